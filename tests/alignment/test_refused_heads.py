"""Heads on which a method cannot work are refused by name, before anything is trained."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import Trainer

from hf_adapt import Adaptation, adapt
from hf_adapt.alignment import (
    ADDA,
    ATDOC,
    FGM,
    SHOT,
    AaD,
    PriorCorrection,
    SelfTraining,
    SupervisedContrastive,
)
from tests.helpers.data import collate, rows
from tests.helpers.models import family
from tests.helpers.trainers import arguments

REFUSED: list[tuple[Callable[[], Adaptation], str]] = [
    *((method, head) for method in (SelfTraining, SHOT, ATDOC, AaD) for head in ("llama", "t5")),
    (PriorCorrection, "llama"),
    (SelfTraining, "bert_masked"),
    (lambda: ADDA(family("t5")), "t5"),
    (FGM, "t5"),
    (SelfTraining, "bert_answers"),
    (SupervisedContrastive, "bert_answers"),
]


@pytest.mark.parametrize(("method", "head"), REFUSED)
def test_a_head_is_refused_by_name(
    method: Callable[[], Adaptation], head: str, tmp_path: Path
) -> None:
    made = method()
    trainer = Trainer(
        family(head),
        arguments(tmp_path),
        train_dataset=rows(8, 1, "lm"),
        data_collator=collate,
    )
    streams = {} if isinstance(made, SHOT) else {"target_dataset": rows(8, 2, None)}
    with pytest.raises(ValueError, match=f"{type(made).__name__}.*Use "):
        adapt(trainer, made, **streams).train()
    assert trainer.state.global_step == 0
