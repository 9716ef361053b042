"""The class of the model that a command is given."""

from __future__ import annotations

import enum
from typing import Any


class Task(enum.StrEnum):
    """What a model's head predicts."""

    sequence_classification = "sequence-classification"
    token_classification = "token-classification"
    question_answering = "question-answering"
    masked_lm = "masked-lm"
    causal_lm = "causal-lm"
    seq2seq_lm = "seq2seq-lm"
    image_classification = "image-classification"
    audio_classification = "audio-classification"
    none = "none"


def model_class(name: str, task: Task | None) -> Any:
    """The class that loads a model with its head.

    Args:
        name: The model's folder, or its id on the Hub.
        task: The head; by default the one that the model's configuration names.

    Raises:
        ValueError: If there is no such model, or transformers does not have its class.
    """
    import transformers

    from hf_adapt.models.heads import HEADS
    from hf_adapt.models.hub_names import check_hub_name

    check_hub_name(name)
    if task is Task.none:
        return transformers.AutoModel
    if task is not None:
        head: Any = "conditional_generation" if task is Task.seq2seq_lm else task.name
        return getattr(transformers, HEADS[head].auto_class)
    config = transformers.AutoConfig.from_pretrained(name)
    named = (getattr(config, "architectures", None) or ["AutoModel"])[0]
    found = getattr(transformers, named, None)
    if found is None:
        raise ValueError(
            f"{name} names the class {named!r}, which transformers {transformers.__version__} "
            f"does not have. Pass --task: {', '.join(Task)}."
        )
    return found
