"""The study: models x targets x schemes x budgets from one file, each a run directory, and one comparative result.

study/
study.json, study.csv, parts.csv, study.html    what the user reads
cells/MODEL/TARGET/SCHEMES/BUDGET/              run directory of each cell
work/MODEL/SCHEMES/                             results of the stages, which the cells of a model share
"""

from __future__ import annotations

import hashlib
import re
import time
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from bitalloy import zoo
from bitalloy.core.effort import EFFORTS, Effort, effort_named
from bitalloy.core.encoding import to_json
from bitalloy.core.errors import BitalloyError, MissingExtraError
from bitalloy.core.limits import limited
from bitalloy.core.plans import Budget
from bitalloy.core.records import Settings
from bitalloy.core.store import RunDirectory, claimed, versions
from bitalloy.core.studies import (
    Lack,
    PartDamage,
    StudiedModel,
    StudyCell,
    StudyFile,
    StudyResult,
)
from bitalloy.model.load import Graph
from bitalloy.model.read import attribute, name_of
from bitalloy.pipeline.early import check_budget
from bitalloy.pipeline.prepare import Prepared, RunOptions, prepare
from bitalloy.pipeline.run import analyzed, deliver_target, publish
from bitalloy.report.answers import answer_all
from bitalloy.report.damages import DamageRows
from bitalloy.report.study import parts_csv, render_study, study_csv
from bitalloy.report.variants import cell_variants
from bitalloy.search.planning import PlanTables, tables_of
from bitalloy.sensitivity.analysis import Analysis
from bitalloy.sensitivity.parts import Effects
from bitalloy.targets import TARGETS, chosen_targets

EMBEDDED = (*zoo.NAMES, *zoo.PROGRAMS)
"""The embedded models, which are studied without a file."""
RESULT = "study.json"
BUDGET_FIELDS = frozenset(Budget.__struct_fields__) - {"keep"}


@dataclass(frozen=True)
class Study:
    """A study that can be run: what its file asks for, checked, with paths as they are from here."""

    asked: StudyFile
    targets: tuple[str, ...]
    budgets: Mapping[str, Budget]

    @property
    def cells(self) -> int:
        """Number of cells, of which a target may lack some."""
        return len(self.asked.models) * len(self.targets) * len(self.asked.schemes) * len(self.budgets)


def read_study(path: str | Path | None = None, *, limit: int | None = None, effort: str | None = None) -> Study:
    """Read the file of a study and check all that can be checked before any work.

    Args:
        path: TOML file, see `StudyFile`; None for the embedded models on all targets that run here.
        limit: largest number of labelled samples that are evaluated, in place of the file's.
        effort: `quick`, `default` or `thorough`, in place of the file's.

    Raises:
        BitalloyError: the file is no TOML, has a key or value that is not known, or names what there is not.
    """
    if path is None:
        asked = StudyFile(models=tuple(StudiedModel(model=name) for name in EMBEDDED), limit=100)
        folder = Path()
    else:
        asked, folder = _parsed(Path(path)), Path(path).parent
    asked = msgspec.structs.replace(asked, limit=limit or asked.limit, effort=effort or asked.effort)
    asked = msgspec.structs.replace(asked, models=tuple(_placed(model, folder) for model in asked.models))
    _check_names(asked)
    effort_named(asked.effort)
    targets = asked.targets or tuple(n for n, t in TARGETS.items() if t.device is None and not t.missing())
    planned = Study(asked, targets, {name: _budget(name, limits) for name, limits in asked.budgets.items()})
    chosen = chosen_targets(targets, _device(asked, targets), [*chain.from_iterable(asked.schemes.values())])
    absent = [f"{t.name}: {why}" for t in chosen if t.device is None and (why := t.missing())]
    if absent:
        raise BitalloyError(f"The study names targets that do not run here. {'; '.join(absent)}.")
    for name, schemes in asked.schemes.items():
        if not _targets_with(planned, schemes):
            raise BitalloyError(
                f"The set of schemes '{name}' is {', '.join(schemes)}; no target of {', '.join(targets)} has all."
            )
    return planned


def lacks_of(study: Study) -> tuple[Lack, ...]:
    """Tell what the models of a study need that is not here, and where to put it; nothing is opened or downloaded."""
    found = []
    for model in study.asked.models:
        paths = [("samples", model.data), *(("labels", path) for path in model.evaluate)]
        if zoo.is_variant(model.model):
            family, variant = zoo.find(model.model)
            if family.missing:
                refusal = MissingExtraError(", ".join(family.missing), family.extra, f"exporting {model.model}")
                found.append(Lack(model=model.name, what=str(refusal)))
            if model.checkpoint is None:
                where = f"give `checkpoint`: {variant.remote.file} ({variant.remote.url or variant.remote.hub})"
                found.append(Lack(model=model.name, what=f"No checkpoint is named; {where}."))
            elif model.checkpoint != zoo.RANDOM_WEIGHTS:
                paths.insert(0, ("checkpoint", model.checkpoint))
        elif model.model not in EMBEDDED:
            paths.insert(0, ("model", model.model))
        absent = [f"the {kind} '{path}'" for kind, path in paths if path is not None and not Path(path).exists()]
        if absent:
            told = f"Not there: {', '.join(absent)}. {model.where}"
            found.append(Lack(model=model.name, what=told.strip()))
    return tuple(found)


def study(
    study: Study | str | Path | None = None, *, out: str | Path, options: RunOptions | None = None
) -> StudyResult:
    """Run all cells of a study, and write the comparative result and its report.

    A killed study goes on where it stopped. A cell that fails is told in the result, and the others go on.

    Args:
        study: what `read_study` gives, or the file itself; None for the embedded models.
        out: folder of the study.
        options: options of all runs: where progress is shown, the memory limit, the executor.

    Raises:
        BitalloyError: the file cannot be used, the folder is in use, or nothing of the study can be run here.
    """
    planned = study if isinstance(study, Study) else read_study(study)
    options, start = options or RunOptions(), time.monotonic()
    lacks = lacks_of(planned)
    left_out = {lack.model for lack in lacks}
    models = [model for model in planned.asked.models if model.name not in left_out]
    if not models:
        raise BitalloyError("Nothing of the study can be run here. " + " ".join(f"{a.model}: {a.what}" for a in lacks))
    cells: list[StudyCell] = []
    damages: list[DamageRows] = []
    with limited(options.memory_limit), claimed(out) as store:
        before = _earlier(planned, store)
        for index, model in enumerate(models):
            for name, schemes in planned.asked.schemes.items():
                options.progress.start(f"{model.name} ({index + 1} of {len(models)}), schemes {name}", None)
                options.progress.finish()
                with options.executor.contexts.passing() if options.executor else nullcontext():
                    found, rows = _cells_of(_Asked(planned, model, name, schemes, store, options))
                cells += found
                damages += rows
                result = _result(planned, lacks, cells, damages, before, time.monotonic() - start)
                publish_study(result, store)  # what is known so far can be read, whatever comes
    return result


def _result(
    planned: Study,
    lacks: tuple[Lack, ...],
    found: list[StudyCell],
    damages: list[DamageRows],
    before: StudyResult | None,
    seconds: float,
) -> StudyResult:
    """Collect what is known; of cells that this command has not come to yet, what an earlier one found."""
    parts = tuple(row for one in damages for row in one.rows)
    contrasts = tuple(row for one in damages for row in one.contrasts)
    cells = tuple(found)
    if before is not None:
        done = {(cell.model, cell.schemes) for cell in found}
        cells += tuple(cell for cell in before.cells if (cell.model, cell.schemes) not in done)
        parts += tuple(row for row in before.parts if (row.model, row.schemes) not in done)
        contrasts += tuple(row for row in before.contrasts if (row.model, row.schemes) not in done)
    return StudyResult(
        cells=cells,
        parts=parts,
        contrasts=contrasts,
        answers=answer_all(cells, parts, contrasts),
        lacks=lacks,
        seconds=round(seconds, 1),
        seed=planned.asked.seed,
        asked=_identity(planned),
        versions=dict(versions()),
    )


def _earlier(planned: Study, store: RunDirectory) -> StudyResult | None:
    """Read what an earlier command found for the same study with the same versions; None where there is no such."""
    try:
        before = msgspec.json.decode((store.path / RESULT).read_bytes(), type=StudyResult)
    except (OSError, msgspec.DecodeError):
        return None
    return before if (before.asked, before.versions) == (_identity(planned), dict(versions())) else None


def _identity(planned: Study) -> str:
    return hashlib.sha256(to_json((planned.asked, planned.targets))).hexdigest()


def publish_study(result: StudyResult, store: RunDirectory) -> Path:
    """Write the files of a study that people read, and return the path of the report."""
    store.publish("study.csv", study_csv(result))
    store.publish("parts.csv", parts_csv(result))
    store.publish(RESULT, to_json(result, pretty=True))
    return store.publish("study.html", render_study(result))


@dataclass(frozen=True)
class _Asked:
    """One model of a study with one set of schemes."""

    study: Study
    model: StudiedModel
    name: str
    schemes: tuple[str, ...]
    store: RunDirectory
    options: RunOptions

    def cell(self, target: str, budget: str) -> StudyCell:
        return StudyCell(
            model=self.model.name,
            family=family_of(self.model.model),
            target=target,
            schemes=self.name,
            budget=budget,
            folder=f"cells/{self.model.name}/{target}/{self.name}/{budget}",
        )

    def failed(self, error: Exception, target: str, budget: str) -> StudyCell:
        return msgspec.structs.replace(self.cell(target, budget), failed=str(error))


def family_of(model: str) -> str:
    """Return the family that the name of a model tells, of embedded models too; empty for others."""
    return next((name for name in zoo.FAMILIES if Path(model).stem.startswith(name)), "")


def _cells_of(asked: _Asked) -> tuple[list[StudyCell], list[DamageRows]]:
    """Run the cells of one model with one set of schemes; what all of them need is computed once."""
    study, effort = asked.study, EFFORTS[asked.study.asked.effort]
    targets = _targets_with(study, asked.schemes)
    settings = Settings(
        targets=targets,
        device=_device(study.asked, targets),
        schemes=asked.schemes,
        seed=study.asked.seed,
        probes=effort.probes,
    )
    cells: list[StudyCell] = []
    damages: list[DamageRows] = []
    try:
        prepared = _prepared(asked)
    except BitalloyError as error:
        return [asked.failed(error, target, budget) for target in targets for budget in study.budgets], []
    budgets = {}
    for name, budget in study.budgets.items():
        try:
            check_budget(prepared, budget, settings)
        except BitalloyError as error:
            cells += [asked.failed(error, target, name) for target in targets]
        else:
            budgets[name] = budget
    parts, failed = _analyses(prepared, settings, study, effort) if budgets else ([], {})
    cells += [asked.failed(error, target, name) for target, error in failed.items() for name in budgets]
    for part in parts:
        tables = None
        for name, budget in budgets.items():
            cell = asked.cell(part.target.name, name)
            try:
                verified = deliver_target(prepared, part, budget, limit=study.asked.limit, effort=effort)
            except BitalloyError as error:
                cells.append(asked.failed(error, part.target.name, name))
                continue
            publish(verified, RunDirectory(asked.store.path / cell.folder))
            tables = tables or tables_of(part, verified.planned.cost)
            cells.append(
                msgspec.structs.replace(
                    cell,
                    status=verified.summary.status.verdict,
                    headline=verified.summary.headline,
                    variants=cell_variants(verified.summary, _published(asked.model.model)),
                )
            )
        if tables is not None:
            damages.append(_damages_of(asked, part, tables))
    order = [asked.cell(target, name).id for target in targets for name in study.budgets]
    return sorted(cells, key=lambda cell: order.index(cell.id)), damages


def _analyses(
    prepared: Prepared, settings: Settings, study: Study, effort: Effort
) -> tuple[list[Analysis], dict[str, BitalloyError]]:
    """Analyse for all targets at once; where that fails, for each alone. Returns what failed by target, too."""
    try:
        return list(analyzed(prepared, settings, limit=study.asked.limit, effort=effort).targets), {}
    except BitalloyError as error:
        if len(settings.targets) == 1:
            return [], {settings.targets[0]: error}
    parts: list[Analysis] = []
    failed: dict[str, BitalloyError] = {}
    for target in settings.targets:
        alone = msgspec.structs.replace(settings, targets=(target,), device=_device(study.asked, (target,)))
        found, refused = _analyses(prepared, alone, study, effort)
        parts += found
        failed |= refused
    return parts, failed


def _targets_with(study: Study, schemes: Sequence[str]) -> tuple[str, ...]:
    """Name the targets of a study that have all of some schemes."""
    chosen = chosen_targets(study.targets, _device(study.asked, study.targets))
    return tuple(t.name for t in chosen if set(schemes) <= {scheme.name for scheme in t.schemes})


def _check_names(asked: StudyFile) -> None:
    """Refuse what leaves nothing to study, and names that cannot be those of folders.

    Raises:
        BitalloyError: the message says what to name otherwise.
    """
    for what, listed in (("model", asked.models), ("set of schemes", asked.schemes), ("budget", asked.budgets)):
        if not listed:
            raise BitalloyError(f"The study has no {what}; give one or more, or leave the table out.")
    names = [model.name for model in asked.models]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise BitalloyError(f"Two models of the study are named {', '.join(twice)}; give each a `name` of its own.")
    for name in (*names, *asked.schemes, *asked.budgets):
        if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
            raise BitalloyError(f"'{name}' names a folder of the study; expected letters, digits, '.', '+' and '-'.")


def _device(asked: StudyFile, targets: Sequence[str]) -> str:
    """The device of the study where one of some targets is estimated; none for those that are measured here."""
    return asked.device if any(TARGETS[name].device for name in targets if name in TARGETS) else ""


def _prepared(asked: _Asked) -> Prepared:
    model, study = asked.model, asked.study.asked
    options = replace(
        asked.options,
        shapes=model.shape,
        checkpoint=model.checkpoint,
        trust_checkpoint=model.trust_checkpoint,
        limit=study.limit,
        effort=EFFORTS[study.effort],
    )
    return prepare(
        model.model,
        out=asked.store.path / "work" / model.name / asked.name,
        data=model.data,
        evaluate=list(model.evaluate) or None,
        seed=study.seed,
        options=options,
    )


def _damages_of(asked: _Asked, analysis: Analysis, tables: PlanTables) -> DamageRows:
    effects = Effects(tables.matrix, tables.units, asked.study.asked.seed)
    row = partial(
        PartDamage,
        model=asked.model.name,
        family=family_of(asked.model.model),
        target=analysis.target.name,
        schemes=asked.name,
    )
    start = f"{asked.model.name}/{analysis.target.name}/{asked.name}"
    return DamageRows(effects, tables, depthwise_nodes(analysis.graph), row, start).collect()


def depthwise_nodes(graph: Graph) -> frozenset[str]:
    """Name the convolutions that read each channel alone: as many groups as channels, and more than one."""
    found = set()
    for node in graph.nodes:
        groups = attribute(node, "group", 1) if node.op_type in ("Conv", "ConvTranspose") else 1
        weight = node.inputs[1].shape if groups != 1 and node.inputs[1] is not None else None
        if weight is not None and weight[1] == 1:  # channels of the input, or of the output, of each group
            found.add(name_of(node))
    return frozenset(found)


def _published(model: str) -> dict[str, float]:
    return dict(zoo.find(model)[1].published.accuracy) if zoo.is_variant(model) else {}


def _parsed(path: Path) -> StudyFile:
    try:
        return msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), StudyFile)
    except msgspec.ValidationError as error:
        raise BitalloyError(f"'{path}' is no file of a study: {error}. See `bitalloy study --help`.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BitalloyError(f"'{path}' cannot be read as TOML: {error}.") from error


def _placed(model: StudiedModel, folder: Path) -> StudiedModel:
    """Take relative paths from the folder of the file, and name what has no name."""

    def placed(path: str | None) -> str | None:
        return path if path in (None, zoo.RANDOM_WEIGHTS) else str(folder / path)

    known = model.model in EMBEDDED or zoo.is_variant(model.model)
    return msgspec.structs.replace(
        model,
        model=model.model if known else str(folder / model.model),
        name=model.name or Path(model.model).name.removesuffix(".onnx"),
        checkpoint=placed(model.checkpoint),
        data=placed(model.data),
        evaluate=tuple(str(folder / path) for path in model.evaluate),
    )


def _budget(name: str, limits: Mapping[str, object]) -> Budget:
    fields: dict[str, Any] = {key.replace("-", "_"): value for key, value in limits.items()}
    if unknown := sorted(fields.keys() - BUDGET_FIELDS):
        raise BitalloyError(f"The budget '{name}' limits '{unknown[0]}'; known are {', '.join(sorted(BUDGET_FIELDS))}.")
    return Budget(**fields)


__all__ = ["Study", "lacks_of", "publish_study", "read_study", "study"]
