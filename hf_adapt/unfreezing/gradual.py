"""Gradual unfreezing: layer groups that train by a schedule, each with its own learning rate."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypedDict, Unpack, cast

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_adapt.engine.adaptation import Adaptation
from hf_adapt.engine.callback import AdaptationCallback
from hf_adapt.engine.progress import Schedule
from hf_adapt.engine.rates import RateFactors
from hf_adapt.unfreezing.costs import group_costs
from hf_adapt.unfreezing.freezing import Freezer
from hf_adapt.unfreezing.layers import LayerGroup, layer_groups
from hf_adapt.unfreezing.phases import Clock, Phase, Timeline
from hf_adapt.unfreezing.plan import UnfreezingPlan, group_patterns
from hf_adapt.unfreezing.prefix import FrozenPrefix, cacheable_stack
from hf_adapt.unfreezing.rates import (
    group_rates,
    importance_factor,
    importance_of,
    rewarm_factor,
)
from hf_adapt.unfreezing.schedules import Direction, Gradual, Plateau, UnfreezingSchedule

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

logger = logging.getLogger(__name__)

ScheduleLike = UnfreezingSchedule | UnfreezingPlan | Sequence[Phase] | str | os.PathLike[str] | None
Groups = Mapping[str, str | Sequence[str]]


class PlanOptions(TypedDict, total=False):
    """What a plan is made of, besides its schedule: see `GradualUnfreezing`."""

    every_steps: int | None
    every_epochs: float | None
    direction: Direction
    until: str | None
    groups: Groups | None
    layer_decay: float | None
    rates: Mapping[str, float] | None
    rewarm_steps: int


class UnfreezingOptions(PlanOptions, total=False):
    """The options of `GradualUnfreezing`, which its callback takes too."""

    importance: Mapping[str, float | Schedule] | None
    rate_schedule: Schedule | None
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
    "rates": None,
    "rewarm_steps": 0,
}


class _PlanMaker:
    """A schedule and its options, checked, that make a plan for a model."""

    def __init__(self, schedule: ScheduleLike, **options: Unpack[PlanOptions]) -> None:
        given = {k: v for k, v in options.items() if v != PLAN_DEFAULTS.get(k)}
        timing = {"every_steps", "every_epochs", "direction", "until"} & set(given)
        if isinstance(schedule, (str, os.PathLike)):
            schedule = UnfreezingPlan.load(schedule)
        if isinstance(schedule, UnfreezingPlan) and given:
            raise ValueError(
                f"{', '.join(sorted(given))} and a plan were given, but a plan holds its own "
                "groups, phases and rates. Edit the plan, or make another with unfreezing_plan()."
            )
        if schedule is not None and timing:
            raise ValueError(
                f"{', '.join(sorted(timing))} belong to the default schedule and another was "
                "given. Drop them, or pass them to the schedule itself: "
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
        """The rule of the phases that wait for a plateau."""
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
                rates=group_rates(groups, self.options["layer_decay"], self.options["rates"]),
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


class GradualUnfreezing(Adaptation):
    """Trains layer groups by a schedule, each with its share of the learning rate.

    What is frozen does not move by a bit, whatever the optimizer, and its backward is not
    computed. The phase is a pure function of `global_step`, so that resuming, accumulation and
    several processes change nothing. The optimizer, its scheduler and the checkpoint stay the
    plain Trainer's.

    Reference:
        Howard & Ruder 2018, "Universal Language Model Fine-tuning for Text Classification",
        section 3, arXiv:1801.06146: gradual unfreezing, discriminative rates, slanted triangle.

    Args:
        schedule: When what trains: `LPFT()`, `Surgical("layer.0")`, `FreezeOnly("embeddings")`,
            `RandomLayers()`, `Plateau("eval_loss")`, a list of `Phase(at, train)`, an
            `UnfreezingPlan` or the path of one. By default the head trains first and one layer
            group is added per phase from the top; the phases are spread evenly over the run.
        every_steps: Optimizer steps of a phase of the default schedule.
        every_epochs: Epochs of a phase of the default schedule.
        direction: `"top_down"`, `"bottom_up"`, or the order as a list of groups.
        until: The last group that the default schedule unfreezes.
        groups: Layer groups, bottom first, as name to patterns (names of modules or parameters,
            or regular expressions). They are found by themselves for nearly every architecture.
        layer_decay: Learning rate of a level relative to the one above it: 0.9, or 1 / 2.6 as in
            ULMFiT. Weight decay and its exemption of biases and norms stay the Trainer's.
        rates: Learning-rate factors by group, in place of the decayed ones.
        rewarm_steps: Steps over which the rate of a newly unfrozen group rises to its full value.
        importance: How much each group matters to what was learnt before, from 0 to 1, or a
            function of progress: its rate is multiplied by 1 - importance. For continual training.
        rate_schedule: A schedule of all rates in place of the Trainer's: `slanted_triangular()`.
        frozen_dropout: Dropout in frozen parts stays live, as in a script that only clears
            `requires_grad`. False turns it off.
        frozen_batch_norm: Batch norm in frozen parts uses its running statistics and leaves them
            alone. With False they go on following the data.
        cache_frozen_prefix: Compute the frozen bottom of the model once per example, keep its
            output on disk, and start later epochs from it. Turns `frozen_dropout` off.
        cache_dir: Where; by default `frozen_prefix_cache` in the output folder.
        name: Prefix of what is logged and stored.

    Raises:
        ValueError: If options contradict each other or are out of range.

    Example:
        >>> GradualUnfreezing(every_epochs=0.5, layer_decay=0.9).name
        'unfreezing'
    """

    name = "unfreezing"
    freezes = True

    def __init__(
        self,
        schedule: ScheduleLike = None,
        *,
        name: str | None = None,
        **options: Unpack[UnfreezingOptions],
    ) -> None:
        known = {**UnfreezingOptions.__annotations__}
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise TypeError(
                f"{type(self).__name__} has no option {', '.join(unknown)}. "
                f"Known: {', '.join(known)}."
            )
        if name is not None:
            self.name = name
        self._importance_given = options.pop("importance", None)
        self.rate_schedule = options.pop("rate_schedule", None)
        self._cached = options.pop("cache_frozen_prefix", False)
        self._cache_dir = options.pop("cache_dir", None)
        self._frozen_dropout = options.pop("frozen_dropout", not self._cached)
        self._frozen_batch_norm = options.pop("frozen_batch_norm", True)
        if self._cached and self._frozen_dropout:
            raise ValueError(
                "cache_frozen_prefix keeps one output per example, but with frozen_dropout=True "
                "it would differ each time. Drop frozen_dropout=True."
            )
        self._maker = _PlanMaker(schedule, **cast(PlanOptions, options))
        self._trainer: Trainer | None = None
        self._freezer: Freezer | None = None
        self._prefix: FrozenPrefix | None = None
        self._undo_find_unused: Any = None

    # ---- before the run ----

    def setup(self, trainer: Trainer) -> None:
        """Find the groups and check the schedule, before anything is made."""
        self._trainer, self._freezer, self._prefix = trainer, None, None
        self._plateau_steps: list[int] = []
        self._best: float | None = None
        self._waited = 0
        self._index: int | None = None
        self._now: dict[str, float] = {}
        model = trainer.accelerator.unwrap_model(trainer.model)
        _refuse_unsupported(trainer)
        rule = self._maker.plateau
        if rule is not None and trainer.args.eval_strategy == "no":
            raise ValueError(
                f"The unfreezing schedule waits for {rule.metric!r}, but nothing is evaluated: set "
                "eval_strategy='steps' or 'epoch' in the training arguments."
            )
        self._groups = self._maker.groups(model)
        self._importance = importance_of(self._groups, self._importance_given)
        if self._cached:
            cacheable_stack(trainer, model)
        if trainer.accelerator.num_processes > 1:
            self._find_unused_parameters(trainer)

    def _find_unused_parameters(self, trainer: Trainer) -> None:
        """DDP must expect that frozen parameters get no gradient."""
        arguments, handler = trainer.args, getattr(trainer.accelerator, "ddp_handler", None)
        before = (
            arguments.ddp_find_unused_parameters,
            getattr(handler, "find_unused_parameters", None),
        )

        def undo() -> None:
            arguments.ddp_find_unused_parameters = before[0]
            if handler is not None:
                handler.find_unused_parameters = before[1]

        if before[0] is False:
            logger.warning(
                "ddp_find_unused_parameters=False was set, but frozen parameters get no gradient: "
                "this run uses True."
            )
        arguments.ddp_find_unused_parameters = True
        if handler is not None:
            handler.find_unused_parameters = True
        self._undo_find_unused = undo

    def begin(self, trainer: Trainer) -> None:
        """Resolve the schedule and check that the optimizer has all that it trains."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        wrapped = trainer.model_wrapped
        if isinstance(wrapped, DistributedDataParallel) and not wrapped.find_unused_parameters:
            raise ValueError(
                "The model was wrapped for DDP by an earlier train() without "
                "find_unused_parameters, so freezing would fail. Add the callback before the "
                "first train(), or set ddp_find_unused_parameters=True."
            )
        self._clock = Clock(trainer.state.max_steps, _steps_per_epoch(trainer))
        plan = self._maker.plan(model, self._groups, self._clock, trainer.args.seed)
        costs = group_costs(model, self._groups)
        self._plan = replace(plan, clock=self._clock, costs=costs)
        self._set_timeline()
        named = dict(model.named_parameters())
        self._parameters = {g.name: {n: named[n] for n in g.parameters} for g in self._groups}
        self._check_optimizer(trainer)
        everything = {n: p for part in self._parameters.values() for n, p in part.items()}
        self._freezer = Freezer(model, everything, self._frozen_dropout, self._frozen_batch_norm)
        if not _reentrant(trainer):
            self._freezer.drop_input_gradients()
        if self._cached:
            self._prefix = FrozenPrefix(trainer, model, self._groups, self._cache_dir)
        logger.info("Gradual unfreezing:\n%s", self._plan)

    def _set_timeline(self) -> None:
        self._timeline: Timeline = self._plan.timeline(
            self._groups, self._clock, self._plateau_steps
        )
        for number, trained in enumerate(self._timeline.trained):
            if not self._trainable(trained):
                raise ValueError(
                    f"Phase {number} trains {', '.join(sorted(trained))} only, whose rate is 0 "
                    "(rates, importance): nothing would learn."
                )

    def _trainable(self, groups: frozenset[str]) -> frozenset[str]:
        """Those whose rate is not the constant 0."""
        return frozenset(
            g for g in groups if self._plan.rates.get(g, 1.0) != 0 and self._importance.get(g) != 1
        )

    def _check_optimizer(self, trainer: Trainer) -> None:
        assert trainer.optimizer is not None
        known = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        trained = frozenset().union(*self._plan.trained(self._groups))
        missing = [
            name
            for group in sorted(trained)
            for name, parameter in self._parameters[group].items()
            if id(parameter) not in known
        ]
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise ValueError(
                f"The schedule trains {', '.join(missing[:5])}{more}, but the optimizer does not "
                "have them: it was made while they were frozen, or by your own code without them. "
                "Let the Trainer make it, or give it every parameter that is to be trained."
            )

    # ---- each optimizer step ----

    def before_step(self, step: int) -> None:
        """Switch the phase; only here, so that all micro-batches of a step are of one phase."""
        assert self._freezer is not None
        index = self._timeline.index(step)
        if index == self._index:
            return
        self._index = index
        trained = self._trainable(self._timeline.trained[index])
        names = frozenset(n for group in trained for n in self._parameters[group])
        self._freezer.train_only(names)
        self._num_trained = sum(self._freezer.parameters[n].numel() for n in names)
        logger.info(
            "Step %d: phase %d of %d trains %s (%s parameters).",
            step,
            index,
            len(self._plan.phases),
            ", ".join(g.name for g in reversed(self._groups) if g.name in trained),
            f"{self._num_trained:,}",
        )
        if self._prefix is not None:
            later = [s for s in self._timeline.starts if s > step]
            self._prefix.start_phase(trained, (later[0] if later else self._clock.max_steps) - step)

    def around_forward(self, inputs: Mapping[str, Any]) -> AbstractContextManager[Any]:
        """Frozen parts in the mode that was chosen for them."""
        if self._freezer is not None:
            self._freezer.before_forward()
        return nullcontext()

    def _factors(self, step: int) -> dict[str, float]:
        """The factor of each group at this step; 0 where it is frozen."""
        progress = step / max(1, self._clock.max_steps)
        trained = self._trainable(self._timeline.at(step))
        factors = {}
        for group in self._parameters:
            factor = 0.0
            if group in trained:
                factor = self._plan.rates.get(group, 1.0)
                if self._plan.rewarm_steps:
                    since = self._timeline.since(group, step)
                    factor *= rewarm_factor(step, since, self._plan.rewarm_steps)
                if group in self._importance:
                    factor *= importance_factor(self._importance[group], progress)
            factors[group] = factor
        return factors

    def rate_factors(self, step: int) -> RateFactors:
        """The factor of every scheduled parameter."""
        factors = self._factors(step)
        self._note_rates(factors)
        return {
            parameter: factors[group]
            for group, part in self._parameters.items()
            for parameter in part.values()
            if factors[group] != 1.0
        }

    def _note_rates(self, factors: Mapping[str, float]) -> None:
        assert self._trainer is not None and self._trainer.optimizer is not None
        rate_of = {
            id(p): group["lr"]
            for group in self._trainer.optimizer.param_groups
            for p in group["params"]
        }
        for group, part in self._parameters.items():
            first = next(iter(part.values()))
            rate = rate_of.get(id(first), 0.0)
            self._now[f"learning_rate/{group}"] = float(rate) * factors[group]

    # ---- evaluation, logs, checkpoints, end ----

    def on_evaluate(self, metrics: Mapping[str, float], step: int) -> None:
        """On a plateau the next group is added from the coming step on."""
        rule = self._plan.plateau
        waiting = len(self._timeline.starts) < len(self._plan.phases)
        if rule is None or not waiting:
            return
        if rule.metric not in metrics:
            raise ValueError(
                f"The unfreezing schedule waits for {rule.metric!r}, which this evaluation did "
                f"not give. It gave: {', '.join(sorted(metrics))}."
            )
        value = float(metrics[rule.metric])
        if rule.improved(value, self._best):
            self._best, self._waited = value, 0
            return
        self._waited += 1
        if self._waited >= rule.patience:
            self._waited = 0
            self._plateau_steps.append(step)
            self._set_timeline()

    def logged(self) -> Mapping[str, float]:
        """The phase, what trains, and each group's learning rate in the last step."""
        assert self._index is not None
        return {
            f"{self.name}/phase": self._index,
            f"{self.name}/trainable_parameters": self._num_trained,
            **self._now,
            **(self._prefix.logged() if self._prefix is not None else {}),
        }

    def state_dict(self) -> dict[str, Any]:
        """What a plateau-driven schedule has seen; others need no state."""
        assert self._trainer is not None
        state: dict[str, Any] = {}
        if self._plan.plateau is not None:
            state = {
                "plateau_steps": self._plateau_steps,
                "best": self._best,
                "waited": self._waited,
            }
        if self._trainer.is_fsdp_enabled:
            state["trained"] = sorted(self._timeline.ever(self._trainer.state.global_step))
        return state

    @contextmanager
    def around_optimizer_load(self, state: dict[str, Any]) -> Iterator[None]:
        """What had not trained when the checkpoint was saved has no optimizer state."""
        assert self._trainer is not None
        trained = state.get("trained", [group.name for group in self._groups])
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        named = dict(model.named_parameters())
        waiting = [named[n] for g in self._groups if g.name not in trained for n in g.parameters]
        for parameter in waiting:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in waiting:
                parameter.requires_grad_(True)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back the steps of the plateaus."""
        if "plateau_steps" not in state:
            return
        self._plateau_steps = list(state["plateau_steps"])
        self._best, self._waited = state["best"], state["waited"]
        self._set_timeline()

    def close(self) -> None:
        """Every parameter trainable, every hook and option as before."""
        if self._prefix is not None:
            self._prefix.close()
        if self._freezer is not None:
            self._freezer.undo()
        if self._undo_find_unused is not None:
            self._undo_find_unused()
        self._trainer = self._freezer = self._prefix = self._undo_find_unused = None


def _refuse_unsupported(trainer: Trainer) -> None:
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "Gradual unfreezing does not work with DeepSpeed, whose optimizer flattens all "
            "parameters before the first step. Use FSDP2 or DDP."
        )
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if trainer.is_fsdp_enabled and getattr(plugin, "fsdp_version", 1) != 2:
        raise ValueError(
            "Gradual unfreezing does not work with FSDP version 1, which flattens parameters. "
            "Use FSDP2: fsdp_config={'version': 2}."
        )
    if trainer.accelerator.num_processes > 1 and _reentrant(trainer):
        raise ValueError(
            "Reentrant gradient checkpointing cannot skip frozen parameters in several processes. "
            "Use gradient_checkpointing_kwargs={'use_reentrant': False}, the default."
        )
    if getattr(trainer.args, "ddp_static_graph", None):
        raise ValueError(
            "ddp_static_graph=True promises that the same parameters get gradients in every step, "
            "which unfreezing changes. Drop it."
        )


def _reentrant(trainer: Trainer) -> bool:
    """Whether gradient checkpointing is on in its reentrant form."""
    arguments = trainer.args
    chosen = getattr(arguments, "activation_checkpointing_kwargs", None) or getattr(
        arguments, "gradient_checkpointing_kwargs", None
    )
    on = getattr(arguments, "activation_checkpointing", None) or getattr(
        arguments, "gradient_checkpointing", False
    )
    return bool(on) and bool((chosen or {}).get("use_reentrant", False))


def _steps_per_epoch(trainer: Trainer) -> float | None:
    loader = trainer.callback_handler.train_dataloader
    try:
        batches = len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None
    return float(-(-batches // trainer.args.gradient_accumulation_steps))


def unfreezing_plan(
    model: nn.Module,
    args: TrainingArguments | None = None,
    schedule: ScheduleLike = None,
    *,
    train_dataset: Any = None,
    max_steps: int | None = None,
    **options: Unpack[PlanOptions],
) -> UnfreezingPlan:
    """Make the plan that a run would follow: to print, to save, to edit, to give to the callback.

    Args:
        model: The model; one on the meta device will do.
        args: The training arguments; their `max_steps` tells the steps of the phases.
        schedule: As for `GradualUnfreezing`.
        train_dataset: Tells the steps where `args` counts epochs (in one process).
        max_steps: Tells the steps directly.
        **options: As for `GradualUnfreezing`: `every_steps`, `layer_decay` and so on.

    Returns:
        The plan; `print(plan)` shows phases, predicted times and memory.

    Raises:
        ValueError: If the schedule does not fit the model or the length of the run.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> size = dict(hidden_size=8, num_attention_heads=2, intermediate_size=16)
        >>> config = BertConfig(vocab_size=32, num_hidden_layers=2, **size)
        >>> print(unfreezing_plan(BertForSequenceClassification(config), max_steps=100))
        phase  starts at        trains      ...
        0      step 0 (0%)      head        ...
        1      step 25 (25%)    layer.1, head ...
        2      step 50 (50%)    ...
        3      step 75 (75%)    everything  ...
        time, memory ...
    """
    maker = _PlanMaker(schedule, **options)
    groups = maker.groups(model)
    clock = _clock(args, train_dataset, max_steps)
    plan = maker.plan(model, groups, clock, args.seed if args is not None else 42)
    plan.clock, plan.costs = clock, group_costs(model, groups)
    if clock is not None:
        plan.timeline(groups, clock)
    return plan


def _clock(
    args: TrainingArguments | None, train_dataset: Any, max_steps: int | None
) -> Clock | None:
    """The length of a run, as far as it can be known before it."""
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


class GradualUnfreezingCallback(AdaptationCallback):
    """Gradual unfreezing and layer-wise learning rates in one line, for any Trainer.

    Args:
        schedule: As for `GradualUnfreezing`; the head first and then one group per phase from the
            top, by default.
        **options: As for `GradualUnfreezing`: `every_steps`, `every_epochs`, `layer_decay`,
            `rates`, `groups`, `cache_frozen_prefix` and so on.

    Raises:
        ValueError: If options contradict each other or are out of range.

    Example:
        ```python
        trainer.add_callback(GradualUnfreezingCallback(layer_decay=0.9))
        trainer.train()
        ```
    """

    def __init__(self, schedule: ScheduleLike = None, **options: Unpack[UnfreezingOptions]) -> None:
        super().__init__(GradualUnfreezing(schedule, **options))
