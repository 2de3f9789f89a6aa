"""Contents of `bitalloy models`: published figures beside ours, and the packages that are installed here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from rich.table import Table

from bitalloy.zoo import NAMES, PROGRAMS, families
from bitalloy.zoo.base import Family, Variant


def install_line(family: Family) -> str:
    """Return the command that installs the family's extra."""
    return f"pip install 'bitalloy[{family.extra}]'"


def as_json() -> dict[str, object]:
    """Return all figures of all names, as a mapping that can be written as JSON."""
    return {
        "samples": [{"name": name, "file": file, "embedded": True} for name, file in (NAMES | PROGRAMS).items()],
        "families": [
            {
                "name": family.name,
                "task": family.task,
                "installed": not family.missing,
                "missing": list(family.missing),
                "install": install_line(family),
                "variants": [asdict(v) for v in family.variants.values()],
            }
            for family in families()
        ],
    }


def tables() -> Iterator[Table | str]:
    """Yield a line on the embedded sample, then a table and its notes for each family."""
    for name, file in NAMES.items():
        yield f"{name}  embedded sample ({file}), ready to run"
    for name, folder in PROGRAMS.items():
        yield f"{name}  embedded sample, several graphs (folder {folder})"
    for family in families():
        lacking = family.missing
        state = f"not installed ({', '.join(lacking)}): {install_line(family)}" if lacking else "installed"
        variants = tuple(family.variants.values())
        yield ""
        yield f"{family.name}: {family.task}"
        table = Table(box=None, pad_edge=False)
        timed = any(v.published.gpu_ms for v in variants)
        for column in ("name", "input", "params, M", "FLOPs, B", "accuracy", *(["ms, CPU | GPU"] if timed else [])):
            table.add_column(column, justify="left" if column == "name" else "right", no_wrap=True)
        for variant in variants:
            table.add_row(*_cells(variant)[: len(table.columns)])
        yield table
        yield from _notes(variants)
        yield f"Export: {state}"


def _cells(variant: Variant) -> tuple[str, ...]:
    published = variant.published
    flops = variant.flops_b * published.flops_per_mac / 2 if variant.flops_b is not None else None
    return (
        variant.name,
        f"{variant.size[0]}x{variant.size[1]}",
        f"{_number(published.parameters_m)} | {_number(variant.parameters_m)}",
        f"{_number(published.flops_b)} | {_number(flops)}",
        " ".join(_number(v) for v in published.accuracy.values()),
        f"{_number(published.cpu_ms)} | {_number(published.gpu_ms)}",
    )


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 1000 else f"{value:.2f}".rstrip("0").rstrip(".")


def _notes(variants: tuple[Variant, ...]) -> Iterator[str]:
    first = variants[0].published
    counted = "one operation" if first.flops_per_mac == 1 else "two operations"
    yield "Parameters and FLOPs: published | counted on what is exported."
    yield f"FLOPs per {variants[0].work}, a multiply-add as {counted}."
    lines: dict[str, None] = {}
    for line in (
        *(f"Accuracy: {', '.join(v.published.accuracy)}" for v in variants),
        *(f"Times: {v.published.setup}" for v in variants if v.published.setup),
        *(f"Published: {v.published.source}" for v in variants),
        *(f"Weights: {v.remote.licence}" for v in variants),
        *(v.note for v in variants),
    ):
        lines.setdefault(line)
    yield from filter(None, lines)
