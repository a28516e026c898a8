"""The tasks that ``--model.task`` chooses from."""

from __future__ import annotations

from job.model.multilabel import MultilabelTask
from job.model.spec import TaskName
from job.model.task import ClassificationTask, Task

TASKS: dict[TaskName, type[Task]] = {"classification": ClassificationTask, "multilabel": MultilabelTask}
