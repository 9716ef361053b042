"""Two models whose weights are tied, against formulas of torch and minima by hand."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback

from hf_adapt import adapt
from hf_adapt.multitask import SoftSharing, soft_sharing
from hf_adapt.multitask.soft_sharing import trace_norms
from tests.helpers.data import collate, rows
from tests.helpers.models import bert
from tests.helpers.points import Point, descent
from tests.helpers.trainers import GradientRecorder, arguments, same_bits, weights


def trainer_of(model: Any, folder: Path, *ties: SoftSharing, **settings: Any) -> Trainer:
    trainer = Trainer(
        model, arguments(folder, **settings), train_dataset=rows(12, 1), data_collator=collate
    )
    return adapt(trainer, *ties) if ties else trainer


def nuclear(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The trace norm of the stacked matrix, by torch."""
    return torch.linalg.matrix_norm(torch.stack([a.flatten(), b.flatten()], 1), ord="nuc")


# ---- the trace norm ----


@pytest.mark.parametrize("apart", [1.0, 1e-3, 1e-6])
def test_trace_norms_and_their_gradient(apart: float, monkeypatch: Any) -> None:
    monkeypatch.setattr(soft_sharing, "BLOCK", 4)
    torch.manual_seed(0)
    shapes = [(5, 3), (7,), (2, 2, 3), (1,), ()]
    own = [torch.randn(shape).double().requires_grad_() for shape in shapes]
    others = [w.detach() * 1.5 + apart * torch.randn(w.shape) for w in own]
    found, factors = trace_norms(list(zip(own, others, strict=True)))
    for a, b, value, (plus, minus) in zip(own, others, found, factors, strict=True):
        expected = nuclear(a, b)
        torch.testing.assert_close(value, expected.detach())
        if a.numel() > 1:
            (slope,) = torch.autograd.grad(expected, a)
        else:  # of one singular value, which torch cannot differentiate beside a zero
            slope = (a / (a**2 + b**2).sqrt()).detach()
        torch.testing.assert_close(plus * (a + b) + minus * (a - b), slope, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_trace_norms_where_a_singular_value_is_zero() -> None:
    """Of equal, nearly equal, parallel and empty weights; the gradient leaves it out."""
    a = torch.randn(50)
    last_bit = torch.nextafter(a, torch.full_like(a, 9.0))
    pairs = [(a, a), (a, last_bit), (a, 0 * a), (0 * a, 0 * a), (0 * a, a)]
    found, factors = trace_norms(pairs)
    length = float(a.norm())
    assert found.tolist() == pytest.approx([2**0.5 * length] * 2 + [length, 0, length], rel=1e-6)
    slopes = [x * (u + v) + y * (u - v) for (u, v), (x, y) in zip(pairs, factors, strict=True)]
    unit = (a / length).double()
    for slope, expected in zip(slopes, [0.5**0.5, 0.5**0.5, 1.0, 0.0, 0.0], strict=True):
        torch.testing.assert_close(slope.double(), expected * unit, rtol=1e-5, atol=1e-7)


# ---- in training ----


@pytest.mark.parametrize("norm", ["l2", "trace"])
@pytest.mark.parametrize("layers", [None, ["bert.encoder.layer.1", r".*\.bias"]])
def test_the_gradient_is_that_of_the_penalty_and_is_clipped(
    norm: Any, layers: Any, tmp_path: Path
) -> None:
    other, recorded = bert(seed=1), []
    before = weights(other)
    for ties in ([], [SoftSharing(other, 0.7, norm, layers)]):
        recorder = GradientRecorder()
        trainer = trainer_of(bert(), tmp_path, *ties, max_steps=1, max_grad_norm=1e6)
        trainer.add_callback(recorder)
        trainer.train()
        recorded.append((recorder.gradients[0], trainer.state.log_history[0]))
    model = bert()
    own, there = dict(model.named_parameters()), dict(other.named_parameters())
    is_tied = {n: "classifier" not in n for n in own}
    if layers:
        is_tied = {n: "layer.1." in n or n.endswith("bias") for n in own}
    pairs = [(p, there[n].detach()) for n, p in own.items() if is_tied[n]]
    if norm == "l2":
        penalty = sum(0.7 / 2 * (a - b).square().sum() for a, b in pairs)
    else:  # biases and norms are left free
        penalty = sum(0.7 * nuclear(a, b) for a, b in pairs if a.ndim > 1)
    expected = torch.autograd.grad(penalty, list(own.values()), allow_unused=True)
    given = zip(expected, own.values(), strict=True)
    flat = torch.cat(
        [(torch.zeros_like(p) if g is None else g).double().flatten() for g, p in given]
    )
    assert flat.norm() > 0.1
    torch.testing.assert_close(recorded[1][0] - recorded[0][0], flat, rtol=1e-4, atol=1e-6)
    log = recorded[1][1]
    assert log["grad_norm"] == pytest.approx(float(recorded[1][0].norm()), rel=1e-4)
    assert same_bits(before, weights(other)) and all(p.grad is None for p in other.parameters())


class Mirrored(Point):
    """The loss Σ (θ + 1)²."""

    def forward(self, x: torch.Tensor, labels: Any = None) -> dict[str, torch.Tensor]:
        return {"loss": (self.theta + 1).square().sum() + 0 * x.sum()}


@pytest.mark.parametrize("norm", ["l2", "trace"])
def test_turns_end_at_the_minimum_of_both_losses_and_the_tie(norm: Any, tmp_path: Path) -> None:
    """Of (a - 1)² + (b + 1)²; where the tie moves with the other model, and only there."""
    one, two = Point(0.3), Mirrored(0.1)
    for model in (one, two):  # the trace norm is of matrices
        model.theta = torch.nn.Parameter(model.theta.detach()[None])
    first, second = (descent(m, tmp_path, 10, learning_rate=0.1) for m in (one, two))
    adapt(first, SoftSharing(two, 0.5, norm))
    adapt(second, SoftSharing(one, 0.5, norm))
    for _ in range(12):
        first.train()
        second.train()
    best = 1 / 1.5 if norm == "l2" else 1 - 0.5 / (2 * 2**0.5)  # L2: 2 (a - 1) + a = 0
    assert one.theta.item() == pytest.approx(best, abs=1e-4)
    assert two.theta.item() == pytest.approx(-best, abs=1e-4)
    penalty = 0.5 * ((2 * best) ** 2 / 2 if norm == "l2" else 2**0.5 * best)
    log = next(e for e in second.state.log_history if "softsharing/distance" in e)
    assert log["softsharing/distance"] == pytest.approx(2 * best, abs=1e-3)
    assert log["softsharing/penalty"] == pytest.approx(penalty, abs=1e-3)


class Moved(TrainerCallback):
    """Moves a point after each step, as its own training may: by other tensors."""

    def __init__(self, point: Point) -> None:
        self.point = point

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.point.theta.data = self.point.theta.data + 0.5


def test_the_tie_follows_the_other_model_and_the_schedule(tmp_path: Path) -> None:
    model, other = Point(0.0), Point(-1.0)
    trainer = descent(model, tmp_path, 4)
    trainer.add_callback(Moved(other))
    adapt(trainer, SoftSharing(other, lambda p: 100 * p)).train()
    theta = 0.0
    for step in range(4):
        theta -= 0.01 * (2 * (theta - 1) + 25 * step * (theta - (-1 + 0.5 * step)))
    assert model.theta.item() == pytest.approx(theta, rel=1e-5)


def test_a_weight_of_zero_is_the_plain_trainer(tmp_path: Path) -> None:
    finals = []
    for ties in ([], [SoftSharing(bert(seed=1), lambda p: 0.0)], [SoftSharing(bert(seed=1), 0)]):
        model = bert()
        trainer_of(model, tmp_path, *ties).train()
        finals.append(weights(model))
    assert same_bits(finals[0], finals[1]) and same_bits(finals[0], finals[2])


def test_heads_are_left_free_and_any_two_models_of_one_body_fit(tmp_path: Path) -> None:
    """Weights that start alike and are tied strongly move alike; the new heads do not."""
    start = bert("token", num_labels=5)
    model, free = bert(seed=1), ("classifier", "bert.pooler")
    body = {n: v for n, v in weights(start).items() if not n.startswith(free)}
    tie = SoftSharing(start, 3.0)
    trainer = trainer_of(model, tmp_path, tie, optim="sgd", learning_rate=0.3, max_steps=60)
    trainer.train()
    for name, value in weights(model).items():
        gap = (value - body.get(name, 9)).abs().max()
        assert (gap < 0.2) == (name in body), name
    assert trainer.state.log_history[-2]["softsharing/distance"] < 0.3


def test_a_model_that_is_another_after_resuming_is_pointed_out(tmp_path: Path, caplog: Any) -> None:
    settings = dict(save_strategy="steps", save_steps=2, max_steps=3)
    trainer_of(bert(), tmp_path, SoftSharing(bert(seed=1), 1.0), **settings).train()
    for seed in (1, 2):
        trainer = trainer_of(bert(), tmp_path, SoftSharing(bert(seed=seed), 1.0), **settings)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert ("resumes tied to another model" in caplog.text) == (seed == 2)


# ---- bad input ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"other": "bert-base"}, "other= is a str: expected a model"),
        ({"weight": -1.0}, "weight=-1.0 must be a finite number"),
        ({"weight": math.inf}, "weight=inf must be"),
        ({"norm": "l1"}, "norm='l1' is unknown: use 'l2' or 'trace'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        SoftSharing(**{"other": Point(), "weight": 1.0, **options})


def test_models_that_do_not_fit(tmp_path: Path) -> None:
    model, frozen = bert(), bert()
    frozen.bert.requires_grad_(False)
    lora = get_peft_model(bert(), LoraConfig(task_type="SEQ_CLS"))
    wide, deep = bert(intermediate_size=48), bert(num_hidden_layers=3)
    cases: list[tuple[Any, Any, Any, str]] = [
        (model, model, None, "share bert.embeddings.word_embeddings.weight"),
        (model, Point(), None, "no weight of one name: the one has bert.embed.* other= theta"),
        (model, wide, None, r"intermediate.dense.weight has the shape \(32, 16\) in the mo"),
        (model, bert(), "bert.encodr", "layers='bert.encodr' matches no weight"),
        (model, bert(), ["bert", "("], r"The pattern '\(' is neither"),
        (deep, bert(), "bert.encoder", "matches bert.encoder.layer.2.*, which other= lacks"),
        (frozen, bert(), None, "ties bert.* of which nothing trains"),
        (lora, bert(), None, "the model has an adapter"),
        (model, lora, None, "other= has an adapter"),
    ]
    for own, other, layers, message in cases:
        trainer = trainer_of(own, tmp_path, SoftSharing(other, 1.0, layers=layers))
        with pytest.raises(ValueError, match=message):
            trainer.train()
        assert trainer.state.global_step == 0
    biases = SoftSharing(bert(), 1.0, "trace", r".*\.bias")
    with pytest.raises(ValueError, match="ties no matrix, of which nothing trains"):
        trainer_of(model, tmp_path, biases).train()
    tie = SoftSharing(bert(), lambda p: -1.0)
    with pytest.raises(ValueError, match=r"gave -1\.0 at step 0"):
        trainer_of(model, tmp_path, tie).train()
