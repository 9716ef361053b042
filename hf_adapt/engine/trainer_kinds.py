"""Trainers whose batches are not one sequence a row: what works there, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from hf_adapt.engine.columns import dataset_columns

if TYPE_CHECKING:
    from transformers import Trainer

COUPLED_ROWS = ("DPOTrainer", "RewardTrainer", "KTOTrainer", "GRPOTrainer", "RLOOTrainer")
"""TRL's Trainers whose losses compare rows with each other, or that write rows of their own."""


def is_sentence_trainer(trainer: Trainer) -> bool:
    """Whether it is one of sentence-transformers': a row is several texts, one input each."""
    return hasattr(trainer, "collect_features")


def compares_answers(trainer: Trainer) -> bool:
    """Whether it trains on answers that are compared: preferences, or rewards of its own rows."""
    classes = [cls for cls in type(trainer).__mro__ if cls.__module__.startswith("trl.")]
    if any(cls.__name__ in COUPLED_ROWS for cls in classes):
        return True
    trainer._set_signature_columns_if_needed()
    columns = [
        *(vars(trainer).get("_signature_columns") or ()),
        *(dataset_columns(trainer.train_dataset) or ()),
    ]
    return {"chosen", "rejected"} <= {str(name).split("_")[0] for name in columns}


def refuse_answers(trainer: Trainer, why: str, instead: str) -> None:
    """Refuse a Trainer that compares answers.

    Args:
        trainer: The Trainer.
        why: What does not fit, as the end of a sentence.
        instead: What to do, as whole sentences.

    Raises:
        ValueError: If it does.
    """
    if compares_answers(trainer):
        raise ValueError(
            f"{type(trainer).__name__} compares answers with each other (preference data, "
            f"rewards), and {why}. {instead}"
        )


def refuse_sentence_trainer(trainer: Trainer, what: str, instead: str) -> None:
    """Refuse what needs one tokenised sequence a row.

    Args:
        trainer: The Trainer.
        what: What is refused.
        instead: What to do, as a whole sentence.

    Raises:
        ValueError: If the Trainer is one of sentence-transformers'.
    """
    if is_sentence_trainer(trainer):
        raise ValueError(
            f"{what} is not supported with {type(trainer).__name__}, whose rows are several texts "
            f"and whose model has inputs and outputs of its own. {instead}"
        )


def sentence_inputs(
    trainer: Any, model: nn.Module, inputs: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """What the model of a sentence-transformers Trainer takes for these rows, column by column.

    A cross-encoder takes pairs, which its losses make of the texts: here the first two columns.

    Raises:
        ValueError: If the rows are a cross-encoder's and have no pair.
    """
    inputs = dict(inputs)
    own = {name: inputs.pop(name, None) for name in ("dataset_name", "prompt", "task")}
    columns = trainer.collect_features(inputs)[0]
    if not columns or isinstance(columns[0], Mapping):
        yield from columns
        return
    if len(columns) < 2 or not isinstance(columns[1][0], str):
        raise ValueError(
            f"The features of {type(trainer).__name__} are those of pairs of texts, and these rows "
            "have a list of texts or no second one. Use a dataset of pairs (query, document)."
        )
    pairs = list(zip(columns[0], columns[1], strict=True))
    if hasattr(model, "preprocess"):
        encoded = model.preprocess(pairs, prompt=own["prompt"], task=own["task"])  # type: ignore[operator]
    else:  # sentence-transformers 5.1
        encoded = model.tokenizer(pairs, padding=True, truncation=True, return_tensors="pt")  # type: ignore[operator]
    yield trainer._prepare_inputs(dict(encoded))
