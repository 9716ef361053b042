"""The influence of source rows, against autograd and on a problem whose answer is known."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from hf_adapt.evaluation import source_influence


def gradient(layer: torch.nn.Linear, feature: torch.Tensor, label: int) -> torch.Tensor:
    loss = F.cross_entropy(layer(feature), torch.tensor(label))
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(layer.parameters()))])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("given", [True, False])
def test_influence_is_the_product_of_gradients(bias: bool, given: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 3, bias=bias).double()
    source, target = torch.randn(9, 6).double(), torch.randn(8, 6).double()
    labels, logits = torch.randint(0, 3, (9,)), layer(target)
    confidence, guess = logits.softmax(1).max(1)
    pseudo = torch.randint(0, 3, (8,))
    pseudo[2] = -100
    rows = [i for i in range(8) if i != 2] if given else confidence.topk(4).indices.tolist()
    wanted = [gradient(layer, target[i], int((pseudo if given else guess)[i])) for i in rows]
    mean = torch.stack(wanted).mean(0)
    own = [gradient(layer, source[i], int(labels[i])) for i in range(9)]
    found = source_influence(
        source, layer(source), labels, target, logits, pseudo if given else None, bias=bias
    )
    np.testing.assert_allclose(found, torch.stack(own) @ mean, rtol=1e-5, atol=1e-7)


def problem(seed: int) -> dict[str, Any]:
    """Two classes apart along the first of 20 axes; the target is shifted along the others.

    One source row in ten, of class 1 and like the target's, has the label of class 0.
    """
    generator = np.random.default_rng(seed)

    def drawn(number: int, shift: float) -> tuple[Any, Any]:
        labels = generator.integers(0, 2, number)
        features = generator.normal(size=(number, 20))
        features[:, 0] += 1.5 * (2 * labels - 1)
        features[:, 1] += shift
        return features, labels

    source, labels = drawn(600, 0.0)
    target, truth = drawn(2000, 1.0)
    like_target = np.flatnonzero(labels == 1)
    wrong = like_target[np.argsort(-source[like_target, 1])[:60]]
    labels = labels.copy()
    labels[wrong] = 0
    return {"x": source, "y": labels, "target": target, "truth": truth, "wrong": wrong}


def fitted(x: Any, y: Any) -> Any:
    model = LogisticRegression(C=1.0).fit(x, y)

    def logits(features: Any) -> Any:
        scores = model.decision_function(features)
        return np.stack([-scores / 2, scores / 2], 1)

    return logits


def test_mislabelled_rows_are_found_and_dropping_them_helps() -> None:
    gains: dict[str, list[float]] = {"bottom": [], "top": [], "random": []}
    shares = []
    for seed in range(5):
        made = problem(seed)
        logits = fitted(made["x"], made["y"])
        influence = source_influence(
            made["x"], logits(made["x"]), made["y"], made["target"], logits(made["target"])
        )
        order = np.argsort(influence)
        dropped = {
            "bottom": order[:60],
            "top": order[-60:],
            "random": np.random.default_rng(seed).choice(600, 60, replace=False),
        }
        shares.append(np.isin(dropped["bottom"], made["wrong"]).mean())

        def accuracy(scores: Any, made: Any = made) -> float:
            return float((scores(made["target"]).argmax(1) == made["truth"]).mean())

        before = accuracy(logits)
        for name, rows in dropped.items():
            kept = np.setdiff1d(np.arange(600), rows)
            gains[name].append(accuracy(fitted(made["x"][kept], made["y"][kept])) - before)
    mean = {name: float(np.mean(values)) for name, values in gains.items()}
    print(mean, shares)
    assert min(shares) > 0.7  # by chance it is 0.1
    assert mean["bottom"] > 0.02 > mean["random"] > -0.01 > mean["top"]


def test_wrong_input_is_refused() -> None:
    x, z = np.zeros((4, 3)), np.zeros((4, 2))
    with pytest.raises(ValueError, match="3 features and 2 classes for the source, 2 and 2"):
        source_influence(x, z, [0] * 4, x[:, :2], z)
    with pytest.raises(ValueError, match="target_logits for each of the 4 rows .* got 3"):
        source_influence(x, z, [0] * 4, x, z[:3])
    with pytest.raises(ValueError, match="at least one of them a class; got 4, 0 of them"):
        source_influence(x, z, [0] * 4, x, z, [-100] * 4)
    with pytest.raises(ValueError, match="confident_share=0 must be over 0"):
        source_influence(x, z, [0] * 4, x, z, confident_share=0)
