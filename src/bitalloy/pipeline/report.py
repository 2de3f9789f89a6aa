"""Reports of finished runs, from their files alone: one again, or several beside each other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from bitalloy.core import files
from bitalloy.core.audited import Audit, Compilation
from bitalloy.core.errors import BitalloyError
from bitalloy.core.examples import Examples
from bitalloy.core.plans import CostTable, PlanReport
from bitalloy.core.records import Calibration, Record, SensitivityTable
from bitalloy.core.store import claimed
from bitalloy.core.units import UnitGraph
from bitalloy.pipeline.check import diff_runs, finished_summary
from bitalloy.report.compare import ComparedRun, render_comparison
from bitalloy.report.render import Extras, render_report
from bitalloy.search.planning import COST_FILE, PLAN_FILE, UNITS_FILE, read_record

REPORT = "report.html"
"""Name of the report in a run directory."""
OPTIONAL: dict[str, type[Record]] = {"audit": Audit, "compiled": Compilation, "examples": Examples}
"""Files, without `.json`, that not every run has -> their records."""


def report_run(run: str | Path) -> str:
    """Write the report of a finished run as one HTML page, from its files alone.

    Args:
        run: directory of a finished run; the results for its other targets lie in folders of their names.

    Raises:
        RunDirectoryError: a directory holds no finished run, or a file of it is damaged or of another version.
    """
    folder = Path(run)
    summary = finished_summary(folder)
    known = {
        name: read_record(folder / f"{name}.json", kind)
        for name, kind in OPTIONAL.items()
        if (folder / f"{name}.json").is_file()
    }
    extras = Extras(
        executed=known.get("audit"),  # type: ignore[arg-type]
        compiled=known.get("compiled"),  # type: ignore[arg-type]
        examples=known.get("examples"),  # type: ignore[arg-type]
        others=tuple(finished_summary(folder / name) for name in summary.others),
        calibration=read_record(folder / "calibration.json", Calibration),
    )
    return render_report(
        summary,
        read_record(folder / PLAN_FILE, PlanReport),
        read_record(folder / "sensitivity.json", SensitivityTable),
        read_record(folder / UNITS_FILE, UnitGraph),
        read_record(folder / COST_FILE, CostTable),
        extras,
    )


def compare_runs(runs: Sequence[str | Path], *, beside: str | Path = ".") -> str:
    """Write a page that shows finished runs side by side: of one model or several, for one target or several.

    Args:
        runs: directories of two finished runs or more; differences are told from the first one.
        beside: folder in which the page will lie, for its links to the reports of the runs.

    Raises:
        BitalloyError: fewer than two directories are given, or one of them twice.
        RunDirectoryError: a directory holds no finished run.
    """
    folders = [Path(run) for run in runs]
    if len({folder.resolve() for folder in folders}) < max(2, len(folders)):
        raise BitalloyError(f"{len(folders)} runs are given; expected the directories of two or more different runs.")
    compared = [
        ComparedRun(
            name=str(folder),
            report=_link(folder, Path(beside)),
            summary=finished_summary(folder),
            difference=None if index == 0 else diff_runs(folders[0], folder),
        )
        for index, folder in enumerate(folders)
    ]
    return render_comparison(compared)


def write_report(runs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the report of one finished run again, or a page that compares several.

    Args:
        runs: directories of finished runs.
        out: file of the page; by default `report.html` in the directory of one run, and `compare.html` here of several.

    Returns:
        The path of the page.

    Raises:
        BitalloyError: see `report_run` and `compare_runs`; or the file cannot be written.
    """
    if len(runs) == 1 and out is None:
        finished_summary(runs[0])
        with claimed(runs[0]) as store:
            return store.publish(REPORT, report_run(runs[0]))
    path = Path("compare.html" if out is None else out)
    page = report_run(runs[0]) if len(runs) == 1 else compare_runs(runs, beside=path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, page.encode())
    except OSError as error:
        raise BitalloyError(f"The report '{path}' cannot be written: {error.strerror}. Give another --out.") from error
    return path


def _link(folder: Path, beside: Path) -> str:
    """Return the way from a page to the report of a run; empty where there is no report."""
    if not (folder / REPORT).is_file():
        return ""
    try:
        return Path(os.path.relpath(folder.resolve() / REPORT, beside.resolve())).as_posix()
    except ValueError:  # on another drive
        return (folder.resolve() / REPORT).as_uri()
