"""Float tensors behind the outputs that cannot be compared.

No error of a class index, of the boxes that a suppression selects, or of a decision can be measured in dB, and no
gradient leads through them. What is compared are the numbers from which they are made, where

Case 1. all outputs are integers; or
Case 2. a float output is behind a selection (`model.selected`), so that the data decides how many rows it has.

Of each such output the last float tensors before it count:

Case 3. TopK: its values. Where two of them change places, the indices differ and hardly anything is lost.
Case 4. ArgMax, ArgMin, NonMaxSuppression, comparisons, NonZero, Cast and any other node: its computed float operands.
Case 5. A node without any (a Cast of indices, a Gather from a table of labels): what makes its operands.
Case 6. A node behind a selection: its operands that are not, and what makes the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from bitalloy.core.errors import ModelError
from bitalloy.model.read import is_float
from bitalloy.model.selected import selected_values
from bitalloy.model.widen import WIDENED


def float_origins(model: ir.Model) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the outputs of a model that cannot be compared, and of the float tensors from which they are.

    Integers beside floats that can be compared are left as they are.

    Args:
        model: in normal form.

    Raises:
        ModelError: an output that is behind a selection is made of no float tensor.
    """
    selected = selected_values(model.graph)
    outputs = [v for v in model.graph.outputs if v.producer() is not None]
    floats = [v for v in outputs if is_float(v) or v.dtype in WIDENED]
    lost = [v for v in floats if v in selected] if floats else outputs
    if floats and len(lost) == len(floats):
        lost = outputs
    found = _origins(lost, selected)
    if floats and lost and not found:
        raise ModelError(
            f"The data decides how many rows '{lost[0].name}' has, and it is selected from no float tensor that the "
            "model computes before, so nothing can be compared. Give the model an output ahead of the selection."
        )
    return tuple(str(v.name) for v in lost if found), tuple(str(v.name) for v in found)


def _origins(lost: Sequence[ir.Value], selected: frozenset[ir.Value]) -> list[ir.Value]:
    """Find the last float tensors before some outputs, in the order of the operands."""
    found: dict[ir.Value, None] = {}
    seen: set[ir.Value] = set()
    waiting = list(lost)[::-1]
    while waiting:
        node = (value := waiting.pop()).producer()
        if value in seen or node is None:
            continue
        seen.add(value)
        made = [node.outputs[0]] if node.op_type == "TopK" and value not in selected else list(node.inputs)
        floats = [v for v in made if v is not None and v.producer() is not None and is_float(v) and v not in selected]
        found.update(dict.fromkeys(floats))
        others = [v for v in node.inputs if v is not None and v not in found]
        waiting += others[::-1] if value in selected or not floats else []
    return list(found)


def told_origins(name: str, lost: Sequence[str], shown: Sequence[str], *, counted: bool) -> str:
    """Say what is compared in place of some outputs of a file.

    Args:
        name: of the file.
        lost: the outputs that are not compared.
        shown: the float tensors that are.
        counted: whether the data decides how many rows the outputs have; otherwise all are integers.
    """
    why = (
        f"has outputs whose rows the data decides ({_listed(lost)})"
        if counted
        else f"gives no floats ({_listed(lost)})"
    )
    return (
        f"'{name}' {why}. What is compared are those behind, {_listed(shown)}, on models that give these too; the "
        "shipped model has the outputs of the file."
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
