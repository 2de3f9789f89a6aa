"""The stages in their order. The only package that knows it."""

from bitalloy.pipeline.analyze import Analysis, analyze
from bitalloy.pipeline.audit import audit, audit_run
from bitalloy.pipeline.calibration import Calibrated, calibrate
from bitalloy.pipeline.deliver import Verified, apply, float_bytes, measure_cost, plan, verify
from bitalloy.pipeline.doctor import doctor
from bitalloy.pipeline.exact import MODES, Selection, confirm, measure_exact
from bitalloy.pipeline.metric import MetricTable, measure_metric
from bitalloy.pipeline.planning import front_json, front_table, plan_again, plan_json, plan_line, unit_table
from bitalloy.pipeline.prepare import SAMPLE_NOTE, Prepared, image_spec, load, open_data, prepare
from bitalloy.pipeline.records import Planned
from bitalloy.pipeline.run import deliver, publish, render, run
from bitalloy.pipeline.sensitivities import readable, sensitivity
from bitalloy.pipeline.work import Progress, Silent, Workspace

__all__ = [
    "MODES",
    "SAMPLE_NOTE",
    "Analysis",
    "Calibrated",
    "MetricTable",
    "Planned",
    "Prepared",
    "Progress",
    "Selection",
    "Silent",
    "Verified",
    "Workspace",
    "analyze",
    "apply",
    "audit",
    "audit_run",
    "calibrate",
    "confirm",
    "deliver",
    "doctor",
    "float_bytes",
    "front_json",
    "front_table",
    "image_spec",
    "load",
    "measure_cost",
    "measure_exact",
    "measure_metric",
    "open_data",
    "plan",
    "plan_again",
    "plan_json",
    "plan_line",
    "prepare",
    "publish",
    "readable",
    "render",
    "run",
    "sensitivity",
    "unit_table",
    "verify",
]
