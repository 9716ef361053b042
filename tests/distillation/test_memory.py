"""Nothing of a step outlives it, and nothing of a run its trainer."""

import copy
import gc
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hf_adapt import (
    AttentionMaps,
    CachedTeacher,
    Contrastive,
    DistillationTrainer,
    HiddenStates,
    SelfAttentionRelations,
    SelfTeacher,
)
from hf_adapt.distillation.hooks import Lesson
from hf_adapt.engine.batch import Part
from tests.distillation.heads import CASES
from tests.tiny import arguments, bert

STEPS = 24

FEATURES = [
    HiddenStates(project=True),
    SelfAttentionRelations(num_heads=2),
    AttentionMaps(),
    Contrastive(),
]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "model": ("sequence", {"evaluate_distillation": True}),
    "several": ("sequence", {"teacher": lambda folder: [SelfTeacher(), bert(seed=1)]}),
    "cached": ("sequence", {"teacher": lambda folder: CachedTeacher(folder / "c", bert(seed=1))}),
    "features": ("sequence", {"features": FEATURES, "eager": True}),
    "language model": ("gpt2", {}),
    "whole logits": ("gpt2", {"chunked": False}),
}


class Counting(TrainerCallback):
    """Counts what is alive at two steps; the collector has run, so circles of Python are gone."""

    def __init__(self) -> None:
        self.counts: list[Counter[str]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (4, STEPS - 1):
            gc.collect()
            kinds = (type(o) for o in gc.get_objects())
            alive = (k for k in kinds if issubclass(k, (torch.Tensor, Part, Lesson)))
            self.counts.append(Counter(kind.__name__ for kind in alive))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_stays_alive(kind: str, tmp_path: Path) -> None:
    name, options = KINDS[kind]
    options, case = copy.copy(options), CASES[name]
    counting = Counting()

    def run() -> list[weakref.ref[Any]]:
        student, teacher = case.model(0), case.model(1)
        if options.pop("eager", False):
            student.set_attn_implementation("eager")
            teacher.set_attn_implementation("eager")
        given = options.pop("teacher", lambda folder: teacher)(tmp_path)
        data = case.data(8)
        trainer = DistillationTrainer(
            model=student,
            teacher=given,
            args=arguments(tmp_path, max_steps=STEPS, logging_steps=10),
            train_dataset=data,
            eval_dataset=data,
            data_collator=case.collate,
            callbacks=[counting],
            **options,
        )
        trainer.train()
        trainer.evaluate()
        modules = [t.module for t in trainer.distillation.teachers if t.module is not None]
        return [weakref.ref(one) for one in (student, trainer, trainer.distillation, *modules)]

    left = run()
    early, late = counting.counts
    assert all(late[key] <= early[key] for key in ("Part", "Lesson")), (early, late)
    assert sum(late.values()) <= sum(early.values()) + 5, (early, late)
    gc.collect()
    assert [ref() for ref in left if ref() is not None] == []
