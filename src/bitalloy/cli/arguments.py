"""Groups of options that several commands have, one frozen record each; `cli.requests` makes commands of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitalloy.cli.guard import MemoryLimit, limit_in_bytes

if TYPE_CHECKING:
    from bitalloy.core.jobs import Executor
    from bitalloy.core.plans import Budget
    from bitalloy.core.records import Settings
    from bitalloy.pipeline.prepare import RunOptions

MOST_COUNT, MOST_PROBES, MOST_SEED = 2**31 - 1, 10_000, 2**63 - 1
"""Largest numbers of samples, of probes in each, and of a seed."""


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """Arguments that name the model, its data and the run directory."""

    model: Annotated[
        str, typer.Argument(help="An .onnx file, a folder with a program.json, or a name from `bitalloy models`.")
    ] = "yolo11n-shapes"
    data: Annotated[
        Path | None,
        typer.Option(
            help="Images, .npz/.npy feeds, or for a program its task's labels, that look like the real inputs."
        ),
    ] = None
    out: Annotated[Path, typer.Option(help="Run directory; results in it are used again.")] = Path("runs/last")


@dataclass(frozen=True, kw_only=True)
class SizeArguments:
    """Options for the sizes of a model's inputs, and for the preparation of its images."""

    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="Shape of an input with open dimensions: `images=1x3x640x640`. Given again for the same input, ranges "
            "are taken, and the shipped model is verified, at that shape too."
        ),
    ] = None
    scale: Annotated[float | None, typer.Option(help="Factor by which pixels are multiplied. Default: 1/255.")] = None
    mean: Annotated[str | None, typer.Option(help="Per-channel mean after scaling: `0.485,0.456,0.406`.")] = None
    std: Annotated[str | None, typer.Option(help="Per-channel standard deviation after scaling.")] = None
    layout: Annotated[str | None, typer.Option(help="`NCHW` or `NHWC`. Default: inferred.")] = None
    fit: Annotated[str | None, typer.Option(help="`letterbox`, `stretch` or `crop`. Default: inferred.")] = None
    memory_limit: MemoryLimit = None

    def check(self) -> None:
        """Refuse malformed options before the model is read."""
        self._values()
        limit_in_bytes(self.memory_limit)

    def options(self, limit: int | None) -> RunOptions:
        """Return the options as the pipeline takes them; at most `limit` labelled images are evaluated."""
        from bitalloy.pipeline.prepare import RunOptions

        shapes, image = self._values()
        memory = limit_in_bytes(self.memory_limit)
        return RunOptions(shapes=shapes[0], image=image, limit=limit, memory_limit=memory)

    def sizes(self) -> tuple[dict[str, tuple[int, ...]], ...]:
        """Return the further shapes that were given, see `Settings.sizes`."""
        return tuple(self._values()[0][1:])

    def _values(self) -> tuple[list[dict[str, tuple[int, ...]]], dict[str, object]]:
        from bitalloy.cli import options

        image = options.image(self.scale, self.mean, self.std, self.layout, self.fit)
        return options.shapes(self.shape or []), image


@dataclass(frozen=True, kw_only=True)
class OpeningArguments(SizeArguments):
    """Options that say how the model and its images are opened."""

    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint of a model to export: file, folder, hub repository, or `random`. Default: the published "
            "one."
        ),
    ] = None
    trust_checkpoint: Annotated[
        bool, typer.Option(help="Open a checkpoint of pickled objects, in a process of its own.")
    ] = False

    def options(self, limit: int | None) -> RunOptions:
        """Return the options as the pipeline takes them; at most `limit` labelled images are evaluated."""
        known = super().options(limit)
        return replace(known, checkpoint=self.checkpoint, trust_checkpoint=self.trust_checkpoint)


@dataclass(frozen=True, kw_only=True)
class ExecutorArguments:
    """Options that say where jobs are done."""

    executor: Annotated[
        str,
        typer.Option(
            help="Where samples are calibrated, probed, measured and evaluated: `local`; `ray`, workers on this "
            "machine; or `ray://HOST:PORT`, a cluster that this machine is in. Latency is measured on this machine, "
            "while no job is at work."
        ),
    ] = "local"
    workers: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_COUNT, help="Workers of Ray. Default: one a node, or a core of this machine."),
    ] = None

    @contextmanager
    def opened(self) -> Iterator[Executor | None]:
        """Give the executor until the end of the block; None for this process."""
        if self.executor == "local" and self.workers is None:
            yield None
            return
        from bitalloy.runtime.cluster.executor import executing

        with executing(self.executor, self.workers) as found:
            yield found


@dataclass(frozen=True, kw_only=True)
class MeasuringArguments(ExecutorArguments):
    """Options that say where jobs are done, and where latency is measured."""

    measure_on: Annotated[
        str,
        typer.Option(
            metavar="RESOURCE",
            help="Where the command runs and measures latency: `local`, this machine; or on a node of the cluster that "
            "carries a resource, such as `target` of `ray start --resources '{\"target\": 1}'`. One command at a time "
            "runs on such a node, and none that is busy; all nodes must see the files.",
        ),
    ] = "local"

    @property
    def is_elsewhere(self) -> bool:
        """Whether the command runs on another node."""
        return self.measure_on != "local"


@dataclass(frozen=True, kw_only=True)
class AnalysisArguments:
    """Options of the analysis, which serves every budget."""

    target: Annotated[
        str,
        typer.Option(
            help="Device and runtime, see `bitalloy targets`; or several for one analysis: `ort-cpu,tensorrt`."
        ),
    ] = "ort-cpu"
    schemes: Annotated[
        str | None,
        typer.Option(
            help="Schemes that plans may use beside float, see `bitalloy targets`: `int8` or `w4,int8-dynamic`. "
            "Default: the usual ones of each target; of a language model all."
        ),
    ] = None
    workload: Annotated[
        str | None,
        typer.Option(
            help="What the latency of a language model pays for: `prompt=256,new=64`, positions of the prompt with its "
            "image and tokens of the answer. Default: the sample's prompt and 64 new tokens."
        ),
    ] = None
    device: Annotated[
        str | None,
        typer.Option(
            help="Device for which `tensorrt` and `ort-cuda` are estimated, which decides their schemes too, see "
            "`bitalloy targets`. Default: a10."
        ),
    ] = None
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            help="Keep parts in float and take no gradient through them: glob over nodes, regions or operator types. "
            "What lies before them is measured by execution, as before operators without adjoint. To try plans use "
            "--keep of `bitalloy run`."
        ),
    ] = None
    equalize: Annotated[
        bool,
        typer.Option(
            "--equalize/--no-equalize",
            help="Scale channels between layers (SmoothQuant, cross-layer equalization) where measurement says it "
            "pays.",
        ),
    ] = True
    bias_correction: Annotated[
        bool,
        typer.Option(
            "--bias-correction/--no-bias-correction",
            help="Take the mean error of INT8 layers out of their biases where measurement says it pays.",
        ),
    ] = True
    weight_rounding: Annotated[
        str,
        typer.Option(
            help="Rounding of weights that are stored in blocks: `nearest`, `search` (ranges by the error of the "
            "product), `gptq` (errors compensated by other weights) or `weighted` (the same, with care where the "
            "outputs depend on it); `auto` tries the last two and keeps the better if it gains."
        ),
    ] = "auto"
    samples: Annotated[
        str, typer.Option(help="Number of samples of the probe matrix and of exact measurement, or `auto`.")
    ] = "auto"
    probes: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST_PROBES, help="Reverse passes per sample, shared by the heads. Default: 8, or by --effort."
        ),
    ] = None
    calibration_samples: Annotated[
        int, typer.Option(min=1, max=MOST_COUNT, help="Number of samples for calibration.")
    ] = 64
    ranges: Annotated[
        str,
        typer.Option(
            help="Calibration of INT8 ranges: minmax, extended (room for unseen samples), moving, percentile, entropy "
            "or mse for all tensors; auto takes, for every tensor, the one whose rounding and clipping disturb the "
            "outputs least."
        ),
    ] = "auto"
    limit: Annotated[
        int | None, typer.Option(min=1, max=MOST_COUNT, help="Largest number of labelled images to evaluate.")
    ] = None
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of all random choices.")] = 0

    def settings(
        self,
        *,
        protect: bool = True,
        sizes: tuple[dict[str, tuple[int, ...]], ...] = (),
        effort: str = "default",
    ) -> Settings:
        """Return the settings as a record.

        Args:
            protect: whether advice of the model's family is followed.
            sizes: further shapes of inputs.
            effort: name of the effort, which decides the number of probes where none is given.

        Raises:
            BitalloyError: a text has not the form that its option expects.
        """
        from bitalloy.cli import options
        from bitalloy.core.effort import effort_named
        from bitalloy.core.records import Settings

        targets, chosen = options.targets(self.target), effort_named(effort)
        return Settings(
            targets=targets,
            device=options.device(self.device, targets),
            calibration_samples=self.calibration_samples,
            range_method=options.choice("--ranges", self.ranges, options.RANGE_METHODS),
            samples=options.samples(self.samples),
            probes=chosen.probes if self.probes is None else self.probes,
            seed=self.seed,
            sizes=sizes,
            exclude=tuple(self.exclude or ()),
            schemes=options.schemes(self.schemes),
            workload=options.workload(self.workload),
            protect=protect,
            equalize=self.equalize,
            bias_correction=self.bias_correction,
            weight_rounding=options.choice("--weight-rounding", self.weight_rounding, options.WEIGHT_ROUNDINGS),
        )


@dataclass(frozen=True, kw_only=True)
class BudgetArguments:
    """Options for the limits of a plan, and for the parts that are kept in a scheme."""

    latency: Annotated[
        str | None,
        typer.Option(help="Latency budget: `0.7x` of the float model's, or `12ms`. Default: 0.7x, or the run's."),
    ] = None
    size: Annotated[str | None, typer.Option(help="Size budget of the file: `8MB`, or `0.5x` of float.")] = None
    max_drop_db: Annotated[
        list[str] | None,
        typer.Option(
            help="Floor on the SQNR of every output head in dB, e.g. 20, or of one head, e.g. `boxes=30`. Higher is "
            "stricter. May be given more than once."
        ),
    ] = None
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="Scheme of a part of the plan: `fp32:'neck*'`, `int8:'model.{4..8}'`. Glob over units, nodes, "
            "regions or operator types; the last one that names a unit holds. Changes the plan alone: nothing is "
            "analysed again."
        ),
    ] = None

    def budget(
        self,
        float_bytes: int,
        drops: Sequence[str] = (),
        agreement: float | None = None,
        confidence: float | None = None,
    ) -> Budget:
        """Return the budget as a record, for a float model of `float_bytes` bytes.

        Args:
            float_bytes: size of the float model.
            drops: limits on task metrics.
            agreement: least agreement with float on the task.
            confidence: probability with which these are to hold; None for the default.

        Raises:
            BitalloyError: a text has not the form that its option expects.
        """
        from bitalloy.cli import options
        from bitalloy.core.plans import DROP_CONFIDENCE, Budget

        ratio, milliseconds = options.latency(self.latency)
        least, heads = options.floors(self.max_drop_db or ())
        return Budget(
            latency_ratio=ratio,
            latency_ms=milliseconds,
            size_bytes=options.size(self.size, float_bytes),
            min_sqnr_db=least,
            head_sqnr_db=heads,
            max_drop=options.drops(drops),
            min_agreement=agreement,
            confidence=DROP_CONFIDENCE if confidence is None else confidence,
            keep=options.keeps(self.keep or ()),
        )
