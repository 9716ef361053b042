"""What came out on a pair of domains and what was chosen, in sentences."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_adapt.evaluation.selection import chosen_by
from hf_adapt.experiments.methods import RECOMMENDED
from hf_adapt.experiments.summary import BELOW, Score, percent, score, scores_of
from hf_adapt.report.methods import Runs, mean_estimate, methods_of
from hf_adapt.report.numbers import Numbers
from hf_adapt.report.words import Sentence, counted, listed

Choices = Sequence[Mapping[str, Any]]
"""What was chosen, for each seed."""


# ---------------------------------------------------------------- without target labels
def chosen(choices: Choices) -> Sentence:
    """What was chosen, without target labels if none was given for it."""
    if not choices:
        return Sentence(
            "No choice is recorded.",
            "hf-adapt run --choose chooses without target labels, and says why.",
        )
    names = Counter(
        f"{each.get('chosen')}{' (do not adapt)' if _keeps(each) else ''}" for each in choices
    )
    if len(choices) == 1:
        reason = str(choices[0].get("reason") or "")
        return Sentence(f"{_by(choices)}: {next(iter(names))}.", reason)
    if len(names) == 1:
        lead = f"{next(iter(names))}, with each of {len(choices)} seeds"
    else:
        lead = listed([f"{name} with {counted(n, 'seed')}" for name, n in names.most_common()])
    return Sentence(f"{_by(choices)}: {lead}.", "Why: see the choice, seed by seed.")


def _by(choices: Choices) -> str:
    """Whether they were made without target labels."""
    given = [each.get("labels_used") for each in choices]
    used = [number for number in given if isinstance(number, int) and number > 0]
    if not used or len(choices) == 1:
        return chosen_by(sum(used))
    return f"Chosen, in {len(used)} of {len(choices)} by labels of target items"


def _keeps(choice: Mapping[str, Any]) -> bool:
    return choice.get("chosen") == choice.get("baseline")


def estimated(runs: Runs, choices: Choices) -> list[Sentence]:
    """The accuracies that are estimated for source only and for what was chosen."""
    methods = methods_of(runs)
    names = [baseline_of(runs), *(focus_of(runs, choices) for _ in choices[:1])]
    known = {n: mean_estimate(methods[n], "atc") for n in names if n is not None}
    texts, doubt = [], False
    for name, each in known.items():
        if each is not None:
            value, low, high = (100 * each[key] for key in ("value", "low", "high"))
            texts.append(f"{name} {value:.1f} % ({low:.1f} to {high:.1f})")
            doubt = doubt or not each["trusted"]
    if not texts:
        return []
    warning = " It is not to be trusted here: see the warnings by method." if doubt else ""
    return [Sentence("Estimated accuracy on the target:", f"{listed(texts)}, by ATC.{warning}")]


def baseline_of(runs: Runs) -> str | None:
    """The method that does not adapt."""
    return next((run["method"] for run in runs if run["role"] == "baseline"), None)


def focus_of(runs: Runs, choices: Choices) -> str | None:
    """The method that is shown first: the chosen or the recommended one, or any that adapts."""
    names = Counter(str(each.get("chosen")) for each in choices)
    methods = methods_of(runs)
    adapted = [name for name, own in methods.items() if own[0]["role"] == "adapted"]
    found = [name for name, _ in names.most_common() if name in methods]
    return next(iter([*found, *(name for name in adapted if name == RECOMMENDED), *adapted]), None)


# ---------------------------------------------------------------- from target labels
@dataclass(frozen=True)
class Levels:
    """Accuracies on labelled target rows.

    Args:
        methods: Of each method that has not trained on target labels.
        baseline: The name of source only.
        chosen: Of the runs that were chosen, over the seeds.
        names: What was chosen.
        bounds: Of the methods that have trained on target labels.
    """

    methods: Mapping[str, Score]
    baseline: str | None
    chosen: Score | None
    names: Sequence[str]
    bounds: Mapping[str, Score]

    @property
    def low(self) -> float | None:
        """The mean of source only."""
        return mean(self.methods.get(self.baseline or ""))

    @property
    def best(self) -> str:
        """The name of the best method."""
        return max(self.methods, key=lambda name: mean(self.methods[name]) or 0.0)

    def gain(self, found: Score | None) -> str:
        """How far a score is from source only, in brackets."""
        value, low = mean(found), self.low
        return "" if value is None or low is None else f" ({100 * (value - low):+.1f} points)"


def mean(found: Score | None) -> float | None:
    """The mean of a score, if there is one."""
    return None if found is None else found["mean"]


def levels_of(runs: Runs, choices: Choices) -> Levels | None:
    """The accuracies of a pair; None if there are no target labels."""
    methods = methods_of(runs)
    scores = {n: scores_of([r["oracle"] for r in own], "accuracy") for n, own in methods.items()}
    known = {name: each for name, each in scores.items() if each is not None}
    bounds = {name: each for name, each in known.items() if methods[name][0]["role"] == "bound"}
    fair = {name: each for name, each in known.items() if name not in bounds}
    if not fair:
        return None
    taken = [
        run["oracle"]["accuracy"]
        for choice in choices
        for run in methods.get(str(choice.get("chosen")), ())
        if choice.get("seed", run["seed"]) == run["seed"]
    ]
    taken = [each for each in taken if each is not None]
    names = list(dict.fromkeys(str(each.get("chosen")) for each in choices))
    return Levels(fair, baseline_of(runs), score(taken) if taken else None, names, bounds)


def from_labels(levels: Levels) -> Sentence:
    """The accuracies of a pair on labelled target rows."""
    best, baseline, methods = levels.best, levels.baseline, levels.methods
    parts = []
    if levels.low is not None:
        parts.append(f"{baseline} has {percent(methods[baseline or ''])} %")
    if levels.chosen is not None and levels.names not in ([best], [baseline]):
        name = levels.names[0] if len(levels.names) == 1 else "by seed"
        parts.append(f"chosen: {name} with {percent(levels.chosen)} %{levels.gain(levels.chosen)}")
    if best != baseline:
        which = ", which was chosen," if levels.names == [best] else ""
        parts.append(f"best: {best}{which} with {percent(methods[best])} %")
        parts[-1] += levels.gain(methods[best])
    elif len(methods) > 1:
        parts.append("no method is better")
    if levels.low is not None and best != baseline:
        worse = sum((mean(each) or 0.0) < levels.low - BELOW for each in methods.values())
        if worse:
            parts.append(f"{counted(worse, 'method')} more than a point below {baseline}")
    parts += [
        f"{n}, trained on target labels, {percent(each)} %" for n, each in levels.bounds.items()
    ]
    return Sentence("Accuracy on the target:", f"{'; '.join(parts)}.", oracle=True)


# ---------------------------------------------------------------- all pairs
def overall(pairs: Sequence[Numbers]) -> list[Sentence]:
    """What holds over several pairs: how often an adapted model was chosen, and what it gained."""
    if len(pairs) < 2:
        return []
    found = []
    choices = [each for pair in pairs for each in pair["choices"]]
    if choices:
        adapts = sum(not _keeps(each) for each in choices)
        found.append(
            Sentence(
                f"{_by(choices)}:",
                f"an adapted model in {adapts} of {counted(len(choices), 'choice')}, one for each "
                f"pair and seed{'; source only in the others' * (adapts < len(choices))}.",
            )
        )
    good = [[run for run in pair["runs"] if "error" not in run] for pair in pairs]
    levels = [
        each
        for pair, runs in zip(pairs, good, strict=True)
        if (each := levels_of(runs, pair["choices"])) is not None and each.low is not None
    ]
    if levels:
        means = {"source only": [each.low for each in levels]}
        if all(each.chosen is not None for each in levels):
            means["the chosen model"] = [mean(each.chosen) for each in levels]
        means["the best method of each pair"] = [mean(each.methods[each.best]) for each in levels]
        texts = [
            f"{n} {100 * statistics.mean(v or 0.0 for v in values):.1f} %"
            for n, values in means.items()
        ]
        over = f"on average over {counted(len(levels), 'pair')}: {listed(texts)}."
        found.append(Sentence("Accuracy on the target,", over, oracle=True))
    return found
