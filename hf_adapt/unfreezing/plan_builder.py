"""A plan from a schedule and its options, for a model and a run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from torch import nn

from hf_adapt.engine.progress import Schedule
from hf_adapt.models.groups import LayerGroup, layer_groups
from hf_adapt.unfreezing.costs import group_costs
from hf_adapt.unfreezing.lr_multipliers import group_multipliers
from hf_adapt.unfreezing.phases import Clock, Phase
from hf_adapt.unfreezing.plan import UnfreezingPlan, group_patterns
from hf_adapt.unfreezing.plateau import Plateau
from hf_adapt.unfreezing.schedules import Direction, Gradual, UnfreezingSchedule

if TYPE_CHECKING:
    from transformers import TrainingArguments

ScheduleLike = UnfreezingSchedule | UnfreezingPlan | Sequence[Phase] | str | os.PathLike[str] | None
Groups = Mapping[str, str | Sequence[str]]


class PlanOptions(TypedDict, total=False):
    """The options of a plan besides its schedule: see `GradualUnfreezing`."""

    every_steps: int | None
    every_epochs: float | None
    direction: Direction
    until: str | None
    groups: Groups | None
    layer_decay: float | None
    lr_multipliers: Mapping[str, float] | None
    rewarm_steps: int


class UnfreezingOptions(PlanOptions, total=False):
    """The options of `GradualUnfreezing` and of its callback."""

    importance: Mapping[str, float | Schedule] | None
    lr_schedule: Schedule | None
    frozen_dropout: bool
    frozen_batch_norm: bool
    cache_frozen_prefix: bool
    cache_dir: str | os.PathLike[str] | None


PLAN_DEFAULTS: PlanOptions = {
    "every_steps": None,
    "every_epochs": None,
    "direction": "top_down",
    "until": None,
    "groups": None,
    "layer_decay": None,
    "lr_multipliers": None,
    "rewarm_steps": 0,
}


class PlanBuilder:
    """Builds the plan of a model from a schedule and its options, which it checks."""

    def __init__(self, schedule: ScheduleLike, **options: Unpack[PlanOptions]) -> None:
        given = {k: v for k, v in options.items() if v != PLAN_DEFAULTS.get(k)}
        timing = {"every_steps", "every_epochs", "direction", "until"} & set(given)
        if isinstance(schedule, (str, os.PathLike)):
            schedule = UnfreezingPlan.load(schedule)
        if isinstance(schedule, UnfreezingPlan) and given:
            raise ValueError(
                f"{', '.join(sorted(given))} and a plan were given, but a plan has its own groups, "
                "phases and learning-rate multipliers. Edit the plan, or make another one with "
                "unfreezing_plan()."
            )
        if schedule is not None and timing:
            raise ValueError(
                f"{', '.join(sorted(timing))} belong to the default schedule, but another schedule "
                "was given. Drop them, or pass them to the schedule itself: "
                "Gradual(every_steps=100), Plateau(direction='bottom_up')."
            )
        self.options: PlanOptions = {**PLAN_DEFAULTS, **options}
        if self.options["rewarm_steps"] < 0:
            raise ValueError(f"rewarm_steps={self.options['rewarm_steps']} must be 0 or more.")
        if schedule is None:
            schedule = Gradual(
                self.options["every_steps"],
                self.options["every_epochs"],
                self.options["direction"],
                self.options["until"],
            )
        if not isinstance(schedule, (UnfreezingPlan, UnfreezingSchedule)):
            schedule = _explicit(schedule)
        self.schedule = schedule

    @property
    def plateau(self) -> Plateau | None:
        """The rule that starts the phases at a plateau."""
        if isinstance(self.schedule, UnfreezingPlan):
            return self.schedule.plateau
        return self.schedule if isinstance(self.schedule, Plateau) else None

    def groups(self, model: nn.Module) -> list[LayerGroup]:
        """The layer groups of a model."""
        if isinstance(self.schedule, UnfreezingPlan):
            return self.schedule.bind(model)
        return layer_groups(model, self.options["groups"])

    def plan(
        self, model: nn.Module, groups: Sequence[LayerGroup], clock: Clock | None, seed: int
    ) -> UnfreezingPlan:
        """The plan for a model, checked against its groups."""
        plan = self.schedule
        if not isinstance(plan, UnfreezingPlan):
            if isinstance(plan, UnfreezingSchedule):
                phases = plan.phases(groups, clock, seed)
            else:
                phases = list(plan)
            plan = UnfreezingPlan(
                groups=group_patterns(model, groups),
                phases=phases,
                lr_multipliers=group_multipliers(
                    groups, self.options["layer_decay"], self.options["lr_multipliers"]
                ),
                rewarm_steps=self.options["rewarm_steps"],
                plateau=self.plateau,
            )
        plan.trained(groups)
        return plan


def _explicit(phases: Any) -> list[Phase]:
    found = list(phases) if isinstance(phases, Iterable) else [phases]
    if not found:
        raise ValueError("The schedule is empty: expected at least one Phase, at step 0.")
    for phase in found:
        if not isinstance(phase, Phase):
            raise TypeError(
                f"Expected a schedule (LPFT(), RandomLayers(), …), a plan, the path of one, or a "
                f"list of Phase(at, train); got {type(phase).__name__} ({phase!r})."
            )
    return found


def unfreezing_plan(
    model: nn.Module,
    args: TrainingArguments | None = None,
    schedule: ScheduleLike = None,
    *,
    train_dataset: Any = None,
    max_steps: int | None = None,
    **options: Unpack[PlanOptions],
) -> UnfreezingPlan:
    """The plan that a run would follow: to print, save, edit and pass to the callback.

    Args:
        model: The model, which may be on the meta device.
        args: The training arguments, for the number of optimizer steps.
        schedule: As in [`GradualUnfreezing`].
        train_dataset: The training set, for the number of optimizer steps where `args` gives epochs
            (of a run in one process).
        max_steps: The number of optimizer steps, in place of that of `args`.
        **options: As in [`GradualUnfreezing`]: `every_steps`, `layer_decay` and so on.

    Returns:
        The plan; `print(plan)` shows its phases with predicted time and memory.

    Raises:
        ValueError: If the schedule does not fit the model or the length of the run.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> size = dict(hidden_size=8, num_attention_heads=2, intermediate_size=16)
        >>> config = BertConfig(vocab_size=32, num_hidden_layers=2, **size)
        >>> print(unfreezing_plan(BertForSequenceClassification(config), max_steps=100))
        phase  starts at                 trains          parameters  time  memory  activations
        0      step 0                    head            18          34%   25%     1%
        1      step 25 (25% of the run)  layer.1, head   690         69%   34%     54%
        2      step 50 (50% of the run)  layer.0 … head  1,290       100%  42%     100%
        3      step 75 (75% of the run)  everything      5,674       100%  100%    100%
        time, memory (weights, ...
    """
    builder = PlanBuilder(schedule, **options)
    groups = builder.groups(model)
    clock = _clock(args, train_dataset, max_steps)
    plan = builder.plan(model, groups, clock, args.seed if args is not None else 42)
    plan.clock, plan.costs = clock, group_costs(model, groups)
    if clock is not None and all(
        clock.knows(phase.at) or phase.at.unit == "plateau" for phase in plan.phases
    ):
        plan.timeline(groups, clock)
    return plan


def _clock(
    args: TrainingArguments | None, train_dataset: Any, max_steps: int | None
) -> Clock | None:
    """The length of a run, as far as it is known before training."""
    per_epoch = None
    if args is not None and hasattr(train_dataset, "__len__"):
        rows = args.per_device_train_batch_size * args.world_size
        batches = -(-len(train_dataset) // rows)
        per_epoch = float(-(-batches // args.gradient_accumulation_steps))
    if max_steps is None and args is not None and args.max_steps > 0:
        max_steps = args.max_steps
    if max_steps is None and per_epoch is not None:
        assert args is not None
        max_steps = int(-(-args.num_train_epochs * per_epoch // 1))
    return None if max_steps is None else Clock(max_steps, per_epoch)
