"""What the first screen says, in sentences."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_adapt.experiments.methods import RECOMMENDED
from hf_adapt.experiments.summary import BELOW, percent, scores_of
from hf_adapt.report.methods import mean_estimate, methods_of
from hf_adapt.report.numbers import Numbers
from hf_adapt.report.runs import ROLES, Pair


@dataclass(frozen=True)
class Sentence:
    """Something that is said.

    Args:
        lead: What it is about.
        text: The words.
        oracle: Whether it needs target labels.
    """

    lead: str
    text: str
    oracle: bool = False


def listed(names: Sequence[str], most: int = 12) -> str:
    """Names in a sentence.

    Example:
        >>> listed(["a", "b", "c"])
        'a, b and c'
    """
    shown = [*names[:most], f"{len(names) - most} more"] if len(names) > most else list(names)
    comma = "; " if any("," in name for name in shown) else ", "
    return " and ".join([comma.join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def counted(count: int, noun: str) -> str:
    """A number with its noun.

    Example:
        >>> counted(1, "run"), counted(2, "run")
        ('1 run', '2 runs')
    """
    return f"{count} {noun}" + ("" if count == 1 else "s")


def compared(pairs: Sequence[Pair], runs: Sequence[Numbers]) -> str:
    """What was compared, and on what."""
    methods = list(methods_of(sorted(runs, key=lambda run: ROLES.index(run["role"]))))
    seeds = sorted({run["seed"] for run in runs})
    return (
        f"{counted(len(methods), 'method')} ({listed(methods)}) on "
        f"{counted(len(pairs), 'pair')} of domains ({listed([pair.title for pair in pairs])}), "
        f"with {'seed' if len(seeds) == 1 else 'seeds'} {listed(list(map(str, seeds)))}: "
        f"{counted(len(runs), 'run')} in all."
    )


def health(runs: Sequence[Numbers]) -> str:
    """How many runs failed, were warned of, or collapsed."""
    counts = {
        "failed": sum("error" in run for run in runs),
        "collapsed": sum(bool(run.get("collapsed")) for run in runs),
        "warned": sum(bool(run["warnings"]) for run in runs),
    }
    found = [f"{counted(n, 'run')} {what}" for what, n in counts.items() if n]
    if not found:
        return "No run failed, warned or collapsed."
    return f"{listed(found)}: see the runs to look at."


def chosen(pair: Pair) -> Sentence:
    """What was chosen without target labels."""
    if pair.choice is None:
        return Sentence(
            "No choice is recorded.",
            "hf-adapt run --choose chooses without target labels, and says why.",
        )
    name, reason = pair.choice.get("chosen"), str(pair.choice.get("reason") or "")
    kept = " (do not adapt)" if name == pair.choice.get("baseline") else ""
    return Sentence(f"Chosen without target labels: {name}{kept}.", reason)


def outcome(runs: Sequence[Numbers], choice: Mapping[str, Any] | None) -> list[Sentence]:
    """What came out on a pair: the estimates, and the accuracies if there are labels.

    Args:
        runs: The runs of the pair that ended well.
        choice: What was chosen.
    """
    methods = methods_of(runs)
    estimates = {name: mean_estimate(own, "atc") for name, own in methods.items()}
    known = {name: each for name, each in estimates.items() if each is not None}
    focus = focus_of(runs, choice)
    names = dict.fromkeys(
        name for name in (baseline_of(runs), focus if choice else None) if name in known
    )
    found = []
    if names:
        texts = [
            f"{name} {100 * known[name]['value']:.1f} % ({100 * known[name]['low']:.1f} to "
            f"{100 * known[name]['high']:.1f})"
            for name in names
        ]
        doubt = not all(known[name]["trusted"] for name in names)
        found.append(
            Sentence(
                "Estimated accuracy on the target:",
                f"{listed(texts)}, by ATC."
                + (" The estimate is not to be trusted here: see its warnings." if doubt else ""),
            )
        )
    return [*found, *_from_labels(methods, baseline_of(runs), focus if choice else None)]


def _from_labels(
    methods: Mapping[str, Sequence[Numbers]], baseline: str | None, choice: str | None
) -> list[Sentence]:
    """The accuracies on labelled target rows."""
    scores = {
        n: scores_of([run["oracle"] for run in own], "accuracy") for n, own in methods.items()
    }
    means = {n: s["mean"] for n, s in scores.items() if s is not None and s["mean"] is not None}
    fair = {name: mean for name, mean in means.items() if methods[name][0]["role"] != "bound"}
    if not fair:
        return []
    best = max(fair, key=lambda name: fair[name])
    low = fair.get(baseline) if baseline else None
    parts = []
    if low is not None and baseline is not None:
        parts.append(f"{baseline} has {percent(scores[baseline])} %")
    for name, verb in ((choice, "chosen"), (best, "best")):
        if name in fair and name != baseline and not (verb == "chosen" and name == best):
            gain = "" if low is None else f" ({100 * (fair[name] - low):+.1f} points)"
            both = ", which was chosen," if verb == "best" and name == choice else ""
            parts.append(f"{verb}: {name}{both} with {percent(scores[name])} %{gain}")
    if best == baseline and len(fair) > 1:
        parts.append("no method is better")
    elif low is not None:
        worse = sum(mean < low - BELOW for mean in fair.values())
        if worse:
            parts.append(f"{counted(worse, 'method')} more than a point below {baseline}")
    bounds = [name for name in means if name not in fair]
    if bounds:
        level = statistics.mean(means[name] for name in bounds)
        parts.append(f"{listed(bounds)}, trained on target labels, {100 * level:.1f} %")
    return [Sentence("Accuracy on the target:", f"{'; '.join(parts)}.", oracle=True)]


def baseline_of(runs: Sequence[Numbers]) -> str | None:
    """The method that does not adapt."""
    return next((run["method"] for run in runs if run["role"] == "baseline"), None)


def focus_of(runs: Sequence[Numbers], choice: Mapping[str, Any] | None) -> str | None:
    """The method that is shown first: the chosen or the recommended one, or any that adapts."""
    adapted = [run["method"] for run in runs if run["role"] == "adapted"]
    name = str((choice or {}).get("chosen"))
    found = [
        method for method in methods_of(runs) if name == method or name.startswith(f"{method},")
    ]
    return next(iter([*found, *(name for name in adapted if name == RECOMMENDED), *adapted]), None)
