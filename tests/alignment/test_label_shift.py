"""A toy with a known answer in real runs: classes whose frequencies differ, and that moved."""

import statistics
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer

from hf_adapt import Adaptation, InformationMaximization, adapt
from hf_adapt.alignment import ATDOC, PriorCorrection, SelfTraining
from tests.helpers.trainers import arguments

SEEDS = range(5)
RARE = (0.85, 0.15)
Rows = list[dict[str, torch.Tensor]]


class Net(nn.Module):
    """A small network with a head, called like a model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh())
        self.head = nn.Linear(8, 2)
        self.config = SimpleNamespace(num_labels=2, id2label={0: "often", 1: "seldom"})

    def forward(self, input_values: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        logits = self.head(self.body(input_values))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def domain(
    seed: int, priors: tuple[float, float], move: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two round classes at ±1, moved along the line between them."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(256, generator=generator) < priors[1]).long()
    centres = torch.stack([labels * 2.0 - 1 + move, torch.zeros(256)], 1)
    return centres + 0.6 * torch.randn(256, 2, generator=generator), labels


def rows(x: torch.Tensor, labels: torch.Tensor | None = None) -> Rows:
    if labels is None:
        return [{"input_values": row} for row in x]
    return [{"input_values": r, "labels": y} for r, y in zip(x, labels, strict=True)]


def accuracy(
    folder: Any, seed: int, make: Callable[[], list[Adaptation]] | None, priors: Any, move: float
) -> float:
    torch.manual_seed(seed)
    source, (target, truth) = domain(seed, (0.5, 0.5), 0.0), domain(seed + 100, RARE, move)
    args = arguments(
        folder,
        max_steps=50,
        learning_rate=0.02,
        per_device_train_batch_size=32,
        logging_steps=50,
        seed=seed,
        remove_unused_columns=False,
    )
    trainer = Trainer(Net(), args, train_dataset=rows(*source))
    if make is not None:
        adapt(trainer, *make(), target_dataset=rows(target), target_priors=priors)
    trainer.train()
    with torch.no_grad():
        guess = trainer.model.eval()(target)["logits"].argmax(1)
    return (guess == truth).float().mean().item()


METHODS: dict[str, Callable[[], list[Adaptation]]] = {
    "self_training": lambda: [SelfTraining(refreshes=(0.3, 0.5, 0.7))],
    "information_maximization": lambda: [InformationMaximization()],
    "atdoc": lambda: [ATDOC(1.0, feature_layer="body", pooling="mean")],
}
CORRECTION = "prior_correction"
EVERY = {**METHODS, CORRECTION: lambda: [PriorCorrection()]}


@pytest.fixture(scope="module")
def mean(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., float]:
    @cache
    def of(name: str | None, priors: Any = None, move: float = 0.9) -> float:
        folder = tmp_path_factory.mktemp("runs")
        make = None if name is None else EVERY[name]
        return statistics.mean(accuracy(folder, seed, make, priors, move) for seed in SEEDS)

    return of


@pytest.mark.parametrize("name", METHODS)
def test_known_frequencies_find_classes_that_moved(name: str, mean: Callable[..., float]) -> None:
    """The source alone does not, nor do the same methods with uniform frequencies."""
    assert mean(None) < 0.7
    assert mean(name, RARE) > mean(None) + 0.08
    assert mean(name, RARE) > mean(name, "uniform") + 0.08


@pytest.mark.parametrize("name", METHODS)
def test_uniform_frequencies_lose_where_only_frequencies_differ(
    name: str, mean: Callable[..., float]
) -> None:
    assert mean(name, "uniform", 0.0) < mean(None, None, 0.0) - 0.015
    assert mean(name, RARE, 0.0) > mean(None, None, 0.0) - 0.01


@pytest.mark.parametrize("name", [*METHODS, CORRECTION])
def test_estimates_are_as_good_as_the_truth_where_only_frequencies_differ(
    name: str, mean: Callable[..., float]
) -> None:
    """That is what they assume."""
    assert mean(name, "estimate", 0.0) == pytest.approx(mean(name, RARE, 0.0), abs=0.012)


def test_a_correction_gains_in_both_cases(mean: Callable[..., float]) -> None:
    for move, least in ((0.0, 0.0), (0.9, 0.05)):
        assert mean(CORRECTION, RARE, move) > mean(None, None, move) + least
