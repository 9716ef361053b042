"""What a model's head predicts: how rows are prepared, collated and scored."""

from hf_adapt.experiments.tasks.image_classification import ImageClassification
from hf_adapt.experiments.tasks.sequence_classification import SequenceClassification
from hf_adapt.experiments.tasks.task import Task
from hf_adapt.experiments.tasks.token_classification import TokenClassification

TASKS: dict[str, Task] = {
    "sequence-classification": SequenceClassification(),
    "token-classification": TokenClassification(),
    "image-classification": ImageClassification(),
}
"""Tasks by the names that configurations use."""

__all__ = [
    "TASKS",
    "ImageClassification",
    "SequenceClassification",
    "Task",
    "TokenClassification",
]
