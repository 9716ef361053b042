"""Which adaptations a Trainer was given, and with which streams of rows."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from hf_adapt.engine.adaptation import Adaptation, Objective
from hf_adapt.engine.mixins import (
    BatchTransform,
    EvaluationObserver,
    EvaluationView,
    FusedObjective,
    GradientTransform,
    LearningRateControl,
    LossCombiner,
    RowRouting,
    WeightAverage,
    WeightTransform,
)
from hf_adapt.engine.streams import TARGET, Stream

logger = logging.getLogger(__name__)

MIXINS = (
    BatchTransform,
    EvaluationObserver,
    EvaluationView,
    FusedObjective,
    GradientTransform,
    LearningRateControl,
    LossCombiner,
    RowRouting,
    WeightAverage,
    WeightTransform,
)


@dataclass(eq=False)
class Plan:
    """Adaptations given together, with their streams.

    Attributes:
        adaptations: What is added to the run.
        streams: The streams that were given with them, by name.
        origin: The callback that the plan came with, if one did.
    """

    adaptations: tuple[Adaptation, ...]
    streams: Mapping[str, Stream] = field(default_factory=dict)
    origin: Any = None

    @classmethod
    def of(
        cls,
        adaptations: Sequence[Adaptation],
        target_dataset: Any = None,
        streams: Mapping[str, Any] | None = None,
        origin: Any = None,
        target_priors: Any = None,
    ) -> Plan:
        """A plan of what a user passes.

        Args:
            adaptations: What is added to the run; with a target and none, the recommended ones.
            target_dataset: The stream `"target"`: datasets or a [`Stream`].
            streams: Further streams by name: datasets or [`Stream`]s.
            origin: The callback that the plan comes with.
            target_priors: How frequent each class is in the target.

        Raises:
            TypeError: If an adaptation or a dataset is none.
            ValueError: If nothing uses the streams, or the target is given twice.
        """
        for adaptation in adaptations:
            if not isinstance(adaptation, Adaptation):
                raise TypeError(_not_an_adaptation(adaptation))
            _check_mixins(adaptation)
        found = {
            name: Stream.of(given, f"streams[{name!r}]") for name, given in (streams or {}).items()
        }
        if target_dataset is not None:
            if TARGET in found:
                raise ValueError("The target is given twice: as target_dataset= and in streams=.")
            found = {TARGET: Stream.of(target_dataset), **found}
        if target_priors is not None:
            target = found.get(TARGET, Stream())
            if target.priors is not None:
                raise ValueError(
                    "The target's class frequencies are given twice: as target_priors= and in "
                    "Stream(priors=...)."
                )
            found[TARGET] = replace(target, priors=target_priors)
        if not adaptations and TARGET in found and found[TARGET].labels == "hide":
            from hf_adapt.alignment.recommended import WHY, recommended

            adaptations = recommended()
            names = ", ".join(type(each).__name__ for each in adaptations)
            logger.warning("A target was given without objectives: using %s: %s.", names, WHY)
        if origin is not None and not adaptations and not found:
            logger.warning(
                "%s was given neither an adaptation nor a target: this is a plain run. Give it "
                "target_dataset=, or an adaptation.",
                type(origin).__name__,
            )
        wanting = [a for a in adaptations if isinstance(a, Objective) or a.needs_streams]
        if not wanting and any(stream.labels == "hide" for stream in found.values()):
            raise ValueError(
                "A target_dataset was given without an adaptation that uses it, so it would "
                "have no effect. Say what to do with it, for example "
                "AdaptationCallback(MMD(), target_dataset=target)."
            )
        return cls(tuple(adaptations), found, origin)


def _check_mixins(adaptation: Adaptation) -> None:
    """Refuse hooks that would never be called, because their mixin is missing."""
    for mixin in MIXINS:
        hooks = [name for name in vars(mixin) if not hasattr(Objective, name)]
        unused = [name for name in hooks if hasattr(adaptation, name)]
        if unused and not isinstance(adaptation, mixin):
            raise TypeError(
                f"{type(adaptation).__name__} has {', '.join(unused)}, which is used only in a "
                f"{mixin.__name__}: derive the class from hf_adapt.engine.mixins.{mixin.__name__}."
            )


def _not_an_adaptation(given: Any) -> str:
    """What to say of an argument that is no adaptation."""
    if isinstance(given, type) and issubclass(given, Adaptation):
        return f"Expected an Adaptation, got the class {given.__name__}: write {given.__name__}()."
    if isinstance(given, (list, tuple)) and given and isinstance(given[0], Adaptation):
        return (
            f"Expected an Adaptation, got a {type(given).__name__} of them: pass them one by one, "
            f"as in AdaptationCallback({', '.join(f'{type(a).__name__}()' for a in given)})."
        )
    if isinstance(given, str):
        return (
            f"Expected an Adaptation or Objective, got the text {given!r}. Make one of its class, "
            "as in: from hf_adapt.alignment import DANN; AdaptationCallback(DANN(), ...)."
        )
    shown = repr(given)
    return (
        f"Expected an Adaptation or Objective, got {type(given).__name__} "
        f"({shown if len(shown) < 80 else shown[:77] + '...'}). A target dataset is passed as "
        "target_dataset=..."
    )


def active_adaptations(plans: Sequence[Plan]) -> list[Adaptation]:
    """The adaptations that change the run, with unique names.

    Raises:
        ValueError: If two have the same name, or two freeze parts of the model.
    """
    active = [a for plan in plans for a in plan.adaptations if a.is_active]
    names = [a.name for a in active]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"Several adaptations are named {', '.join(map(repr, twice))}, so each would be "
            "counted twice. If the callback was added twice (a notebook cell that ran again), "
            "remove one with trainer.remove_callback(...), or build the Trainer again. If both are "
            "meant, give one of them another name=."
        )
    freezing = [a.name for a in active if isinstance(a, LearningRateControl) and a.freezes]
    if len(freezing) > 1:
        raise ValueError(
            f"{' and '.join(freezing)} both decide what is frozen. Put what you want into one "
            "schedule."
        )
    return active


def streams_of(plans: Sequence[Plan], adaptations: Sequence[Adaptation]) -> dict[str, Stream]:
    """The streams of a run, by name: those given, and those that active adaptations provide.

    Args:
        plans: The plans of the run.
        adaptations: Their active adaptations.

    Returns:
        The streams, the target first. A target that is needed and not given is that of a `domain`
        column.

    Raises:
        ValueError: If two differ under one name, or an adaptation's stream is missing.
    """
    active = set(map(id, adaptations))
    found: dict[str, Stream] = {}
    given = []
    for plan in plans:
        is_active = any(id(a) in active for a in plan.adaptations)
        given.append({n: s for n, s in plan.streams.items() if s.is_trained_on or is_active})
    for streams in [*given, *(a.provided_streams() for a in adaptations)]:
        for name, stream in streams.items():
            known = found.get(name)
            if known is None:
                found[name] = stream
            elif known.dataset is not None and stream.dataset is not None:
                _check_agree(name, known, stream)
            else:  # one of them says only what is known of the rows
                whole, other = (known, stream) if stream.dataset is None else (stream, known)
                if other.priors is not None and whole.priors is None:
                    whole = replace(whole, priors=other.priors)
                found[name] = whole
    for adaptation in adaptations:
        for name in adaptation.needs_streams:
            if name == TARGET:
                found.setdefault(TARGET, Stream())
            elif name not in found:
                raise ValueError(
                    f"{adaptation.name!r} needs the stream {name!r}, and the run has "
                    f"{', '.join(map(repr, found)) or 'none'}. Pass streams={{{name!r}: dataset}}."
                )
    source_free = next((a for a in adaptations if a.source_free), None)
    if source_free is not None and TARGET in found:
        name = type(source_free).__name__
        raise ValueError(
            f"{name} adapts to the rows of train_dataset: pass the target's rows there (their "
            f"labels are not used) and class frequencies as {name}(prior=...). Leave "
            "target_dataset and target_priors out."
        )
    for name, stream in found.items():
        if (
            stream.priors is not None
            and adaptations
            and not any(a.uses_priors for a in adaptations)
        ):
            raise ValueError(
                f"Class frequencies were given for the stream {name!r}, and no adaptation of the "
                f"run uses them ({', '.join(a.name for a in adaptations)}). Leave target_priors "
                "out, or add one that does (SelfTraining, InformationMaximization, ATDOC, "
                "PriorCorrection)."
            )
    return dict(sorted(found.items(), key=lambda item: item[0] != TARGET))


def _check_agree(name: str, first: Stream, second: Stream) -> None:
    """Refuse two streams of one name that differ."""
    if first is second:
        return
    which = "target datasets" if name == TARGET else f"datasets for the stream {name!r}"
    if first.dataset is not second.dataset:
        raise ValueError(
            f"Two adaptations were given different {which}, but a batch has one set of such rows. "
            "Pass the same dataset to both, give it to one of them only, or "
            + (
                "a list of all domains to one: target_dataset=[a, b]."
                if name == TARGET
                else "give one of them another name=, if both bring rows of their own."
            )
        )
    for option in ("ratio", "labels", "forward", "weight", "priors"):
        ours, theirs = getattr(first, option), getattr(second, option)
        if ours is not theirs and not np.array_equal(ours, theirs):
            raise ValueError(
                f"Two adaptations of one run disagree on the {option} of the stream {name!r}: "
                f"{ours!r} and {theirs!r}. Give the stream and its options to one."
            )


def the_only(adaptations: Sequence[Adaptation], kind: type[Any], what: str) -> Any:
    """The adaptation of a kind of which a run has one at most.

    Raises:
        ValueError: If there are several.
    """
    found = [a for a in adaptations if isinstance(a, kind)]
    if len(found) > 1:
        raise ValueError(
            f"{' and '.join(a.name for a in found)} both {what}, and a run has one way to do so. "
            "Drop one of them."
        )
    return found[0] if found else None
