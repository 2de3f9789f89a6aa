"""Arguments of the commands: one frozen record for each command.

A command is a function of one record; `cli.collecting.collected` gives it a parameter for every field, of nested
records too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitalloy.cli.arguments import (
    MOST_COUNT,
    MOST_SEED,
    AnalysisArguments,
    BudgetArguments,
    ExecutorArguments,
    MeasuringArguments,
    ModelArguments,
    OpeningArguments,
    SizeArguments,
)
from bitalloy.cli.config import CODE
from bitalloy.cli.guard import MemoryLimit
from bitalloy.core.errors import BitalloyError

if TYPE_CHECKING:
    from bitalloy.core.plans import Budget
    from bitalloy.pipeline.sensitivity import SensitivityQuestion

LabelFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--eval",
        exists=True,
        help="Labels of the model's task, such as a COCO annotation file or questions as JSON lines: measure "
        "float, INT8 and mixed on them. May be given more than once.",
    ),
]
"""Option for files of labels."""
OwnMetric = Annotated[
    str | None,
    typer.Option(
        metavar=CODE,
        help="A metric of your own in place of --eval: a function of a session, used as an ONNX Runtime session, "
        "that returns a number or several by name; or a bitalloy.Metric with labels, which gives paired intervals. "
        "The module is looked up in the current folder too, and its code is executed as it is: only name what you "
        "trust.",
    ),
]
"""Option for a metric of the user's own."""
Quiet = Annotated[
    bool, typer.Option("--quiet", help="Show no progress; the result and errors are printed all the same.")
]
"""Option for a command without progress."""


@dataclass(frozen=True, kw_only=True)
class RunArguments:
    """Arguments of `bitalloy run`."""

    model: ModelArguments
    limits: BudgetArguments
    max_drop: Annotated[
        list[str] | None,
        typer.Option(
            help="Largest drop of a task metric against float, measured on --eval: `AP50-95=0.003`, or `0.3` in points "
            "of the first metric. Finds the fastest plan of the front that keeps it."
        ),
    ] = None
    min_agreement: Annotated[
        float | None,
        typer.Option(
            help="Least agreement with float on the task, such as 0.98, which needs no labels: AP against what float "
            "detects, pixels of the same class, IoU with its masks, same answers."
        ),
    ] = None
    confidence: Annotated[
        float | None,
        typer.Option(
            help="Probability, above 0.5 and below 1, with which --max-drop and --min-agreement must hold, by all that "
            "was evaluated, to count as met, or not hold to count as missed; else it is undecided. Default: 0.8."
        ),
    ] = None
    fail_on_miss: Annotated[
        bool,
        typer.Option(
            "--fail-on-miss",
            help="End with exit code 3, after all results are written, if a limit is missed or undecided: if it is not "
            "proven that the model keeps it.",
        ),
    ] = False
    evaluate: LabelFiles = None
    metric: OwnMetric = None
    preprocess: Annotated[
        str | None,
        typer.Option(
            metavar=CODE,
            help="A function of your own that makes of each image of --data (RGB, as Pillow reads it), or of the "
            "arrays of each .npz, what the model takes: an array, or a dict by input name. Its code is executed as "
            "that of --metric.",
        ),
    ] = None
    effort: Annotated[
        str,
        typer.Option(
            help="How much is measured: `quick` (fewer variants and probes, one verification, no repair, no memory), "
            "`default`, or `thorough` (more of each, and the neighbours on the front)."
        ),
    ] = "default"
    protect: Annotated[
        bool,
        typer.Option(
            "--protect/--no-protect",
            help="Keep in float what the model's family advises, unless measurement overrules it.",
        ),
    ] = True
    analysis: AnalysisArguments
    opening: OpeningArguments
    place: MeasuringArguments
    json_output: Annotated[bool, typer.Option("--json", help="Print summary.json instead of the table.")] = False
    mlflow: Annotated[
        bool,
        typer.Option("--mlflow", help="Log parameters, metrics and files of the result to MLflow; needs the extra."),
    ] = False
    quiet: Quiet = False

    def check(self) -> None:
        """Refuse malformed options, and what needs a package that is not there, before the model is read."""
        self.budget(1)
        self.opening.check()
        if self.mlflow:
            from bitalloy.pipeline.tracking import require_mlflow

            require_mlflow()

    def evaluation(self) -> Any:
        """Return what models are evaluated with, see `options.evaluated_with`."""
        from bitalloy.cli import options

        return options.evaluated_with(self.metric, self.evaluate)

    def preparation(self) -> Any:
        """Return the function that prepares samples; None without one.

        Raises:
            BitalloyError: it is not found, or nothing can be called.
        """
        from bitalloy.cli import options

        found = options.named_object("--preprocess", self.preprocess)
        if found is not None and not callable(found):
            raise BitalloyError(f"--preprocess is '{self.preprocess}', which is {type(found).__name__}, no function.")
        if found is not None and self.model.data is None:
            raise BitalloyError("--preprocess prepares samples of --data. Give both.")
        return found

    def budget(self, float_bytes: int) -> Budget:
        """Return the budget with all limits, task metrics included, see `BudgetArguments.budget`."""
        return self.limits.budget(float_bytes, self.max_drop or (), self.min_agreement, self.confidence)


@dataclass(frozen=True, kw_only=True)
class SensitivityArguments:
    """Arguments of `bitalloy sensitivity`."""

    model: ModelArguments
    method: Annotated[str, typer.Option(help="`probe` predicts everything at once, `exact` executes.")] = "probe"
    mode: Annotated[
        str | None,
        typer.Option(help="Mode of --method exact: `one-at-a-time` (default) or `leave-one-out` of all-INT8."),
    ] = None
    units: Annotated[list[str] | None, typer.Option(help="Glob over units. Default: all of them.")] = None
    regions: Annotated[list[str] | None, typer.Option(help="Glob over regions, such as 'model.22*'.")] = None
    sites: Annotated[list[str] | None, typer.Option(help="Glob over rounding sites, 'tensor->node#slot'.")] = None
    confirm: Annotated[
        int | None,
        typer.Option(
            min=0, max=MOST_COUNT, help="Number of the worst units to measure exactly, with all flagged ones."
        ),
    ] = None
    metric: Annotated[
        bool, typer.Option("--metric", help="Measure the drop of box AP in place of SQNR; needs --eval.")
    ] = False
    evaluate: Annotated[
        Path | None, typer.Option("--eval", exists=True, dir_okay=False, help="COCO annotation file for --metric.")
    ] = None
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Do the I-th of N parts of the work alone, such as `2/8`, and keep its results in --store, from which "
            "`bitalloy merge` makes the table. For the tasks of a job array.",
        ),
    ] = None
    store: Annotated[
        Path | None, typer.Option(help="Folder for the results of --shard: one for all parts, or for each its own.")
    ] = None
    analysis: AnalysisArguments
    opening: OpeningArguments
    place: ExecutorArguments
    json_output: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False
    quiet: Quiet = False

    def check(self) -> None:
        """Refuse malformed or contradictory options before the model is read."""
        from bitalloy.cli import options

        exact = options.choice("--method", self.method, ("probe", "exact")) == "exact"
        options.together(
            exact=exact, mode=self.mode, confirm=self.confirm, metric=self.metric, evaluate=self.evaluate is not None
        )
        options.shard(self.shard, self.store)
        self.opening.check()

    def question(self) -> SensitivityQuestion:
        """Return the question as the pipeline takes it."""
        from bitalloy.cli import options
        from bitalloy.pipeline.sensitivity import SensitivityQuestion
        from bitalloy.sensitivity.measuring import MODES, Selection

        return SensitivityQuestion(
            selection=Selection(tuple(self.units or ()), tuple(self.regions or ()), tuple(self.sites or ())),
            exact=self.method == "exact",
            mode=options.choice("--mode", self.mode, MODES) or MODES[0],
            confirmed=self.confirm,
            labels=self.evaluate,
        )


@dataclass(frozen=True, kw_only=True)
class MergeArguments:
    """Arguments of `bitalloy merge`."""

    stores: Annotated[
        list[Path], typer.Argument(metavar="STORE...", help="Folders in which parts of one question were done.")
    ]
    out: Annotated[Path, typer.Option(help="Run directory; it may be one of the stores.")] = Path("runs/last")
    memory_limit: MemoryLimit = None
    json_output: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False
    quiet: Quiet = False


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """Arguments of `bitalloy evaluate`."""

    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help=".onnx files, folders with a program.json, or names of samples; the others are compared with the "
            "first.",
        ),
    ]
    evaluate: LabelFiles = None
    metric: OwnMetric = None
    limit: Annotated[int | None, typer.Option(min=1, max=MOST_COUNT, help="Largest number of samples to evaluate.")] = (
        None
    )
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of all random choices.")] = 0
    opening: SizeArguments
    json_output: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False
    quiet: Quiet = False

    def evaluation(self) -> Any:
        """Return what models are evaluated with, see `options.evaluated_with`."""
        from bitalloy.cli import options

        return options.evaluated_with(self.metric, self.evaluate)


@dataclass(frozen=True, kw_only=True)
class PlanArguments:
    """Arguments of `bitalloy plan`."""

    run_directory: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory of a finished `bitalloy run`.")]
    limits: BudgetArguments
    front: Annotated[bool, typer.Option("--front", help="Print the plans of the Pareto front, not the units.")] = False
    json_output: Annotated[bool, typer.Option("--json", help="Print the plan (or its front) as JSON.")] = False
    quiet: Quiet = False
