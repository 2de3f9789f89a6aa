"""The one table of operators: what is true of each, whatever runs it.

Facts about one runtime (which activations its kernels fuse, for example) belong to the targets. What an operator does
to numbers stands here, once: every module takes its sets from here. An operator or a fact that is missing is not known
to be true, and is treated as false.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """The axes of a product with a weight, the second operand of the operator. Negative axes count from the last."""

    channels: int
    """Of the first operand and the result: the axis of the channels that are mixed."""
    inputs: int
    """Of the weight: the axis of the channels that go in."""
    outputs: int
    """Of the weight: the axis of the channels that come out."""
    swapped_by: str = ""
    """Attribute that swaps these two axes of the weight where it is set; empty where none does."""


@dataclass(frozen=True, slots=True)
class Operator:
    """Facts about one operator of ONNX."""

    name: str
    domain: str = ""
    """In which it is defined; empty for the standard."""

    moves: bool = False
    """Whether every number that it gives is one of its first input, so that rounding before and after are the same.
    Of Gather only with constant indices; Resize does so too where its mode is `nearest`."""
    reshapes: bool = False
    """Whether it gives all numbers of its first input once each, in another shape or order of axes."""
    identity: bool = False
    """Whether its result is its first input, in inference."""
    converts: bool = False
    """Whether it only changes the type in which numbers are stored."""
    rising: bool = False
    """Whether it is a rising function of each element, without attributes."""
    homogeneous: bool = False
    """Whether f(s x) = s f(x) for s > 0, channel by channel."""
    pools: bool = False
    """Whether it combines windows over the axes behind the channels, so that it knows channels on axis 1 only."""
    product: Product | None = None
    """How it multiplies by a weight; None where it does not."""
    stepwise: bool = False
    """Whether its result is piecewise constant in its inputs: no gradient flows through it."""
    boolean: bool = False
    """Whether its result is true or false."""
    reads_shape: bool = False
    """Whether it needs the shape of its input alone, not the numbers."""
    several_outputs: bool = False
    """Whether all of its outputs are parts of its first input, and none is secondary."""
    recurrent: bool = False
    """Whether it hands states on along the first axis of its first input, and gives these states in all outputs."""
    counted_by: tuple[int, ...] = ()
    """Inputs whose numbers decide how many results it has, whatever their shapes."""
    sized_by: tuple[int, ...] = ()
    """Inputs whose numbers say the size of its result."""
    carries_nan: bool = False
    """Whether NaN anywhere in an input reaches its result. Of Conv that depends on its attributes."""
    takes_infinity: bool = False
    """Whether an infinite constant has a use: as a mask or an open bound."""
    ends_infinity: bool = False
    """Whether its result is finite where some numbers that it reads are -infinity, as masked scores are."""

    lowerable: bool = False
    """Whether its floating-point inputs and outputs all have one type, which may be FP16, but for `full_slots`."""
    full_slots: tuple[int, ...] = ()
    """Inputs that stay float32 where the others are FP16."""

    expanded: bool = False
    """Whether analysis takes apart what ONNX defines it by, because products are inside, or for want of a rule."""
    control_flow: bool = False
    """Whether it runs graphs of its own."""
    sequence: bool = False
    """Whether it reads or makes a sequence of tensors."""
    random: bool = False
    """Whether it draws random numbers."""
    training: bool = False
    """Whether only training has a use for it: in an exported model it is a sign of a wrong mode."""
    quantized: bool = False
    """Whether it makes or reads quantized integers."""


_IMAGE = Product(channels=1, inputs=1, outputs=0)
_TRANSPOSED = Product(channels=1, inputs=0, outputs=1)
_ROWS = Product(channels=-1, inputs=-2, outputs=-1)
_GEMM = Product(channels=-1, inputs=-2, outputs=-1, swapped_by="transB")

OPERATORS: Mapping[str, Operator] = {
    o.name: o
    for o in (
        # products with weights
        Operator("Conv", product=_IMAGE, lowerable=True),
        Operator("ConvTranspose", product=_TRANSPOSED, lowerable=True),
        Operator("Gemm", product=_GEMM, lowerable=True),
        Operator("MatMul", product=_ROWS, lowerable=True, carries_nan=True),
        Operator("FusedMatMul", "com.microsoft"),
        # elementwise, of several inputs
        Operator("Add", lowerable=True, carries_nan=True, takes_infinity=True),
        Operator("Sub", lowerable=True, carries_nan=True),
        Operator("Mul", lowerable=True, carries_nan=True),
        Operator("Div", lowerable=True, carries_nan=True),
        Operator("Pow", lowerable=True),
        Operator("Max", lowerable=True, takes_infinity=True, ends_infinity=True),
        Operator("Min", lowerable=True, takes_infinity=True),
        Operator("Where", lowerable=True, takes_infinity=True),
        Operator("PRelu", lowerable=True, homogeneous=True),
        # elementwise, of one input
        Operator("Abs", lowerable=True),
        Operator("Clip", lowerable=True, takes_infinity=True),
        Operator("Cos", lowerable=True),
        Operator("Elu", lowerable=True),
        Operator("Erf", lowerable=True, rising=True),
        Operator("Exp", lowerable=True, rising=True, ends_infinity=True),
        Operator("Gelu", lowerable=True),
        Operator("HardSigmoid", lowerable=True),
        Operator("HardSwish", lowerable=True),
        Operator("LeakyRelu", lowerable=True, homogeneous=True),
        Operator("Log", lowerable=True, rising=True),
        Operator("Neg", lowerable=True),
        Operator("Reciprocal", lowerable=True),
        Operator("Relu", lowerable=True, rising=True, homogeneous=True),
        Operator("Sigmoid", lowerable=True, rising=True),
        Operator("Sin", lowerable=True),
        Operator("Softplus", lowerable=True, rising=True),
        Operator("Sqrt", lowerable=True, rising=True),
        Operator("Tanh", lowerable=True, rising=True),
        # over axes or windows
        Operator("AveragePool", lowerable=True, homogeneous=True, pools=True),
        Operator("GlobalAveragePool", lowerable=True, homogeneous=True, pools=True),
        Operator("GlobalMaxPool", lowerable=True, homogeneous=True, pools=True),
        Operator("MaxPool", lowerable=True, homogeneous=True, pools=True, moves=True),
        Operator("BatchNormalization", lowerable=True),
        Operator("InstanceNormalization", lowerable=True),
        Operator("LayerNormalization", lowerable=True),
        Operator("ReduceL2", lowerable=True),
        Operator("ReduceMax", lowerable=True, ends_infinity=True),
        Operator("ReduceMean", lowerable=True),
        Operator("ReduceMin", lowerable=True),
        Operator("ReduceSum", lowerable=True),
        Operator("Softmax", lowerable=True, ends_infinity=True),
        # moving data
        Operator("Concat", lowerable=True, carries_nan=True),
        Operator("DepthToSpace", lowerable=True, moves=True),
        Operator("Expand", lowerable=True, moves=True, sized_by=(1,)),
        Operator("Flatten", lowerable=True, moves=True, reshapes=True),
        Operator("Gather", lowerable=True, moves=True),
        Operator("GatherElements", lowerable=True),
        Operator("GatherND", lowerable=True),
        Operator("Pad", lowerable=True, takes_infinity=True, sized_by=(1,)),
        Operator("Reshape", lowerable=True, moves=True, reshapes=True, sized_by=(1,)),
        Operator("Resize", lowerable=True, full_slots=(1, 2), sized_by=(2, 3)),
        Operator("Slice", lowerable=True, moves=True, sized_by=(1, 2)),
        Operator("SpaceToDepth", lowerable=True, moves=True),
        Operator("Split", lowerable=True, moves=True, several_outputs=True),
        Operator("Squeeze", lowerable=True, moves=True, reshapes=True),
        Operator("Tile", lowerable=True, moves=True, sized_by=(1,)),
        Operator("Transpose", lowerable=True, moves=True, reshapes=True),
        Operator("Unsqueeze", lowerable=True, moves=True, reshapes=True),
        # selecting
        Operator("Compress", counted_by=(1,)),
        Operator("Unique", counted_by=(0,)),
        Operator("TopK", sized_by=(1,)),
        Operator("Range", sized_by=(0, 1, 2)),
        Operator("OneHot", sized_by=(1,)),
        # over time
        Operator("GRU", recurrent=True),
        Operator("LSTM", recurrent=True),
        Operator("RNN", recurrent=True),
        # the identity
        Operator("Identity", identity=True, reshapes=True),
        Operator("Dropout", identity=True, training=True),
        # piecewise constant
        Operator("ArgMax", stepwise=True),
        Operator("ArgMin", stepwise=True),
        Operator("Ceil", stepwise=True),
        Operator("ConstantOfShape", stepwise=True, sized_by=(0,)),
        Operator("EyeLike", stepwise=True),
        Operator("Floor", stepwise=True),
        Operator("Hardmax", stepwise=True),
        Operator("NonMaxSuppression", stepwise=True, counted_by=(0, 1, 2, 3, 4)),
        Operator("NonZero", stepwise=True, counted_by=(0,)),
        Operator("Round", stepwise=True),
        Operator("Shape", stepwise=True, reads_shape=True),
        Operator("Sign", stepwise=True),
        Operator("Size", stepwise=True, reads_shape=True),
        Operator("And", stepwise=True, boolean=True),
        Operator("Equal", stepwise=True, boolean=True),
        Operator("Greater", stepwise=True, boolean=True),
        Operator("GreaterOrEqual", stepwise=True, boolean=True),
        Operator("IsInf", stepwise=True, boolean=True),
        Operator("IsNaN", stepwise=True, boolean=True),
        Operator("Less", stepwise=True, boolean=True),
        Operator("LessOrEqual", stepwise=True, boolean=True),
        Operator("Not", stepwise=True, boolean=True),
        Operator("Or", stepwise=True, boolean=True),
        Operator("Xor", stepwise=True, boolean=True),
        # types and integers
        Operator("Cast", converts=True),
        Operator("QuantizeLinear", quantized=True, converts=True),
        Operator("DequantizeLinear", quantized=True, converts=True),
        Operator("DynamicQuantizeLinear", quantized=True),
        Operator("ConvInteger", quantized=True),
        Operator("MatMulInteger", quantized=True),
        Operator("QLinearConv", quantized=True),
        Operator("QLinearMatMul", quantized=True),
        # what no float model in normal form has
        Operator("Attention", expanded=True),
        Operator("CenterCropPad", expanded=True),
        Operator("NegativeLogLikelihoodLoss", expanded=True),
        Operator("RotaryEmbedding", expanded=True),
        Operator("SoftmaxCrossEntropyLoss", expanded=True),
        Operator("If", control_flow=True),
        Operator("Loop", control_flow=True),
        Operator("Scan", control_flow=True),
        Operator("SequenceMap", control_flow=True, sequence=True),
        Operator("ConcatFromSequence", sequence=True),
        Operator("SequenceAt", sequence=True),
        Operator("SequenceConstruct", sequence=True),
        Operator("SequenceEmpty", sequence=True),
        Operator("SequenceErase", sequence=True),
        Operator("SequenceInsert", sequence=True),
        Operator("SequenceLength", sequence=True),
        Operator("SplitToSequence", sequence=True),
        Operator("Bernoulli", random=True),
        Operator("Multinomial", random=True),
        Operator("RandomNormal", random=True, training=True),
        Operator("RandomNormalLike", random=True, training=True),
        Operator("RandomUniform", random=True, training=True),
        Operator("RandomUniformLike", random=True, training=True),
    )
}
"""By name."""


def where(condition: Callable[[Operator], object]) -> frozenset[str]:
    """Names of the operators of the table for which a condition holds.

    >>> sorted(where(lambda o: o.rising and o.homogeneous))
    ['Relu']
    """
    return frozenset(o.name for o in OPERATORS.values() if condition(o))


MOVERS = where(lambda o: o.moves)
RESHAPERS = where(lambda o: o.reshapes)
IDENTITIES = where(lambda o: o.identity)
CONVERTERS = where(lambda o: o.converts)
ROUNDING = where(lambda o: o.converts and o.quantized)
"""Operators that no float model has: a rewriting put them there."""
RISING = where(lambda o: o.rising)
HOMOGENEOUS = where(lambda o: o.homogeneous)
POOLS = where(lambda o: o.pools)
WEIGHTED = where(lambda o: o.product)
"""Operators that multiply by a weight, their second operand."""
STEPWISE = where(lambda o: o.stepwise)
BOOLEAN = where(lambda o: o.boolean)
SHAPE_READERS = where(lambda o: o.reads_shape)
SEVERAL_OUTPUTS = where(lambda o: o.several_outputs)
RECURRENT = where(lambda o: o.recurrent)
CARRIES_NAN = where(lambda o: o.carries_nan)
TAKES_INFINITY = where(lambda o: o.takes_infinity)
ENDS_INFINITY = where(lambda o: o.ends_infinity)
LOWERABLE = where(lambda o: o.lowerable)
EXPANDED = where(lambda o: o.expanded)
CONTROL_FLOW = where(lambda o: o.control_flow)
SEQUENCE = where(lambda o: o.sequence)
RANDOM = where(lambda o: o.random)
TRAINING_ONLY = where(lambda o: o.training)
QUANTIZED = where(lambda o: o.quantized)


def domain_of(name: str) -> str:
    """Domain in which an operator is defined; the standard, which is empty, for one that the table does not have."""
    return OPERATORS[name].domain if name in OPERATORS else ""


def full_slots(name: str) -> tuple[int, ...]:
    """Inputs of an operator that stay float32 where its other ones are FP16."""
    return OPERATORS[name].full_slots if name in OPERATORS else ()


def counted_by(name: str) -> tuple[int, ...]:
    """Inputs of an operator whose numbers decide how many results it has."""
    return OPERATORS[name].counted_by if name in OPERATORS else ()


def sized_by(name: str) -> tuple[int, ...]:
    """Inputs of an operator whose numbers say the size of its result."""
    return OPERATORS[name].sized_by if name in OPERATORS else ()


def channel_axis(name: str, rank: int) -> int:
    """Axis of the channels that an operator of `WEIGHTED` mixes, in tensors of a rank.

    >>> channel_axis("Conv", 4), channel_axis("MatMul", 3)
    (1, 2)
    """
    product = OPERATORS[name].product
    assert product is not None, f"{name} does not multiply by a weight"
    return product.channels % rank


def weight_axes(name: str, rank: int, attributes: Mapping[str, object]) -> tuple[int, int]:
    """Axes of the weight of an operator of `WEIGHTED`: of the channels that go in, and of those that come out.

    Args:
        name: of the operator.
        rank: of the weight, at least 2.
        attributes: of the node, as plain numbers; those that turn no weight are ignored.

    >>> weight_axes("Conv", 4, {}), weight_axes("Gemm", 2, {}), weight_axes("Gemm", 2, {"transB": 1})
    ((1, 0), (0, 1), (1, 0))
    """
    product = OPERATORS[name].product
    assert product is not None, f"{name} does not multiply by a weight"
    axes = product.inputs % rank, product.outputs % rank
    return axes[::-1] if product.swapped_by and attributes.get(product.swapped_by) else axes
