"""The estimate of accuracy on the target, and when it says that it cannot be trusted."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy

from hf_adapt.evaluation import estimate_accuracy, fitted_temperature

METHODS = ("atc", "doc", "iwv")


def world(seed: int = 0, number: int = 2000, noise: float = 1.5, shift: float = 0.0) -> Any:
    """Logits of a calibrated model of two classes, its labels and features, of one domain."""
    random = np.random.default_rng(seed)
    features = random.normal(size=(number, 3))
    features[:, 0] += shift
    score = noise * features[:, 0]
    labels = (random.random(number) < 1 / (1 + np.exp(-2 * score))).astype(int)
    return np.stack([-score, score], 1), labels, features


def test_atc_is_the_share_above_the_sources_threshold() -> None:
    source, labels, _ = world()
    target, _, _ = world(1, 500, 1.0)
    temperature = fitted_temperature(source, labels)
    score = [-entropy(softmax(x / temperature, axis=1), axis=1) for x in (source, target)]
    errors = (source.argmax(1) != labels).sum()
    threshold = np.sort(score[0])[errors]
    assert (score[0] < threshold).mean() == pytest.approx((source.argmax(1) != labels).mean())
    expected = (score[1] >= threshold).mean()
    assert estimate_accuracy(source, labels, target).value == pytest.approx(expected)


def test_doc_is_the_accuracy_less_the_drop_of_confidence() -> None:
    source, labels, _ = world()
    target, _, _ = world(1, 500, 1.0)
    temperature = fitted_temperature(source, labels)
    drop = np.subtract(*(softmax(x / temperature, axis=1).max(1).mean() for x in (source, target)))
    expected = (source.argmax(1) == labels).mean() - drop
    assert estimate_accuracy(source, labels, target, method="doc").value == pytest.approx(expected)


@pytest.mark.parametrize("method", METHODS)
def test_estimates_are_near_the_truth_where_only_the_inputs_change(method: Any) -> None:
    source, labels, features = world()
    target, truth, target_features = world(1, 2000, 1.5, shift=1.0)
    accuracy = (target.argmax(1) == truth).mean()
    assert accuracy > (source.argmax(1) == labels).mean() + 0.03
    found = estimate_accuracy(
        source,
        labels,
        torch.tensor(target),
        method=method,
        source_features=features,
        target_features=target_features,
    )
    assert found.trusted and found.low < found.value < found.high
    assert found.low - 0.03 < accuracy < found.high + 0.03
    assert (found.effective_sample_size is not None) == (method == "iwv")


def test_a_bootstrap_of_more_items_is_narrower() -> None:
    def width(number: int) -> float:
        found = estimate_accuracy(*world(0, number)[:2], world(1, number)[0])
        return found.high - found.low

    assert width(4000) < width(200) / 2


def test_a_model_without_errors_has_a_finite_estimate() -> None:
    source, _, _ = world()
    found = estimate_accuracy(source, source.argmax(1), world(1)[0])
    assert 0.9 < found.value <= 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_classes": ["a", "b", "c"]}, r"classes that the model does not know \(c\)"),
        ({"target_classes": ["a"]}, r"lacks classes of the source \(b\)"),
        ({"source_logits": "few"}, "There are 10 source items"),
        ({"target_logits": "few"}, "There are 10 target items"),
        ({"target_logits": "one"}, "collapsed: every target item is given class 0"),
        ({"source_labels": "one"}, r"no held-out item of the classes \[1\]"),
        ({"method": "iwv"}, "the domains do not overlap"),
    ],
)
def test_what_cannot_be_trusted_says_why(change: dict[str, Any], message: str) -> None:
    source, labels, features = world()
    given: dict[str, Any] = {
        "source_logits": source,
        "source_labels": labels,
        "target_logits": world(1)[0],
        "source_features": features,
        "target_features": features + 50,
        "source_classes": ["a", "b"],
        "target_classes": ["b", "a"],
    }
    for key, value in change.items():
        if value == "few" and key == "source_logits":
            given |= {"source_logits": source[:10], "source_labels": labels[:10]}
            given["source_features"] = features[:10]
        elif value == "few":
            given[key] = given[key][:10]
        elif value == "one":
            given[key] = given[key] * 0 + (0 if key == "source_labels" else np.array([1.0, 0.0]))
        else:
            given[key] = value
    if change != {"method": "iwv"}:
        given["target_features"] = features[: len(given["target_logits"])]
    found = estimate_accuracy(**given)
    assert not found.trusted
    assert any(message.replace("\\", "") in text for text in found.warnings), found.warnings
    assert "not to be trusted" in str(found)
    assert estimate_accuracy(**{**given, **_fine()}).trusted


def _fine() -> dict[str, Any]:
    source, labels, features = world()
    return {
        "source_logits": source,
        "source_labels": labels,
        "target_logits": world(1)[0],
        "source_features": features,
        "target_features": world(1)[2],
        "source_classes": ["a", "b"],
        "target_classes": ["b", "a"],
    }


def test_bad_input_is_named() -> None:
    source, labels, _ = world()
    with pytest.raises(ValueError, match="have 2 classes and the target's 3"):
        estimate_accuracy(source, labels, np.zeros((5, 3)))
    with pytest.raises(ValueError, match="method='xyz' is unknown: use atc, doc, iwv"):
        estimate_accuracy(source, labels, source, method="xyz")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pass source_features= and target_features="):
        estimate_accuracy(source, labels, source, method="iwv")
    with pytest.raises(ValueError, match="Leave out the items without a label"):
        estimate_accuracy(source, labels - 100, source)
