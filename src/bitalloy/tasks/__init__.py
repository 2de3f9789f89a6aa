"""Tasks of models, one module each: preparing inputs, reading outputs, and measuring how good a model is."""

from __future__ import annotations

from typing import Any

from bitalloy.tasks import detection, instance, language, promptable, semantic
from bitalloy.tasks.base import Interface, Task

__all__ = ["TASKS", "find_task"]

TASKS: tuple[Task[Any], ...] = (
    instance.INSTANCE,
    detection.DETECTION,
    promptable.PROMPTABLE,
    language.LANGUAGE,
    semantic.SEMANTIC,
)
"""All tasks, the narrower before the wider, because a model with masks is also a detector."""


def find_task(model: Interface) -> Task[Any] | None:
    """Find the first task that a model looks like, or None."""
    return next((task for task in TASKS if task.matches(model)), None)
