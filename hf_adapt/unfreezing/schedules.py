"""Schedules: when, and in which order, layer groups train."""

from __future__ import annotations

import difflib
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from hf_adapt.models.groups import LayerGroup
from hf_adapt.unfreezing.phases import Clock, Moment, Phase

Direction = Literal["top_down", "bottom_up"] | Sequence[str | Sequence[str]]
"""`"top_down"`, `"bottom_up"`, or the order itself: one pattern or list of patterns per phase."""


def select(patterns: str | Iterable[str], groups: Sequence[LayerGroup]) -> list[str]:
    """The names of the groups that patterns match, bottom first.

    Args:
        patterns: Names of groups, or regular expressions that match a name whole.
        groups: The model's groups.

    Raises:
        ValueError: If a pattern matches no group (similar names are shown) or is invalid.
    """
    names = [group.name for group in groups]
    chosen: set[str] = set()
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        try:
            found = [n for n in names if n == pattern or re.fullmatch(pattern, n)]
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}.") from error
        if not found:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
            hint = f" Did you mean {', '.join(map(repr, near))}?" if near else ""
            raise ValueError(
                f"There is no layer group {pattern!r}.{hint} The groups, bottom to top: "
                f"{', '.join(names)}."
            )
        chosen.update(found)
    return [name for name in names if name in chosen]


class UnfreezingSchedule(ABC):
    """A rule that turns a model's layer groups into phases."""

    @abstractmethod
    def phases(
        self, groups: Sequence[LayerGroup], clock: Clock | None = None, seed: int = 0
    ) -> list[Phase]:
        """The phases of a run.

        Args:
            groups: The model's groups, bottom first.
            clock: The length of the run, if it is known.
            seed: The run's seed, for schedules that draw random groups.
        """


def ordered_groups(
    groups: Sequence[LayerGroup], direction: Direction, until: str | None
) -> list[list[str]]:
    """The groups that each phase adds, first phase first.

    Raises:
        ValueError: If the direction is unknown, or a group is named twice or not at all.
    """
    if isinstance(direction, str):
        if direction not in ("top_down", "bottom_up"):
            raise ValueError(
                f"direction={direction!r} is unknown: use 'top_down', 'bottom_up', or the order "
                "as a list of groups, one entry per phase."
            )
        levels = sorted({group.level for group in groups}, reverse=direction == "top_down")
        order = [[g.name for g in groups if g.level == level] for level in levels]
    else:
        order = [select(entry, groups) for entry in direction]
        names = [name for entry in order for name in entry]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"The order names {', '.join(twice)} twice; name each group once.")
    if until is not None:
        last = select(until, groups)
        ends = [i for i, entry in enumerate(order) if set(entry) & set(last)]
        if not ends:
            raise ValueError(f"until={until!r} is not in the order {order}.")
        order = order[: max(ends) + 1]
    return order


def cumulative_phases(order: Sequence[Sequence[str]], moments: Sequence[Moment]) -> list[Phase]:
    """Phases, each of which also trains the groups of those before it."""
    trained: list[str] = []
    phases = []
    for added, moment in zip(order, moments, strict=True):
        trained = [*added, *trained]
        phases.append(Phase(moment, trained))
    return phases


@dataclass(frozen=True)
class Gradual(UnfreezingSchedule):
    r"""Start with one group and add one per phase.

    Reference:
        Howard & Ruder 2018, "Universal Language Model Fine-tuning for Text Classification",
        section 3.3, arXiv:1801.06146.

    Args:
        every_steps: Optimizer steps of each phase. By default the phases are spread evenly.
        every_epochs: Epochs of each phase, fractions allowed.
        direction: `"top_down"` (head first), `"bottom_up"`, or the order as a list of groups.
        until: The last group to be unfrozen; the groups after it stay frozen.

    Raises:
        ValueError: If both intervals are given, or one is not positive.

    Example:
        >>> Gradual(every_steps=100, until=r"layer\.8").every_steps
        100
    """

    every_steps: int | None = None
    every_epochs: float | None = None
    direction: Direction = "top_down"
    until: str | None = None

    def __post_init__(self) -> None:
        if self.every_steps is not None and self.every_epochs is not None:
            raise ValueError("Give every_steps or every_epochs, not both.")
        for name in ("every_steps", "every_epochs"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be positive: the length of a phase.")
        if self.every_steps is not None and self.every_steps != int(self.every_steps):
            raise ValueError(f"every_steps={self.every_steps} must be a whole number of steps.")

    def phases(
        self, groups: Sequence[LayerGroup], clock: Clock | None = None, seed: int = 0
    ) -> list[Phase]:
        """One phase per level of groups."""
        order = ordered_groups(groups, self.direction, self.until)
        numbers = range(len(order))
        if self.every_steps is not None:
            moments = [Moment(i * int(self.every_steps)) for i in numbers]
        elif self.every_epochs is not None:
            moments = [Moment(0), *(Moment(i * self.every_epochs, "epoch") for i in numbers[1:])]
        else:
            moments = [Moment(0), *(Moment(100 * i / len(order), "percent") for i in numbers[1:])]
        return cumulative_phases(order, moments)


@dataclass(frozen=True)
class LPFT(UnfreezingSchedule):
    """Linear probing, then fine-tuning: the head alone, then all groups.

    Reference:
        Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and Underperform
        Out-of-Distribution", arXiv:2202.10054.

    Args:
        switch: When all groups start to train: `"50%"`, a step, or epochs.
        head: The groups of the head, as a name or regular expression.
    """

    switch: int | str | Moment = "50%"
    head: str = r"(.*\.)?head"

    def phases(
        self, groups: Sequence[LayerGroup], clock: Clock | None = None, seed: int = 0
    ) -> list[Phase]:
        """Two phases."""
        return [
            Phase(0, select(self.head, groups)),
            Phase(self.switch, [group.name for group in groups]),
        ]


@dataclass(frozen=True, init=False)
class Surgical(UnfreezingSchedule):
    """Train one block, or a few, and nothing else.

    Reference:
        Lee et al. 2023, "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts",
        arXiv:2210.11466: which block is best depends on the shift (early ones for changes of the
        input, late ones for changes of the label).

    Args:
        *blocks: Groups, by name or regular expression.
    """

    blocks: tuple[str, ...]

    def __init__(self, *blocks: str) -> None:
        object.__setattr__(self, "blocks", blocks)

    def phases(
        self, groups: Sequence[LayerGroup], clock: Clock | None = None, seed: int = 0
    ) -> list[Phase]:
        """One phase."""
        return [Phase(0, select(self.blocks, groups))]


@dataclass(frozen=True, init=False)
class FreezeOnly(UnfreezingSchedule):
    """Keep some groups frozen for the whole run and train the others.

    Args:
        *frozen: Groups, by name or regular expression.
    """

    frozen: tuple[str, ...]

    def __init__(self, *frozen: str) -> None:
        object.__setattr__(self, "frozen", frozen)

    def phases(
        self, groups: Sequence[LayerGroup], clock: Clock | None = None, seed: int = 0
    ) -> list[Phase]:
        """One phase."""
        frozen = select(self.frozen, groups)
        return [Phase(0, [group.name for group in groups if group.name not in frozen])]


@dataclass(frozen=True)
class RandomLayers(UnfreezingSchedule):
    """Train a few random layers in each interval, besides the groups that always train.

    Reference:
        Pan et al. 2024, "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language
        Model Fine-Tuning", Algorithm 1, arXiv:2403.17919. Deviation: the optimizer keeps the
        moments of the layers that do not train, as a Trainer's optimizer does.

    Args:
        num_layers: Layers that train in each interval.
        every_steps: Optimizer steps of each interval.
        always: Groups that always train; by default all that are not layers (embeddings, head).
        seed: Seed of the draw; by default the run's.

    Raises:
        ValueError: If a number is not positive.
    """

    num_layers: int = 2
    every_steps: int = 20
    always: str | Sequence[str] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.num_layers < 1 or self.every_steps < 1:
            raise ValueError(
                f"RandomLayers(num_layers={self.num_layers}, every_steps={self.every_steps}): "
                "both must be at least 1."
            )

    def phases(
        self, groups: Sequence[LayerGroup], clock: Clock | None = None, seed: int = 0
    ) -> list[Phase]:
        """One phase per interval."""
        if clock is None:
            raise ValueError(
                "RandomLayers draws once per interval, so the number of steps must be known: set "
                "args.max_steps, or pass train_dataset= or max_steps=."
            )
        layers = [g.name for g in groups if g.kind == "layer"]
        if self.always is not None:
            always = select(self.always, groups)
        else:
            always = [g.name for g in groups if g.kind != "layer"]
        candidates = [name for name in layers if name not in always]
        if len(candidates) < self.num_layers:
            raise ValueError(
                f"RandomLayers(num_layers={self.num_layers}) can draw from {len(candidates)} "
                f"layers only: {', '.join(candidates) or 'none'}."
            )
        draw = random.Random(seed if self.seed is None else self.seed)
        phases = []
        for start in range(0, clock.max_steps, self.every_steps):
            chosen = {*always, *draw.sample(candidates, self.num_layers)}
            phases.append(Phase(start, [g.name for g in groups if g.name in chosen]))
        return phases
