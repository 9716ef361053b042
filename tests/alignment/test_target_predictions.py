"""Losses on predictions: values of peers, gradients, extreme logits, and their objectives."""

import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_adapt.alignment import (
    BNM,
    FGM,
    MCC,
    VAT,
    EntropyMinimization,
    RDrop,
    bnm_loss,
    mcc_loss,
    prediction_entropy,
    rdrop_loss,
)
from tests.helpers.fake_batch import FakeBatch

LOGITS = torch.tensor(
    [[1.0, -1.0, 0.5], [0.2, 2.0, -0.3], [0.1, 0.0, 3.0], [-1.0, 1.5, 0.7]], dtype=torch.float64
)
OTHER = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)
LOSSES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mcc_loss": mcc_loss,
    "bnm_loss": bnm_loss,
    "rdrop_loss": lambda z: rdrop_loss(z, z.detach() * 0.5 + OTHER.to(z.dtype)),
}

# ---- what all of them hold ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_extreme_logits_stay_finite(name: str, dtype: torch.dtype) -> None:
    """Probabilities that underflow to 0, and a class that no row predicts."""
    logits = torch.tensor(
        [[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [1e4, 0.0, -1e4], [0.0, 0.0, 0.0]], dtype=dtype
    ).requires_grad_()
    loss = LOSSES[name](logits)
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    assert logits.grad.dtype == dtype and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_equal_rows_have_equal_finite_gradients(name: str) -> None:
    """Their singular values are 0 but for one; a decomposition may choose any vectors for those."""
    logits = LOGITS[:1].float().repeat(5, 1).requires_grad_()
    LOSSES[name](logits).backward()
    assert torch.isfinite(logits.grad).all()
    torch.testing.assert_close(logits.grad, logits.grad[:1].expand(5, 3), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(3,), (0, 3), (4, 1), (2, 4, 3)])
@pytest.mark.parametrize("name", LOSSES)
def test_shapes_that_do_not_fit_are_refused(name: str, shape: tuple[int, ...]) -> None:
    loss = LOSSES[name] if name != "rdrop_loss" else lambda z: rdrop_loss(z, z)
    with pytest.raises(ValueError, match=rf"{name} expects logits \(N, C\)"):
        loss(torch.zeros(shape))


# ---- minimum class confusion ----


@pytest.mark.parametrize(("temperature", "expected"), [(2.5, 0.6103234632), (1.0, 0.4128980144)])
def test_mcc_is_pytorch_adapts(temperature: float, expected: float) -> None:
    """pytorch-adapt 0.0.83, MCCLoss(T)."""
    assert mcc_loss(LOGITS, temperature).item() == pytest.approx(expected, abs=1e-9)


def test_mcc_is_the_papers_matrix_with_its_gradient() -> None:
    logits = LOGITS.clone().requires_grad_()
    p = (logits / 2.5).softmax(-1)
    entropy = -(p * p.log()).sum(-1).detach()
    w = 4 * (1 + torch.exp(-entropy)) / (1 + torch.exp(-entropy)).sum()
    confusion = p.T @ torch.diag(w) @ p
    confusion = confusion / confusion.sum(1, keepdim=True)
    expected = (confusion.sum() - confusion.trace()) / 3
    found = mcc_loss(logits)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*[torch.autograd.grad(x, logits)[0] for x in (found, expected)])


@pytest.mark.parametrize("classes", [2, 7])
def test_mcc_is_0_without_confusion_and_highest_for_uniform_predictions(classes: int) -> None:
    assert mcc_loss(1e3 * torch.eye(classes)).item() == pytest.approx(0, abs=1e-6)
    assert mcc_loss(torch.zeros(9, classes)).item() == pytest.approx(1 - 1 / classes)


# ---- nuclear norm ----


def test_bnm_is_pytorch_adapts_and_numpys() -> None:
    """pytorch-adapt 0.0.83, BNMLoss."""
    assert bnm_loss(LOGITS).item() == pytest.approx(-0.6411613557, abs=1e-9)
    expected = -np.linalg.norm(LOGITS.softmax(-1).numpy(), "nuc") / 4
    assert bnm_loss(LOGITS).item() == pytest.approx(expected, abs=1e-12)


def test_bnm_has_the_gradient_of_the_norm() -> None:
    logits = LOGITS.clone().requires_grad_()
    expected = -torch.linalg.matrix_norm(logits.softmax(-1), "nuc") / 4
    gradients = [torch.autograd.grad(x, logits)[0] for x in (bnm_loss(logits), expected)]
    torch.testing.assert_close(*gradients)
    assert torch.autograd.gradcheck(bnm_loss, (logits,))


def test_bnm_with_equal_singular_values() -> None:
    """One row for each class: all are alike, and their differences are 0."""
    logits = (3 * torch.eye(3)).requires_grad_()
    bnm_loss(logits).backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad.diagonal() < 0).all()  # to be surer is better


# ---- R-Drop ----


def test_rdrop_is_its_formula() -> None:
    other = LOGITS.flip(0)
    p, q = LOGITS.softmax(-1).numpy(), other.softmax(-1).numpy()
    rows = ((p * np.log(p / q)).sum(1) + (q * np.log(q / p)).sum(1)) / 2
    assert rdrop_loss(LOGITS, other).item() == pytest.approx(rows.mean(), rel=1e-12)
    assert rdrop_loss(other, LOGITS, "sum").item() == pytest.approx(rows.sum(), rel=1e-12)
    assert rdrop_loss(LOGITS, LOGITS).item() == 0
    one, two = (x.clone().requires_grad_() for x in (LOGITS, other))
    assert torch.autograd.gradcheck(rdrop_loss, (one, two))
    with pytest.raises(ValueError, match="two predictions of the same rows"):
        rdrop_loss(LOGITS, LOGITS[:2])


# ---- the objectives ----


@pytest.mark.parametrize(
    ("objective", "loss"), [(MCC(temperature=2.0), lambda z: mcc_loss(z, 2.0)), (BNM(), bnm_loss)]
)
def test_the_target_rows_of_a_batch_are_one_term(
    objective: MCC, loss: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    logits = LOGITS.clone().requires_grad_()
    term = objective.loss(FakeBatch(LOGITS, [0, 1, 0, 2], logits))
    torch.testing.assert_close(term, loss(LOGITS[[1, 3]]))
    term.backward()
    assert torch.equal(logits.grad[[0, 2]], torch.zeros(2, 3).double())
    none = objective.loss(FakeBatch(LOGITS, [0, 0, 0, 0], logits))
    assert none.item() == 0 and none.requires_grad


def test_entropy_is_a_sum_over_target_rows() -> None:
    total, count = EntropyMinimization().loss(FakeBatch(LOGITS, [0, 1, 0, 2], LOGITS))
    torch.testing.assert_close(total, prediction_entropy(LOGITS[[1, 3]]).sum())
    assert int(count) == 2
    rows = SimpleNamespace(num_predictions=lambda target_only: torch.tensor(5 + target_only))
    assert int(EntropyMinimization().num_items(rows)) == 6


def test_rdrop_compares_all_rows_with_a_further_forward(caplog: pytest.LogCaptureFixture) -> None:
    further = FakeBatch(LOGITS, [0, 0, 1, 1], LOGITS.flip(0))
    total, count = RDrop().loss(FakeBatch(LOGITS, [0, 0, 1, 1], LOGITS, further=further))
    torch.testing.assert_close(total, rdrop_loss(LOGITS, LOGITS.flip(0), "sum"))
    assert int(count) == 4


def test_rdrop_warns_once_of_a_model_without_dropout(caplog: pytest.LogCaptureFixture) -> None:
    objective = RDrop()
    for value in (0.1, 0.0, 0.0):
        objective.on_log({"loss/rdrop": value}, 0.5)
    assert len(caplog.records) == 1
    assert "two forwards gave the same predictions" in caplog.text


@pytest.mark.parametrize("make", [MCC, BNM, EntropyMinimization, RDrop, FGM, VAT])
def test_heads_without_exclusive_classes_are_refused(make: Callable[[], MCC]) -> None:
    config = SimpleNamespace(problem_type="multi_label_classification")
    with pytest.raises(ValueError, match=f"{make.__name__} needs predictions over exclusive"):
        make().setup(SimpleNamespace(model=SimpleNamespace(config=config)))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_mcc_refuses_a_temperature(temperature: float) -> None:
    for call in (lambda: MCC(temperature=temperature), lambda: mcc_loss(LOGITS, temperature)):
        with pytest.raises(ValueError, match=r"temperature=.* must be positive"):
            call()
