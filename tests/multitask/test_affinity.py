"""What tasks do to each other: values by hand, one formula against another, and what is refused."""

import math

import pytest
import torch
import torch.nn.functional as F

from hf_adapt.multitask import (
    affinity_plot,
    cosine_plot,
    gradient_cosines,
    relative_gain,
    task_affinity,
)


def test_cosines() -> None:
    torch.manual_seed(0)
    gradients = torch.randn(4, 50) * torch.tensor([1e-12, 1.0, 1e12, 3.0])[:, None]
    unit = F.normalize(gradients.double(), eps=0)
    expected = (unit[:, None] * unit).sum(-1)
    found = gradient_cosines(gradients)
    torch.testing.assert_close(found, expected.float())
    assert found.dtype == gradients.dtype and torch.equal(found, found.T)
    none = gradient_cosines(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert none[0, 0] == 1 and none[0, 1].isnan() and none[1].isnan().all()


def test_affinity_of_two_squares() -> None:
    """Gradient steps of .1 on (t - 1)² and (t + 1)² from 0: the one helps itself and harms."""
    target = torch.tensor([1.0, -1.0])
    theta = torch.zeros(2) + 0.1 * 2 * target  # after a step on each
    found = task_affinity(target**2, (theta[:, None] - target) ** 2)
    helps, harms = 1 - 0.8**2, 1 - 1.2**2
    torch.testing.assert_close(found, torch.tensor([[helps, harms], [harms, helps]]))
    skewed = task_affinity(torch.ones(2), torch.tensor([[1.0, 0.7], [1.2, 1.0]]))
    assert skewed[0, 1].item() == pytest.approx(0.3) and skewed[1, 0].item() == pytest.approx(-0.2)


def test_gain() -> None:
    results, alone = {"a": 0.9, "b": 3.0, "c": 40.0}, {"c": 50.0, "a": 0.6, "b": 4.0}
    assert relative_gain(results, alone, ["b"]) == pytest.approx((0.5 + 0.25 - 0.2) / 3)
    assert relative_gain(results, alone, "b") == relative_gain(results, alone, ["b"])
    assert relative_gain(alone, alone, ["a"]) == 0


def test_pictures_have_white_for_nothing() -> None:
    """What a step does to its own task is not in the span of the colours."""
    matrix, tasks = torch.tensor([[0.9, 0.02], [-0.04, math.nan]]), ["a", "b"]
    for figure, largest, texts in [
        (affinity_plot(matrix, tasks, title="T"), 0.04, ["+0.9", "+0.02", "-0.04"]),
        (cosine_plot(matrix.numpy(), tasks, title="T"), 1.0, ["0.90", "0.02", "-0.04"]),
        (affinity_plot([[0.5]], ["a"], title="T"), 1.0, ["+0.5"]),
    ]:
        axes = figure.axes[0]
        (image,) = axes.images
        assert image.get_clim() == pytest.approx((-largest, largest))
        assert min(image.to_rgba(0.0)) > 0.95 and image.to_rgba(largest)[2] > 0.3
        assert [text.get_text() for text in axes.texts] == texts and axes.get_title() == "T"
        rows = [label.get_text() for label in axes.get_yticklabels()]
        assert rows == tasks[: len(rows)] == [each.get_text() for each in axes.get_xticklabels()]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gradient_cosines(torch.ones(3)), r"expected \(K, P\)"),
        (lambda: task_affinity(torch.ones(2), torch.ones(2)), r"\(2,\) and \(2,\); expected"),
        (lambda: task_affinity(torch.zeros(1), torch.ones(1, 1)), "needs positive ones"),
        (lambda: cosine_plot(torch.ones(2, 2), ["a"]), r"\(2, 2\), and there are 1 names"),
        (lambda: relative_gain({"a": 1.0}, {"b": 1.0}), "of a, and the baselines of b"),
        (lambda: relative_gain({}, {}), "of no task"),
        (lambda: relative_gain({"a": 1.0}, {"a": 0.0}), "'a' has the result 1.0 and the baseline"),
        (lambda: relative_gain({"a": math.nan}, {"a": 1.0}), "finite numbers"),
        (lambda: relative_gain({"a": 1.0}, {"a": 1.0}, ["b"]), "lower_is_better names b"),
    ],
)
def test_what_does_not_fit(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
