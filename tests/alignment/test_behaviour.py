"""Toys with a known answer: classes that moved or were rotated, and the methods that find them."""

import math
import statistics
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_adapt import Objective
from hf_adapt.alignment import (
    AFN,
    BNM,
    CMD,
    CORAL,
    JMMD,
    MCC,
    MMD,
    DeepJDOT,
    EntropyMinimization,
    InformationMaximization,
)
from tests.helpers.fake_batch import FakeBatch

SEEDS, STEPS, ROWS = range(5), 100, 32
Domain = tuple[torch.Tensor, torch.Tensor]


def moved(generator: torch.Generator, is_target: bool) -> Domain:
    """Two round classes at ±1; those of the target have moved by (1, 1)."""
    labels = torch.arange(512) % 2
    noise = 0.3 * torch.randn(512, 2, generator=generator)
    centres = torch.stack([labels * 2.0 - 1, torch.zeros(512)], 1)
    return centres + noise + (1.0 if is_target else 0.0), labels


def rotated(generator: torch.Generator, is_target: bool) -> Domain:
    """Two long classes side by side; those of the target are rotated by 45 degrees."""
    labels = torch.arange(512) % 2
    noise = torch.randn(512, 2, generator=generator)
    rows = torch.stack([labels * 2.0 - 1 + 0.2 * noise[:, 0], noise[:, 1]], 1)
    cosine = math.sqrt(0.5) if is_target else 1.0
    sine = math.sqrt(0.5) if is_target else 0.0
    return rows @ torch.tensor([[cosine, sine], [-sine, cosine]]), labels


def scarce(generator: torch.Generator, is_target: bool) -> Domain:
    """Classes that moved, of which one is rare in the target."""
    rows, labels = moved(generator, is_target)
    if not is_target:
        return rows, labels
    share = torch.where(labels == 0, 1.0, 0.15)
    picked = torch.multinomial(share, len(rows), replacement=True, generator=generator)
    return rows[picked], labels[picked]


def accuracies(toy: Callable[..., Domain], make: Callable[[], Objective] | None) -> list[float]:
    """Accuracy on the target of a small network, for each seed."""
    return [_accuracy(toy, make() if make else None, seed) for seed in SEEDS]


def _accuracy(toy: Callable[..., Domain], objective: Objective | None, seed: int) -> float:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    (source, labels), (target, truth) = (toy(generator, domain) for domain in (False, True))
    body = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh())
    head = nn.Linear(8, 2)
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=0.01)
    domain = torch.arange(2 * ROWS) // ROWS
    for step in range(STEPS):
        picked, others = torch.randint(0, 512, (2, ROWS), generator=generator)
        features = body(torch.cat([source[picked], target[others]]))
        logits = head(features)
        loss = F.cross_entropy(logits[:ROWS], labels[picked])
        if objective is not None:
            seen = torch.cat([labels[picked], torch.full((ROWS,), -100)])
            batch = FakeBatch(features, domain, logits, seen, progress=step / STEPS)
            terms = objective.loss(batch)  # type: ignore[arg-type]
            for term in terms.values() if isinstance(terms, dict) else [terms]:
                value = term[0] / term[1] if isinstance(term, tuple) else term
                loss = loss + objective.term_weight(batch.progress) * value
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (head(body(target)).argmax(1) == truth).float().mean().item()


@cache
def source_only(toy: Callable[..., Domain]) -> float:
    """Mean accuracy without target rows."""
    return statistics.mean(accuracies(toy, None))


SOLVE_THE_MOVE: list[Callable[[], Objective]] = [
    lambda: BNM(weight=1.0),
    lambda: CMD(weight=1.0),
    CORAL,
    lambda: DeepJDOT(weight=0.1, feature_weight=1.0),
    lambda: DeepJDOT(weight=0.5, feature_weight=1.0, unbalanced=1.0),
    lambda: InformationMaximization(weight=0.5),
    JMMD,
    MCC,
    MMD,
]


@pytest.mark.parametrize("make", SOLVE_THE_MOVE, ids=[make().name for make in SOLVE_THE_MOVE])
def test_classes_that_moved_are_found(make: Callable[[], Objective]) -> None:
    reached = accuracies(moved, make)
    assert source_only(moved) < 0.8
    assert statistics.mean(reached) > 0.95
    assert min(reached) > source_only(moved)


@pytest.mark.parametrize(
    "make", [lambda: AFN(weight=0.05), lambda: EntropyMinimization(weight=0.3), MCC]
)
def test_the_boundary_turns_with_the_classes(make: Callable[[], Objective]) -> None:
    """Some of the target stays on the wrong side of a boundary that can only turn so far."""
    assert statistics.mean(accuracies(rotated, make)) > source_only(rotated) + 0.03


@pytest.mark.parametrize("make", [EntropyMinimization, lambda: AFN(weight=0.05)])
def test_what_looks_at_each_row_alone_is_misled_by_a_move(make: Callable[[], Objective]) -> None:
    """The documentation says so: they make the model surer of what it takes for a class."""
    assert statistics.mean(accuracies(moved, make)) < source_only(moved)


def test_where_class_frequencies_differ_exact_transport_loses() -> None:
    """It moves a source class to where the target has the other one; so does aligning features."""
    exact, relaxed = (
        statistics.mean(
            accuracies(scarce, lambda rho=rho: DeepJDOT(0.5, feature_weight=1.0, unbalanced=rho))
        )
        for rho in (None, 1.0)
    )
    assert relaxed > exact + 0.05
    assert statistics.mean(accuracies(scarce, MMD)) < 0.8  # 0.99 where they agree
    assert statistics.mean(accuracies(scarce, MCC)) > 0.85
