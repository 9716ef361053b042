"""The adaptation that trains layer groups by a schedule, each with its own learning rate."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack, cast

from torch import nn

from hf_adapt.engine.mixins import LearningRateControl, LrMultipliers
from hf_adapt.engine.training import (
    check_in_optimizer,
    check_unused_parameters,
    checkpoint_without_reentry,
    expect_unused_parameters,
    fixed_parameters,
    refuse_changing_gradients,
    steps_per_epoch,
    unwrapped_model,
)
from hf_adapt.unfreezing.costs import group_costs
from hf_adapt.unfreezing.freezer import Freezer
from hf_adapt.unfreezing.lr_multipliers import (
    group_importance,
    importance_multiplier,
    rewarm_multiplier,
)
from hf_adapt.unfreezing.phases import Clock, Timeline
from hf_adapt.unfreezing.plan_builder import (
    PlanBuilder,
    PlanOptions,
    ScheduleLike,
    UnfreezingOptions,
)
from hf_adapt.unfreezing.plateau import PlateauProgress
from hf_adapt.unfreezing.prefix.cache import FrozenPrefix
from hf_adapt.unfreezing.prefix.checks import cacheable_stack
from hf_adapt.unfreezing.resumption import warn_of_moved_phases

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)


class GradualUnfreezing(LearningRateControl):
    """Trains layer groups by a schedule, each with its own learning-rate multiplier.

    Frozen parameters do not change by a single bit, whatever the optimizer, and their backward is
    not computed. The phase is a pure function of `global_step`, so resuming, gradient accumulation
    and several processes change nothing. The optimizer, its scheduler and the checkpoint stay the
    plain Trainer's.

    Reference:
        Howard & Ruder 2018, "Universal Language Model Fine-tuning for Text Classification",
        section 3, arXiv:1801.06146: gradual unfreezing, discriminative learning rates, slanted
        triangular schedule.

    Args:
        schedule: Which groups train when: `LPFT()`, `Surgical("layer.0")`,
            `FreezeOnly("embeddings")`, `RandomLayers()`, `Plateau("eval_loss")`, a list of
            `Phase(at, train)`, an `UnfreezingPlan` or the path of one. By default the head
            trains first and one layer group is added per phase, from the top; the phases are
            spread evenly over the run.
        every_steps: Optimizer steps of each phase of the default schedule.
        every_epochs: Epochs of each phase of the default schedule.
        direction: `"top_down"`, `"bottom_up"`, or the order as a list of groups.
        until: The last group that the default schedule unfreezes.
        groups: Layer groups, bottom first, as name to patterns (names of modules or parameters,
            or regular expressions). By default they are found in the model, which works for nearly
            every architecture.
        layer_decay: Learning rate of each level relative to the level above it: 0.9, or 1 / 2.6 as
            in ULMFiT. Weight decay and its exemption of biases and norms stay the Trainer's.
        lr_multipliers: Learning-rate multipliers of groups, in place of those of `layer_decay`.
        rewarm_steps: Steps over which the learning rate of a newly unfrozen group rises to its full
            value.
        importance: How much each group matters for what the model has learned before, from 0 to 1,
            or a function of progress: the group's learning rate is multiplied by 1 - importance.
            For continual training.
        lr_schedule: A learning-rate schedule in place of the Trainer's: `slanted_triangular()`.
        frozen_dropout: Whether dropout in frozen modules stays active, as in a script that only
            sets `requires_grad` to False.
        frozen_batch_norm: Whether batch norm in frozen modules uses its running statistics and does
            not update them. With False, it uses and tracks the statistics of the batches.
        cache_frozen_prefix: Compute the frozen lower layers once per example, store their output on
            disk, and start from it in later epochs. Turns `frozen_dropout` off.
        cache_dir: Folder of that cache; by default `_frozen_prefix_cache` in the output folder.
        name: Prefix of the logs and of the state in the checkpoint.

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
        known = UnfreezingOptions.__annotations__
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise TypeError(
                f"{type(self).__name__} has no option {', '.join(unknown)}. "
                f"Known: {', '.join(known)}."
            )
        if name is not None:
            self.name = name
        self._importance_given = options.pop("importance", None)
        self.lr_schedule = options.pop("lr_schedule", None)
        self._cached = options.pop("cache_frozen_prefix", False)
        self._cache_dir = options.pop("cache_dir", None)
        self._frozen_dropout = options.pop("frozen_dropout", not self._cached)
        self._frozen_batch_norm = options.pop("frozen_batch_norm", True)
        if self._cached and self._frozen_dropout:
            raise ValueError(
                "cache_frozen_prefix stores one output per example, but with frozen_dropout=True "
                "the output differs in each epoch. Drop frozen_dropout=True."
            )
        self._builder = PlanBuilder(schedule, **cast(PlanOptions, options))
        self._trainer: Trainer | None = None
        self._freezer: Freezer | None = None
        self._prefix: FrozenPrefix | None = None
        self._parameters: dict[str, dict[str, nn.Parameter]] = {}
        self._undo_unused: Any = None
        self._undo_checkpointing: Any = None

    # ---- before the run ----

    def setup(self, trainer: Trainer) -> None:
        """Find the groups and check the schedule, before the optimizer exists."""
        self._trainer, self._freezer, self._prefix = trainer, None, None
        self._index: int | None = None
        self._learning_rates: dict[str, float] = {}
        model = unwrapped_model(trainer)
        refuse_changing_gradients(trainer, "gradual unfreezing")
        rule = self._builder.plateau
        if rule is not None and trainer.args.eval_strategy == "no":
            raise ValueError(
                f"The unfreezing schedule waits for {rule.metric!r}, but nothing is evaluated: set "
                "eval_strategy='steps' or 'epoch' in the training arguments."
            )
        self._plateau = None if rule is None else PlateauProgress(rule)
        self._groups = self._builder.groups(model)
        self._importance = group_importance(self._groups, self._importance_given)
        if self._cached:
            cacheable_stack(trainer, model)
        self._undo_unused = expect_unused_parameters(trainer)

    def begin(self, trainer: Trainer) -> None:
        """Resolve the schedule and check that the optimizer has every parameter that it trains."""
        check_unused_parameters(trainer)
        model = unwrapped_model(trainer)
        self._clock = Clock(trainer.state.max_steps, steps_per_epoch(trainer))
        plan = self._builder.plan(model, self._groups, self._clock, trainer.args.seed)
        costs = group_costs(model, self._groups)
        self._plan = replace(plan, clock=self._clock, costs=costs)
        named = dict(model.named_parameters())
        fixed = fixed_parameters(trainer)
        self._parameters = {
            g.name: {n: named[n] for n in g.parameters if id(named[n]) not in fixed}
            for g in self._groups
        }
        self._set_timeline()
        everything = {n: p for group in self._parameters.values() for n, p in group.items()}
        trained = frozenset().union(*self._plan.trained(self._groups))
        scheduled = {n: p for g in sorted(trained) for n, p in self._parameters[g].items()}
        check_in_optimizer(trainer, scheduled, "The schedule")
        self._check_optimizer_takes_rates(trainer)
        self._freezer = Freezer(model, everything, self._frozen_dropout, self._frozen_batch_norm)
        self._undo_checkpointing = checkpoint_without_reentry(model)
        self._freezer.drop_input_gradients()
        if self._cached:
            self._prefix = FrozenPrefix(trainer, model, self._groups, self._cache_dir)
        logger.info("Gradual unfreezing:\n%s", self._plan)
        warn_of_moved_phases(trainer, self._plan, self._groups, self._clock)

    def _check_optimizer_takes_rates(self, trainer: Trainer) -> None:
        assert trainer.optimizer is not None
        given = self._plan.lr_multipliers or self._plan.rewarm_steps or self._importance
        if given and any(group.get("relative_step") for group in trainer.optimizer.param_groups):
            raise ValueError(
                "The optimizer makes its own learning rates (Adafactor, relative_step=True), so "
                "those of layer groups would have no effect. Use relative_step=False with a "
                "learning rate, or drop layer_decay, lr_multipliers, rewarm_steps and importance."
            )

    def _set_timeline(self) -> None:
        self._timeline: Timeline = self._plan.timeline(
            self._groups, self._clock, () if self._plateau is None else self._plateau.steps
        )
        for number, trained in enumerate(self._timeline.trained):
            if not self._trainable(trained):
                raise ValueError(
                    f"Phase {number} trains only {', '.join(sorted(trained))}, whose learning rate "
                    "is 0 (lr_multipliers, importance) or whose weights another adaptation holds "
                    "fixed (SHOT, ADDA): nothing would learn. Leave such a phase out."
                )

    def _trainable(self, groups: frozenset[str]) -> frozenset[str]:
        """Those with weights that may change, and no multiplier that is the constant 0."""
        multipliers, importance = self._plan.lr_multipliers, self._importance
        return frozenset(
            g
            for g in groups
            if self._parameters[g] and multipliers.get(g, 1.0) != 0 and importance.get(g) != 1
        )

    # ---- each optimizer step ----

    def before_step(self, step: int) -> None:
        """Switch the phase; only here, so that all micro-batches of a step are in one phase."""
        assert self._freezer is not None
        if self._plateau is not None:
            self._plateau.check_metric()
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
        """Put frozen modules into the mode that was chosen for them."""
        if self._freezer is not None:
            self._freezer.before_forward()
        return nullcontext()

    def around_changed_forward(self) -> AbstractContextManager[Any]:
        """Leave the cached prefix out: the same inputs will hardly come again."""
        return nullcontext() if self._prefix is None else self._prefix.serving("none")

    def around_sweep(self) -> AbstractContextManager[Any]:
        """Use the cached prefix, as training does."""
        return nullcontext() if self._prefix is None else self._prefix.serving("all")

    def _lr_multiplier(self, group: str, step: int) -> float:
        """The multiplier of a group that trains at this step."""
        multiplier = self._plan.lr_multipliers.get(group, 1.0)
        if self._plan.rewarm_steps:
            since = self._timeline.since(group, step)
            multiplier *= rewarm_multiplier(step, since, self._plan.rewarm_steps)
        if group in self._importance:
            progress = step / max(1, self._clock.max_steps)
            multiplier *= importance_multiplier(self._importance[group], progress)
        return multiplier

    def lr_multipliers(self, step: int) -> LrMultipliers:
        """The learning-rate multiplier of every scheduled parameter; 0 where it is frozen."""
        trained = self._trainable(self._timeline.at(step))
        multipliers = {
            group: self._lr_multiplier(group, step) if group in trained else 0.0
            for group in self._parameters
        }
        self._record_learning_rates(multipliers)
        return {
            parameter: multipliers[group]
            for group, parameters in self._parameters.items()
            for parameter in parameters.values()
            if multipliers[group] != 1.0
        }

    def _record_learning_rates(self, multipliers: Mapping[str, float]) -> None:
        assert self._trainer is not None and self._trainer.optimizer is not None
        rate_of = {
            id(p): group["lr"]
            for group in self._trainer.optimizer.param_groups
            for p in group["params"]
        }
        for group, parameters in self._parameters.items():
            first = next(iter(parameters.values()), None)  # None where all of it is fixed
            rate = rate_of.get(id(first)) or 0.0  # None where the optimizer makes its own
            self._learning_rates[f"learning_rate/{group}"] = float(rate) * multipliers[group]

    # ---- evaluation, logs, checkpoints, end ----

    def on_evaluate(self, metrics: Mapping[str, float], step: int) -> None:
        """Start the next phase with the next step if the metric no longer improves."""
        waiting = len(self._timeline.starts) < len(self._plan.phases)
        if self._plateau is not None and waiting and self._plateau.observe(metrics, step):
            self._set_timeline()

    def on_log(self, logs: dict[str, float], progress: float) -> None:
        """Add the phase, the number of trainable parameters, and each group's learning rate."""
        assert self._index is not None
        logs[f"{self.name}/phase"] = self._index
        logs[f"{self.name}/trainable_parameters"] = self._num_trained
        logs.update(self._learning_rates)
        if self._prefix is not None:
            logs.update(self._prefix.log_values())

    def state_dict(self) -> dict[str, Any]:
        """The progress of a `Plateau` schedule; others need no state."""
        assert self._trainer is not None
        state = {} if self._plateau is None else self._plateau.state_dict()
        if self._trainer.is_fsdp_enabled:
            state["trained"] = sorted(self._timeline.ever(self._trainer.state.global_step))
        return state

    @contextmanager
    def around_optimizer_load(self, state: dict[str, Any]) -> Iterator[None]:
        """Groups that had not trained when the checkpoint was saved have no optimizer state."""
        assert self._trainer is not None
        trained = state.get("trained", [group.name for group in self._groups])
        named = dict(unwrapped_model(self._trainer).named_parameters())
        fixed = fixed_parameters(self._trainer)
        names = [n for g in self._groups if g.name not in trained for n in g.parameters]
        waiting = [named[n] for n in names if id(named[n]) not in fixed]
        for parameter in waiting:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in waiting:
                parameter.requires_grad_(True)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        if self._plateau is not None and "plateau_steps" in state:
            self._plateau.load_state_dict(state)
            self._set_timeline()

    def close(self) -> None:
        """Restore `requires_grad`, hooks and options of the model and the Trainer."""
        if self._prefix is not None:
            self._prefix.close()
        if self._freezer is not None:
            self._freezer.undo()
        for undo in (self._undo_unused, self._undo_checkpointing):
            if undo is not None:
                undo()
        self._trainer = self._freezer = self._prefix = None
        self._undo_unused = self._undo_checkpointing = None
        self._parameters = {}
