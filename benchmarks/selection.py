"""How well models are chosen without target labels: each validator, and `choose`, on finished runs.

    python benchmarks/domain_shift.py --seeds 3 --jobs 2 --cache-prefix     # hours: the runs
    python benchmarks/selection.py benchmarks/configs/vader4.yaml           # minutes: this table

The candidates of a pair and seed are all methods but the bound and those that were given the
target's class frequencies. Regret is what the choice loses against the best candidate, in points of
accuracy on the target's test rows; those labels are used for nothing else. The rows with fifty
labels choose by labels of the target's training rows, of texts alone, drawn ten times: there, worst
and lowest are over ten times as many choices.
"""

import argparse
import json
import math
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
from domain_data import cache_folder
from measure import print_machine, progress
from numpy.typing import NDArray

from hf_adapt.cli.run_options import experiment
from hf_adapt.engine.item_outputs import ItemOutputs
from hf_adapt.engine.labels import IGNORED
from hf_adapt.evaluation import Candidate, Neighborhoods, choose
from hf_adapt.evaluation.contest import aligned_labels
from hf_adapt.evaluation.estimates import Method
from hf_adapt.evaluation.scores import VALIDATORS, TargetScores
from hf_adapt.evaluation.validators import ensemble_agreement
from hf_adapt.experiments.choice import reference_items
from hf_adapt.experiments.config import Experiment
from hf_adapt.experiments.label_file import LabelFile
from hf_adapt.experiments.outputs import RunOutputs
from hf_adapt.experiments.tables import markdown

LABELS_USED = ("frequencies given", "10 points")
"""Parts of the names of methods that were given counts of the target's labels."""
NEIGHBOURS = ("ATDOC", "AaD")
"""Methods that train on neighbours, which neighbour agreement does not judge."""
SEEN = ("movies", "tweets", "products", "nyt", "mnist", "uci", "sms", "email")
"""Domains whose runs with seeds 42 and 43 had been seen when the rule of `choose` was made."""
WIDE = 0.1
LABELS = 50


@dataclass(frozen=True)
class Run:
    """One finished run."""

    result: dict[str, Any]
    folder: Path

    @property
    def accuracy(self) -> float:
        return float(self.result["target_accuracy"])

    @cached_property
    def outputs(self) -> RunOutputs:
        return RunOutputs.load(self.folder)

    @cached_property
    def scores(self) -> dict[str, float]:
        """The validators, and the estimates of accuracy, none of which a label has seen."""
        source, target = self.outputs.source_dev, self.outputs.target_unlabelled
        assert source is not None and target is not None
        scores = TargetScores(source, target)
        found = scores.all(VALIDATORS)
        for method in get_args(Method):
            found[f"estimate ({method})"] = scores.estimate(method, resamples=1).value
        return found


@dataclass(frozen=True)
class Group:
    """The runs of one pair and seed."""

    pair: tuple[str, str]
    seed: int
    runs: dict[str, Run]
    bound: float | None
    reference: ItemOutputs
    labels: NDArray[np.int64] | None

    @property
    def was_seen(self) -> bool:
        return self.seed in (42, 43) and {*self.pair} <= {*SEEN}

    @property
    def source_only(self) -> float:
        return self.runs["source only"].accuracy

    @property
    def best(self) -> float:
        return max(run.accuracy for run in self.runs.values())

    def highest(self, name: str) -> float:
        """The accuracy of the run that a validator ranks first."""
        best = max(self.runs.values(), key=lambda run: run.scores[name])
        return best.accuracy if best.scores[name] > -math.inf else self.source_only

    @cached_property
    def ensemble(self) -> float:
        logits = [run.outputs.target_unlabelled.logits for run in self.runs.values()]
        values = [ensemble_agreement(logits, number) for number in range(len(logits))]
        return list(self.runs.values())[values.index(max(values))].accuracy

    @cached_property
    def neighbors(self) -> float:
        classes = self.reference.logits.shape[1]
        near = Neighborhoods(self.reference.features, num_classes=classes)

        def agreement(run: Run) -> float:
            return near.agreement(run.outputs.target_unlabelled.logits)

        return max(self.judged.values(), key=agreement).accuracy

    @cached_property
    def apart(self) -> Sequence[int]:
        """The items on which the candidates disagree."""
        return choose(self._candidates(self.judged), "source only").to_label

    def with_labels(self, draw: int, where_they_disagree: bool) -> float:
        """The accuracy of what is chosen by fifty labels of the target's training rows."""
        assert self.labels is not None
        numbers = self.apart if where_they_disagree else range(len(self.labels))
        asked = np.random.default_rng(draw).permutation(numbers)[:LABELS]
        known = np.full(len(self.labels), IGNORED)
        known[asked] = self.labels[asked]
        made = choose(
            self._candidates(self.judged),
            "source only",
            reference_features=self.reference.features,
            target_labels=known,
            labels_are_random=True,
        )
        return self.runs[made.chosen].accuracy

    @staticmethod
    def _candidates(runs: dict[str, Run]) -> list[Candidate]:
        return [
            Candidate(name, run.outputs.source_dev, run.outputs.target_unlabelled)
            for name, run in runs.items()
        ]

    @property
    def judged(self) -> dict[str, Run]:
        return {name: run for name, run in self.runs.items() if name not in NEIGHBOURS}

    @cached_property
    def choice(self) -> float:
        candidates = self._candidates(self.judged)
        made = choose(candidates, "source only", reference_features=self.reference.features)
        pair = " → ".join(self.pair)
        progress({"pair": pair, "seed": self.seed, "chosen": made.chosen, "why": made.reason})
        return self.runs[made.chosen].accuracy


def groups(experiment: Experiment, least: int, methods: list[str] | None) -> Iterator[Group]:
    """The runs of an experiment by pair and seed; those with source only and others."""
    root = Path(experiment.output_dir)
    found: dict[Any, dict[str, Run]] = defaultdict(dict)
    for file in sorted(root.glob("*/*/result.json"), key=lambda each: each.stat().st_mtime):
        result = json.loads(file.read_text(encoding="utf-8"))
        if "error" not in result and (file.parent / "outputs.npz").exists():
            key = ((result["source"], result["target"]), result["seed"])
            found[key][result["method"]] = Run(result, file.parent)
    for (pair, seed), runs in found.items():
        bound = runs.pop("bound", None)
        kept = {n: r for n, r in runs.items() if not any(part in n for part in LABELS_USED)}
        if methods:
            kept = {n: r for n, r in kept.items() if n in methods}
        if "source only" in kept and len(kept) >= least:
            reference = reference_items(experiment, *pair)
            accuracy = None if bound is None else bound.accuracy
            labels = labels_of(experiment, pair, reference)
            yield Group(pair, seed, kept, accuracy, reference, labels)


def labels_of(
    experiment: Experiment, pair: tuple[str, str], items: ItemOutputs
) -> NDArray[np.int64] | None:
    """The labels of the target's training rows, in the order of their items; None but for texts."""
    file = LabelFile(experiment, *pair)
    if not file.is_possible:
        return None
    rows = file.pair.target["train"]
    texts, labels = (rows[column] for column in (file.task.input_column, file.task.label_column))
    return aligned_labels(dict(zip(file.keys(texts).tolist(), labels, strict=True)), items.keys)


def row(
    name: str, groups: list[Group], accuracy: Callable[[Group, int], float], draws: int = 1
) -> list[str]:
    """Regret, how often it is below source only, and the share of wide gaps that is closed."""
    found = [group for group in groups for _ in range(draws)]
    values = [accuracy(group, draw) for group in groups for draw in range(draws)]
    regret = [100 * (group.best - value) for group, value in zip(found, values, strict=True)]
    gains = [100 * (v - group.source_only) for group, v in zip(found, values, strict=True)]
    closed = [
        (value - group.source_only) / (group.bound - group.source_only)
        for group, value in zip(found, values, strict=True)
        if group.bound is not None and group.bound - group.source_only >= WIDE
    ]
    return [
        name,
        f"{statistics.mean(values) * 100:.1f}",
        f"{statistics.mean(regret):.1f}",
        f"{max(regret):.1f}",
        f"{sum(gain < -1 for gain in gains)} of {len(gains)}",
        f"{min(gains):.1f}",
        f"{statistics.mean(closed):.0%}" if closed else "–",
    ]


def table(found: list[Group]) -> str:
    head = [
        "chosen by",
        "accuracy",
        "regret",
        "worst",
        "below source only",
        "lowest gain",
        "closed",
    ]
    rows = [
        row("labels (the best)", found, lambda group, _: group.best),
        row("choose", found, lambda group, _: group.choice),
        row("nothing: source only", found, lambda group, _: group.source_only),
    ]
    if all(group.labels is not None for group in found):
        for name, apart in (("of any rows", False), ("where they disagree", True)):
            rows.append(
                row(f"fifty labels {name}", found, lambda g, n, a=apart: g.with_labels(n, a), 10)
            )
    for method in ("recommended", "ATDOC", "MCC", "DANN"):
        if all(method in group.runs for group in found):
            rows.append(row(f"always {method}", found, lambda g, _, m=method: g.runs[m].accuracy))
    rows.append(row("neighbors", found, lambda group, _: group.neighbors))
    rows.append(row("ensv", found, lambda group, _: group.ensemble))
    for name in [*VALIDATORS, "estimate (atc)", "estimate (doc)", "estimate (iwv)"]:
        rows.append(row(name, found, lambda group, _, n=name: group.highest(n)))
    return markdown([head, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", help="of runs that benchmarks/domain_shift.py has made")
    parser.add_argument("--output-dir", help="where they are, if not where the file says")
    parser.add_argument("--least", type=int, default=4, help="candidates of a pair and seed")
    parser.add_argument("--method", action="append", help="candidates; all if not given")
    given = parser.parse_args()
    os.environ["HF_ADAPT_CACHE"] = str(cache_folder())
    flags = {} if given.output_dir is None else {"output_dir": given.output_dir}
    made = experiment(given.config, flags, {})
    found = list(groups(made, given.least, given.method))
    if not found:
        sys.exit(f"No finished runs with source only among them under {made.output_dir}.")
    print_machine("cpu", "scikit-learn", "torch", "transformers")
    for name, kept in (
        ("Not seen when the rule was made", [g for g in found if not g.was_seen]),
        ("Seen when the rule was made", [g for g in found if g.was_seen]),
    ):
        if kept:
            sizes = sorted({len(group.runs) for group in kept})
            print(f"{name}: {len(kept)} pairs and seeds, {sizes[0]} to {sizes[-1]} candidates.\n")
            print(table(kept) + "\n")


if __name__ == "__main__":
    main()
