"""What may be added to a training run: the two classes that every method derives from."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_adapt.engine.progress import Schedule, value_at

if TYPE_CHECKING:
    from typing import Self

    from transformers import Trainer

    from hf_adapt.engine.batch import Batch, Rows
    from hf_adapt.engine.parts import Part
    from hf_adapt.engine.streams import Stream
    from hf_adapt.models.capture import Extract
    from hf_adapt.models.pooling import Pooling

logger = logging.getLogger(__name__)

Term = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""A loss term: a scalar mean over one micro-batch, or a (sum, count) over its items."""


class Adaptation:
    """Something added to a Trainer's training run, through small hooks that are all optional.

    An adaptation may build auxiliary modules (trained in an optimizer of their own, outside the
    model's ``state_dict``), act before each optimizer step and around the model's forward, keep
    state in the checkpoint and react to what is logged. One that adds a loss term derives from
    [`Objective`]; rarer abilities are mixins in `hf_adapt.engine.mixins`.

    Attributes:
        name: Prefix of everything it logs and stores; must be unique within a run. The class
            name in lower case unless set.
        needs_streams: Names of the streams that the run must have (`"target"`).
        learning_rate: Peak learning rate of its auxiliary modules; it follows the run's own
            learning-rate schedule.
        weight_decay: Weight decay of its auxiliary modules.
        module: What `build_modules` returned; the engine sets, trains and stores it.
        uses_priors: Whether it reads `target_priors`.
        source_free: Whether it adapts to the training rows themselves, without their labels, and
            sees no other stream.
        fixed: Parameters of the model that do not train while it takes part, found in `setup`; a
            schedule over the layers leaves them alone.
        given_settings: The plain arguments that it was made with, as text for a model card.
        columns: Columns of the rows that it wants to see; they come with the batch, in
            `part.columns`, and never reach the model.
    """

    name: str = ""
    given_settings: Mapping[str, str]
    needs_streams: Collection[str] = ()
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    module: nn.Module | None = None
    uses_priors: bool = False
    source_free: bool = False
    fixed: Sequence[nn.Parameter] = ()
    columns: Sequence[str] = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Remember what it is made with."""
        self = super().__new__(cls)
        try:
            given = inspect.signature(cls).bind(*args, **kwargs).arguments
        except TypeError:  # which `__init__` raises, saying more
            given = {}
        shown = {name: _shown(value) for name, value in given.items()}
        self.given_settings = {name: text for name, text in shown.items() if text is not None}
        return self

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = cls.__name__.lower()

    @property
    def is_active(self) -> bool:
        """Whether it changes the run at all; an inactive one leaves the Trainer untouched."""
        return True

    def provided_streams(self) -> Mapping[str, Stream]:
        """Streams of rows that it brings along, by their names."""
        return {}

    def extra_inputs(self, trainer: Trainer) -> Collection[str]:
        """Inputs that it wants to see and the model's forward does not take.

        Called before the data is prepared. They are collated like the others, and are found in
        `part.extra`.
        """
        return ()

    def setup(self, trainer: Trainer) -> None:
        """Called once per `train()`, before the dataloader and the optimizer exist.

        The place to check that the model and the arguments fit, and to raise if not.
        """

    def begin(self, trainer: Trainer) -> None:
        """Called when the model is wrapped and the optimizer exists, before the first step."""

    def build_modules(self, batch: Batch) -> nn.Module | None:
        """Make the auxiliary modules, once, from the sizes seen in a first batch.

        Called without gradients and under a seeded random state of its own, so that building
        does not shift the run's random numbers and all processes build the same.
        """
        return None

    def before_step(self, step: int) -> None:
        """Called before the first forward of each optimizer step; `step` is `global_step`."""

    def around_forward(self, inputs: Mapping[str, Any]) -> AbstractContextManager[Any]:
        """A context held open while the base loss of a training micro-batch is computed."""
        return nullcontext()

    def around_changed_forward(self) -> AbstractContextManager[Any]:
        """A context held open during a further forward whose inputs an objective has changed."""
        return nullcontext()

    def around_sweep(self) -> AbstractContextManager[Any]:
        """A context held open during a pass over a stream's rows, without gradients."""
        return nullcontext()

    def on_evaluate(self, metrics: Mapping[str, float], step: int) -> None:
        """See the metrics of an evaluation after `step` optimizer steps, before anything is saved.

        All processes see the same values.
        """

    def on_log(self, logs: dict[str, float], progress: float) -> None:
        """See the averaged values of a logging step, and add values of now to them.

        A warning belongs here; averages go to `batch.log`.
        """

    def state_dict(self) -> dict[str, Any]:
        """What must survive in the checkpoint besides `module` (tensors and plain values)."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`, when training resumes."""

    def save(self, folder: str) -> None:
        """Write what belongs beside a saved model, besides the weights of `module`.

        Called in one process, for each checkpoint and for the final model.
        """

    def finish(self, trainer: Trainer) -> None:
        """Called when the run has ended well, with the final weights in the model."""

    def close(self) -> None:
        """Called when the run ends, also by an error: remove all hooks from the model."""


def _shown(value: Any) -> str | None:
    """A plain value as it is written in Python; None for data, models and all that is long."""
    text: str | None = None
    if isinstance(value, bool | int | float | str | None):
        text = repr(value)
    elif inspect.isroutine(value) and not value.__name__.startswith("<"):
        text = value.__name__
    elif isinstance(value, (list, tuple)) and len(value) <= 20:
        parts = [_shown(each) for each in value]
        text = None if None in parts else f"[{', '.join(map(str, parts))}]"
    elif isinstance(value, Mapping) and len(value) <= 20:
        parts = [_shown(each) for each in value.values()]
        pairs = [f"{key!r}: {part}" for key, part in zip(value, parts, strict=True)]
        text = None if None in parts else "{" + ", ".join(pairs) + "}"
    return text if text is not None and len(text) <= 200 else None


class Objective(Adaptation):
    """An adaptation that adds a loss term to the training loss.

    A subclass needs only `loss`. What it returns is scaled by the engine so that gradient
    accumulation and several processes change nothing: a scalar is taken as a mean over the
    micro-batch; a (sum, count) is divided by the number of items in the whole optimizer step,
    over micro-batches and processes, as counted by `num_items`.

    Args:
        weight: Factor of the term, or a schedule of it (a function of progress from 0 to 1). A
            constant 0 makes the objective inactive: the run is then the stock Trainer's.
        feature_layer: The module whose output `batch.features()` reads, by its dotted name; by
            default the base model's last hidden state (of the encoder, if there is one).
        pooling: How a row's feature is made of its tokens: `"mean"` (mask-aware), `"cls"`,
            `"last"`, `"tokens"` (every token is an item), a callable `(hidden, mask) -> (B, D)`,
            or `"auto"`: tokens for token classification, else the mean.
        name: Prefix of what is logged and stored.

    Attributes:
        streams: Names of the streams whose rows it sees beside the training rows, where the run
            has them.
        uses_logits: Whether `loss` may read the model's predictions; False lets another objective
            do without.

    Raises:
        ValueError: If a constant weight is negative or not finite.

    Example:
        >>> class CentreDistance(Objective):
        ...     needs_streams = ("target",)
        ...
        ...     def loss(self, batch):
        ...         features, domain = batch.features()
        ...         source, target = features[domain == 0], features[domain > 0]
        ...         return (source.mean(0) - target.mean(0)).square().sum()
        >>> CentreDistance(weight=0.1).name
        'centredistance'
    """

    weight: float | Schedule = 1.0
    feature_layer: str | None = None
    pooling: Pooling = "auto"
    uses_logits: bool = True
    streams: Collection[str] = ("target",)

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        feature_layer: str | None = None,
        pooling: Pooling = "auto",
        name: str | None = None,
    ) -> None:
        if not callable(weight) and not (math.isfinite(weight) and weight >= 0):
            raise ValueError(
                f"{type(self).__name__}(weight={weight}): the weight must be a finite number >= 0, "
                "or a function of progress. To turn the objective off pass 0; a gradient is "
                "reversed inside the objective (as DANN does), not by a negative weight."
            )
        self.weight = weight
        self.feature_layer = feature_layer
        self.pooling = pooling
        if name is not None:
            self.name = name

    @property
    def is_active(self) -> bool:
        """False where the weight is the constant 0."""
        return callable(self.weight) or self.weight != 0

    def term_weight(self, progress: float) -> float:
        """The factor of the term at this progress."""
        return value_at(self.weight, progress)

    def base_weight(self, progress: float) -> float:
        """The factor of the task's own loss while this objective is active.

        Where it is 0, batches need no labels.
        """
        return 1.0

    def reads_first_forward(self, trainer: Trainer) -> bool:
        """Whether `loss` reads the outputs of the first forward on the rows of its streams.

        Where no objective does, the rows of a stream without a loss of its own go through the model
        in further forwards alone.
        """
        return True

    def wanted_rows(self, part: Part) -> torch.Tensor | None:
        """Which rows of its streams `loss` looks at in this step, (B,) bool; None for all.

        Rows of a stream without a loss of its own that no objective looks at are left out of the
        forward. A pure function of the rows, and of what changes between steps alone.
        """
        return None

    def captures(self, model: nn.Module) -> Mapping[nn.Module, Extract | None]:
        """Modules whose outputs `loss` wants to see, in `part.hidden` by the module's id.

        None keeps the hidden state in the output.
        """
        return {}

    def num_items(self, rows: Rows) -> torch.Tensor | Mapping[str, torch.Tensor] | None:
        """How many items of a micro-batch a (sum, count) runs over, known before the forward.

        Needed only by a `loss` that returns a (sum, count). Where the components of a dict run over
        different items: a dict of their counts.
        """
        return None

    def loss(self, batch: Batch) -> Term | dict[str, Term]:
        """The term on one micro-batch, in float32: a scalar mean, a (sum, count), or a dict.

        The components of a dict are added up and each is logged as `name/component`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define loss(self, batch).")
