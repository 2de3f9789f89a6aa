"""Read-only commands: they list models and targets, diagnose this machine, and audit a finished run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from bitalloy.cli.console import SHOWN_LINES, out_console, shown_progress
from bitalloy.cli.requests import Quiet
from bitalloy.core.errors import BitalloyError


def models_command(
    json_output: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """List the models that are known by name, with published and own figures.

    The figures are published ones and our own.

    Example: bitalloy models --json
    """
    import json

    from bitalloy.zoo import listing

    if json_output:
        sys.stdout.write(json.dumps(listing.as_json(), indent=2) + "\n")
        return
    for part in listing.tables():
        out_console.print(part, soft_wrap=isinstance(part, str), markup=False, highlight=False)


def targets_command(
    json_output: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """List devices and runtimes.

    `bitalloy doctor` tells which of them are here.

    Example: bitalloy run model.onnx --data images/ --target ort-cpu
    """
    import json

    from bitalloy.targets import TARGETS, on_devices

    if json_output:
        listed = [
            {
                "name": t.name,
                "description": t.describe,
                "schemes": [scheme.name for scheme in t.schemes],
                "estimated": t.device is not None,
                "devices": {
                    device: {"name": one.device.name, "schemes": [scheme.name for scheme in one.schemes]}
                    for device, one in on_devices(t).items()
                    if one.device is not None
                },
            }
            for t in TARGETS.values()
        ]
        sys.stdout.write(json.dumps(listed, indent=2) + "\n")
        return
    for entry in TARGETS.values():
        line = f"{entry.name:<12} {entry.describe}"
        if entry.device is not None:
            line += f"; --device {', '.join(on_devices(entry))} (default: {entry.device.id})"
        out_console.print(line, soft_wrap=True, highlight=False, markup=False)


def audit_command(
    run_directory: Annotated[Path, typer.Argument(help="Directory of a finished `bitalloy run`.")] = Path("runs/last"),
    here: Annotated[
        bool,
        typer.Option("--here", help="Audit the model on this CPU where the target's device is absent."),
    ] = False,
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="Compile a plan for NVIDIA GPUs, and tell which types its kernels read."),
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(help="With --compile: GPU or compute capability, such as l4 or sm120. Default: that of the run."),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Tell in which precision the runtime executed each unit.

    The mixed model is run again for it. A model for a GPU is audited on a machine that has it. Elsewhere --compile
    tells what TensorRT for RTX makes of it, which needs no GPU and runs nothing.

    For example:

      bitalloy audit runs/last

      bitalloy audit runs/last --compile --device sm120
    """
    if device is not None and not compiled:
        raise BitalloyError("--device says what to compile for, and belongs to --compile.")
    if compiled:
        _tell_compiled(run_directory, device or "", json_output=json_output)
        return
    from bitalloy.core.encoding import to_json
    from bitalloy.pipeline.audit import audit_run

    found = audit_run(run_directory, here=here)
    if json_output:
        sys.stdout.write(to_json(found, pretty=True).decode() + "\n")
        return
    shares = ", ".join(f"{name} {share:.0%}" for name, share in found.share_of_time.items())
    line = f"{found.runtime} {found.version}. Share of kernel time: {shares}."
    out_console.print(line, soft_wrap=True, highlight=False, markup=False)
    differing = found.differences()
    as_planned = sum(u.executed == u.planned and not u.rounded for u in found.units)
    inside = len(found.units) - as_planned - len(differing)
    line = f"{as_planned} units ran as planned, {inside} inside other kernels, {len(differing)} otherwise."
    for text in (line, *(g.sentence() for g in found.graphs)):
        out_console.print(text, soft_wrap=True, highlight=False, markup=False)
    _tell_differing([(u.unit, u.planned, u.executed, u.cause) for u in differing], "executed", found.note)


def _tell_compiled(run_directory: Path, device: str, *, json_output: bool) -> None:
    from bitalloy.core.encoding import to_json
    from bitalloy.pipeline.audit import compile_run

    found = compile_run(run_directory, device)
    if json_output:
        sys.stdout.write(to_json(found, pretty=True).decode() + "\n")
        return
    messages = [message for graph in found.graphs for message in graph.messages]
    for text in (found.sentence(), *(graph.sentence() for graph in found.graphs), *messages):
        out_console.print(text, soft_wrap=True, highlight=False, markup=False)
    lines = [(u.unit, u.planned, u.compiled, u.cause) for u in found.differences()]
    _tell_differing(lines, "compiled", found.note)


def _tell_differing(lines: Sequence[tuple[str, str, str, str]], found: str, note: str) -> None:
    """Show units that are otherwise than planned: unit, scheme as planned and as `found`, cause; then a note."""
    if lines:
        out_console.table(("unit", "planned", found, "likely cause"), lines[:SHOWN_LINES])
        if len(lines) > SHOWN_LINES:
            out_console.print(f"{len(lines) - SHOWN_LINES} more with --json.")
    if note:
        out_console.print(note, style="yellow", soft_wrap=True)


def doctor_command(
    model: Annotated[
        str | None,
        typer.Argument(help="A model whose labels are to be judged, with --eval; none for the machine alone."),
    ] = None,
    evaluate: Annotated[
        Path | None,
        typer.Option("--eval", exists=True, help="Labels of the model's task: tell which drops they resolve."),
    ] = None,
    max_drop: Annotated[
        list[str] | None,
        typer.Option(help="Drop that is to be limited, as in `bitalloy run`: tell how many images that needs."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Largest number of labelled images.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    quiet: Quiet = False,
) -> None:
    """Tell what is available on this machine, or what labelled images can resolve.

    What is not available comes with its install line. With a model and --eval, the float model is run over the images,
    and the smallest drop of each metric is told that they tell from noise.

    For example:

      bitalloy doctor --json

      bitalloy doctor yolo11n.onnx --eval instances.json --max-drop 0.3
    """
    if (model is None) != (evaluate is None):
        raise BitalloyError("A model and --eval belong together: `bitalloy doctor model.onnx --eval labels.json`.")
    if model is not None and evaluate is not None:
        _tell_resolution(model, evaluate, max_drop or [], limit, json_output=json_output, quiet=quiet)
        return
    from bitalloy.cli.doctor import examine_machine
    from bitalloy.core.encoding import to_json

    found = examine_machine()
    if json_output:
        sys.stdout.write(to_json(found, pretty=True).decode() + "\n")
        return
    lines = [
        f"processor    {found.device}, {found.threads} threads, VNNI or its equal: {'yes' if found.vnni else 'no'}",
        f"system       {found.system}, Python {found.python}",
        f"versions     {', '.join(f'{name} {version}' for name, version in found.versions.items())}",
    ]
    verified = "; latencies are estimates, models are verified on the CPU"
    lines += [
        f"target       {t.name}: {t.problem or f'{t.runtime} {t.version}'}{verified * t.estimated}"
        for t in found.targets
    ]
    lines += [
        f"extra        {e.name}: " + (f"lacks {', '.join(e.missing)}; {e.install}" if e.missing else "installed")
        for e in found.extras
    ]
    for line in lines:
        out_console.print(line, soft_wrap=True, highlight=False, markup=False)


def _tell_resolution(
    model: str, labels: Path, drops: list[str], limit: int | None, *, json_output: bool, quiet: bool
) -> None:
    from bitalloy.cli import options

    wanted = options.drops(drops)
    from bitalloy.core.encoding import to_json
    from bitalloy.pipeline.prepare import RunOptions
    from bitalloy.pipeline.resolve import resolve_drops
    from bitalloy.tasks.resolution import tell_resolution

    with shown_progress(quiet=quiet) as progress:
        found = resolve_drops(model, labels, max_drop=wanted, options=RunOptions(limit=limit, progress=progress))
    if json_output:
        sys.stdout.write(to_json(found, pretty=True).decode() + "\n")
        return
    for one in found:
        out_console.print(tell_resolution(one), soft_wrap=True, highlight=False, markup=False)
    if not found:
        out_console.print("Images without labels have no metric to drop; agreement with float needs none.")
