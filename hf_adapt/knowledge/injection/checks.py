"""What is refused before a training with knowledge begins: trainers and columns."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_adapt.engine.columns import dataset_columns
from hf_adapt.engine.supported import refuse_answers, refuse_sentence_trainer
from hf_adapt.knowledge.linking.mapping import TOKEN_MENTIONS

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


def check_text_columns(trainer: Trainer, columns: Sequence[str]) -> None:
    """Refuse datasets without a column that `text_column` names.

    Args:
        trainer: The Trainer.
        columns: The columns that were named.

    Raises:
        ValueError: Naming the dataset, and a column of nearly that name.
    """
    for name, dataset in _datasets(trainer):
        found = dataset_columns(dataset)
        if found is not None:
            check_has_text(found, columns, f"the {name} does not have")


def check_has_text(found: Collection[str], columns: Sequence[str], which: str) -> None:
    """Refuse rows without a column that `text_column` names.

    Args:
        found: The columns that there are.
        columns: The columns that were named.
        which: Who lacks it, for the message: "the train_dataset does not have".

    Raises:
        ValueError: Naming a column of nearly that name.
    """
    if TOKEN_MENTIONS in found:  # placed already
        return
    for column in columns:
        if column not in found:
            near = difflib.get_close_matches(column, found, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"text_column names {column!r}, which {which}.{hint} There is "
                f"{', '.join(found)}. Keep the text as a column when you tokenise. Without "
                "text_column=, the column 'text' is read where there is one, and else what the "
                "tokens decode to."
            )


def _datasets(trainer: Trainer) -> Iterator[tuple[str, Any]]:
    """The datasets of a run with their names."""
    yield "train_dataset", trainer.train_dataset
    several: Any = trainer.eval_dataset
    if isinstance(several, Mapping):
        for name, dataset in several.items():
            yield f"eval_dataset[{name!r}]", dataset
    elif several is not None:
        yield "eval_dataset", several
