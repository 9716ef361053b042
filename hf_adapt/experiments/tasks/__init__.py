"""What a model's head predicts: how rows are prepared, collated and scored."""

from hf_adapt.experiments.tasks.sequence_classification import SequenceClassification
from hf_adapt.experiments.tasks.task import Task

TASKS: dict[str, type[Task]] = {"sequence-classification": SequenceClassification}
"""Tasks by the names that configurations use."""

__all__ = ["TASKS", "SequenceClassification", "Task"]
