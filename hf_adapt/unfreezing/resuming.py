"""Resuming with another number of steps, which moves phases that start at a share of the run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from hf_adapt.engine.training import resumed_from
from hf_adapt.models.groups import LayerGroup
from hf_adapt.unfreezing.phases import Clock
from hf_adapt.unfreezing.plan import UnfreezingPlan

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)


def warn_of_moved_phases(
    trainer: Trainer, plan: UnfreezingPlan, groups: Sequence[LayerGroup], clock: Clock
) -> None:
    """Say which groups a longer run freezes again.

    Args:
        trainer: The Trainer, with the state of its checkpoint.
        plan: The run's plan.
        groups: The groups of the model.
        clock: The length of the run.
    """
    folder, step = resumed_from(trainer), trainer.state.global_step
    if folder is None or not any(phase.at.unit == "percent" for phase in plan.phases):
        return
    before = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)).max_steps
    try:
        earlier = plan.timeline(groups, replace(clock, max_steps=before))
    except ValueError:  # a phase of another schedule, beyond the end of that run
        return
    trained = earlier.at(min(step, before - 1))
    frozen_again = trained - plan.timeline(groups, clock).at(step)
    if frozen_again:
        names = ", ".join(g.name for g in reversed(groups) if g.name in frozen_again)
        logger.warning(
            "The run resumes at step %d of %d, and its checkpoint is of a run of %d steps. Phases "
            "that start at a share of the run come later in a longer one, which freezes %s again. "
            "To leave phases where they were, give them in steps or epochs: every_steps= or "
            "every_epochs=, Phase(120, ...), `at: 120` in a plan's file.",
            step,
            clock.max_steps,
            before,
            names,
        )
