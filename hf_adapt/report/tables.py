"""The tables of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_adapt.experiments.summary import Score, marked, pair_name, percent, scores_of
from hf_adapt.report.drawing import Column, Table
from hf_adapt.report.methods import Runs, mean_estimate, methods_of, number, trained_on_target
from hf_adapt.report.numbers import Numbers
from hf_adapt.report.runs import ROLES


def accuracies(pairs: Sequence[Numbers]) -> Table | None:
    """Accuracy on the target: methods × pairs."""
    good = [[run for run in pair["runs"] if "error" not in run] for pair in pairs]
    if not any(run["oracle"]["accuracy"] is not None for runs in good for run in runs):
        return None
    every = sorted((run for runs in good for run in runs), key=lambda run: ROLES.index(run["role"]))
    methods = list(dict.fromkeys(run["method"] for run in every))
    columns = [Column("method", numeric=False)]
    columns += [Column(pair_name((pair["source"], pair["target"])), oracle=True) for pair in pairs]
    rows = []
    for method in methods:
        cells = []
        for pair in pairs:
            own = [run for run in pair["runs"] if run["method"] == method]
            score = percent(scores_of([r["oracle"] for r in own if "error" not in r], "accuracy"))
            cells.append(_flags(score, own) if own else "–")
        rows.append([method, *cells])
    return Table("Accuracy on the target, % ± sd over seeds", columns, rows)


def _flags(text: str, runs: Runs) -> str:
    """A cell with how many of its runs failed, were warned of, or collapsed."""
    collapsed = sum(bool(run.get("collapsed")) for run in runs)
    return marked(text, runs) + (f" ({collapsed} collapsed)" if collapsed else "")


def methods(runs: Runs) -> Table:
    """What is known of each method without target labels, and with them."""
    heads = ("runs", "source acc. %", "ATC %", "IWV %", "A-distance", "collapsed")
    columns = [Column("method", numeric=False), *map(Column, heads)]
    rows = []
    for method, own in methods_of(runs).items():
        distances = scores_of(own, "a_distance")
        rows.append(
            [
                method,
                str(len(own)),
                percent(scores_of(own, "source_accuracy")),
                *(_interval(mean_estimate(own, name)) for name in ("atc", "iwv")),
                number(None if distances is None else distances["mean"], 2),
                str(sum(bool(run.get("collapsed")) for run in own) or "–"),
            ]
        )
    if any(run["oracle"]["accuracy"] is not None for run in runs):
        columns += [Column(text, oracle=True) for text in ("accuracy %", "gain", "F1 %", "ECE %")]
        low = scores_of([run["oracle"] for run in runs if run["role"] == "baseline"], "accuracy")
        for row, own in zip(rows, methods_of(runs).values(), strict=True):
            known = [run["oracle"] for run in own]
            accuracy = scores_of(known, "accuracy")
            row += [
                percent(accuracy),
                _gain(accuracy, low) if own[0]["role"] != "baseline" else "–",
                percent(scores_of(known, "f1")),
                percent(scores_of([each.get("calibration") or {} for each in known], "ece")),
            ]
    bound = trained_on_target(runs)
    marked_rows = [place for place, row in enumerate(rows) if row[0] in bound]
    return Table("Methods: means over seeds", columns, rows, oracle_rows=marked_rows)


def _gain(score: Score | None, low: Score | None) -> str:
    if score is None or low is None or score["mean"] is None or low["mean"] is None:
        return "–"
    return f"{100 * (score['mean'] - low['mean']):+.1f}"


def _interval(estimate: Mapping[str, Any] | None) -> str:
    if estimate is None:
        return "–"
    value, low, high = (100 * estimate[key] for key in ("value", "low", "high"))
    return f"{value:.1f} ({low:.1f}–{high:.1f}){'' if estimate['trusted'] else '*'}"


def candidates(choices: Sequence[Mapping[str, Any]]) -> list[Table]:
    """What each choice says of each candidate."""
    given = [(choice, each) for choice in choices for each in choice.get("candidates") or ()]
    if not given:
        return []
    names = list(dict.fromkeys(name for _, each in given for name in each.get("scores") or ()))
    rows = []
    for choice, each in given:
        scores = each.get("scores") or {}
        is_chosen = each.get("name") == choice.get("chosen")
        rows.append(
            [
                str(each.get("name")),
                str(choice.get("seed", "–")),
                "chosen" if is_chosen else "kept" if each.get("kept") else "dropped",
                str((choice if is_chosen else each).get("reason") or "").removeprefix("dropped: "),
                *(number(scores.get(name)) for name in names),
            ]
        )
    heads = [Column("candidate", numeric=False), Column("seed")]
    heads += [Column(text, numeric=False) for text in ("verdict", "why")]
    return [Table("The choice, candidate by candidate", [*heads, *map(Column, names)], rows)]


def flagged(pairs: Sequence[Numbers]) -> Table | None:
    """Runs that failed, collapsed or were warned of, by name."""
    rows: list[list[str]] = []
    from_labels: list[int] = []
    for pair in pairs:
        for run in pair["runs"]:
            found = []
            if "error" in run:
                found.append(("failed", str(run["error"])))
            if run.get("collapsed"):
                found.append(("collapsed", run["collapsed"]))
            if run["warnings"]:
                count = f" ({run['warnings']})" if run["warnings"] > 1 else ""
                found.append((f"warned{count}", str(run["first_warning"])))
            if run["role"] == "bound":
                from_labels += range(len(rows), len(rows) + len(found))
            name = [pair_name((pair["source"], pair["target"])), run["method"], str(run["seed"])]
            rows += [[*name, *each] for each in found]
    heads = ("pair", "method", "seed", "what", "text")
    columns = [Column(head, numeric=head == "seed") for head in heads]
    caption = "Runs that failed, collapsed or were warned of"
    return Table(caption, columns, rows, from_labels) if rows else None
