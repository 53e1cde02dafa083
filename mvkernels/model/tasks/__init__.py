"""Tasks: problems with an exact grader, and their traces in the grammar of the control tags."""

from __future__ import annotations

from mvkernels.model.tasks import arithmetic, sat
from mvkernels.model.tasks.common import GeneratedProblem, Task, grade

__all__ = ["TASKS", "GeneratedProblem", "Task", "grade", "task_named"]

#: Every task that makes its own problems, by name.
TASKS: dict[str, Task] = {task.name: task for task in (arithmetic.TASK, sat.TASK)}


def task_named(name: str) -> Task:
    """The task of this name. Raises ValueError where there is none."""
    if name not in TASKS:
        raise ValueError(f"task: expected one of {tuple(TASKS)}, got {name!r}")
    return TASKS[name]
