"""Float tensors behind the outputs of a model that gives integers alone.

No error of a class index, of the boxes that a suppression selects, or of a decision can be measured in dB, and no
gradient leads through them. What is compared are the numbers from which they are made.

Case 1. TopK: its values. Where two of them change places, the indices differ and hardly anything is lost.
Case 2. ArgMax, ArgMin, NonMaxSuppression, comparisons, NonZero, Cast and any other node: its computed float operands.
Case 3. A node without any (a Cast of indices, a Gather from a table of labels): what makes its operands.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from bitalloy.model.read import is_float
from bitalloy.model.widen import WIDENED


def float_origins(model: ir.Model) -> tuple[ir.Value, ...]:
    """Return the float tensors from which a model makes its outputs; none where one of these is computed in floats.

    Args:
        model: in normal form.
    """
    outputs = [v for v in model.graph.outputs if v.producer() is not None]
    if any(is_float(v) or v.dtype in WIDENED for v in outputs):
        return ()
    found: dict[ir.Value, None] = {}
    seen: set[ir.Value] = set()
    waiting = outputs[::-1]
    while waiting:
        node = (value := waiting.pop()).producer()
        if value in seen or node is None:
            continue
        seen.add(value)
        made = [node.outputs[0]] if node.op_type == "TopK" else node.inputs
        floats = [v for v in made if v is not None and v.producer() is not None and is_float(v)]
        found.update(dict.fromkeys(floats))
        waiting += [v for v in reversed(node.inputs) if v is not None] if not floats else []
    return tuple(found)


def told_origins(name: str, outputs: Sequence[str], shown: Sequence[str]) -> str:
    """Say what is compared in place of the outputs of a file."""
    return (
        f"'{name}' gives no floats ({_listed(outputs)}). What is compared are those behind, {_listed(shown)}, on "
        "models that give these too; the shipped model has the outputs of the file."
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
