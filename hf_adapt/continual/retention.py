"""Keeping what a model predicts: its starting self as its teacher."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.func import functional_call

from hf_adapt.distillation.divergences import logit_mse
from hf_adapt.distillation.heads import Head, output_logits
from hf_adapt.distillation.objective import Distillation
from hf_adapt.distillation.teachers import ModelTeacher
from hf_adapt.engine.adaptation import Term
from hf_adapt.engine.batch import Batch
from hf_adapt.engine.progress import Schedule
from hf_adapt.engine.streams import TRAINING
from hf_adapt.engine.sweep import evaluating
from hf_adapt.engine.training import optimized
from hf_adapt.models.averages import running_statistics
from hf_adapt.models.structure import unwrapped_base

if TYPE_CHECKING:
    from transformers import Trainer

NEW = "new"


class StartingModel(ModelTeacher):
    """The model itself with the weights that training started from, as a teacher.

    Only the weights that train are kept a second time: with LoRA those of the adapters. They are
    stored in checkpoints, since a resumed run begins with others.
    """

    def __init__(self) -> None:
        self.name = "the starting model"
        self.shard, self.load_options = False, {}
        self._is_sharded, self._accepted = False, None
        self._start: dict[str, torch.Tensor] = {}
        self._run: Any = None
        self._is_known = True

    def setup(self, trainer: Trainer, student: nn.Module) -> None:
        """Remember the model."""
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                "KeepPredictions keeps the weights that training starts from, and FSDP and "
                "DeepSpeed shard them. Pass start= with the model's folder or name; "
                "start=ModelTeacher(folder, shard=True) shards it alike."
            )
        self._take(student)

    def load(self, student: nn.Module) -> None:
        """There is nothing to load."""
        self._take(student)

    def begin(self, trainer: Trainer) -> None:
        """Keep the weights that train as they are now, once in a run."""
        assert self.module is not None
        run = getattr(trainer, "_adaptation_run", None)
        if self._start and (run is None or run is self._run):
            return  # an evaluation begins
        self._run = run
        self._start = {n: v.detach().clone() for n, v in self._changing(trainer).items()}
        self._is_known = trainer.state.global_step == 0

    def _changing(self, trainer: Trainer) -> dict[str, torch.Tensor]:
        """What training may change: the optimizer's weights, and the statistics of batch norm."""
        assert self.module is not None
        return {**optimized(trainer, self.module), **running_statistics(self.module)}

    def before_step(self, step: int) -> None:
        """Refuse to take a resumed run's weights for those at its start."""
        if step > 0 and not self._is_known:
            raise ValueError(
                "The checkpoint does not hold the weights that training started from (it was saved "
                "without KeepPredictions, or with save_only_model=True). Pass the starting model: "
                "KeepPredictions(start=folder)."
            )
        self._is_known = True

    def __call__(self, **inputs: Any) -> Any:
        """The starting model's outputs, without dropout."""
        assert self.module is not None
        given = {name: value for name, value in inputs.items() if self.accepts(name)}
        # Other tensors in the place of the weights: those are neither changed nor, under autocast,
        # cached in half precision.
        with evaluating(self.module):
            return functional_call(self.module, self._start, (), given)

    def starting(self, projection: nn.Linear) -> nn.Linear:
        """A projection with the weights that it had at the start, which are not copied."""
        assert self.module is not None
        names = {id(p): name for name, p in self.module.named_parameters()}
        made = nn.Linear(projection.in_features, projection.out_features, device="meta")
        for key in ("weight", "bias"):
            own = getattr(projection, key)
            start = None if own is None else self._start.get(names[id(own)], own.detach())
            setattr(made, key, None if start is None else nn.Parameter(start, requires_grad=False))
        return made

    def state_dict(self) -> dict[str, Any]:
        """The weights that training started from, of those that train."""
        return {"start": {name: value.cpu() for name, value in self._start.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        stored = state.get("start", {})
        if stored.keys() != self._start.keys():
            raise ValueError(
                f"The checkpoint holds the starting values of {len(stored)} weights, and "
                f"{len(self._start)} train. Resume with the same parts of the model frozen."
            )
        for name, value in stored.items():
            self._start[name].copy_(value)
        self._is_known = True

    def close(self) -> None:
        """Release the model; what it was is kept for evaluations."""
        self.module = self._run = None


class KeepPredictions(Distillation):
    r"""Holds the model's predictions near those that it made when training started (LwF).

    .. math::
        L = L_{task} + \lambda \frac{1}{N} \sum_{i=1}^{N}
        T^2 \, KL\!\left(\sigma(z^0_i / T) \,\middle\|\, \sigma(z_i / T)\right)

    over the N items (rows, or tokens) of an optimizer step, with the logits :math:`z^0` of the
    starting model. The numbers of a regression are held by their squared distance. No old rows are
    needed; rows of the past, or general text, make it stronger (`on="replay"`). How far the
    predictions on the *new* task move says best how much is forgotten, whatever the method: read
    `keep_predictions/kl_to_start`.

    With LoRA the teacher is the model with its adapters as they were, so that there is no second
    copy. A language model's divergence is computed without the logits of all tokens, as that of
    [`Distillation`] is.

    Reference:
        Li & Hoiem 2016, "Learning without Forgetting", arXiv:1606.09282; Shenfeld et al. 2025,
        "RL's Razor", arXiv:2509.04259 (the divergence predicts forgetting).

    Args:
        weight: λ, or a schedule of it.
        on: The rows. `"new"`: the training rows; `"replay"`: those of a [`Replay`] beside it; or
            the name of another stream (`"target"`).
        temperature: T, a positive number or a schedule. The paper has 2; with 1 the term is the
            divergence itself.
        start: The starting model, where it is not the one that is trained: its folder, name, or
            itself. It need not be stored in checkpoints then.
        classes: Which classes are old, by name or number, where the head has grown; all by default,
            or those of `start`. Others are left free.
        chunked: As in [`Distillation`].
        evaluate: Whether evaluations compare the two models, as in [`Distillation`].
        name: Prefix of the logs.

    Logs:
        `loss/keep_predictions` (without `weight`), `loss/task`, `keep_predictions/agreement`, and
        with T = 1 `keep_predictions/kl_to_start`, in nats per item.

    Raises:
        ValueError: If an option is out of range, or the starting model does not fit.

    Example:
        ```python
        trainer.add_callback(AdaptationCallback(KeepPredictions(weight=1.0)))
        ```
    """

    name = "keep_predictions"

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        on: str = NEW,
        temperature: float | Schedule = 1.0,
        start: Any = None,
        classes: Sequence[int | str] | None = None,
        chunked: bool | None = None,
        evaluate: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(
            StartingModel() if start is None else start,
            temperature,
            kd_weight=weight,
            ce_weight=1.0,
            chunked=chunked,
            evaluate=evaluate,
            name=name,
        )
        if classes is not None and len(set(classes)) < 2:
            raise ValueError(
                f"classes={list(classes)}: a distribution needs at least two old classes. For "
                "other heads leave classes out."
            )
        self.on = on
        self.streams = () if on == NEW else (on,)
        self.needs_streams = () if on in (NEW, TRAINING) else (on,)
        self.classes = None if classes is None else list(dict.fromkeys(classes))
        self._old_classes: torch.Tensor | None = None

    def setup(self, trainer: Trainer) -> None:
        """Find the starting model and the old classes."""
        self._old_classes = None
        vars(self).pop("select_logits", None)
        if self.classes is not None or not isinstance(self.teachers[0], StartingModel):
            self._choose_classes(trainer)
        if Head.of(trainer.accelerator.unwrap_model(trainer.model)).kind == "values":
            self.divergence_function = logit_mse  # a regression predicts no distribution
        super().setup(trainer)
        for sanity in self._sanity:  # on a new task the starting model may well guess
            sanity.is_done = True

    def begin(self, trainer: Trainer) -> None:
        """Keep the starting model."""
        super().begin(trainer)
        teacher, found = self.teachers[0], self._projections
        if isinstance(teacher, StartingModel) and found is not None:
            self._projections = replace(found, teacher_values=teacher.starting(found.teacher))

    @property
    def num_labels(self) -> int:
        """The number of classes that are compared."""
        return super().num_labels if self._old_classes is None else len(self._old_classes)

    def _choose_classes(self, trainer: Trainer) -> None:
        """Compare the old classes alone, where the head has others."""
        student = trainer.accelerator.unwrap_model(trainer.model)
        names = _label_names(student)
        if self.classes is not None:
            old = [_number(each, names) for each in self.classes]
        else:
            teacher = self.teachers[0]
            if isinstance(teacher, ModelTeacher):
                teacher.load(student)
            theirs = _label_names(teacher.module)
            if not theirs or not names or len(theirs) >= len(names):
                return
            generic = all(name.startswith("LABEL_") for name in theirs)
            old = list(range(len(theirs))) if generic else [_number(n, names) for n in theirs]
        self._old_classes = torch.tensor(old)
        # On the object, so that a run over all classes has no override and may do without logits.
        self.select_logits = self._select_old  # type: ignore[method-assign]

    def _select_old(
        self, outputs: Any, inputs: Mapping[str, Any], mask: torch.Tensor
    ) -> torch.Tensor:
        """The logits of the items, over the old classes."""
        assert self._old_classes is not None
        logits = output_logits(outputs)
        if logits.shape[-1] > len(self._old_classes):  # else a starting model that has no others
            logits = logits[..., self._old_classes.to(logits.device)]
        return self.head.select({"logits": logits}, inputs, mask)

    def item_mask(
        self, inputs: Mapping[str, Any], domain: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The items of the rows that are held."""
        mask = super().item_mask(inputs, domain)
        if domain is None:
            return mask
        mine = (domain == 0) if self.on in (NEW, TRAINING) else (domain > 0)
        return mask & mine.to(mask.device).view(-1, *[1] * (mask.ndim - 1))

    def loss(self, batch: Batch) -> Term | dict[str, Term]:
        """The divergence from the starting model's predictions."""
        mine = copy.copy(batch)
        # The teacher need not run on a micro-batch of which no row is held.
        mine.parts = [part for part in batch.parts if bool(self.items(part).any())]
        if not mine.parts:
            zero = torch.zeros((), device=batch.domain.device)
            return zero, zero
        return super().loss(mine)

    def on_log(self, logs: dict[str, float], progress: float) -> None:
        """Name the divergence by what it predicts."""
        loss = logs.get(f"loss/{self.name}")
        if loss is not None and self.temperature == 1 and self.head.kind != "values":
            logs[f"{self.name}/kl_to_start"] = loss


def _label_names(model: nn.Module | None) -> list[str]:
    config = getattr(unwrapped_base(model), "config", None) if model is not None else None
    names = getattr(config, "id2label", None) or {}
    return [str(names[key]) for key in sorted(names, key=int)]


def _number(given: int | str, names: Sequence[str]) -> int:
    """The number of a class.

    Raises:
        ValueError: If the model has no such class.
    """
    if isinstance(given, str) and given in names:
        return list(names).index(given)
    if isinstance(given, int) and 0 <= given < len(names):
        return given
    raise ValueError(
        f"The old class {given!r} is none of the model's {len(names)}: {', '.join(names[:20])}. "
        "Load the model with the classes of both tasks, and name them alike (id2label)."
    )
