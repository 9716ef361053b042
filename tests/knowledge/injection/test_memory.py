"""Nothing of a step outlives it, and nothing of a run the run."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_adapt import FreezeOnly, GradualUnfreezing, adapt
from hf_adapt.engine.batch import Batch, Part
from hf_adapt.knowledge import (
    DescriptionAlignment,
    EntityPrediction,
    KnowledgeInjection,
    KnowledgeInjector,
    LinkPrediction,
    load_knowledge_model,
)
from hf_adapt.knowledge.injection.inputs import Knowledge
from tests.knowledge import toy
from tests.knowledge.injection.test_injection import injection, trainer
from tests.knowledge.injection.test_saving import trained

STEPS, WARM = 24, 8


@pytest.fixture(autouse=True)
def quick_collections() -> Any:
    """What was there before is not looked at."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Alive(TrainerCallback):
    """How many objects of a step are alive when it has ended."""

    def __init__(self) -> None:
        self.counts: list[tuple[int, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (WARM, STEPS - 1):
            gc.collect()
            everything = gc.get_objects()
            ours = sum(type(each) in (Batch, Part, Knowledge) for each in everything)
            self.counts.append((sum(type(each) is torch.Tensor for each in everything), ours))


def with_objectives() -> list[Any]:
    own = injection()
    kinds = (EntityPrediction, LinkPrediction, DescriptionAlignment)
    return [own, *(kind(own) for kind in kinds)]


def form(name: str, **options: Any) -> Callable[[], list[Any]]:
    return lambda: [injection(injector=KnowledgeInjector(form=name, **options))]


KINDS: dict[str, tuple[str, Callable[[], list[Any]], dict[str, Any]]] = {
    "gated": ("bert", form("gated"), {}),
    "silent": ("bert", form("gated"), {"logging_strategy": "no"}),
    "cross_attention": ("bert", form("cross_attention", layers=0, num_neighbours=2), {}),
    "adapter": ("bert", form("adapter", layers=0), {}),
    "soft_prompt": ("llama", form("soft_prompt"), {}),
    "text_triples": ("bert", form("text_triples"), {}),
    "checkpointed": ("bert", form("gated", layers=0), {"gradient_checkpointing": True}),
    "encoder-decoder": ("t5", form("gated"), {}),
    "default vectors": ("bert", lambda: [KnowledgeInjection(toy.graph())], {}),
    "losses": ("bert", with_objectives, {}),
    "unfreezing": (
        "bert",
        lambda: [GradualUnfreezing(every_steps=2, layer_decay=0.5, rewarm_steps=2)],
        {},
    ),
    "prefix": (
        "bert",
        lambda: [GradualUnfreezing(FreezeOnly("embeddings", "layer.0"), cache_frozen_prefix=True)],
        {},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_grows_from_step_to_step(kind: str, tmp_path: Path) -> None:
    name, make, settings = KINDS[kind]
    alive = Alive()
    one = trainer(tmp_path, name, max_steps=STEPS, **settings)
    one.add_callback(alive)
    adaptations = make()
    adapt(one, *adaptations).train()
    (tensors, ours), (later_tensors, later_ours) = alive.counts
    assert later_tensors <= tensors and later_ours <= ours
    model = one.model_wrapped
    watched = [weakref.ref(each) for each in (one, model, *model.parameters(), *adaptations)]
    keeps_model = isinstance(adaptations[0], KnowledgeInjection)  # for explain()
    if not keeps_model:
        del one, model
        gc.collect()
        assert [ref() for ref in watched[: -len(adaptations)]] == [None] * (len(watched) - 1)
    else:
        assert watched[0]() is one
        del one
        gc.collect()
        assert watched[0]() is None  # the Trainer, its optimizer and its data
        del model
    del adaptations
    gc.collect()
    assert [ref() for ref in watched] == [None] * len(watched)


def test_loaded_models_go_with_their_last_reference(tmp_path: Path) -> None:
    trained(tmp_path)
    gone = []
    for _ in range(2):
        model = load_knowledge_model(tmp_path / "final")
        inputs = toy.tokenizer()(["w0"], return_tensors="pt", return_token_type_ids=False)
        with pytest.warns(UserWarning, match="linked in the tokenizer's own decoding"):
            model(**inputs).logits.sum().backward()
        gone.append(weakref.ref(model))
        del model
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_a_run_that_fails_keeps_nothing(tmp_path: Path) -> None:
    class Broken(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 2:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    one = trainer(tmp_path, cls=Broken, max_steps=8)
    own = GradualUnfreezing(every_steps=1)
    adapt(one, injection(), own)
    try:
        one.train()
    except KeyboardInterrupt:
        pass
    watched = [weakref.ref(one), weakref.ref(one.model)]
    del one
    gc.collect()
    assert [ref() for ref in watched] == [None, None] and own.name == "unfreezing"
