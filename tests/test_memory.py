"""Nothing outlives its step: no batch and no tensor while a run lasts, no model after it.

A cycle through a tensor's hooks is never collected, so one forgotten hook costs a batch a step.
"""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_adapt import (
    DANN,
    MMD,
    AdaptationCallback,
    Distillation,
    GradualUnfreezingCallback,
    InformationMaximization,
    KnowledgeCallback,
    Objective,
)
from hf_adapt.distillation import (
    AttentionMaps,
    CachedTeacher,
    Contrastive,
    HiddenStates,
    SelfAttentionRelations,
    SelfTeacher,
)
from hf_adapt.engine.batch import Rows
from hf_adapt.engine.streams import Stream
from hf_adapt.knowledge import (
    DescriptionAlignment,
    EntityPrediction,
    KnowledgeInjection,
    KnowledgeInjector,
    LinkPrediction,
    TextTriples,
)
from hf_adapt.knowledge.injection.adaptation import KnowledgeAdaptation
from hf_adapt.unfreezing import FreezeOnly
from tests.helpers import toy
from tests.helpers.data import collate, rows
from tests.helpers.models import FIVE, bert, llama
from tests.helpers.trainers import arguments

Make = Callable[[Path], tuple[Any, TrainerCallback | None]]
"""Makes a model and the callback that adds the capability to its Trainer."""


class Centres(Objective):
    """An objective of an author's own, on features and on predictions."""

    needs_streams = ("target",)

    def loss(self, batch: Any) -> torch.Tensor:
        features, domain = batch.features()
        logits, _ = batch.logits()
        batch.log("seen", features.mean())
        gap = features[domain == 0].mean(0) - features[domain > 0].mean(0)
        return gap.square().sum() + logits.square().mean()


def domains(*objectives: type[Objective], **settings: Any) -> Make:
    return lambda folder: (
        bert(),
        AdaptationCallback(
            *(objective() for objective in objectives),
            target_dataset=Stream(rows(40, 2, labels=None), **settings),
        ),
    )


def distilled(*others: type[SelfTeacher], featured: bool = False) -> Make:
    def make(folder: Path) -> tuple[Any, TrainerCallback]:
        student, teacher = (bert(seed=seed, attn_implementation="eager") for seed in (0, 1))
        relations = SelfAttentionRelations(num_heads=2)
        features = [HiddenStates(project=True), relations, AttentionMaps(), Contrastive()]
        teachers = [teacher, *(other() for other in others)]
        objective = Distillation(teachers, features=features if featured else [])
        return student, AdaptationCallback(objective)

    return make


def known(*objectives: type[Objective], **injector: Any) -> Make:
    def make(folder: Path) -> tuple[Any, TrainerCallback]:
        own = KnowledgeInjector(**injector)
        injection = KnowledgeInjection(toy.graph(), toy.vectors(), injector=own)
        return bert(), AdaptationCallback(injection, *(kind(injection) for kind in objectives))

    return make


CASES: dict[str, Make] = {
    "plain": lambda folder: (bert(), None),
    "mmd": domains(MMD),
    "dann": domains(DANN),
    "information maximization": domains(InformationMaximization),
    "several, separate": domains(MMD, DANN, Centres, forward="separate"),
    "teacher": distilled(),
    "several teachers": distilled(SelfTeacher),
    "features": distilled(featured=True),
    "self-teacher": lambda folder: (
        bert(dropout=True),
        AdaptationCallback(Distillation(SelfTeacher())),
    ),
    "cached teacher": lambda folder: (
        bert(),
        AdaptationCallback(Distillation(CachedTeacher(folder / "cache", bert(seed=1)))),
    ),
    "language model, chunked": lambda folder: (
        llama(),
        AdaptationCallback(Distillation(llama(seed=1))),
    ),
    "language model, whole logits": lambda folder: (
        llama(),
        AdaptationCallback(Distillation(llama(seed=1), chunked=False)),
    ),
    "described": lambda folder: (bert(), KnowledgeCallback(toy.graph())),
    "gated addition": known(layers=["embeddings", 0, "head"], num_neighbours=2),
    "cross-attention": known(layers=0, injection_layer="cross_attention", num_heads=2),
    "adapter": known(layers=-1, injection_layer="adapter"),
    "soft prompt": known(injection_layer="soft_prompt"),
    "text triples": lambda folder: (bert(), AdaptationCallback(TextTriples(toy.graph()))),
    "knowledge objectives": known(
        EntityPrediction, LinkPrediction, DescriptionAlignment, layers=0, num_neighbours=2
    ),
    "unfreezing": lambda folder: (bert(), GradualUnfreezingCallback(layer_decay=0.9)),
    "prefix cache": lambda folder: (
        bert(),
        GradualUnfreezingCallback(
            FreezeOnly("embeddings", r"layer\.0"),
            cache_frozen_prefix=True,
            cache_dir=folder / "prefix",
        ),
    ),
}


class Count(TrainerCallback):
    """Counts live tensors, and the rows and batches that objectives see, at two steps."""

    def __init__(self) -> None:
        self.counts: list[tuple[int, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (40, 50):  # schedules are in their last phase
            gc.collect()
            objects = gc.get_objects()
            tensors = sum(issubclass(type(o), torch.Tensor) for o in objects)
            self.counts.append((tensors, sum(issubclass(type(o), Rows) for o in objects)))


if not FIVE:
    del CASES["text triples"]  # BERT of transformers 4 takes no 4-D mask


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_kept_from_step_to_step_or_after_the_run(name: str, tmp_path: Path) -> None:
    model, callback = CASES[name](tmp_path)
    adaptations = callback.plan.adaptations if isinstance(callback, AdaptationCallback) else ()
    knowledge = any(isinstance(a, KnowledgeAdaptation) for a in adaptations)
    labels = "lm" if name.startswith("language") else "row"
    # One epoch: its last batch may be smaller.
    data = toy.rows(120, 1) if knowledge else rows(120, 1, labels)
    settings = {"gradient_checkpointing": True} if name == "adapter" else {}
    count = Count()
    trainer = Trainer(
        model,
        arguments(
            tmp_path,
            max_steps=50,
            per_device_train_batch_size=2,
            logging_steps=100,  # what is kept for the next log must not grow either
            **settings,
        ),
        train_dataset=data,
        eval_dataset=data.select(range(4)),
        data_collator=toy.collator() if knowledge else collate,
        processing_class=toy.tokenizer() if knowledge else None,
        callbacks=[count],
    )
    if callback is not None:
        trainer.add_callback(callback)
    trainer.train()
    trainer.evaluate()
    assert count.counts[0] == count.counts[1]
    alive = [weakref.ref(each) for each in (model, trainer, *adaptations)]
    del model, trainer, callback, adaptations, count, data
    gc.collect()
    assert [each() for each in alive] == [None] * len(alive)
