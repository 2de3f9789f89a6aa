"""The readable text inside a serialized engine of TensorRT for RTX, which lists its kernels with the types they read.

The text is not documented. It was learned from engines of version 1.7, and is read with that in mind: what has another
form is passed over, never guessed. An engine holds programs in the form

    header { ... }
    descriptors {
      tensor={ ... dims={ 1 64 40 40 } ... name="x.1" ... type=int8 }
      sub_tensor={ ... }
    }
    main {
      corrltn={ name="/c/Conv" output={"t2" } input={"x.1" "w" } ... layers="[ONNX Layer: /c/Conv]" }
      function={ name=__myl_MulCast ... input_args={ "t2" } output_args={ "t3" } ... layers="" }
    }

one record a line. The inside of a fused kernel (`runtime_fusion`) is described by a program of its own behind the one
that runs it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

FUSION = "runtime_fusion"
"""Kind of the record of a convolution or product fused with its neighbours, which may read what comes first."""
CONTRACTIONS = frozenset({"corrltn", "deconvolution", "fully_connected", FUSION})
"""Kinds of records of convolutions and matrix products. All but fused ones read their two operands first."""
INSIDE_FUSION = "region = { name=runtime-fusion"
LONGEST_LINE = 1 << 20
"""Number of characters of a line that is still read."""
_RECORD = re.compile(r"^ {2}(\w+)=\{ (.*)\}\s*$")
_NAME = re.compile(r'\bname="?([^" ]*)')
_TYPE = re.compile(r"\btype=(\w+)")
_SIZES = re.compile(r"\bdims=\{([^{}]*)\}")
_INPUTS = re.compile(r"\binput(?:_args)?=\{([^{}]*)\}")
_OUTPUTS = re.compile(r"\boutput(?:_args)?=\{([^{}]*)\}")
_LAYERS = re.compile(r'\blayers="([^"]*)"')
_NODE = re.compile(r"\[ONNX Layer: ([^\[\]]*)\]")
_QUOTED = re.compile(r'"([^"]*)"')


@dataclass(frozen=True, slots=True)
class EngineTensor:
    """A tensor that a kernel reads or writes."""

    type: str
    """Type in the compiler's words, e.g. `fp8_e4m3`; empty where the text does not tell."""
    scalar: bool = False
    """Whether it has one element, as scales have."""


@dataclass(frozen=True, slots=True)
class EngineKernel:
    """A kernel of an engine."""

    kind: str
    """Kind in the compiler's words, e.g. `corrltn` or `function`."""
    name: str
    nodes: tuple[str, ...]
    """Nodes of the ONNX model that it works for; none for changes of layout."""
    reads: tuple[EngineTensor, ...]
    writes: tuple[EngineTensor, ...]
    inside: bool = False
    """Whether it is a part of a fused kernel, which is listed by itself."""

    @property
    def contracts(self) -> bool:
        """Whether it computes a convolution or a product of matrices."""
        return self.kind in CONTRACTIONS


def read_engine(engine: bytes) -> tuple[EngineKernel, ...]:
    """Read the kernels of an engine in their order, and the parts of fused ones; none where the text is another."""
    text = engine.decode("latin-1")
    found: list[EngineKernel] = []
    for program in text.split("header {\n")[1:]:
        header, _, rest = program.partition("\ndescriptors {\n")
        if not rest:
            continue
        inside = INSIDE_FUSION in header
        described, _, main = rest.partition("\nmain {\n")
        tensors = dict(filter(None, map(_tensor, described.split("\n"))))
        kernels = (_kernel(line, tensors) for line in main.partition("\n}\n")[0].split("\n"))
        found.extend(replace(kernel, inside=inside) for kernel in kernels if kernel is not None)
    return tuple(found)


def _tensor(line: str) -> tuple[str, EngineTensor] | None:
    record = _RECORD.match(line) if len(line) <= LONGEST_LINE else None
    if record is None:
        return None
    name, kind, sizes = (pattern.search(record[2]) for pattern in (_NAME, _TYPE, _SIZES))
    if name is None or kind is None:
        return None
    scalar = sizes is not None and set(sizes[1].split()) <= {"1"}
    return name[1], EngineTensor(kind[1], scalar)


def _kernel(line: str, tensors: dict[str, EngineTensor]) -> EngineKernel | None:
    record = _RECORD.match(line) if len(line) <= LONGEST_LINE else None
    if record is None:
        return None
    name, reads, writes, layers = (p.search(record[2]) for p in (_NAME, _INPUTS, _OUTPUTS, _LAYERS))
    if name is None or reads is None or writes is None or layers is None:
        return None
    unknown = EngineTensor("")
    inputs, outputs = ([tensors.get(t, unknown) for t in _QUOTED.findall(part[1])] for part in (reads, writes))
    nodes = tuple(dict.fromkeys(_NODE.findall(layers[1])))
    return EngineKernel(record[1], name[1], nodes, tuple(inputs), tuple(outputs))
