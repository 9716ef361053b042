"""Sentences of the first screen: what was compared, and how it went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_adapt.report.methods import methods_of
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
        f"{_kinds(pairs)} ({listed([pair.title for pair in pairs])}), "
        f"with {'seed' if len(seeds) == 1 else 'seeds'} {listed(list(map(str, seeds)))}: "
        f"{counted(len(runs), 'run')} in all."
    )


def _kinds(pairs: Sequence[Pair]) -> str:
    if all(pair.source == pair.target for pair in pairs):
        return counted(len(pairs), "task")
    return f"{counted(len(pairs), 'pair')} of domains"


def health(runs: Sequence[Numbers]) -> str:
    """How many runs failed, were warned of, or collapsed, but for what trained on target labels."""
    runs = [run for run in runs if run["role"] != "bound"]
    counts = {
        "failed": sum("error" in run for run in runs),
        "collapsed": sum(bool(run.get("collapsed")) for run in runs),
        "warned": sum(bool(run["warnings"]) for run in runs),
    }
    found = [f"{counted(n, 'run')} {what}" for what, n in counts.items() if n]
    if not found:
        return "No run failed, warned or collapsed."
    return f"{listed(found)}: see the runs to look at."
