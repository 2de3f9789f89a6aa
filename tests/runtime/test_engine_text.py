"""The text inside an engine, in the form in which the compiler writes it; what has another form is passed over."""

from __future__ import annotations

from bitalloy.runtime.engine_text import EngineKernel, EngineTensor, read_engine

ENGINE = b"""\x00\xffNLYM\x01header {
  version = 5
  region = { name=devmem size=8193280 alignment=128 }
  inputs={ "x.1" }
}
descriptors {
  tensor={ alignment=32 dims={ 1 8 4 4 } name="x.1" offset=0 region="" type=float }
  tensor={ alignment=128 const_payload_size=4 dims={ 1 } name="step" type=float }
  tensor={ dims={ 1 8 4 4 } name="t2" region="devmem" type=int8 }
  tensor={ const_payload_size=576 dims={ 8 8 3 3 } name="w" type=int8 }
  sub_tensor={ base="t2" dims={ 8 16 } name="t2^deref" type=int8 }
  tensor={ dims={ 1 8 4 4 } name="y.1" type=half }
}
main {
 label bb1:
  function={ name=__myl_MulCast fqn=__myl_MulCast_0x1 args={ "x.1" "step" "t2" } input_args={ "x.1" "step" } shape_args_count=0 output_args={ "t2" } binary = 0 grid = { 1 1 1 } layers="[ONNX Layer: Q]" swap_ab=false }
  corrltn={ name="/c/Conv" output={"y.1" } input={"t2^deref" "w" } strides={ 1 1 } bias=false layers="[ONNX Layer: /c/Conv]\x1f[ONNX Layer: DQ]\x1f[ONNX Layer: DQ]" }
  runtime_fusion={ name=__myl_Fc input_args={ "gone" "w" } output_args={ "y.1" } layers="[ONNX Layer: mm]" backbone=gemm }
  moved={ name="m" output={"y.1" } input={"x.1" } layers="" }
  prose={ says nothing }
}
\x00\x00#include <cuda>
  function={ name=code input={ "x.1" } output={ "x.1" } layers="" }
header {
  version = 4
  region = { name=runtime-fusion-consts size=132 }
}
descriptors {
  tensor={ dims={ 4 4 } name="a" type=half }
}
main {
 label bb1:
  fully_connected={ name="mm" output={"a" } input={"a" "a" } layers="[ONNX Layer: mm]" }
}
\x00"""  # noqa: E501
FLOAT, WHOLE, HALF = EngineTensor("float"), EngineTensor("int8"), EngineTensor("half")
KERNELS = (
    EngineKernel("function", "__myl_MulCast", ("Q",), (FLOAT, EngineTensor("float", scalar=True)), (WHOLE,)),
    EngineKernel("corrltn", "/c/Conv", ("/c/Conv", "DQ"), (WHOLE, WHOLE), (HALF,)),
    EngineKernel("runtime_fusion", "__myl_Fc", ("mm",), (EngineTensor(""), WHOLE), (HALF,)),
    EngineKernel("moved", "m", (), (FLOAT,), (HALF,)),
    EngineKernel("fully_connected", "mm", ("mm",), (HALF, HALF), (HALF,), inside=True),
)


def test_kernels_are_read_with_the_types_of_their_tensors() -> None:
    assert read_engine(ENGINE) == KERNELS
    assert [k.contracts for k in KERNELS] == [False, True, True, False, True]


def test_damaged_text_gives_fewer_kernels_and_no_error() -> None:
    """Whatever is cut off, kernels that are still read name the same nodes."""
    names = [kernel.nodes for kernel in KERNELS]
    for end in range(0, len(ENGINE), 7):
        found = [kernel.nodes for kernel in read_engine(ENGINE[:end])]
        assert found == names[: len(found)]
    assert read_engine(b"") == read_engine(bytes(range(256)) * 64) == ()
    assert read_engine(ENGINE.replace(b" type=", b" kind="))[1].reads == (EngineTensor(""), EngineTensor(""))
