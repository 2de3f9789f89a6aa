"""bitalloy: the fastest mixed-precision version of an ONNX model that keeps its accuracy, with proof.

model = bitalloy.load("model.onnx")
data = bitalloy.open_data(model, "images/")
analysis = bitalloy.analyze(model, data)
planned = bitalloy.plan(analysis, bitalloy.Budget(latency_ratio=0.7))
verified = bitalloy.verify(analysis, planned)
print(verified.summary.headline)
"""

from bitalloy.core.errors import (
    BitalloyError,
    BudgetError,
    DataError,
    MissingExtraError,
    ModelError,
    RunDirectoryError,
    UnsupportedOpError,
)
from bitalloy.core.outcome import Summary
from bitalloy.core.planned import Planned
from bitalloy.core.plans import Budget, Keep
from bitalloy.core.records import Settings
from bitalloy.core.schemes import Plan
from bitalloy.core.store import RunDirectory
from bitalloy.core.work import Workspace
from bitalloy.measure.cost import measure_cost
from bitalloy.pipeline.analyze import analyze
from bitalloy.pipeline.calibrate import calibrate
from bitalloy.pipeline.plan import plan, plan_again
from bitalloy.pipeline.prepare import load, open_data
from bitalloy.pipeline.run import publish, run
from bitalloy.pipeline.run import render as report
from bitalloy.pipeline.ship import Verified, apply, verify
from bitalloy.rewrite.calibrated import Calibrated
from bitalloy.sensitivity.analysis import Analysis
from bitalloy.sensitivity.measuring import Selection, confirm, measure_exact
from bitalloy.tasks.metric import measure_metric

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
    "plan",
    "plan_again",
    "apply",
    "verify",
    "report",
    "publish",
    "run",
    # what they take and give
    "Analysis",
    "Budget",
    "Calibrated",
    "Keep",
    "Planned",
    "Plan",
    "RunDirectory",
    "Selection",
    "Settings",
    "Summary",
    "Verified",
    "Workspace",
    # errors
    "BitalloyError",
    "BudgetError",
    "DataError",
    "MissingExtraError",
    "ModelError",
    "RunDirectoryError",
    "UnsupportedOpError",
]
