"""Schedules: in which order, and when, layer groups train."""

from __future__ import annotations

import difflib
import math
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from hf_adapt.models.groups import LayerGroup
from hf_adapt.unfreezing.phases import Clock, Moment, Phase

Direction = Literal["top_down", "bottom_up"] | Sequence[str | Sequence[str]]
"""`"top_down"`, `"bottom_up"`, or the order itself: one entry (pattern or patterns) per phase."""


def select(patterns: str | Iterable[str], groups: Sequence[LayerGroup]) -> list[str]:
    """The names of the groups that patterns choose, bottom first.

    Args:
        patterns: Names of groups, or regular expressions that match a name whole.
        groups: The model's groups.

    Raises:
        ValueError: If a pattern chooses nothing (near names are shown) or is no expression.
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
            clock: How long the run is, where that is known.
            seed: The run's seed, for schedules that draw.
        """


def _ordered(
    groups: Sequence[LayerGroup], direction: Direction, until: str | None
) -> list[list[str]]:
    """What each phase adds, first phase first."""
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
            raise ValueError(f"The order names {', '.join(twice)} twice; each trains from one on.")
    if until is not None:
        last = select(until, groups)
        ends = [i for i, entry in enumerate(order) if set(entry) & set(last)]
        if not ends:
            raise ValueError(f"until={until!r} is not in the order {order}.")
        order = order[: max(ends) + 1]
    return order


def _grown(order: Sequence[Sequence[str]], moments: Sequence[Moment]) -> list[Phase]:
    """Phases of which each trains all that came before, too."""
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
        every_steps: Optimizer steps of a phase. By default the phases are spread evenly.
        every_epochs: Epochs of a phase, fractions allowed.
        direction: `"top_down"` (head first), `"bottom_up"`, or the order as a list of groups.
        until: The last group to be unfrozen; what comes after it stays frozen.

    Raises:
        ValueError: If both intervals are given or one is not positive.

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
        order = _ordered(groups, self.direction, self.until)
        numbers = range(len(order))
        if self.every_steps is not None:
            moments = [Moment(i * int(self.every_steps)) for i in numbers]
        elif self.every_epochs is not None:
            moments = [Moment(0), *(Moment(i * self.every_epochs, "epoch") for i in numbers[1:])]
        else:
            moments = [Moment(0), *(Moment(100 * i / len(order), "percent") for i in numbers[1:])]
        return _grown(order, moments)


@dataclass(frozen=True)
class Plateau(UnfreezingSchedule):
    """Add a group whenever a metric has stopped getting better.

    The steps of the transitions are kept in the checkpoint, so that a resumed run repeats them.
    Choose a metric of source data: no target label may choose.

    Args:
        metric: Name of the metric, as evaluation logs it.
        patience: Evaluations without an improvement before the next group is added.
        min_delta: By how much a value must be better to count.
        greater_is_better: By default False where the name ends in "loss", else True.
        direction: As in `Gradual`.
        until: As in `Gradual`.
    """

    metric: str = "eval_loss"
    patience: int = 1
    min_delta: float = 0.0
    greater_is_better: bool | None = None
    direction: Direction = "top_down"
    until: str | None = None

    def __post_init__(self) -> None:
        if self.patience < 1 or self.min_delta < 0:
            raise ValueError(
                f"Plateau(patience={self.patience}, min_delta={self.min_delta}): expected "
                "patience >= 1 and min_delta >= 0."
            )

    def phases(
        self, groups: Sequence[LayerGroup], clock: Clock | None = None, seed: int = 0
    ) -> list[Phase]:
        """One phase per level of groups; all but the first wait for the plateau."""
        order = _ordered(groups, self.direction, self.until)
        waiting = [Moment(0, "plateau")] * (len(order) - 1)
        return _grown(order, [Moment(0), *waiting])

    def improved(self, value: float, best: float | None) -> bool:
        """Whether a value is better than the best so far."""
        if not math.isfinite(value):
            return False
        if best is None:
            return True
        greater = self.greater_is_better
        if greater is None:
            greater = not self.metric.endswith("loss")
        return value > best + self.min_delta if greater else value < best - self.min_delta


@dataclass(frozen=True)
class LPFT(UnfreezingSchedule):
    """Linear probing, then fine-tuning: the head alone, then everything.

    Reference:
        Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and Underperform
        Out-of-Distribution", arXiv:2202.10054.

    Args:
        switch: When everything starts to train: `"50%"`, a step, or epochs.
        head: Which groups are the head.
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
    """Train one block (or a few) and nothing else.

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
    """In each interval train a few layers drawn at random, besides the groups that always train.

    Reference:
        Pan et al. 2024, "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language
        Model Fine-Tuning", Algorithm 1, arXiv:2403.17919. Deviation: the optimizer keeps the
        moments of a layer that rests, as a Trainer's optimizer does.

    Args:
        num_layers: Layers that train in an interval.
        every_steps: Optimizer steps of an interval.
        always: Groups that always train; by default all that are not layers (embeddings, head).
        seed: Of the draw; by default the run's.

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
        free = [name for name in layers if name not in always]
        if len(free) < self.num_layers:
            raise ValueError(
                f"RandomLayers(num_layers={self.num_layers}) can draw from {len(free)} layers "
                f"only: {', '.join(free) or 'none'}."
            )
        draw = random.Random(seed if self.seed is None else self.seed)
        phases = []
        for start in range(0, clock.max_steps, self.every_steps):
            chosen = {*always, *draw.sample(free, self.num_layers)}
            phases.append(Phase(start, [g.name for g in groups if g.name in chosen]))
        return phases
