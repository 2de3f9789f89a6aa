"""Every field of every stage's inputs is part of the stage's key, and every stage stores under such inputs."""

from __future__ import annotations

import enum
import importlib
import inspect
import math
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
import pytest

import bitalloy
from bitalloy.core import store
from bitalloy.core.jobs import Opening
from bitalloy.core.records import Record
from bitalloy.core.store import StageInputs, key_of
from bitalloy.core.units import Offset
from bitalloy.core.work import Workspace
from bitalloy.rewrite.calibrated import Calibrated, environment_of
from bitalloy.runtime.machine import this_machine
from bitalloy.sensitivity.probing import probe_all


def every_stage() -> list[type[StageInputs]]:
    """All records of inputs in the package, whichever module has them."""
    for module in pkgutil.walk_packages(bitalloy.__path__, "bitalloy."):
        if not module.name.startswith(("bitalloy.__main__", "bitalloy.zoo.networks")):
            importlib.import_module(module.name)

    def below(kind: type[Any]) -> Iterator[type[Any]]:
        for one in kind.__subclasses__():
            yield one
            yield from below(one)

    return sorted(
        (k for k in set(below(StageInputs)) if k.__module__.startswith("bitalloy.")), key=lambda k: k.__qualname__
    )


STAGES = every_stage()


def values(kind: Any) -> tuple[Any, Any]:
    """Two different values of a type."""
    if kind is object or kind is Any:
        return "one", "two"
    simple: dict[Any, tuple[Any, Any]] = {
        str: ("a", "b"), int: (1, 2), bool: (False, True), float: (0.75, math.nextafter(0.75, 1)),
        type(None): (None, None),
    }  # fmt: skip
    if kind in simple:
        return simple[kind]
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Literal:
        return inside[0], inside[-1]
    if origin in (Union, types.UnionType):
        first, *others = (k for k in inside if k is not type(None))
        return (None, values(first)[0]) if type(None) in inside else (values(first)[0], values(others[0])[0])
    if origin is tuple:
        if inside[-1] is Ellipsis:
            one, two = values(inside[0])
            return (one,), ((one, two) if one != two else (one, one))
        pairs = [values(k) for k in inside]
        return tuple(p[0] for p in pairs), (*(p[0] for p in pairs[:-1]), pairs[-1][1])
    if origin is dict:
        one, two = values(inside[1])
        return {values(inside[0])[0]: one}, {values(inside[0])[0]: two}
    if issubclass(kind, enum.Enum):
        return next(iter(kind)), list(kind)[-1]
    return example(kind), changed_somewhere(kind)


def example(kind: type) -> Any:
    hints = get_type_hints(kind)
    return kind(**{name: values(hints[name])[0] for name in fields_of(kind)})


def changed_somewhere(kind: type) -> Any:
    """A record with another value in its last field."""
    name = fields_of(kind)[-1]
    return with_other(example(kind), name, values(get_type_hints(kind)[name])[1])


def fields_of(kind: type) -> tuple[str, ...]:
    """Names of the fields, without those that are read while the record is made and never stored."""
    if issubclass(kind, msgspec.Struct):
        hints = get_type_hints(kind)
        return tuple(name for name in kind.__struct_fields__ if msgspec.UnsetType not in get_args(hints[name]))
    return tuple(kind.__dataclass_fields__)  # type: ignore[attr-defined]


def with_other(record: Any, name: str, value: Any) -> Any:
    parts = {field: getattr(record, field) for field in fields_of(type(record))}
    return type(record)(**{**parts, name: value})


def others(record: Any, path: str = "") -> Iterator[tuple[str, Callable[[], Any]]]:
    """The record with one of its fields changed, of the records in it too, whatever they are called."""
    hints = get_type_hints(type(record))
    for name in fields_of(type(record)):
        place, value = f"{path}{name}", getattr(record, name)
        for other in values(hints[name])[1:]:
            yield place, lambda name=name, other=other: with_other(record, name, other)  # type: ignore[misc]
        if isinstance(value, msgspec.Struct):
            for inner, make in others(value, f"{place}."):
                yield inner, lambda name=name, make=make: with_other(record, name, make())  # type: ignore[misc]


def test_all_stages_have_inputs() -> None:
    assert len(STAGES) >= 20
    assert {"ProbeInputs", "CalibrationInputs", "CostInputs", "VerificationInputs"} <= {k.__name__ for k in STAGES}


@pytest.mark.parametrize("kind", STAGES, ids=lambda k: k.__name__)
def test_every_field_changes_the_key(kind: type[StageInputs]) -> None:
    record = example(kind)
    assert key_of(example(kind)) == key_of(record)
    for place, make in others(record):
        other = make()
        assert other != record, place
        key = key_of(other)
        assert key != key_of(record), f"{kind.__name__}.{place} is no part of the key"


def test_keys_tell_what_json_does_not() -> None:
    class One(StageInputs, frozen=True, kw_only=True):
        value: float | None

    class Two(StageInputs, frozen=True, kw_only=True):
        value: float | None

    told = (None, math.inf, -math.inf, math.nan, 0.1, math.nextafter(0.1, 1))
    assert len({key_of(kind(value=v)) for kind in (One, Two) for v in told}) == 2 * len(told)


def test_keys_follow_the_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Opening(kind="resident", spec=None)
    before = key_of(spec)
    monkeypatch.setattr(store, "versions", lambda: {**dict.fromkeys(store.DECISIVE, "1"), "bitalloy": "99"})
    assert key_of(spec) != before


def test_results_are_stored_under_inputs_only() -> None:
    """No stage can make up a key by itself: whatever stores asks for a record of inputs."""
    hints = typing.get_type_hints(Workspace.cached)
    assert hints["inputs"] is StageInputs
    assert list(inspect.signature(key_of).parameters) == ["inputs"]
    assert typing.get_type_hints(key_of)["inputs"] is Record


def wanted(monkeypatch: pytest.MonkeyPatch, work: Callable[[Workspace], object]) -> StageInputs:
    """The inputs of the first stage that some work asks for."""
    seen: list[StageInputs] = []

    def stop(_: Workspace, __: str, inputs: StageInputs, ___: Any) -> bytes:
        seen.append(inputs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Workspace, "cached", stop)
        work(Workspace())
    return seen[0]


@pytest.fixture(scope="module")
def parts(inputs: Any) -> list[Calibrated]:
    """A model that is calibrated on two targets, of which the first does not round."""
    model = bitalloy.load(inputs.classifier)
    data = bitalloy.open_data(model, inputs.images)
    settings = bitalloy.Settings(
        targets=("ort-cuda", "ort-cpu"), calibration_samples=4, samples=2, equalize=False, bias_correction=False
    )
    ready = bitalloy.calibrate(model, data, settings)
    return [ready, *ready.others]


def test_offsets_of_any_target_are_part_of_the_probe(parts: list[Calibrated], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = parts
    moved = second.corrected({"some site": Offset(node="n", values=(1.0,))})
    plain = wanted(monkeypatch, lambda work: probe_all([first, second], work))
    assert key_of(plain) == key_of(wanted(monkeypatch, lambda work: probe_all([first, second], work)))
    assert key_of(plain) != key_of(wanted(monkeypatch, lambda work: probe_all([first, moved], work)))


@pytest.mark.parametrize("change", [{"processor": "another"}, {"features": ("vnni",)}, {"threads": 99}])
def test_the_machine_is_part_of_what_is_executed(
    parts: list[Calibrated], change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = parts[1].executed
    other = msgspec.structs.replace(this_machine(), **change)
    monkeypatch.setattr("bitalloy.rewrite.calibrated.this_machine", lambda: other)
    assert parts[1].executed == msgspec.structs.replace(before, environment=environment_of(parts[1].target))
    assert key_of(parts[1].executed) != key_of(before)


def test_stages_that_execute_rounded_models_know_the_machine() -> None:
    executing = {
        "AuditInputs", "BiasInputs", "CostInputs", "DamageInputs", "ExactInputs", "MetricInputs", "NeighbourInputs",
        "ObservationInputs", "RangeInputs", "ScalingInputs", "SecantInputs", "VerificationInputs",
    }  # fmt: skip
    told = {k.__name__ for k in STAGES if {"ExecutedNetwork", "Environment"} & set(re.findall(r"\w+", str(hints(k))))}
    assert executing <= told


def hints(kind: type) -> list[Any]:
    return list(get_type_hints(kind).values())
