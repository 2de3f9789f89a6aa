"""The stages in their order. The only package that knows it."""

from bitalloy.pipeline.analyze import Analysis, analyze, image_spec, load, open_data
from bitalloy.pipeline.deliver import Verified, apply, measure_cost, plan, verify
from bitalloy.pipeline.records import Planned
from bitalloy.pipeline.run import publish, render, run
from bitalloy.pipeline.work import Progress, Silent, Workspace

__all__ = [
    "Analysis",
    "Planned",
    "Progress",
    "Silent",
    "Verified",
    "Workspace",
    "analyze",
    "apply",
    "image_spec",
    "load",
    "measure_cost",
    "open_data",
    "plan",
    "publish",
    "render",
    "run",
    "verify",
]
