"""The influence of source rows, against autograd and on a problem whose answer is known."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from transformers import Trainer

from hf_adapt.engine.callback import collect_items
from hf_adapt.evaluation import source_influence
from tests.helpers.data import collate, rows
from tests.helpers.models import family
from tests.helpers.trainers import arguments


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


def test_the_pooler_of_a_model_is_what_its_last_layer_is_given(tmp_path: Path) -> None:
    model, source, target = family("bert").eval(), rows(6, 1), rows(5, 2, None)
    source = source.map(lambda row: {"labels": row["labels"] % 2})
    trainer = Trainer(model, arguments(tmp_path), data_collator=collate)
    one, two = (collect_items(trainer, d, feature_layer="bert.pooler") for d in (source, target))
    found = source_influence(
        one.features, one.logits, one.labels, two.features, two.logits, confident_share=1.0
    )

    def gradients(data: Any) -> torch.Tensor:
        made = []
        for row in data:
            ids = torch.tensor([row["input_ids"]])
            logits = model(ids).logits
            label = torch.tensor([row["labels"]]) if "labels" in row else logits.argmax(1)
            loss = F.cross_entropy(logits, label)
            head = list(model.classifier.parameters())
            made.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, head)]))
        return torch.stack(made)

    expected = gradients(source) @ gradients(target).mean(0)
    assert sorted(found) == pytest.approx(sorted(expected.tolist()), rel=1e-3, abs=1e-6)


def problem(seed: int, wrong_are_near_target: bool) -> dict[str, Any]:
    """Two classes apart along the first of 20 axes; the target is shifted along the second.

    A tenth of the source rows, all of class 1, have the label of class 0.
    """
    generator = np.random.default_rng(seed)

    def drawn(number: int, shift: float) -> tuple[Any, Any]:
        labels = generator.integers(0, 2, number)
        features = generator.normal(size=(number, 20))
        features[:, 0] += 2 * (2 * labels - 1)
        features[:, 1] += shift
        return features, labels

    (source, labels), (target, truth) = drawn(300, 0.0), drawn(2000, 1.0)
    ones = np.flatnonzero(labels == 1)
    nearest = ones[np.argsort(-source[ones, 1])[:30]]
    wrong = nearest if wrong_are_near_target else generator.choice(ones, 30, replace=False)
    labels[wrong] = 0
    return {"x": source, "y": labels, "target": target, "truth": truth, "wrong": wrong}


def fitted(x: Any, y: Any) -> Any:
    model = LogisticRegression().fit(x, y)

    def logits(features: Any) -> Any:
        scores = model.decision_function(features)
        return np.stack([-scores / 2, scores / 2], 1)

    return logits


@pytest.mark.parametrize(
    ("near_target", "with_truth"),
    # Pseudo-labels do not see rows that have misled the model just where the target is.
    [(False, False), (True, True)],
)
def test_dropping_the_lowest_rows_helps_and_the_highest_hurts(
    near_target: bool, with_truth: bool
) -> None:
    gains: dict[str, list[float]] = {"lowest": [], "highest": [], "random": []}
    for seed in range(5):
        made = problem(seed, near_target)
        x, y, target, truth = (made[name] for name in ("x", "y", "target", "truth"))
        logits = fitted(x, y)
        given = truth if with_truth else None
        influence = source_influence(x, logits(x), y, target, logits(target), given)
        order = np.argsort(influence)
        some = np.random.default_rng(seed).choice(300, 30, replace=False)
        assert np.isin(order[:30], made["wrong"]).mean() > 0.7  # by chance it is 0.1
        before = (logits(target).argmax(1) == truth).mean()
        for name, few in (("lowest", order[:30]), ("highest", order[-30:]), ("random", some)):
            kept = np.setdiff1d(np.arange(300), few)
            after = (fitted(x[kept], y[kept])(target).argmax(1) == truth).mean()
            gains[name].append(after - before)
    mean = {name: float(np.mean(values)) for name, values in gains.items()}
    assert mean["lowest"] > 0.03 and mean["highest"] < -0.03 and abs(mean["random"]) < 0.015, mean


def test_wrong_input_is_refused() -> None:
    x, z = np.zeros((4, 3)), np.zeros((4, 2))
    with pytest.raises(ValueError, match="3 features and 2 classes for the source, 2 and 2"):
        source_influence(x, z, [0] * 4, x[:, :2], z)
    with pytest.raises(ValueError, match=r"target_logits for each of the 4 rows .* got 3"):
        source_influence(x, z, [0] * 4, x, z[:3])
    with pytest.raises(ValueError, match="at least one of them a class; got 4, 0 of them"):
        source_influence(x, z, [0] * 4, x, z, [-100] * 4)
    with pytest.raises(ValueError, match="confident_share=0 must be over 0"):
        source_influence(x, z, [0] * 4, x, z, confident_share=0)
