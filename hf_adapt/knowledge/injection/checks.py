"""What is refused before a training with knowledge begins: trainers, models and columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from hf_adapt.engine.columns import dataset_columns
from hf_adapt.engine.texts import check_dataset, named_datasets
from hf_adapt.engine.trainer_kinds import refuse_answers, refuse_sentence_trainer
from hf_adapt.knowledge.linking.mentions import TOKEN_MENTIONS

if TYPE_CHECKING:
    from transformers import Trainer


def refuse_trainer(trainer: Trainer) -> None:
    """Refuse a Trainer whose rows are not one sequence of tokens each.

    Args:
        trainer: The Trainer, before its dataloader exists.

    Raises:
        ValueError: If it compares answers or encodes each text column by itself.
    """
    refuse_answers(
        trainer,
        "knowledge injection needs rows of one sequence",
        "Use it in a training on single sequences: SFTTrainer on the prompts and chosen answers "
        "before the preferences are trained, or a Trainer with a ...ForSequenceClassification "
        "model on labelled rows in place of a reward trainer.",
    )
    refuse_sentence_trainer(
        trainer,
        "Knowledge injection",
        "Train the transformers model inside with a Trainer of transformers, on rows with "
        "input_ids.",
    )


def refuse_prompt_vectors(model: nn.Module) -> None:
    """Refuse a PEFT method that puts prompt vectors before the tokens.

    Raises:
        ValueError: If the model has one.
    """
    configs = getattr(model, "peft_config", None) or {}
    for config in configs.values() if isinstance(configs, dict) else ():
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"{type(config).__name__} puts prompt vectors before the tokens, so the mentions' "
                "positions would be wrong. Use LoRA or another method that leaves the input as it "
                "is."
            )


def check_text_columns(trainer: Trainer, columns: Sequence[str]) -> None:
    """Refuse datasets without a column that `text_column` names, or without text in it.

    Of several columns, some may be empty: a pair may lack its second text. What only reading the
    rows would tell is checked as they come.

    Args:
        trainer: The Trainer.
        columns: The columns that were named.

    Raises:
        ValueError: Naming the dataset, and a column of nearly that name or a row.
    """
    for name, dataset in named_datasets(trainer.train_dataset, (), trainer.eval_dataset):
        if TOKEN_MENTIONS not in (dataset_columns(dataset) or ()):  # else the mentions are known
            check_dataset(dataset, columns, name, one_suffices=True, read_stream=False)
