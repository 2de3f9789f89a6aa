"""bitalloy: the fastest mixed-precision version of an ONNX model that keeps its accuracy, with proof.

verified = bitalloy.quantize("model.onnx", samples)  # the shortest way; in steps:

model = bitalloy.load("model.onnx")
data = bitalloy.open_data(model, "images/")
analysis = bitalloy.analyze(model, data)
planned = bitalloy.plan(analysis, bitalloy.Budget(latency_ratio=0.7))
verified = bitalloy.verify(analysis, planned)
print(verified.summary.headline)

Public names are loaded when they are first used: importing bitalloy itself takes no time.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bitalloy.core.checked import CheckedRun, RunDifference
    from bitalloy.core.errors import (
        BitalloyError,
        BudgetError,
        DataError,
        MissingExtraError,
        ModelError,
        RunDirectoryError,
        UnreachableError,
        UnsupportedOpError,
    )
    from bitalloy.core.outcome import Summary
    from bitalloy.core.planned import Planned
    from bitalloy.core.plans import Budget, Keep
    from bitalloy.core.records import Settings, Workload
    from bitalloy.core.schemes import Plan
    from bitalloy.core.status import LimitStatus, Status
    from bitalloy.core.store import RunDirectory
    from bitalloy.core.studies import StudyResult
    from bitalloy.core.work import Workspace
    from bitalloy.measure.cost import measure_cost
    from bitalloy.pipeline.analyze import analyze
    from bitalloy.pipeline.calibrate import calibrate
    from bitalloy.pipeline.check import check_run as check
    from bitalloy.pipeline.check import diff_runs as diff
    from bitalloy.pipeline.evaluate import evaluate_models as evaluate
    from bitalloy.pipeline.plan import plan, plan_again
    from bitalloy.pipeline.prepare import RunOptions, load, open_data
    from bitalloy.pipeline.report import write_report
    from bitalloy.pipeline.resolve import resolve_drops
    from bitalloy.pipeline.run import publish, run
    from bitalloy.pipeline.run import quantize_model as quantize
    from bitalloy.pipeline.run import render as report
    from bitalloy.pipeline.ship import Verified, apply, verify
    from bitalloy.pipeline.study import read_study, study
    from bitalloy.rewrite.calibrated import Calibrated
    from bitalloy.sensitivity.analysis import Analysis
    from bitalloy.sensitivity.measuring import Selection, confirm, measure_exact
    from bitalloy.tasks.metric import measure_metric
    from bitalloy.tasks.own import Metric, OwnSession

__version__ = "0.1.0"

__all__ = [
    # stages
    "load",
    "open_data",
    "analyze",
    "confirm",
    "calibrate",
    "measure_exact",
    "measure_metric",
    "measure_cost",
    "resolve_drops",
    "plan",
    "plan_again",
    "apply",
    "verify",
    "report",
    "publish",
    "run",
    "quantize",
    "study",
    "read_study",
    # what comes out of finished runs
    "check",
    "diff",
    "write_report",
    "evaluate",
    # what they take and give
    "Analysis",
    "Budget",
    "Calibrated",
    "CheckedRun",
    "Keep",
    "LimitStatus",
    "Metric",
    "OwnSession",
    "Planned",
    "Plan",
    "RunDifference",
    "RunDirectory",
    "RunOptions",
    "Selection",
    "Settings",
    "Status",
    "StudyResult",
    "Summary",
    "Verified",
    "Workload",
    "Workspace",
    # errors
    "BitalloyError",
    "BudgetError",
    "DataError",
    "MissingExtraError",
    "ModelError",
    "RunDirectoryError",
    "UnreachableError",
    "UnsupportedOpError",
]

_HOMES = {
    "load": "pipeline.prepare",
    "open_data": "pipeline.prepare",
    "analyze": "pipeline.analyze",
    "confirm": "sensitivity.measuring",
    "calibrate": "pipeline.calibrate",
    "measure_exact": "sensitivity.measuring",
    "measure_metric": "tasks.metric",
    "measure_cost": "measure.cost",
    "resolve_drops": "pipeline.resolve",
    "plan": "pipeline.plan",
    "plan_again": "pipeline.plan",
    "apply": "pipeline.ship",
    "verify": "pipeline.ship",
    "report": "pipeline.run:render",
    "publish": "pipeline.run",
    "run": "pipeline.run",
    "quantize": "pipeline.run:quantize_model",
    "study": "pipeline.study",
    "read_study": "pipeline.study",
    "check": "pipeline.check:check_run",
    "diff": "pipeline.check:diff_runs",
    "write_report": "pipeline.report",
    "evaluate": "pipeline.evaluate:evaluate_models",
    "Analysis": "sensitivity.analysis",
    "Budget": "core.plans",
    "Calibrated": "rewrite.calibrated",
    "CheckedRun": "core.checked",
    "Keep": "core.plans",
    "LimitStatus": "core.status",
    "Metric": "tasks.own",
    "OwnSession": "tasks.own",
    "Planned": "core.planned",
    "Plan": "core.schemes",
    "RunDifference": "core.checked",
    "RunDirectory": "core.store",
    "RunOptions": "pipeline.prepare",
    "Selection": "sensitivity.measuring",
    "Settings": "core.records",
    "Status": "core.status",
    "StudyResult": "core.studies",
    "Summary": "core.outcome",
    "Verified": "pipeline.ship",
    "Workload": "core.records",
    "Workspace": "core.work",
    "BitalloyError": "core.errors",
    "BudgetError": "core.errors",
    "DataError": "core.errors",
    "MissingExtraError": "core.errors",
    "ModelError": "core.errors",
    "RunDirectoryError": "core.errors",
    "UnreachableError": "core.errors",
    "UnsupportedOpError": "core.errors",
}
"""Public name -> the module that defines it, followed by `:name` where it has another name there."""


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'bitalloy' has no attribute '{name}'")
    module, _, other = _HOMES[name].partition(":")
    found = getattr(import_module(f"bitalloy.{module}"), other or name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Root(ModuleType):
    """The package itself, in which a public function keeps its name although a sub-package is called the same.

    Python stores every imported sub-package as an attribute of its parent: `import bitalloy.verify.course` would put
    the package `verify` where users expect the function `bitalloy.verify`. Such an assignment is left out here.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Root
