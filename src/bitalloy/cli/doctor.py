"""Diagnosis of this machine: what is available, and the install command for what is missing."""

from __future__ import annotations

import importlib.metadata
import platform

from packaging.requirements import Requirement

from bitalloy.core.errors import MissingExtraError
from bitalloy.core.records import Record
from bitalloy.runtime.machine import machine_name
from bitalloy.runtime.ort import available_cores
from bitalloy.targets import TARGETS
from bitalloy.targets.patterns import has_vnni

NOT_SHOWN = frozenset({"ultralytics", "zoo"})
"""Extras that the diagnosis leaves out: one serves a test, one is the sum of others."""
CORE = ("bitalloy", "onnxruntime", "onnx", "onnx-ir", "numpy", "scipy")


class TargetCheck(Record, frozen=True, kw_only=True):
    """Whether a target can be measured here."""

    name: str
    runtime: str
    version: str | None
    """Version of the runtime; None where it is not installed."""
    problem: str = ""
    """What is missing, with the install command; empty where nothing is missing."""
    estimated: bool = False
    """Whether latencies of the target are estimates, and its models are verified on the CPU."""


class ExtraCheck(Record, frozen=True, kw_only=True):
    """Whether the packages of an extra are installed."""

    name: str
    missing: tuple[str, ...]
    install: str


class Diagnosis(Record, frozen=True, kw_only=True):
    """The machine as bitalloy sees it."""

    device: str
    system: str
    python: str
    threads: int
    """Number of threads that every runtime uses: the cores that this process may run on."""
    vnni: bool
    """Whether products of uint8 and int8 are added in 32 bits; without VNNI INT8 gains less and limits weights."""
    versions: dict[str, str]
    targets: tuple[TargetCheck, ...]
    extras: tuple[ExtraCheck, ...]


def examine_machine() -> Diagnosis:
    """Examine this machine without measurements and without imports of packages that are not installed."""
    targets = []
    for target in TARGETS.values():
        version, problem = None, ""
        try:
            version = target.runtime.version()
        except MissingExtraError as error:
            problem = str(error)
        problem = problem or target.missing()
        targets.append(
            TargetCheck(
                name=target.name,
                runtime=target.runtime.name,
                version=version,
                problem=problem,
                estimated=target.device is not None,
            )
        )
    checks = []
    for name, packages in extras().items():
        missing = tuple(p for p in packages if not _installed(p))
        checks.append(ExtraCheck(name=name, missing=missing, install=f"pip install 'bitalloy[{name}]'"))
    return Diagnosis(
        device=machine_name(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        threads=available_cores(),
        vnni=has_vnni(),
        versions={name: importlib.metadata.version(name) for name in CORE},
        targets=tuple(targets),
        extras=tuple(checks),
    )


def extras() -> dict[str, tuple[str, ...]]:
    """Return extra -> its packages, as this installation declares them."""
    declared = importlib.metadata.metadata("bitalloy").get_all("Provides-Extra") or []
    needed = [Requirement(line) for line in importlib.metadata.requires("bitalloy") or ()]
    found = {
        extra: [r.name for r in needed if r.marker and r.marker.evaluate({"extra": extra})]
        for extra in declared
        if extra not in NOT_SHOWN
    }
    return {name: tuple(packages) for name, packages in sorted(found.items())}


def _installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
