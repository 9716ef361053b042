"""Gradual unfreezing in one line."""

from __future__ import annotations

from typing import Unpack

from hf_adapt.engine.callback import AdaptationCallback
from hf_adapt.unfreezing.adaptation import GradualUnfreezing
from hf_adapt.unfreezing.plan_builder import ScheduleLike, UnfreezingOptions


class GradualUnfreezingCallback(AdaptationCallback):
    """Gradual unfreezing and layer-wise learning rates in one line, for any Trainer.

    Args:
        schedule: As in [`GradualUnfreezing`]; by default the head trains first and one group is
            added per phase, from the top.
        **options: As in [`GradualUnfreezing`]: `every_steps`, `every_epochs`, `layer_decay`,
            `lr_multipliers`, `groups`, `cache_frozen_prefix` and so on.

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
