"""The command line: parse, make one pipeline call, print."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from bitalloy.cli import look as commands
from bitalloy.cli.console import SHOWN_LINES, Bars, error_console, out_console
from bitalloy.core.errors import BitalloyError

if TYPE_CHECKING:
    from bitalloy.core.plans import Budget
    from bitalloy.pipeline.ship import Verified

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
    help="Find the fastest mixed-precision version of an ONNX model that keeps its accuracy, with proof.\n\n"
    "Start with `bitalloy run`, which uses the embedded sample, or `bitalloy run model.onnx --data images/`.",
)
Ranges = Annotated[
    str,
    typer.Option(
        help="Calibration of INT8 ranges: minmax, moving, percentile, entropy or mse for all tensors; auto takes, for "
        "every tensor, the one whose rounding and clipping disturb the outputs least."
    ),
]
Floors = Annotated[
    list[str] | None,
    typer.Option(
        help="Floor on the SQNR of every output head in dB, e.g. 20, or of one head, e.g. `boxes=30`. Higher is "
        "stricter. May be given more than once."
    ),
]
BiasCorrection = Annotated[
    bool,
    typer.Option(
        "--bias-correction/--no-bias-correction",
        help="Take the mean error of INT8 layers out of their biases where measurement says it pays.",
    ),
]
Equalize = Annotated[
    bool,
    typer.Option(
        "--equalize/--no-equalize",
        help="Scale channels between layers (SmoothQuant, cross-layer equalization) where measurement says it pays.",
    ),
]
Kept = Annotated[
    list[str] | None,
    typer.Option(
        help="Precision of a part of the plan: `fp32:'neck*'`, `int8:'model.{4..8}'`. Glob over units, nodes, regions "
        "or operator types; the last one that names a unit holds. Changes the plan alone: nothing is analysed again."
    ),
]


@app.command()
def run(
    model: Annotated[
        str, typer.Argument(help="An .onnx file, a folder with a program.json, or a name from `bitalloy models`.")
    ] = "yolo11n-shapes",
    data: Annotated[
        Path | None,
        typer.Option(
            help="Images, .npz/.npy feeds, or for a program its task's labels, that look like the real inputs."
        ),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            help="Device and runtime, see `bitalloy targets`; or several of one analysis: `ort-cpu,tensorrt`."
        ),
    ] = "ort-cpu",
    latency: Annotated[
        str | None, typer.Option(help="Latency budget: `0.7x` of the float model's, or `12ms`.  [default: 0.7x]")
    ] = None,
    max_drop_db: Floors = None,
    max_drop: Annotated[
        list[str] | None,
        typer.Option(
            help="Largest drop of a task metric against float, measured on --eval: `AP50-95=0.003`, or `0.3` in points "
            "of the first metric. Finds the fastest plan of the front that keeps it."
        ),
    ] = None,
    size: Annotated[str | None, typer.Option(help="Size budget of the file: `8MB`, or `0.5x` of float.")] = None,
    evaluate: Annotated[
        list[Path] | None,
        typer.Option(
            "--eval",
            exists=True,
            help="Labels of the model's task, such as a COCO annotation file or questions as JSON lines: measure "
            "float, INT8 and mixed on them. May be given more than once.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Run directory; results in it are used again.")] = Path("runs/last"),
    shape: Annotated[
        list[str] | None, typer.Option(help="Shape of an input with open dimensions: `images=1x3x640x640`.")
    ] = None,
    scale: Annotated[float | None, typer.Option(help="Factor on pixel values.  [default: 1/255]")] = None,
    mean: Annotated[str | None, typer.Option(help="Per-channel mean after scaling: `0.485,0.456,0.406`.")] = None,
    std: Annotated[str | None, typer.Option(help="Per-channel standard deviation after scaling.")] = None,
    layout: Annotated[str | None, typer.Option(help="`NCHW` or `NHWC`.  [default: inferred]")] = None,
    fit: Annotated[str | None, typer.Option(help="`letterbox`, `stretch` or `crop`.  [default: inferred]")] = None,
    keep: Kept = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            help="Leave out of the analysis, such as an operator without adjoint: glob over node names, regions or "
            "operator types, which stay in float. To try plans use --keep."
        ),
    ] = None,
    protect: Annotated[
        bool,
        typer.Option(
            "--protect/--no-protect",
            help="Keep in float what the model's family advises, unless measurement overrules it.",
        ),
    ] = True,
    equalize: Equalize = True,
    bias_correction: BiasCorrection = True,
    samples: Annotated[str, typer.Option(help="Samples of the probe matrix, or `auto`.")] = "auto",
    probes: Annotated[int, typer.Option(min=1, help="Reverse passes per sample, shared by the heads.")] = 8,
    calibration_samples: Annotated[int, typer.Option(min=1, help="Samples for the ranges.")] = 64,
    ranges: Ranges = "auto",
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="Of a model that is exported first: file, folder, hub repository, or `random`.  "
            "[default: the published one]"
        ),
    ] = None,
    trust_checkpoint: Annotated[
        bool, typer.Option(help="Open a checkpoint of pickled objects, in a process of its own.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Evaluate at most so many labelled images.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of all random choices.")] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="Print summary.json instead of the table.")] = False,
) -> None:
    """Analyse, plan, apply, verify and report: everything, in one go.

    Leaves in the run directory: mixed.onnx (or mixed/ of a program), report.html, summary.json, plan.json,
    sensitivity.json/.csv and the probe matrix. A killed run goes on where it stopped when the same command is given
    again.

    Examples:
      bitalloy run                                   the embedded sample

      bitalloy run model.onnx --data images/ --latency 0.7x

      bitalloy run yolo11n.onnx --data images/ --max-drop-db 20 --eval instances.json

      bitalloy run yolo11n.onnx --data images/ --max-drop 0.3 --eval instances.json   in points of AP50-95

      bitalloy run model.onnx --data images/ --latency 0.7x --keep fp32:'neck*' --keep int8:'backbone/model.{4..8}'

      bitalloy run mobilesam --checkpoint mobile_sam.pt --data instances.json   exported first
    """
    from bitalloy.cli import options
    from bitalloy.core.records import Settings
    from bitalloy.measure.sizes import float_bytes
    from bitalloy.pipeline import prepare as opening
    from bitalloy.pipeline import run as stages

    def budget(float_bytes: int) -> Budget:
        return options.budget(
            latency_text=latency,
            size_text=size,
            floor_texts=max_drop_db,
            drop_texts=max_drop,
            keep_texts=keep,
            float_bytes=float_bytes,
        )

    budget(1)  # refuses what is wrong before the model is read
    settings = Settings(
        targets=options.targets(target),
        calibration_samples=calibration_samples,
        range_method=options.choice("--ranges", ranges, options.RANGE_METHODS),
        samples=options.samples(samples),
        probes=probes,
        seed=seed,
        exclude=tuple(exclude or ()),
        protect=protect,
        equalize=equalize,
        bias_correction=bias_correction,
    )
    with Bars() as bars:
        prepared = opening.prepare(
            model,
            out=out,
            data=data,
            labels=evaluate,
            shapes=options.shapes(shape or []),
            image=options.image(scale, mean, std, layout, fit),
            checkpoint=checkpoint,
            trust_checkpoint=trust_checkpoint,
            seed=seed,
            progress=bars,
        )
        chosen = budget(float_bytes(prepared.model))
        verified = stages.deliver(prepared, budget=chosen, settings=settings, limit=limit)
    if json_output:
        sys.stdout.write((out / "summary.json").read_text() + "\n")
        return
    for one in (verified, *verified.others):
        _show(one, out if one is verified else out / one.summary.target)


def _show(verified: Verified, folder: Path) -> None:
    """The result of a run on one target."""
    from bitalloy.report import formats
    from bitalloy.report.text import counted

    summary = verified.summary
    out_console.print(summary.headline, soft_wrap=True, highlight=False, markup=False)
    table = Table("", "float", "all INT8", "mixed")
    latency_ms, bytes_ = summary.latency_ms, summary.size_bytes
    table.add_row(
        "latency, ms" + " (estimated)" * summary.latency_estimated,
        *(f"{v:.2f}" for v in (latency_ms.reference, latency_ms.lowest, latency_ms.mixed)),
    )
    expected = summary.predicted_latency_ratio_interval
    ends = f" {expected.low:.2f} to {expected.high:.2f}" if expected is not None else ""
    predicted = f"{summary.latency_ratio:.2f} (predicted {summary.predicted_latency_ratio:.2f}{ends})"
    table.add_row("latency over float", "1", f"{latency_ms.lowest / latency_ms.reference:.2f}", predicted)
    table.add_row("size, MB", *(f"{v / 1e6:.2f}" for v in (bytes_.reference, bytes_.lowest, bytes_.mixed)))
    for head, pair in summary.sqnr_db.items():
        cells = (f"{c.measured:.1f} (predicted {c.predicted:.1f})" for c in (pair.lowest, pair.mixed))
        table.add_row(f"SQNR {head}, dB", "", *cells)
    for head, pair in summary.kl_nats.items():
        cells = (f"{c.measured:.3g} (predicted {c.predicted:.3g})" for c in (pair.lowest, pair.mixed))
        table.add_row(f"KL {head}, nats", "", *cells)
    for name, metric in summary.metrics.items():
        values = (metric.reference, metric.lowest, metric.mixed)
        table.add_row(f"{name} (n={metric.reference.n})", *(f"{m.value:.4f}" for m in values))
    for name, part in summary.graphs.items():
        cells = (f"{v / 1e6:.2f}" for v in (part.reference, part.lowest, part.mixed))
        table.add_row(f"size of {name}, MB", *cells)
    out_console.print(table)
    for correction in (c for c in summary.corrections if c.places):
        verdict = "kept" if correction.kept else "not kept"
        out_console.print(
            f"Correction `{correction.name}` at {correction.places} places, {verdict}: {correction.reason}.",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
    report = folder / "report.html"
    out_console.print(f"{counted(summary.schemes)} of {summary.units} units on {summary.target}. Report: {report}")
    if summary.ranges is not None:
        out_console.print(f"INT8 ranges: {formats.ranges(summary.ranges)}.", soft_wrap=True, highlight=False)
    for note in summary.notes:
        out_console.print(note, style="yellow", soft_wrap=True)


@app.command()
def plan(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory of a finished `bitalloy run`.")],
    latency: Annotated[str | None, typer.Option(help="Latency budget: `0.7x` of float, or `12ms`.")] = None,
    size: Annotated[str | None, typer.Option(help="Size budget of the file: `8MB`, or `0.5x` of float.")] = None,
    max_drop_db: Floors = None,
    keep: Kept = None,
    front: Annotated[bool, typer.Option("--front", help="Print the plans of the front, not the units.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the plan (or its front) as JSON.")] = False,
) -> None:
    """Plan again from a run directory: other limits or constraints, without model, data or measuring.

    Without limits those of the run hold. Leaves replanned.json in the run directory; `bitalloy run` with the same
    limits makes and verifies the model.

    Examples:
      bitalloy plan runs/last --latency 0.6x --keep fp32:'neck*'

      bitalloy plan runs/last --front

      bitalloy plan runs/last --max-drop-db boxes=30 --max-drop-db scores=12 --json
    """
    from bitalloy.cli import options
    from bitalloy.pipeline import plan as stage
    from bitalloy.report import text

    def budget(float_bytes: int) -> Budget:
        return options.budget(
            latency_text=latency,
            size_text=size,
            floor_texts=max_drop_db,
            drop_texts=None,
            keep_texts=keep,
            float_bytes=float_bytes,
        )

    with Bars() as bars:
        planned = stage.plan_again(run_directory, budget, progress=bars)
    if json_output:
        sys.stdout.write(text.front_json(planned) if front else text.plan_json(planned))
        return
    columns, lines = text.front_table(planned) if front else text.unit_table(planned)
    shown = Table()
    for column in columns:
        shown.add_column(column, overflow="fold")
    for line in lines:
        shown.add_row(*line)
    out_console.print(shown)
    out_console.print(text.plan_line(planned), soft_wrap=True, highlight=False, markup=False)


@app.command()
def sensitivity(
    model: Annotated[
        str, typer.Argument(help="An .onnx file, a folder with a program.json, or a name from `bitalloy models`.")
    ] = "yolo11n-shapes",
    data: Annotated[
        Path | None,
        typer.Option(
            help="Images, .npz/.npy feeds, or for a program its task's labels, that look like the real inputs."
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="`probe` predicts everything at once, `exact` executes.")] = "probe",
    mode: Annotated[
        str | None,
        typer.Option(help="Of exact: `one-at-a-time`, or `leave-one-out` of the all-INT8 model.  [default: the first]"),
    ] = None,
    units: Annotated[list[str] | None, typer.Option(help="Glob over units.  [default: all of them]")] = None,
    regions: Annotated[list[str] | None, typer.Option(help="Glob over regions, such as 'model.22*'.")] = None,
    sites: Annotated[list[str] | None, typer.Option(help="Glob over rounding sites, 'tensor->node#slot'.")] = None,
    confirm: Annotated[
        int | None, typer.Option(min=0, help="Measure so many of the worst units, and everything flagged, exactly.")
    ] = None,
    metric: Annotated[bool, typer.Option("--metric", help="Drop of box AP in place of SQNR; needs --eval.")] = False,
    evaluate: Annotated[
        Path | None, typer.Option("--eval", exists=True, dir_okay=False, help="COCO annotation file for --metric.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Evaluate at most so many labelled images.")] = None,
    target: Annotated[
        str, typer.Option(help="Device and runtime, see `bitalloy targets`; of several the table is of the first.")
    ] = "ort-cpu",
    out: Annotated[Path, typer.Option(help="Run directory; results in it are used again.")] = Path("runs/last"),
    shape: Annotated[
        list[str] | None, typer.Option(help="Shape of an input with open dimensions: `images=1x3x640x640`.")
    ] = None,
    scale: Annotated[float | None, typer.Option(help="Factor on pixel values.  [default: 1/255]")] = None,
    mean: Annotated[str | None, typer.Option(help="Per-channel mean after scaling: `0.485,0.456,0.406`.")] = None,
    std: Annotated[str | None, typer.Option(help="Per-channel standard deviation after scaling.")] = None,
    layout: Annotated[str | None, typer.Option(help="`NCHW` or `NHWC`.  [default: inferred]")] = None,
    fit: Annotated[str | None, typer.Option(help="`letterbox`, `stretch` or `crop`.  [default: inferred]")] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Leave out of the analysis: glob over node names, regions or operator types."),
    ] = None,
    equalize: Equalize = True,
    bias_correction: BiasCorrection = True,
    samples: Annotated[str, typer.Option(help="Samples to measure on, or `auto`.")] = "auto",
    probes: Annotated[int, typer.Option(min=1, help="Reverse passes per sample, shared by the heads.")] = 8,
    calibration_samples: Annotated[int, typer.Option(min=1, help="Samples for the ranges.")] = 64,
    ranges: Ranges = "auto",
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="Of a model that is exported first: file, folder, hub repository, or `random`.  "
            "[default: the published one]"
        ),
    ] = None,
    trust_checkpoint: Annotated[
        bool, typer.Option(help="Open a checkpoint of pickled objects, in a process of its own.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of all random choices.")] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """What rounding each unit, region or site does to every output, worst first.

    Leaves in the run directory: sensitivity.json/.csv, with --method exact sensitivity_exact.json/.csv, with --metric
    sensitivity_metric.json. A killed command goes on where it stopped when the same command is given again.

    Examples:
      bitalloy sensitivity model.onnx --data images/

      bitalloy sensitivity model.onnx --data images/ --confirm 10

      bitalloy sensitivity model.onnx --data images/ --method exact --regions 'model.22*' --samples 4

      bitalloy sensitivity model.onnx --data images/ --method exact --mode leave-one-out --units '*/cv1/*'

      bitalloy sensitivity yolo11n.onnx --data images/ --metric --eval instances.json --units '/model.23/*/Sigmoid'
    """
    from bitalloy.cli import options
    from bitalloy.core.records import Settings
    from bitalloy.pipeline import sensitivity as stage
    from bitalloy.pipeline.prepare import SAMPLE_NOTE
    from bitalloy.report import text
    from bitalloy.sensitivity.measuring import MODES, Selection

    exact = options.choice("--method", method, ("probe", "exact")) == "exact"
    options.together(exact=exact, mode=mode, confirm=confirm, metric=metric, evaluate=evaluate is not None)
    with Bars() as bars:
        table = stage.sensitivity(
            model,
            out=out,
            data=data,
            settings=Settings(
                targets=options.targets(target),
                calibration_samples=calibration_samples,
                range_method=options.choice("--ranges", ranges, options.RANGE_METHODS),
                samples=options.samples(samples),
                probes=probes,
                seed=seed,
                exclude=tuple(exclude or ()),
                equalize=equalize,
                bias_correction=bias_correction,
            ),
            selection=Selection(tuple(units or ()), tuple(regions or ()), tuple(sites or ())),
            exact=exact,
            mode=options.choice("--mode", mode, MODES) or MODES[0],
            confirmed=confirm,
            labels=evaluate,
            limit=limit,
            shapes=options.shapes(shape or []),
            image=options.image(scale, mean, std, layout, fit),
            checkpoint=checkpoint,
            trust_checkpoint=trust_checkpoint,
            progress=bars,
        )
    if json_output:
        import msgspec

        sys.stdout.write(msgspec.json.format(msgspec.json.encode(table), indent=2).decode() + "\n")
        return
    columns, lines = text.readable(table)
    shown = Table()
    for column in columns:
        shown.add_column(column, overflow="fold")
    for line in lines[:SHOWN_LINES]:
        shown.add_row(*line)
    out_console.print(shown)
    if len(lines) > SHOWN_LINES:
        out_console.print(f"{len(lines) - SHOWN_LINES} more in {out}, or with --json.")
    if data is None:
        out_console.print(SAMPLE_NOTE, style="yellow", soft_wrap=True)


@app.command()
def export(
    name: Annotated[str, typer.Argument(help="A name from `bitalloy models`.")],
    checkpoint: Annotated[
        str | None,
        typer.Option(help="File, folder or hub repository; `random` for random weights.  [default: the published one]"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the ONNX files.  [default: models/NAME]")] = None,
    image_size: Annotated[str | None, typer.Option(help="Height and width of the image: `480x640`.")] = None,
    open_size: Annotated[bool, typer.Option(help="Keep height and width open (SegFormer).")] = False,
    trust_checkpoint: Annotated[
        bool, typer.Option(help="Open a checkpoint of pickled objects, in a process of its own.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of random weights and inputs.")] = 0,
) -> None:
    """Write a known model as ONNX and compare the files with torch.

    Examples:
      bitalloy export yolo11n --checkpoint yolo11n.pt --trust-checkpoint

      bitalloy export segformer-b0

      bitalloy export mobilesam --checkpoint mobile_sam.pt --out sam/
    """
    from bitalloy import zoo
    from bitalloy.cli import options

    chosen = zoo.Options(
        size=options.image_size(image_size), open_size=open_size, seed=seed, trust_checkpoint=trust_checkpoint
    )
    exported = zoo.export_model(name, checkpoint=checkpoint, folder=out or Path("models") / name, options=chosen)
    for graph, path in exported.graphs.items():
        out_console.print(f"{graph:<12} {path}", soft_wrap=True, markup=False, highlight=False)
    for wire in exported.wires:
        out_console.print(f"wire         {wire}", soft_wrap=True, markup=False, highlight=False)
    for kept in exported.protect:
        text = f"in float     {kept.pattern}: {kept.reason} ({kept.source})"
        out_console.print(text, soft_wrap=True, markup=False, highlight=False)
    for note in exported.notes:
        out_console.print(note, soft_wrap=True, markup=False, highlight=False)


for _command in (commands.models, commands.targets, commands.audit, commands.doctor):
    app.command()(_command)


def main() -> None:
    """Entry point: the user's errors end with exit code 2 and one message, never with a traceback."""
    try:
        app(standalone_mode=True)
    except BitalloyError as error:
        error_console.print(f"Error: {error}", style="red", soft_wrap=True, markup=False, highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        error_console.print("Stopped. The same command goes on from here.", style="yellow")
        sys.exit(130)
