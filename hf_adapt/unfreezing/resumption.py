"""A resumed run with another number of steps, in which phases at a percentage start later."""

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
    """Warn of groups that a longer run freezes again.

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
    except ValueError:  # a phase of another schedule, after the end of that run
        return
    trained = earlier.at(min(step, before - 1))
    frozen_again = trained - plan.timeline(groups, clock).at(step)
    if frozen_again:
        names = ", ".join(g.name for g in reversed(groups) if g.name in frozen_again)
        logger.warning(
            "The run resumes at step %d of %d, from a checkpoint of a run of %d steps. Phases that "
            "start at a percentage of the run start later in a longer run, which freezes %s again. "
            "To keep phases where they were, give them in steps or epochs: every_steps= or "
            "every_epochs=, Phase(120, ...), or `at: 120` in a plan's file.",
            step,
            clock.max_steps,
            before,
            names,
        )
