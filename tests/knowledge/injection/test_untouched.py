"""What runs the model beside the training leaves its counters, modes and random numbers alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_adapt.knowledge import EntityVectors, KnowledgeInjector, explain, load_knowledge_model
from hf_adapt.knowledge.injection.text_triples import check_visibility
from tests.helpers import toy
from tests.helpers.injectors import trained
from tests.helpers.models import FIVE, family


class Counter(nn.Module):
    """In front of the embeddings' norm: counts forwards, in evaluation mode too."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer("in_place", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))
        self.calls = 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.in_place += 1
        self.replaced = self.replaced + 1
        self.calls += 1
        return self.norm(hidden + 0 * torch.rand(()))


def counting(model: Any) -> Any:
    embeddings = model.bert.embeddings
    embeddings.LayerNorm = Counter(embeddings.LayerNorm)
    model.train()
    model.bert.encoder.layer[0].eval()  # as a script may have it
    return model


def describe(folder: Path) -> tuple[Any, Callable[[], Any]]:
    model = counting(family("bert"))
    return model, lambda: EntityVectors.from_descriptions(
        toy.graph(), model, toy.tokenizer(), batch_size=2
    )


def visibility(folder: Path) -> tuple[Any, Callable[[], Any]]:
    model = counting(family("bert"))
    return model, lambda: check_visibility(model)


def explaining(folder: Path) -> tuple[Any, Callable[[], Any]]:
    trained(folder, injector=KnowledgeInjector(0))
    model = counting(load_knowledge_model(folder / "final"))
    return model, lambda: explain(model, "w0 w20")


@pytest.mark.parametrize("beside", [describe, explaining, *([visibility] if FIVE else [])])
def test_nothing_is_counted(beside: Any, tmp_path: Path) -> None:
    model, act = beside(tmp_path)
    counter = model.bert.embeddings.LayerNorm
    modes = {name: module.training for name, module in model.named_modules()}
    replaced, state = counter.replaced, torch.get_rng_state()
    act()
    assert (counter.in_place, counter.replaced, counter.calls) == (0, 0, 0)
    assert counter.replaced is replaced
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)
