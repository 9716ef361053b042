"""A choice among models without target labels, which may be to keep the one without adaptation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from hf_adapt.engine.item_outputs import ItemOutputs
from hf_adapt.evaluation import validators
from hf_adapt.evaluation.arrays import Array, Floats, as_prior, extra
from hf_adapt.evaluation.calibration import calibrated
from hf_adapt.evaluation.collapsed import collapse
from hf_adapt.evaluation.estimates import estimate_accuracy
from hf_adapt.evaluation.neighborhoods import Neighborhoods
from hf_adapt.evaluation.scores import TargetScores

MAX_SOURCE_LOSS = 0.05
"""How much accuracy on held-out source items a candidate may lose against the baseline."""
MAX_SHIFT = 0.15
"""How far its predicted classes' shares may be from known frequencies (total variation)."""
EVIDENCE = ("certainty", "clusters", "neighbors", "confidence")
"""What speaks for a candidate, four kinds; beside them `closeness` to the baseline counts."""
CREDIBLE = 3
"""In how many of the four a candidate must be above the baseline."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A trained model, by what it gives for both domains.

    Args:
        name: What it is called.
        source: Held-out source items with labels.
        target: Target items, the same for all candidates; their labels are not looked at.
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
        """A candidate from plain arrays; without features a part of the evidence is left out.

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
    count = len(scores)
    found = torch.full((count,), -100) if labels is None else _tensor(labels, "labels", 1)
    pooled = torch.zeros(count, 0) if features is None else _tensor(features, "features", 2)
    return ItemOutputs(pooled.float(), scores, found.long(), torch.arange(count))


def _tensor(values: Array, name: str, ndim: int) -> torch.Tensor:
    found = torch.as_tensor(values).detach().cpu()
    if found.ndim != ndim:
        raise ValueError(f"Expected {name} with {ndim} dimensions, got {tuple(found.shape)}.")
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
    """

    chosen: str
    baseline: str
    reason: str
    candidates: Sequence[Verdict] = field(default_factory=tuple)

    @property
    def adapts(self) -> bool:
        """Whether an adapted model was chosen."""
        return self.chosen != self.baseline

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        width = max(len(each.name) for each in self.candidates)
        lines = [f"Chosen without target labels: {self.chosen}. {self.reason}"]
        for each in self.candidates:
            mark = "*" if each.name == self.chosen else " "
            lines.append(f"{mark} {each.name:{width}}  {each.reason}")
        return "\n".join(lines)


def choose(
    candidates: Sequence[Candidate],
    baseline: str | None = None,
    *,
    reference_features: Array | None = None,
    prior: Array | None = None,
    max_source_loss: float = MAX_SOURCE_LOSS,
    max_shift: float = MAX_SHIFT,
) -> Choice:
    """Choose a model for the target without its labels, or keep the one without adaptation.

    1. What has collapsed, has lost the source, or contradicts known class frequencies is dropped.
    2. The rest is ranked by the mean of its ranks in five things of different kinds: how sure and
       varied its predictions are, calibrated on the source ([`nuclear_norm`]; with known
       frequencies [`information_maximization`]); whether its classes are clusters of its own
       features ([`class_ami`]), and of those before training ([`neighbor_agreement`]); how much of
       the source's confidence it keeps ([`estimate_accuracy`], `"doc"`); and on how many items it
       agrees with the baseline.
    3. The first is taken if it is above the baseline in three of the first four; else the baseline
       is kept.

    Each of these can be fooled, but a method seldom fools all of them. It needs candidates that
    differ: of one method with several weights it can say little. Ranks depend on who else is there.

    Args:
        candidates: The models, the baseline among them.
        baseline: The name of the one that was trained on the source only; the first by default.
        reference_features: Features of the target items before any training, in the order of the
            candidates' items; without them the third of the five is left out.
        prior: The target's class frequencies, if they are known.
        max_source_loss: How much accuracy on held-out source items a candidate may lose.
        max_shift: How far predicted shares may be from `prior` (total variation).

    Raises:
        ValueError: If names are given twice, the baseline is missing, or candidates have other
            target items.
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
    found = _evidence(kept, base, scores, reference_features)
    ranks = _mean_ranks(found)
    order = sorted(found, key=lambda name: (ranks[name], name == first), reverse=True)
    chosen, reason = _decide(order, first, found)
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
    return Choice(chosen, first, reason, tuple(verdicts))


def _evidence(
    kept: Sequence[Candidate],
    base: Candidate,
    scores: Mapping[str, TargetScores],
    reference: Array | None,
) -> dict[str, dict[str, float]]:
    """What speaks for each candidate, by kind."""
    count, classes = base.target.logits.shape
    if reference is not None and len(reference) != count:  # type: ignore[arg-type]
        raise ValueError(
            f"Expected reference_features of the candidates' {count} target items, in their order, "
            f"got {len(reference)}."  # type: ignore[arg-type]
        )
    near = None if reference is None else Neighborhoods(reference, num_classes=classes)
    baseline = base.target.logits.argmax(1)
    found = {}
    for each in kept:
        target, source, own = each.target, each.source.labelled, scores[each.name]
        found[each.name] = {
            "certainty": _certainty(each, own.prior),
            **({"clusters": own.score("class_ami")} if target.features.shape[1] else {}),
            **({} if near is None else {"neighbors": near.agreement(target.logits)}),
            "confidence": estimate_accuracy(
                source.logits, source.labels, target.logits, method="doc", resamples=1
            ).value,
            "closeness": float((target.logits.argmax(1) == baseline).double().mean()),
        }
    return found


def _certainty(candidate: Candidate, prior: Array | None) -> float:
    """How sure and varied the predictions are, at the temperature that fits the source."""
    source = candidate.source.labelled
    logits = calibrated(candidate.target.logits, source.logits, source.labels)
    if prior is None:
        return validators.nuclear_norm(logits)
    return validators.information_maximization(logits, prior)


def _mean_ranks(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean rank of each over all criteria, higher is better; equal values share a rank."""
    table = np.array([list(values.values()) for values in found.values()])
    ranks = extra("scipy.stats").rankdata(table, axis=0).mean(1)
    return dict(zip(found, ranks.tolist(), strict=True))


def _decide(
    order: Sequence[str], first: str, found: Mapping[str, Mapping[str, float]]
) -> tuple[str, str]:
    """The name of what is taken, and why."""
    best = order[0]
    if best == first:
        why = "No adapted model ranks higher." if len(order) > 1 else "Nothing else is left."
        return first, why
    kinds = [name for name in EVIDENCE if name in found[best]]
    above = [name for name in kinds if found[best][name] > found[first][name]]
    text = f"it is above {first} in {', '.join(above) or 'nothing'} ({len(above)} of {len(kinds)})"
    if len(above) >= min(CREDIBLE, len(kinds)):
        return best, f"It ranks highest: {text}."
    return first, (
        f"Nothing is credibly better: {best} ranks highest, but {text}. To decide, label fifty "
        f"target rows on which {best} and {first} disagree."
    )


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
    if not (
        torch.isfinite(candidate.target.logits).all()
        and torch.isfinite(candidate.source.logits).all()
    ):
        return "dropped: its predictions are not finite"
    if (
        collapsed := collapse(candidate.target.logits, candidate.target.features, prior)
    ) is not None:
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
