"""What a model is for: preparing its input, reading its output, measuring how good it is. One module per task."""

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
"""The narrower before the wider: a model with masks is also a detector."""


def find_task(model: Interface) -> Task[Any] | None:
    """Find the first task that a model looks like, or None."""
    return next((task for task in TASKS if task.matches(model)), None)
