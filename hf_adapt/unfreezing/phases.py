"""Moments, phases, and the timeline that they form in a run."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

Unit = Literal["step", "percent", "epoch", "plateau"]

_MOMENT = re.compile(
    r"(?P<amount>\d+(\.\d+)?(e-?\d+)?)\s*(?P<unit>%|epochs?|steps?)", re.IGNORECASE
)


@dataclass(frozen=True)
class Moment:
    """A point in training: an optimizer step, a percentage of the run, an epoch, or a plateau.

    Attributes:
        amount: Number of units that have passed; 0 for a plateau.
        unit: `"step"`, `"percent"`, `"epoch"` or `"plateau"`.
    """

    amount: float
    unit: Unit = "step"

    @classmethod
    def parse(cls, value: int | str | Moment) -> Moment:
        """Read a moment from a number or text.

        Args:
            value: `120` (optimizer steps), `"25%"`, `"1.5 epochs"`, `"120 steps"` or `"plateau"`.

        Raises:
            ValueError: If the value is none of these.

        Example:
            >>> Moment.parse("25%")
            Moment(amount=25.0, unit='percent')
            >>> str(Moment.parse(120)), str(Moment.parse("1.5 epochs"))
            ('120', '1.5 epochs')
        """
        if isinstance(value, Moment):
            return value
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return cls(value)
        text = str(value).strip()
        if text == "plateau":
            return cls(0, "plateau")
        if isinstance(value, str) and text.isdecimal():
            return cls(int(text))
        found = _MOMENT.fullmatch(text)
        if found is None:
            raise ValueError(
                f"{value!r} is not a moment of training: expected a step (120), a share of the run "
                '("25%"), epochs ("1.5 epochs") or "plateau".'
            )
        amount, unit = float(found["amount"]), found["unit"][0].lower()
        if unit == "%" and amount >= 100:
            raise ValueError(f"{value!r} is the end of the run or later: expected less than 100%.")
        if unit == "s":
            return cls(int(amount))
        return cls(amount, "percent" if unit == "%" else "epoch")

    def __str__(self) -> str:
        if self.unit == "plateau":
            return "plateau"
        number = f"{self.amount:.6f}".rstrip("0").rstrip(".")
        epochs = f"{number} epoch" + ("" if number == "1" else "s")
        return {"step": number, "percent": f"{number}%", "epoch": epochs}[self.unit]


@dataclass(frozen=True)
class Clock:
    """The length of a run.

    Attributes:
        max_steps: Optimizer steps of the run.
        steps_per_epoch: Optimizer steps of an epoch, or None if that is unknown (a stream).
    """

    max_steps: int
    steps_per_epoch: float | None = None

    def knows(self, moment: Moment) -> bool:
        """Whether the step of a moment is known in advance."""
        if moment.unit == "plateau":
            return False
        return moment.unit != "epoch" or self.steps_per_epoch is not None

    def step_of(self, moment: Moment) -> int:
        """The optimizer step of a moment.

        Raises:
            ValueError: If it is after the last step, or in epochs of unknown length.
        """
        if moment.unit == "percent":
            # The nearest step, always before the end. The small summand lets a share that was
            # written with six decimals fall on the same step as the exact one.
            nearest = math.floor(moment.amount / 100 * self.max_steps + 0.5 + 1e-4)
            return min(nearest, max(0, self.max_steps - 1))
        step = moment.amount
        if moment.unit == "epoch":
            if self.steps_per_epoch is None:
                raise ValueError(
                    f"A phase starts after {moment}, but the training set has no length, so an "
                    "epoch has no number of steps. Give steps (every_steps=, at: 120) or shares "
                    "of the run (at: 25%)."
                )
            step = moment.amount * self.steps_per_epoch
        step = math.floor(step + 0.5 + 1e-4)
        if step >= self.max_steps:
            epochs = (
                f" of {self.steps_per_epoch:g} steps each" if moment.unit == "epoch" else " steps"
            )
            raise ValueError(
                f"A phase starts after {moment}{epochs}, beyond the last of the run's "
                f"{self.max_steps} optimizer steps: its groups would never be trained. Start it "
                "earlier, train longer, or leave the phase out (`until=` names the last group "
                "that a gradual schedule unfreezes)."
            )
        return step


@dataclass(frozen=True)
class Phase:
    r"""The groups that train from a moment on.

    Args:
        at: When the phase starts: a step (120), `"25%"`, `"1.5 epochs"` or `"plateau"`.
        train: Names of groups, or regular expressions that match them whole.
        where: Prefix of error messages: the file and line that the phase was read from.

    Example:
        >>> Phase(0, ["head"]), str(Phase("25%", ["head", r"layer\..*"]).at)
        (Phase(at=Moment(amount=0, unit='step'), train=('head',)), '25%')
    """

    at: Moment
    train: tuple[str, ...]
    where: str = field(default="", compare=False, repr=False)

    def __init__(self, at: int | str | Moment, train: str | Iterable[str], where: str = "") -> None:
        object.__setattr__(self, "where", where)
        object.__setattr__(self, "at", Moment.parse(at))
        object.__setattr__(self, "train", (train,) if isinstance(train, str) else tuple(train))


class Timeline:
    """Which groups train at which step: a pure function of `global_step`.

    Args:
        starts: The first step of each phase, in ascending order.
        trained: The groups of each phase.
    """

    def __init__(self, starts: Sequence[int], trained: Sequence[frozenset[str]]) -> None:
        self.starts = list(starts)
        self.trained = list(trained)

    def index(self, step: int) -> int:
        """The number of the phase at `step`; if several start at the same step, the last."""
        return bisect_right(self.starts, step) - 1

    def at(self, step: int) -> frozenset[str]:
        """The groups that train at this step."""
        return self.trained[self.index(step)]

    def since(self, group: str, step: int) -> int:
        """The step since which a group that trains at `step` has trained without interruption."""
        index = self.index(step)
        first = self.starts[index]
        while index >= 0:
            # A phase never ran if the next one starts at the same step.
            shadowed = index + 1 < len(self.starts) and self.starts[index + 1] == self.starts[index]
            if not shadowed and group not in self.trained[index]:
                break
            first = self.starts[index]
            index -= 1
        return first

    def ever(self, step: int) -> frozenset[str]:
        """The groups that have trained in some step before `step`."""
        ran = [
            groups
            for i, groups in enumerate(self.trained)
            if self.starts[i] < step
            and (i + 1 == len(self.starts) or self.starts[i + 1] > self.starts[i])
        ]
        return frozenset().union(*ran)
