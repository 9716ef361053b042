"""Gradual unfreezing: layer groups that train by a schedule, each with its own learning rate."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack, cast

from torch import nn

from hf_adapt.engine.callback import AdaptationCallback
from hf_adapt.engine.mixins import LearningRateControl, LrMultipliers
from hf_adapt.engine.training import (
    check_in_optimizer,
    check_unused_parameters,
    checkpoint_without_reentry,
    expect_unused_parameters,
    refuse_changing_gradients,
    steps_per_epoch,
    unwrapped_model,
)
from hf_adapt.unfreezing.costs import group_costs
from hf_adapt.unfreezing.freezing import Freezer
from hf_adapt.unfreezing.phases import Clock, Timeline
from hf_adapt.unfreezing.planning import PlanMaker, PlanOptions, ScheduleLike, UnfreezingOptions
from hf_adapt.unfreezing.prefix import FrozenPrefix
from hf_adapt.unfreezing.prefix_checks import cacheable_stack
from hf_adapt.unfreezing.rates import importance_factor, importance_of, rewarm_factor
from hf_adapt.unfreezing.resuming import warn_of_moved_phases

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)


class GradualUnfreezing(LearningRateControl):
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
        cache_dir: Where; by default `_frozen_prefix_cache` in the output folder.
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
        self.lr_schedule = options.pop("rate_schedule", None)
        self._cached = options.pop("cache_frozen_prefix", False)
        self._cache_dir = options.pop("cache_dir", None)
        self._frozen_dropout = options.pop("frozen_dropout", not self._cached)
        self._frozen_batch_norm = options.pop("frozen_batch_norm", True)
        if self._cached and self._frozen_dropout:
            raise ValueError(
                "cache_frozen_prefix keeps one output per example, but with frozen_dropout=True "
                "it would differ each time. Drop frozen_dropout=True."
            )
        self._maker = PlanMaker(schedule, **cast(PlanOptions, options))
        self._trainer: Trainer | None = None
        self._freezer: Freezer | None = None
        self._prefix: FrozenPrefix | None = None
        self._parameters: dict[str, dict[str, nn.Parameter]] = {}
        self._undo_unused: Any = None
        self._undo_checkpointing: Any = None

    # ---- before the run ----

    def setup(self, trainer: Trainer) -> None:
        """Find the groups and check the schedule, before anything is made."""
        self._trainer, self._freezer, self._prefix = trainer, None, None
        self._plateau_steps: list[int] = []
        self._best: float | None = None
        self._waited = 0
        self._other_metrics: set[str] = set()
        self._metric_came = False
        self._index: int | None = None
        self._now: dict[str, float] = {}
        model = unwrapped_model(trainer)
        refuse_changing_gradients(trainer, "gradual unfreezing")
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
        self._undo_unused = expect_unused_parameters(trainer)

    def begin(self, trainer: Trainer) -> None:
        """Resolve the schedule and check that the optimizer has all that it trains."""
        check_unused_parameters(trainer)
        model = unwrapped_model(trainer)
        self._clock = Clock(trainer.state.max_steps, steps_per_epoch(trainer))
        plan = self._maker.plan(model, self._groups, self._clock, trainer.args.seed)
        costs = group_costs(model, self._groups)
        self._plan = replace(plan, clock=self._clock, costs=costs)
        self._set_timeline()
        named = dict(model.named_parameters())
        self._parameters = {g.name: {n: named[n] for n in g.parameters} for g in self._groups}
        everything = {n: p for part in self._parameters.values() for n, p in part.items()}
        trained = frozenset().union(*self._plan.trained(self._groups))
        scheduled = {n: p for g in sorted(trained) for n, p in self._parameters[g].items()}
        check_in_optimizer(trainer, scheduled, "The schedule")
        self._check_rates_count(trainer)
        self._freezer = Freezer(model, everything, self._frozen_dropout, self._frozen_batch_norm)
        self._undo_checkpointing = checkpoint_without_reentry(model)
        self._freezer.drop_input_gradients()
        if self._cached:
            self._prefix = FrozenPrefix(trainer, model, self._groups, self._cache_dir)
        logger.info("Gradual unfreezing:\n%s", self._plan)
        warn_of_moved_phases(trainer, self._plan, self._groups, self._clock)

    def _check_rates_count(self, trainer: Trainer) -> None:
        assert trainer.optimizer is not None
        given = self._plan.rates or self._plan.rewarm_steps or self._importance
        if given and any(group.get("relative_step") for group in trainer.optimizer.param_groups):
            raise ValueError(
                "The optimizer makes its own learning rates (Adafactor, relative_step=True), so "
                "rates of layer groups would have no effect. Use relative_step=False with a "
                "learning rate, or drop layer_decay, rates, rewarm_steps and importance."
            )

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

    # ---- each optimizer step ----

    def before_step(self, step: int) -> None:
        """Switch the phase; only here, so that all micro-batches of a step are of one phase."""
        assert self._freezer is not None
        rule = self._plan.plateau
        if rule is not None and self._other_metrics and not self._metric_came:
            raise ValueError(
                f"The unfreezing schedule waits for {rule.metric!r}, which the evaluation did not "
                f"give. It gave: {', '.join(sorted(self._other_metrics))}."
            )
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

    def lr_multipliers(self, step: int) -> LrMultipliers:
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
            rate = rate_of.get(id(first)) or 0.0  # None where the optimizer makes its own
            self._now[f"learning_rate/{group}"] = float(rate) * factors[group]

    # ---- evaluation, logs, checkpoints, end ----

    def on_evaluate(self, metrics: Mapping[str, float], step: int) -> None:
        """On a plateau the next group is added from the coming step on."""
        rule = self._plan.plateau
        waiting = len(self._timeline.starts) < len(self._plan.phases)
        if rule is None or not waiting:
            return
        if rule.metric not in metrics:  # another of several evaluation sets
            self._other_metrics |= set(metrics)
            return
        self._metric_came = True
        value = float(metrics[rule.metric])
        if rule.improved(value, self._best):
            self._best, self._waited = value, 0
            return
        self._waited += 1
        if self._waited >= rule.patience:
            self._waited = 0
            self._plateau_steps.append(step)
            self._set_timeline()

    def on_log(self, logs: dict[str, float], progress: float) -> None:
        """Add the phase, what trains, and each group's learning rate in the last step."""
        assert self._index is not None
        logs[f"{self.name}/phase"] = self._index
        logs[f"{self.name}/trainable_parameters"] = self._num_trained
        logs.update(self._now)
        if self._prefix is not None:
            logs.update(self._prefix.log_values())

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
        named = dict(unwrapped_model(self._trainer).named_parameters())
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
        for undo in (self._undo_unused, self._undo_checkpointing):
            if undo is not None:
                undo()
        self._trainer = self._freezer = self._prefix = None
        self._undo_unused = self._undo_checkpointing = None
        self._parameters = {}


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
