"""A choice among models without target labels, or by a few that were asked for.

It may be to keep the model without adaptation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from hf_adapt.engine.item_outputs import ItemOutputs
from hf_adapt.engine.labels import IGNORED
from hf_adapt.evaluation.arrays import Array, Floats, as_logits, as_prior, softmax
from hf_adapt.evaluation.collapsed import collapse
from hf_adapt.evaluation.contest import Contest, as_labels
from hf_adapt.evaluation.neighborhoods import Neighborhoods
from hf_adapt.evaluation.scores import TargetScores

MAX_SOURCE_LOSS = 0.05
"""How much accuracy on held-out source items a candidate may lose against the baseline."""
MAX_SHIFT = 0.15
"""How far its predicted classes' shares may be from known frequencies (total variation)."""
CREDIBLE = 2 / 3
"""In which share of bootstrap samples a candidate must beat the baseline: two to one."""
BY_LABELS = "labelled_accuracy"
"""The name of what candidates are ranked by where labels decide."""
WORTH = 0.01
"""Labels are asked for as long as a candidate may be so much better."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A trained model, by what it gives for both domains.

    Args:
        name: What it is called.
        source: Held-out source items with labels.
        target: Target items, the same for all candidates; the labels in it are not looked at.
    """

    name: str
    source: ItemOutputs
    target: ItemOutputs

    @classmethod
    def of(
        cls,
        name: str,
        source_logits: Array,
        source_labels: Array,
        target_logits: Array,
        source_features: Array | None = None,
        target_features: Array | None = None,
    ) -> Candidate:
        """A candidate from plain arrays.

        Shape:
            - source_logits: (N, C); source_labels: (N,); target_logits: (M, C); features: (N, D)
              and (M, D).
        """
        return cls(
            name,
            _items(source_features, source_logits, source_labels),
            _items(target_features, target_logits, None),
        )


def _items(features: Array | None, logits: Array, labels: Array | None) -> ItemOutputs:
    scores = _tensor(logits, "logits", 2).float()
    count, classes = scores.shape
    found = torch.full((count,), IGNORED)
    if labels is not None:
        given = _tensor(labels, "labels", 1, count)
        found = given.long()
        if not ((found == given) & ((found == IGNORED) | (found >= 0) & (found < classes))).all():
            raise ValueError(
                f"Expected labels from 0 to {classes - 1}, one for each row of the logits "
                f"({IGNORED} for none), got {sorted(set(given.tolist()))[:5]} …"
            )
    pooled = torch.zeros(count, 0)
    if features is not None:
        pooled = _tensor(features, "features", 2, count).float()
    return ItemOutputs(pooled, scores, found, torch.arange(count))


def _tensor(values: Array, name: str, ndim: int, count: int | None = None) -> torch.Tensor:
    found = torch.as_tensor(values).detach().cpu()
    if found.ndim != ndim:
        raise ValueError(f"Expected {name} with {ndim} dimensions, got {tuple(found.shape)}.")
    if count is not None and len(found) != count:
        raise ValueError(f"Expected {name} of the {count} rows of the logits, got {len(found)}.")
    return found


@dataclass(frozen=True)
class Verdict:
    """What was found of one candidate.

    Args:
        name: Its name.
        kept: Whether it could be chosen.
        reason: Why not, or where it stands.
        scores: Its values by name; empty if it was dropped.
    """

    name: str
    kept: bool
    reason: str
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Choice:
    """The outcome of [`choose`].

    Args:
        chosen: The name of the model to take.
        baseline: The name of the model without adaptation.
        reason: Why, in a sentence.
        candidates: All of them, in the order that they were given.
        labels_used: How many labels of target items have decided; 0 where none has.
        needs_labels: Whether the choice is open: an adapted model ranks highest, but not credibly,
            or the labels that were given could not decide.
        to_label: The numbers of the target items on which the candidates disagree and that have no
            label, in random order: label the first fifty, leaving none out, and hand the labels to
            [`choose`] as `target_labels`.
    """

    chosen: str
    baseline: str
    reason: str
    candidates: Sequence[Verdict] = field(default_factory=tuple)
    labels_used: int = 0
    needs_labels: bool = False
    to_label: Sequence[int] = ()

    @property
    def adapts(self) -> bool:
        """Whether an adapted model was chosen."""
        return self.chosen != self.baseline

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; without `to_label`, which numbers items in memory."""
        return {key: value for key, value in asdict(self).items() if key != "to_label"}

    def __str__(self) -> str:
        width = max(len(each.name) for each in self.candidates)
        lines = [f"{chosen_by(self.labels_used)}: {self.chosen}. {self.reason}"]
        for each in self.candidates:
            mark = "*" if each.name == self.chosen else " "
            lines.append(f"{mark} {each.name:{width}}  {each.reason}")
        return "\n".join(lines)


def chosen_by(labels_used: int) -> str:
    """How a choice is told of that so many labels of target items have decided."""
    if labels_used:
        return f"Chosen by {labels_used} labels of target items"
    return "Chosen without target labels"


def choose(
    candidates: Sequence[Candidate],
    baseline: str | None = None,
    *,
    reference_features: Array | None = None,
    prior: Array | None = None,
    target_labels: Array | None = None,
    labels_are_random: bool = False,
    max_source_loss: float = MAX_SOURCE_LOSS,
    max_shift: float = MAX_SHIFT,
) -> Choice:
    """Choose a model for the target without its labels, or keep the one without adaptation.

    1. What has collapsed, has lost the source, or contradicts known class frequencies is dropped.
    2. The rest is ranked by whether target items that were alike before training are given the same
       class ([`neighbor_agreement`]).
    3. The first is taken if that is credibly more than the baseline's: in two of three bootstrap
       samples of the items.

    It cannot judge methods that train on neighbours ([`ATDOC`], [`AaD`]): nothing may be chosen by
    what it has trained. Without `reference_features`, agreement with the mean of all candidates
    ([`ensemble_agreement`]) takes the place of the neighbours', which is much weaker.

    Labels of a few target items decide better than either. Only items on which the candidates
    disagree tell them apart: [`Choice`] names these as `to_label`. With `target_labels` the
    candidates are ranked by how many of them they have right. When candidates have changed, the
    labels decide once the items that the new ones add are labelled too, with which the new
    `to_label` begins. Such items are no random sample of the target: neither an accuracy nor class
    frequencies can be read off their labels.

    Reference:
        Okanovic et al. 2025, "All models are wrong, some are useful: Model Selection with Limited
        Labels", arXiv:2410.13609 (labels where candidates disagree).
        Deviation: items are drawn at random from those on which any two disagree.

    Args:
        candidates: The models, the baseline among them.
        baseline: The name of the one that was trained on the source only; the first by default.
        reference_features: Features of the target items before any training, in the order of the
            candidates' items.
        prior: The target's class frequencies, if they are known.
        target_labels: The classes of target items, -100 for those without one: of the first of
            `to_label`, leaving none out; -1 for what nobody could tell.
        labels_are_random: Whether the labels are of items that were drawn at random from all the
            target's in place of `to_label`.
        max_source_loss: How much accuracy on held-out source items a candidate may lose.
        max_shift: How far predicted shares may be from `prior` (total variation).

    Raises:
        ValueError: If names are given twice, the baseline is missing, candidates have other target
            items, or labels are not those of the items.

    Shape:
        - reference_features: (M, D); prior: (C,); target_labels: (M,).
    """
    names = [each.name for each in candidates]
    _check(candidates, names, baseline)
    first = names[0] if baseline is None else baseline
    base = candidates[names.index(first)]
    classes = base.target.logits.shape[1]
    known = None if prior is None else as_prior(prior, classes)
    scores = {each.name: TargetScores(each.source, each.target, known) for each in candidates}
    limits = (max_source_loss, max_shift)
    problems = {
        each.name: _problem(each, scores[each.name], scores[first], known, limits)
        for each in candidates
    }
    flaw = problems.pop(first)
    if flaw is not None and "not finite" in flaw:
        raise ValueError(
            f"There is nothing to compare with: of {first} the outputs are not finite."
        )
    kept = [each for each in candidates if problems.get(each.name) is None]
    labels = as_labels(target_labels, len(base.target), classes)
    given = {each.name: each.target.logits.argmax(1).numpy() for each in kept}
    contest = Contest(given, base.target.keys, labels, labels_are_random)
    if len(contest.sample):
        criterion = BY_LABELS
        evidence = {name: contest.right(name) for name in given}
    else:
        criterion = "ensv" if reference_features is None else "neighbors"
        evidence = _evidence(kept, reference_features)
    found = {
        each.name: {
            criterion: float(evidence[each.name].mean()),
            "source_accuracy": scores[each.name].source_accuracy,
        }
        for each in kept
    }
    order = sorted(found, key=lambda n: (found[n][criterion], n == first), reverse=True)
    chosen, reason, is_open = _decide(order, first, evidence, criterion, contest)
    if contest.problem:
        reason, is_open = f"{reason} {contest.problem}", True
    if flaw is not None:
        reason += f" Beware of {first}: {flaw.removeprefix('dropped: ')}."
    verdicts = [
        Verdict(
            each,
            each in found,
            problems.get(each) or _standing(order.index(each) + 1, found[each]),
            found.get(each, {}),
        )
        for each in names
    ]
    to_label = contest.to_label
    needs_labels = is_open and len(to_label) > 0
    used = len(contest.sample)
    return Choice(chosen, first, reason, tuple(verdicts), used, needs_labels, to_label)


def _evidence(kept: Sequence[Candidate], reference: Array | None) -> dict[str, Floats]:
    """What speaks for each candidate, item by item."""
    logits = {each.name: each.target.logits for each in kept}
    if reference is None:
        mean = np.mean([softmax(as_logits(each)) for each in logits.values()], axis=0).argmax(1)
        return {n: (as_logits(each).argmax(1) == mean).astype(float) for n, each in logits.items()}
    count, classes = next(iter(logits.values())).shape
    if len(reference) != count:  # type: ignore[arg-type]
        raise ValueError(
            f"Expected reference_features of the candidates' {count} target items, in their order, "
            f"got {len(reference)}."  # type: ignore[arg-type]
        )
    near = Neighborhoods(reference, num_classes=classes)
    return {name: near.agreements(each) for name, each in logits.items()}


def _decide(
    order: Sequence[str],
    first: str,
    evidence: Mapping[str, Floats],
    criterion: str,
    contest: Contest,
) -> tuple[str, str, bool]:
    """The name of what is taken, why, and whether labels may show that another is better."""
    best = order[0]
    if best == first:
        why = "No adapted model ranks higher." if len(order) > 1 else "Nothing else is left."
        return first, why, False
    differences = evidence[best] - evidence[first]
    share = _share_above(differences)
    text = f"{differences.mean():+.3f} against {first}, above 0 in {share:.0%} of bootstrap samples"
    if criterion == BY_LABELS:
        low, high = contest.gain(differences)
        share = 1.0 if low == high else share  # every item that matters has a label
        ends = f"{100 * low:+.1f}" + f" to {100 * high:+.1f}" * (low < high)
        text = (
            f"accuracy on {len(differences)} labelled items where candidates disagree {text}; on "
            f"all {contest.total} items {ends} points"
        )
        number, stake = "more", ""
    else:
        what = {"neighbors": "neighbour agreement", "ensv": "agreement with all candidates"}
        text = f"{what[criterion]} {text}"
        differs = (contest.classes[best] != contest.classes[first]).mean()
        number, high = "fifty", 1.0
        stake = (
            f" It gives {differs:.0%} of the items another class than {first}, and can neither win "
            "nor lose more."
        )
    if share >= CREDIBLE:
        return best, f"It ranks highest: {text}.{stake}", False
    reason = f"Nothing is credibly better: {best} ranks highest, with {text}."
    if high >= WORTH:
        reason += (
            f" To decide, label {number} of the items on which the candidates disagree (to_label)."
        )
    return first, reason, high >= WORTH


def _share_above(differences: Floats, resamples: int = 1000) -> float:
    """In which share of bootstrap samples the mean is above 0."""
    random = np.random.default_rng(0)
    size = len(differences)
    means = [differences[random.integers(size, size=size)].mean() for _ in range(resamples)]
    return float(np.mean(np.array(means) > 0))


def _standing(rank: int, scores: Mapping[str, float]) -> str:
    shown = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
    return f"rank {rank}: {shown}"


def _check(candidates: Sequence[Candidate], names: Sequence[str], baseline: str | None) -> None:
    """Refuse what cannot be compared."""
    if not candidates:
        raise ValueError("Expected candidates, the one without adaptation among them, got none.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"Several candidates are named {', '.join(twice)}: give each its own name."
        )
    if baseline is not None and baseline not in names:
        raise ValueError(
            f"The baseline {baseline!r} is not among the candidates {', '.join(names)}. It must "
            "be: to keep the model without adaptation is always one of the choices."
        )
    classes = {side.logits.shape[1] for each in candidates for side in (each.source, each.target)}
    if len(classes) > 1:
        raise ValueError(
            f"Candidates have different numbers of classes ({sorted(classes)}): compare models of "
            "the same classes."
        )
    for each in candidates:
        if not torch.equal(each.target.keys, candidates[0].target.keys):
            raise ValueError(
                f"{each.name} and {names[0]} were run on other target items. Run every candidate "
                "on the same rows."
            )
        if not len(each.source.labelled):
            raise ValueError(
                f"{each.name} has no held-out source items with labels, which show whether the "
                "source was lost. Keep some source rows out of training."
            )


def _problem(
    candidate: Candidate,
    score: TargetScores,
    base: TargetScores,
    prior: Floats | None,
    limits: tuple[float, float],
) -> str | None:
    """Why a candidate cannot be chosen, if it cannot."""
    max_source_loss, max_shift = limits
    source, target = candidate.source, candidate.target
    outputs = (source.logits, source.features, target.logits, target.features)
    if not all(bool(torch.isfinite(each).all()) for each in outputs):
        return "dropped: its predictions are not finite"
    features = target.features if target.features.shape[1] else None
    if (collapsed := collapse(target.logits, features, prior)) is not None:
        return f"dropped: it has collapsed: {collapsed}"
    lost = base.source_accuracy - score.source_accuracy
    if lost > max_source_loss:
        return f"dropped: it lost {100 * lost:.1f} points on held-out source items"
    if prior is not None:
        shares = np.bincount(candidate.target.logits.argmax(1), minlength=len(prior))
        distance = float(np.abs(shares / shares.sum() - prior).sum() / 2)
        if distance > max_shift:
            return f"dropped: its classes are {100 * distance:.0f} points off the known frequencies"
    return None
