"""Divergences against hand-computed values, float64 formulas and other people's code."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hf_adapt.distillation.divergences import (
    ABSENT,
    DIVERGENCES,
    JensenShannon,
    forward_kl,
    logit_mse,
    named_divergence,
    reverse_kl,
)


def logits(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(5, 7, generator=generator, dtype=dtype)


def by_hand(name: str, student: torch.Tensor, teacher: torch.Tensor, t: float) -> torch.Tensor:
    q, p = (student / t).softmax(-1), (teacher / t).softmax(-1)
    m = (p + q) / 2
    return {
        "forward_kl": t * t * (p * (p / q).log()).sum(-1),
        "reverse_kl": t * t * (q * (q / p).log()).sum(-1),
        "jsd": t * t * ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2,
        "mse": ((student - teacher) ** 2).mean(-1),
    }[name]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_value_and_gradient_are_those_of_the_formula(name: str, temperature: float) -> None:
    teacher = logits(1)
    results = []
    for function in (DIVERGENCES[name], lambda *given: by_hand(name, *given)):
        student = logits(0).requires_grad_()
        value = function(student, teacher, temperature)
        (gradient,) = torch.autograd.grad(value.sum(), student)
        results.append((value, gradient))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradients_are_numerically_right(name: str) -> None:
    student, teacher = logits(0)[:2].requires_grad_(), logits(1)[:2]
    assert torch.autograd.gradcheck(lambda s: DIVERGENCES[name](s, teacher, 2.0), (student,))


def test_hand_computed() -> None:
    # teacher (1/2, 1/2), student (3/4, 1/4): KL = ln(2/3)/2 + ln(2)/2
    student = torch.tensor([[math.log(3.0), 0.0]])
    expected = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    assert forward_kl(student, torch.zeros(1, 2)).item() == pytest.approx(expected, rel=1e-6)
    assert reverse_kl(torch.zeros(1, 2), student).item() == pytest.approx(expected, rel=1e-6)
    assert logit_mse(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2)).item() == 2.5
    assert reverse_kl(student, torch.tensor([[0.0, -torch.inf]])).item() == math.inf


@pytest.mark.parametrize("name", DIVERGENCES)
def test_equal_predictions_have_no_divergence_and_no_gradient(name: str) -> None:
    student = logits(0, torch.float32).requires_grad_()
    value = DIVERGENCES[name](student, logits(0, torch.float32), 2.0).sum()
    value.backward()
    assert value.abs() < 1e-5
    assert student.grad.abs().max() < 1e-6


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    student = torch.tensor([[3e4, -3e4, 0.0]], dtype=dtype).requires_grad_()
    teacher = torch.tensor([[-3e4, 3e4, 0.0]], dtype=dtype)
    value = DIVERGENCES[name](student, teacher, 1.0)
    value.sum().backward()
    assert value.dtype == torch.float32
    assert torch.isfinite(value).all()
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_an_absent_class_has_no_part(name: str) -> None:
    student, teacher = logits(0).requires_grad_(), logits(1)
    absent = torch.full((5, 2), ABSENT, dtype=torch.float64)
    padded = DIVERGENCES[name](
        torch.cat([student, absent], 1), torch.cat([teacher, absent], 1), 2.0
    )
    torch.testing.assert_close(padded, DIVERGENCES[name](student, teacher, 2.0))
    padded.sum().backward()
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_a_class_that_the_teacher_rules_out(name: str, both: bool) -> None:
    """0 log 0 is 0: value and gradient are the limits of a very low logit."""
    results = []
    for low, dtype in ((-torch.inf, torch.float32), (-1e4, torch.float64)):
        teacher, student = logits(1).to(dtype), logits(0).to(dtype)
        teacher[:, 2] = low
        if both:
            student[:, 2] = low
        student.requires_grad_()
        value = DIVERGENCES[name](student, teacher, 2.0)
        results.append((value.double(), torch.autograd.grad(value.sum(), student)[0].double()))
    (value, gradient), expected = results
    assert gradient.abs().sum() > 0
    torch.testing.assert_close((value, gradient), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_jensen_shannon_is_that_of_trl(
    beta: float, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    gkd = pytest.importorskip("trl.experimental.gkd", reason="TRL before 0.25 has it elsewhere")

    def theirs(student: torch.Tensor, teacher: torch.Tensor) -> Any:
        return gkd.GKDTrainer.generalized_jsd_loss(
            student[None], teacher[None], beta=beta, temperature=temperature, reduction="sum"
        )

    results = []
    for function, factor in (
        (lambda s, t: JensenShannon(beta)(s, t, temperature).sum(), 1.0),
        (theirs, temperature**2),  # TRL has no T²
    ):
        student = logits(0).requires_grad_()
        value = factor * function(student, logits(1))
        results.append((value, *torch.autograd.grad(value, student)))
    for ours, other in zip(*results, strict=True):
        torch.testing.assert_close(ours, other)


def test_the_ends_of_jensen_shannon_point_the_way_of_the_kl_divergences() -> None:
    def gradient(function: Any) -> torch.Tensor:
        student = logits(0).requires_grad_()
        return torch.autograd.grad(function(student, logits(1), 2.0).sum(), student)[0]

    near_zero = gradient(JensenShannon(1e-6)) / 1e-6
    near_one = gradient(JensenShannon(1 - 1e-6)) / 1e-6
    torch.testing.assert_close(near_zero, gradient(forward_kl), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(near_one, gradient(reverse_kl), rtol=1e-3, atol=1e-4)


def test_forward_kl_is_that_of_torch() -> None:
    student, teacher = logits(0), logits(1)
    expected = 9 * F.kl_div(
        (student / 3).log_softmax(-1), (teacher / 3).softmax(-1), reduction="batchmean"
    )
    torch.testing.assert_close(forward_kl(student, teacher, 3.0).mean(), expected)


def test_names_and_functions() -> None:
    assert named_divergence(logit_mse) is logit_mse
    with pytest.raises(ValueError, match="'kl' is unknown: use 'forward_kl'"):
        named_divergence("kl")
    with pytest.raises(ValueError, match="beta must lie between 0 and 1"):
        JensenShannon(1.0)
