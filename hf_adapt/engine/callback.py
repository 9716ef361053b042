"""The same engine on a Trainer that already exists: `adapt()` and the one-line callback."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from transformers import Trainer, TrainerCallback

from hf_adapt.engine.adaptation import Adaptation
from hf_adapt.engine.item_outputs import ItemOutputs, OutputCollector
from hf_adapt.engine.plan import Plan
from hf_adapt.engine.trainer import AdaptationMixin

TrainerT = TypeVar("TrainerT", bound=Trainer)


_adapted: dict[type[Trainer], type[Trainer]] = {}


def adapted_class(cls: type[Trainer]) -> type[Trainer]:
    """`cls` with `AdaptationMixin` before it, made once and named like `cls`."""
    if issubclass(cls, AdaptationMixin):
        return cls
    if cls in _adapted:
        return _adapted[cls]
    namespace = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    metaclass: Any = type(cls)
    _adapted[cls] = metaclass(cls.__name__, (AdaptationMixin, cls), namespace)
    return _adapted[cls]


def adapt(
    trainer: TrainerT,
    *adaptations: Adaptation,
    target_dataset: Any = None,
    target_priors: Any = None,
    streams: Mapping[str, Any] | None = None,
) -> TrainerT:
    """Add adaptations to a Trainer that already exists, of any class.

    Overrides of the Trainer's own class, and their `super()`, keep working.

    Args:
        trainer: The Trainer; it is changed in place.
        *adaptations: What to add. With a target and none, the recommended ones
            ([`hf_adapt.alignment.recommended`]).
        target_dataset: Rows of the target domain, prepared like `train_dataset`: datasets, or a
            [`Stream`] of them with options.
        target_priors: How frequent each class is in the target, for the methods that use it: a dict
            by label name, an array, `"uniform"`, `"predicted"`, `"source"` or `"estimate"` (see
            [`hf_adapt.alignment.priors`]).
        streams: Further streams of rows by name: datasets or [`Stream`]s.

    Returns:
        The same trainer.

    Raises:
        TypeError: If `trainer` is not a Trainer or an argument is not an Adaptation.

    Example:
        ```python
        adapt(trainer, MMD(), InformationMaximization(), target_dataset=target).train()
        ```
    """
    _attach(trainer, Plan.of(adaptations, target_dataset, streams, target_priors=target_priors))
    return trainer


def collect_items(
    trainer: Trainer, dataset: Any, collector: OutputCollector | None = None, **options: Any
) -> ItemOutputs:
    """Run a Trainer's model over a data set and keep features, predictions and labels of its items.

    Args:
        trainer: Any Trainer; it is changed in place, as by [`adapt`].
        dataset: Rows, prepared like `train_dataset`.
        collector: Says what is kept; by default an [`OutputCollector`] with these options.
        **options: Those of [`OutputCollector`].
    """
    return _adaptable(trainer).collect(dataset, collector or OutputCollector(**options))


def keys_of_rows(trainer: Trainer, dataset: Any) -> torch.Tensor:
    """The keys of a data set's rows in their order, as [`collect_items`] has them: no model runs.

    Args:
        trainer: Any Trainer; it is changed in place, as by [`adapt`].
        dataset: Rows that can be read by number.

    Shape:
        - output: (N,) long.
    """
    return _adaptable(trainer).row_keys(dataset)


def load_weights(trainer: Trainer, folder: str) -> None:
    """Give a Trainer's model the weights that `save_model` has written to a folder."""
    trainer._load_from_checkpoint(folder)


def _attach(trainer: Trainer, plan: Plan) -> None:
    if not isinstance(trainer, Trainer):
        raise TypeError(f"Expected a transformers Trainer, got {type(trainer).__name__}.")
    _adaptable(trainer).add_adaptation_plan(plan)


def _adaptable(trainer: Trainer) -> AdaptationMixin:
    """The same Trainer, of a class with the mixin from now on."""
    trainer.__class__ = adapted_class(type(trainer))
    assert isinstance(trainer, AdaptationMixin)
    return trainer


def _wrap_trainer() -> None:
    """Let `Trainer.train`, `evaluate` and `predict` attach waiting callbacks, once per process.

    A callback is never handed its trainer, and needs it before the dataloader and the optimizer
    exist.
    """
    for name in ("train", "evaluate", "predict"):
        original = getattr(Trainer, name)
        if not getattr(original, "_attaches_adaptations", False):
            setattr(Trainer, name, _attaching(original))


def _attaching(original: Any) -> Any:
    @functools.wraps(original)
    def method(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        for callback in list(self.callback_handler.callbacks):
            if isinstance(callback, AdaptationCallback):
                callback.attach(self)
        return original(self, *args, **kwargs)

    method._attaches_adaptations = True  # type: ignore[attr-defined]
    return method


def _unknown(name: str, unknown: dict[str, Any]) -> str:
    """What to say of keyword arguments that a callback does not have."""
    advice = ""
    if "objectives" in unknown:
        advice = (
            "; objectives= belongs to AdaptationTrainer. Here they are passed one by one, as in "
            f"{name}(MMD(), DANN(), target_dataset=target)"
        )
    return f"{name} got an unexpected keyword argument {next(iter(unknown))!r}{advice}."


class AdaptationCallback(TrainerCallback):
    """Adds adaptations to an existing script in one line.

    Args:
        *adaptations: What to add. With a target and none, the recommended ones
            ([`hf_adapt.alignment.recommended`]).
        target_dataset: Rows of the target domain, prepared (tokenised) like `train_dataset`;
            labels may be missing and are hidden. A list or dict of datasets for several target
            domains, or a [`Stream`] of them with options. May be left out if `train_dataset` has a
            `domain` column.
        target_priors: How frequent each class is in the target, for the methods that use it: a dict
            by label name, an array, `"uniform"`, `"predicted"`, `"source"` or `"estimate"` (see
            [`hf_adapt.alignment.priors`]).
        streams: Further streams of rows by name: datasets or [`Stream`]s.

    Raises:
        TypeError: If an argument is not an Adaptation.
        ValueError: If nothing uses the target.

    Example:
        ```python
        trainer.add_callback(AdaptationCallback(MMD(), target_dataset=target))
        trainer.train()
        ```
    """

    def __init__(
        self,
        *adaptations: Adaptation,
        target_dataset: Any = None,
        target_priors: Any = None,
        streams: Mapping[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise TypeError(_unknown(type(self).__name__, unknown))
        self.plan = Plan.of(adaptations, target_dataset, streams, self, target_priors)
        self._trainer: weakref.ref[Trainer] | None = None
        _wrap_trainer()

    def attach(self, trainer: Trainer) -> None:
        """Attach to a trainer by hand; `train()` does it for callbacks in its list.

        Raises:
            ValueError: If the callback is attached to another trainer.
        """
        attached = self._trainer() if self._trainer is not None else None
        if attached is trainer:
            return
        if attached is not None:
            raise ValueError(
                f"This {type(self).__name__} is attached to another Trainer already, whose "
                "modules and state it holds. Make a new callback for each Trainer."
            )
        self._trainer = weakref.ref(trainer)
        _attach(trainer, self.plan)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse to be silently without effect."""
        attached = self._trainer() if self._trainer is not None else None
        if attached is None or attached.state is not state:
            raise RuntimeError(
                f"This {type(self).__name__} was never attached to its Trainer, so it would have "
                "no effect: it was added after train() began, or train() is not the Trainer's "
                "own. Add it before train(), or call callback.attach(trainer) first."
            )
