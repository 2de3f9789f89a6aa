"""bitalloy: the fastest mixed-precision version of an ONNX model that keeps its accuracy, with proof.

model = bitalloy.load("model.onnx")
data = bitalloy.open_data(model, "images/")
analysis = bitalloy.analyze(model, data)
planned = bitalloy.plan(analysis, bitalloy.Budget(latency_ratio=0.7))
verified = bitalloy.verify(analysis, planned)
print(verified.summary.headline)
"""

from bitalloy.errors import (
    BitalloyError,
    BudgetError,
    DataError,
    MissingExtraError,
    ModelError,
    RunDirectoryError,
    UnsupportedOpError,
)
from bitalloy.outcome import Summary
from bitalloy.pipeline import (
    Analysis,
    Calibrated,
    Planned,
    Selection,
    Verified,
    Workspace,
    analyze,
    apply,
    calibrate,
    confirm,
    load,
    measure_cost,
    measure_exact,
    measure_metric,
    open_data,
    plan,
    plan_again,
    publish,
    run,
    verify,
)
from bitalloy.pipeline import render as report
from bitalloy.plans import Budget, Keep
from bitalloy.records import Precision, Settings
from bitalloy.store import RunDirectory

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
    "Precision",
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
