"""The hardest choice: self-training with other class frequencies, told apart without labels.

    python benchmarks/class_frequencies.py [--pair movies:tweets]

On frozen features of all-MiniLM-L6-v2 (the 12 pairs of vader4), a logistic regression trains itself
in five rounds with class-balanced pseudo-labels (shares .2 to .8), once for each assumed share of
the positive class from .1 to .9. Each validator then says which of the nine models, or the one that
was trained on the source only, it takes. Target labels score, and do nothing else. Three minutes on
two cores. Results: docs/results.md.
"""

import argparse
import statistics
import warnings
from typing import Any

import numpy as np
import torch
from frozen_features import FrozenPair, frozen_pairs
from measure import print_machine, progress
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score

from hf_adapt.engine.item_outputs import ItemOutputs
from hf_adapt.evaluation.neighborhoods import Neighborhoods
from hf_adapt.evaluation.scores import VALIDATORS, TargetScores
from hf_adapt.experiments.tables import markdown

SHARES = tuple(round(0.1 * n, 1) for n in range(1, 10))
SOURCE_ONLY = "source only"
VIEWS, HALVES = "two halves of the features agree", "two halves of the source agree"


def fitted(rows: Any, labels: Any) -> LogisticRegression:
    return LogisticRegression(C=20.0, max_iter=300).fit(rows, labels)


def self_trained(source: Any, labels: Any, target: Any, share: float) -> LogisticRegression:
    """Five rounds of the most certain rows of each class, as many as its share says."""
    model = fitted(source, labels)
    for part in np.linspace(0.2, 0.8, 5):
        order = np.argsort(-model.predict_proba(target)[:, 1])
        positive = round(part * share * len(target))
        negative = round(part * (1 - share) * len(target))
        rows = np.concatenate([source, target[order[:positive]], target[order[::-1][:negative]]])
        model = fitted(rows, np.concatenate([labels, np.ones(positive), np.zeros(negative)]))
    return model


def items(model: Any, rows: Any, labels: Any = None) -> ItemOutputs:
    score = torch.from_numpy(model.decision_function(rows)).float()
    keys = torch.arange(len(rows))
    known = torch.full_like(keys, -100) if labels is None else torch.from_numpy(labels)
    logits = torch.stack([-score / 2, score / 2], 1)
    return ItemOutputs(torch.from_numpy(rows).float(), logits, known, keys)


def agreements(pair: FrozenPair, share: float) -> dict[str, float]:
    """Kappa of two models that see other features, or other source rows."""
    random = np.random.default_rng(0)
    dimensions = np.array_split(random.permutation(pair.source.shape[1]), 2)
    rows = np.array_split(random.permutation(len(pair.source)), 2)
    views = [
        self_trained(pair.source[:, d], pair.labels, pair.target[:, d], share).predict(
            pair.target[:, d]
        )
        for d in dimensions
    ]
    halves = [
        self_trained(pair.source[r], pair.labels[r], pair.target, share).predict(pair.target)
        for r in rows
    ]
    return {VIEWS: cohen_kappa_score(*views), HALVES: cohen_kappa_score(*halves)}


def candidates(pair: FrozenPair) -> dict[Any, dict[str, float]]:
    """The accuracy of each candidate in per cent, and what each validator says of it."""
    near = Neighborhoods(pair.target)
    models: dict[Any, Any] = {SOURCE_ONLY: fitted(pair.source, pair.labels)}
    models |= {s: self_trained(pair.source, pair.labels, pair.target, s) for s in SHARES}
    found = {}
    for name, model in models.items():
        target = items(model, pair.target)
        scores = TargetScores(items(model, pair.dev, pair.dev_labels), target).all(VALIDATORS)
        scores["neighbors"] = near.agreement(target.logits)
        scores |= agreements(pair, name) if name != SOURCE_ONLY else {VIEWS: -1, HALVES: -1}
        found[name] = {**scores, "accuracy": 100 * model.score(pair.test, pair.truth)}
    return found


def table(results: dict[str, dict[Any, dict[str, float]]], truths: dict[str, float]) -> str:
    """Mean accuracy, mean and worst regret, and pairs below source only, by who chooses."""
    criteria = [*VALIDATORS, "neighbors", VIEWS, HALVES]
    choosers: dict[str, Any] = {
        "labels (the best)": lambda pair, found: max(found, key=lambda n: found[n]["accuracy"]),
        "the true share, to a tenth": lambda pair, found: round(
            min(max(truths[pair], 0.1), 0.9), 1
        ),
        "uniform": lambda pair, found: 0.5,
        SOURCE_ONLY: lambda pair, found: SOURCE_ONLY,
        **{c: lambda pair, found, c=c: max(found, key=lambda n: found[n][c]) for c in criteria},
    }
    cells = [["chosen by", "accuracy", "regret", "worst", "below source only"]]
    for name, chooser in choosers.items():
        values = [f[chooser(pair, f)]["accuracy"] for pair, f in results.items()]
        best = [max(each["accuracy"] for each in f.values()) for f in results.values()]
        base = [f[SOURCE_ONLY]["accuracy"] for f in results.values()]
        regret = [b - v for b, v in zip(best, values, strict=True)]
        below = sum(v < b - 1 for v, b in zip(values, base, strict=True))
        shown = (statistics.mean(values), statistics.mean(regret), max(regret))
        cells.append([name, *(f"{each:.1f}" for each in shown), f"{below} of {len(values)}"])
    return markdown(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pair", action="append", help="SOURCE:TARGET; all 12 if not given")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print_machine("cpu", "scikit-learn", "torch", "transformers")
    results, truths = {}, {}
    for pair in frozen_pairs(options.pair):
        results[pair.name] = candidates(pair)
        truths[pair.name] = float(pair.target_labels.mean())
        shown = {str(n): round(f["accuracy"], 1) for n, f in results[pair.name].items()}
        progress({"pair": pair.name, "positive": round(truths[pair.name], 2), **shown})
    print(f"\n{table(results, truths)}")


if __name__ == "__main__":
    main()
