"""The Trainer's events, handed to a run."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from hf_adapt.engine.run import AdaptationRun


class RunCallback(TrainerCallback):
    """Hears the Trainer's events for a run; in the callback list only while the run lasts."""

    def __init__(self, run: AdaptationRun) -> None:
        self.run = run

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the epoch of the training rows (accelerate does not always)."""
        rows: Any = self.run.trainer.train_dataset if self.run.data is None else self.run.data
        if callable(set_epoch := getattr(rows, "set_epoch", None)):
            set_epoch(int(state.epoch or 0))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The model is wrapped, the optimizer made, a checkpoint loaded."""
        self.run.begin()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The micro-batches of an optimizer step follow."""
        self.run.before_step()

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        """An evaluation during training has ended; nothing is saved yet."""
        self.run.on_evaluate(metrics or {})

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The gradients are complete."""
        self.run.before_main_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The main optimizer has stepped, or has skipped."""
        self.run.after_main_step()
