"""The engine: the only place that touches the Trainer.

What is changed on a user's Trainer, and for how long:

- `Trainer.train`, `evaluate` and `predict` are wrapped once per process, when the first
  `AdaptationCallback` is made: they attach the callbacks that wait in the Trainer's list.
- The class of the instance becomes a subclass `(AdaptationMixin, its class)` of the same name. It
  overrides the training loop, the dataloaders and the sampler, the removal of unused columns,
  `get_batch_samples`, `training_step`, `compute_loss`, `create_scheduler`, the evaluation methods,
  `log`, and what saves and loads; each calls the method of the user's class. New are
  `add_adaptation_plan`, and `sweep`, `check_sweep` and `stream_options` for adaptations.
- While a loader is built, `train_dataset` and `data_collator` are paired ones; both are put back.
- While a run lasts, a callback more is in the list, forward hooks are on the captured modules, and
  the optimizer's groups are divided for the length of a step whose learning rates are scaled. For
  the length of a pass over a stream the model is in evaluation mode, perhaps with other weights.
- While another task is evaluated, the model, the collator, the metrics and the names of labels are
  that task's.

Without an active adaptation each override calls the user's method and does nothing else.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if not TYPE_CHECKING:  # a type checker would take every name for one of ours

    def __getattr__(name: str) -> Any:
        """A module of the engine: they are imported when they are asked for."""
        if name.startswith("_") or find_spec(f"{__name__}.{name}") is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return import_module(f"{__name__}.{name}")
