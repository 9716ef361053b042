"""Means over seeds and pairs, and what is gained on source only."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_adapt.experiments.config import Experiment
from hf_adapt.multitask import relative_gain

LARGE_GAP = 0.1
"""The gap from which a pair counts in the average share that is closed; small ones are noise."""
BELOW = 0.01
"""How much worse than source only counts as below it."""

Score = Mapping[str, float | None]
"""Mean and standard deviation over seeds; a single run has no deviation."""

Results = Sequence[Mapping[str, Any]]


def score(values: Sequence[float]) -> Score:
    """Mean and standard deviation.

    Example:
        >>> score([0.5, 0.7])["mean"], score([0.5])
        (0.6, {'mean': 0.5, 'sd': None})
    """
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "sd": deviation}


def percent(score: Score | None, form: str = ".1f") -> str:
    """A score as the cell of a table; `form` is that of its mean.

    Example:
        >>> percent({"mean": 0.66, "sd": 0.07}), percent(None)
        ('66.0 ± 7.0', '–')
    """
    if score is None or (mean := score["mean"]) is None:
        return "–"
    deviation = score["sd"]
    return f"{100 * mean:{form}}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")


def pair_name(pair: tuple[str, str]) -> str:
    """How a pair of domains is called; one with itself is a task.

    Example:
        >>> pair_name(("movies", "tweets")), pair_name(("spam", "spam"))
        ('movies → tweets', 'spam')
    """
    return pair[0] if pair[0] == pair[1] else " → ".join(pair)


def scores_of(results: Iterable[Mapping[str, Any]], key: str) -> Score | None:
    """The score of a value over the runs that have it."""
    values = [result[key] for result in results if result.get(key) is not None]
    return score(values) if values else None


@dataclass(frozen=True)
class Row:
    """A method over all pairs.

    Args:
        method: Its name.
        accuracy: Accuracy on the target of each pair; None where no run ended well.
        gaps: The share of the gap from source only to the bound that it closes on each pair; None
            where there is none.
        average: Mean of `accuracy` over the pairs that have one; None if a pair has none.
        gap_closed: Mean of `gaps` over the pairs whose gap is 10 points or more.
        below: Pairs on which it is more than a point below source only.
        compared: Pairs on which it can be compared with source only.
        gain: [`hf_adapt.multitask.relative_gain`] on the runs of each task alone, of a mixture.
        marked: Its name, with how many of its runs failed or were warned of.
    """

    method: str
    accuracy: Mapping[tuple[str, str], Score | None]
    gaps: Mapping[tuple[str, str], float | None]
    average: float | None
    gap_closed: float | None
    below: int | None
    compared: int
    gain: Score | None
    marked: str


def marked(text: str, runs: Iterable[Mapping[str, Any]]) -> str:
    """A name or a score, with how many of its runs failed or were warned of.

    Example:
        >>> marked("66.0", [{"warnings": 2}, {"warnings": 0}]), marked("66.0", [{"warnings": 0}])
        ('66.0 (1 warned)', '66.0')
    """
    runs = list(runs)
    failed = sum("error" in run for run in runs)
    warned = sum(bool(run.get("warnings")) for run in runs)
    notes = [f"{failed} failed"] * bool(failed) + [f"{warned} warned"] * bool(warned)
    return f"{text} ({', '.join(notes)})" if notes else text


def summarize(experiment: Experiment, results: Results) -> list[Row]:
    """One row for each method, in the order of the experiment."""
    means = {
        (method, pair): scores_of(runs_of(results, method, pair), "target_accuracy")
        for method in experiment.methods
        for pair in experiment.pairs
    }
    baseline = experiment.baseline
    bound = next((name for name, m in experiment.methods.items() if m.is_bound), None)

    def mean(method: str | None, pair: tuple[str, str]) -> float | None:
        found = means.get((method, pair)) if method is not None else None
        return None if found is None else found["mean"]

    rows = []
    for method in experiment.methods:
        gaps: dict[tuple[str, str], float | None] = {}
        large, gains = [], []
        for pair in experiment.pairs:
            own, low, high = mean(method, pair), mean(baseline, pair), mean(bound, pair)
            gaps[pair] = None
            if own is None or low is None or method in (baseline, bound):
                continue
            gains.append(own - low)
            if high is not None and high > low:
                gaps[pair] = (own - low) / (high - low)
                if high - low >= LARGE_GAP:
                    large.append((own - low) / (high - low))
        found = [m for pair in experiment.pairs if (m := mean(method, pair)) is not None]
        own_runs = [run for run in results if run["method"] == method]
        rows.append(
            Row(
                method=method,
                accuracy={pair: means[method, pair] for pair in experiment.pairs},
                gaps=gaps,
                average=statistics.mean(found) if len(found) == len(experiment.pairs) else None,
                gap_closed=statistics.mean(large) if large else None,
                below=sum(gain < -BELOW for gain in gains) if gains else None,
                compared=len(gains),
                gain=_gain(experiment, results, method, baseline),
                marked=marked(method, own_runs),
            )
        )
    return rows


def _gain(
    experiment: Experiment, results: Results, method: str, baseline: str | None
) -> Score | None:
    """How much better the tasks are than alone, over the seeds in which all runs ended well."""
    if experiment.mixture is None or baseline is None or baseline == method:
        return None
    accuracy = {
        (run["method"], run["seed"], run["source"]): float(run["target_accuracy"])
        for run in results
        if run.get("target_accuracy") is not None
    }
    gains = []
    for seed in experiment.seeds:
        own, alone = (
            {t: accuracy[name, seed, t] for t in experiment.data if (name, seed, t) in accuracy}
            for name in (method, baseline)
        )
        if len(own) == len(alone) == len(experiment.data) and all(alone.values()):
            gains.append(relative_gain(own, alone))
    return score(gains) if gains else None


def runs_of(results: Results, method: str, pair: tuple[str, str]) -> list[Mapping[str, Any]]:
    """The runs of a method on a pair."""
    return [r for r in results if r["method"] == method and (r["source"], r["target"]) == pair]
