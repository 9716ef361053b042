"""T3A and Tent: the published formulas, batch by batch, and a shift that they undo."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_adapt.alignment import T3A, Tent, prediction_entropy
from tests.helpers.models import bert
from tests.helpers.trainers import same_bits, weights


class Classifier(nn.Module):
    """Normalised inputs and a linear head."""

    def __init__(self, classes: int = 3, size: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.head = nn.LayerNorm(size), nn.Linear(size, classes)
        self.config = SimpleNamespace(num_labels=classes)

    def forward(self, x: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.head(self.norm(x)))


def batches(count: int, rows: int = 16, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 4, generator=generator) for _ in range(count)]


def published_t3a(model: Classifier, data: list[torch.Tensor], k: int) -> list[torch.Tensor]:
    """Line by line as in the paper's algorithm 1, with lists in place of tensors."""
    weight = model.head.weight.detach()
    supports: list[list[tuple[float, torch.Tensor]]] = [
        [(float(prediction_entropy(weight @ row)), row / row.norm())] for row in weight
    ]
    found = []
    for x in data:
        with torch.no_grad():
            z = model.norm(x)
            logits = model.head(z)
        for row, score in zip(z, logits, strict=True):
            own = supports[int(score.argmax())]
            own.append((float(prediction_entropy(score)), row / row.norm()))
        supports = [sorted(own, key=lambda each: each[0])[:k] for own in supports]
        centres = torch.stack([sum(row for _, row in own) for own in supports])  # type: ignore[misc]
        found.append(z @ F.normalize(centres).T)
    return found


@pytest.mark.parametrize("k", [1, 5, 1000])
def test_t3a_is_the_published_algorithm(k: int) -> None:
    model, data = Classifier(), batches(3)
    predict = T3A(model, num_supports=k)
    for x, wanted in zip(data, published_t3a(model, data, k), strict=True):
        torch.testing.assert_close(predict(x=x), wanted, rtol=1e-4, atol=1e-5)
    predict.reset()
    torch.testing.assert_close(predict(x=data[0]), published_t3a(model, data[:1], k)[0])


def test_t3a_trains_nothing_and_does_not_see_labels() -> None:
    model = bert()
    before, ids = weights(model), torch.randint(3, 30, (4, 6))
    found = T3A(model)(input_ids=ids, labels=torch.tensor([0, 1, 2, 0]))
    assert found.shape == (4, 3) and same_bits(before, weights(model))
    assert not model.classifier._forward_pre_hooks


def test_tent_is_a_step_on_the_entropy() -> None:
    """Of all rows, without sharpness, on the scale and shift alone."""
    model, (first, second) = Classifier(), batches(2)
    other = Classifier()
    predict = Tent(model, learning_rate=0.1, reliable=1.0, sharpness=0)
    wanted = other(first).logits
    prediction_entropy(wanted).mean().backward()
    with torch.no_grad():
        for parameter in (other.norm.weight, other.norm.bias):
            assert parameter.grad is not None
            parameter -= 0.1 * parameter.grad
    torch.testing.assert_close(predict(x=first), wanted)
    torch.testing.assert_close(predict(x=second), other(second).logits)
    assert torch.equal(model.head.weight, other.head.weight)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    predict.restore()
    torch.testing.assert_close(predict(x=first), wanted)


def test_sar_steps_where_the_loss_is_highest_nearby() -> None:
    model, (x,) = Classifier(), batches(1)
    predict = Tent(model, learning_rate=0.1, reliable=0.9, sharpness=0.05)
    predict._watch = lambda *_: None  # type: ignore[method-assign]
    other = Classifier()
    own = [other.norm.weight, other.norm.bias]

    def loss() -> torch.Tensor:
        entropy = prediction_entropy(other(x).logits)
        return entropy[entropy.detach() < 0.9 * torch.tensor(3.0).log()].mean()

    gradients = torch.autograd.grad(loss(), own)
    norm = torch.cat(list(gradients)).norm()
    start = [p.detach().clone() for p in own]
    with torch.no_grad():
        for p, g in zip(own, gradients, strict=True):
            p += 0.05 * g / norm
    gradients = torch.autograd.grad(loss(), own)
    predict(x=x)
    for p, before, g in zip(predict.parameters, start, gradients, strict=True):
        torch.testing.assert_close(p.detach(), before - 0.1 * g)


def test_a_collapsed_model_is_restored_and_no_reliable_row_moves_nothing() -> None:
    model, data = Classifier(), batches(80)
    before = weights(model)
    sure = Tent(model, learning_rate=20.0, reliable=1.0, sharpness=0.01)
    moved = [sure(x=x) is not None and not same_bits(before, weights(model)) for x in data]
    assert True in moved and False in moved[moved.index(True) :]
    other = Classifier()
    Tent(other, reliable=1e-6)(x=data[0])
    assert same_bits(before, weights(other))


def test_a_shift_of_the_features_is_undone() -> None:
    """Two clusters, moved so that the trained boundary cuts one of them."""
    model = Classifier(2)
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor([[2.0, -2.0, 0, 0], [-2.0, 2.0, 0, 0]]))
        model.head.bias.copy_(torch.tensor([1.5, -1.5]))  # what the shift does to the scores
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (400,), generator=generator)
    centres = torch.tensor([[1.0, -1.0, 0, 0], [-0.2, 0.2, 1.0, -1.0]])
    x = centres[labels] + 0.3 * torch.randn(400, 4, generator=generator)
    plain = (model(x).logits.argmax(1) == labels).float().mean()
    predict = T3A(model, num_supports=None)
    adapted = torch.cat([predict(x=part) for part in x.split(50)])
    assert (adapted.argmax(1) == labels).float().mean() > plain + 0.05


@pytest.mark.parametrize("method", [T3A, Tent])
def test_other_models_are_refused(method: Any) -> None:
    model = bert()
    model.config.problem_type = "regression"
    with pytest.raises(ValueError, match=f"{method.__name__} needs predictions over exclusive"):
        method(model)
    plain = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="has none"):
        method(plain)


@pytest.mark.parametrize(
    ("method", "options"),
    [(T3A, {"num_supports": 0}), (Tent, {"learning_rate": 0.0}), (Tent, {"reliable": 2.0})],
)
def test_options_are_refused(method: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        method(bert(), **options)
