"""One training run with adaptations: what happens between `train()` and its end."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback

from hf_adapt.engine.adaptation import Adaptation, Objective
from hf_adapt.engine.auxiliary import AuxiliaryOptimizer, base_schedule, seed_for
from hf_adapt.engine.batch import Batch, Layout, Part, Rows
from hf_adapt.engine.checkpoint import (
    load_state,
    load_weights,
    read_state,
    save_state,
    save_weights,
)
from hf_adapt.engine.columns import take_columns
from hf_adapt.engine.domains import DOMAIN, TARGET_BATCH, UNPAIRED
from hf_adapt.engine.fusing import FUSED, difference, few_rows, needs_logits, with_labels
from hf_adapt.engine.metrics import FiniteGuard, MetricAverager
from hf_adapt.engine.normalisation import (
    count_labels,
    data_parallel_size,
    rows_of,
    trainer_divides,
)
from hf_adapt.engine.progress import Schedule
from hf_adapt.engine.rates import DividedGroups
from hf_adapt.engine.supported import is_sentence_trainer, sentence_inputs
from hf_adapt.engine.training import forget_compiled
from hf_adapt.engine.unlabelled import (
    TARGET_ROWS_FAIL,
    depends_on_target,
    explained,
    trains_on_target,
)
from hf_adapt.models.capture import OutputCapture
from hf_adapt.models.state import preserved, preserved_random_state
from hf_adapt.models.structure import find_feature_module, is_encoder_decoder, unwrapped_base

if TYPE_CHECKING:
    from transformers import Trainer

    from hf_adapt.engine.plan import DomainData

logger = logging.getLogger(__name__)

KEPT_METRICS = ("_metrics", "accum_loss_components")
"""Where TRL's and sentence-transformers' Trainers keep what their compute_loss logs."""

BaseLoss = Callable[[Any, dict[str, Any], Any], torch.Tensor]
"""The author's `compute_loss` as (model, inputs, num_items_in_batch) -> loss."""


class Memory:
    """What outlives a run: the auxiliary modules and their optimizer belong to a model."""

    def __init__(self, model: nn.Module, adaptations: Sequence[Adaptation]) -> None:
        self.model = model
        self.adaptations = list(adaptations)
        self.optimizer: AuxiliaryOptimizer | None = None
        for adaptation in adaptations:
            adaptation.module = None

    def save_weights(self, folder: str) -> None:
        """Write the auxiliary modules beside the model."""
        save_weights(self.adaptations, folder)
        for adaptation in self.adaptations:
            adaptation.save(folder)

    def load_weights(self, folder: str) -> None:
        """Bring the auxiliary modules to where a model was saved."""
        load_weights(self.adaptations, folder)

    def save_state(self, folder: str) -> None:
        """Write the auxiliary optimizer beside the Trainer's."""
        if self.optimizer is not None:
            save_state(self.adaptations, self.optimizer, folder)

    def belongs_to(self, model: nn.Module, adaptations: Sequence[Adaptation]) -> bool:
        """Whether these modules were built for this model and these adaptations."""
        return self.model is model and self.adaptations == list(adaptations)


class AdaptationRun:
    """The state of one `train()`: taps on the model, counts of the current step, what is logged.

    Args:
        trainer: The Trainer, before its dataloader and optimizer exist.
        adaptations: The active adaptations.
        data: The target domains, or None if nothing is paired.
        base_loss: The author's `compute_loss`.
        memory: What an earlier run of the same model left, or None.
        extra_inputs: Inputs in the batches that are not for the model.
    """

    def __init__(
        self,
        trainer: Trainer,
        adaptations: Sequence[Adaptation],
        data: DomainData | None,
        base_loss: BaseLoss,
        memory: Memory | None,
        extra_inputs: Collection[str] = (),
    ) -> None:
        self.trainer = trainer
        self.adaptations = list(adaptations)
        self.objectives = [a for a in adaptations if isinstance(a, Objective)]
        self.data = data
        self.model: nn.Module = trainer.accelerator.unwrap_model(trainer.model)
        if memory is None or not memory.belongs_to(self.model, adaptations):
            memory = Memory(self.model, adaptations)
        self.memory = memory
        self.metrics = MetricAverager(trainer.accelerator)
        self.guard = FiniteGuard()
        self._base_loss = base_loss
        self.extra_inputs = extra_inputs
        self._ready = self._has_extra_forward = False
        self._ignores_num_items = False
        self.checkpoint: str | None = None
        self._resume_from: str | None = None
        self._schedule: Callable[[int], float] | None = None
        self._totals: dict[str, torch.Tensor] = {}
        self._label_total: torch.Tensor | None = None
        self._layout = Layout(
            self.model,
            1 if data is None else data.num_domains,
            may_be_frozen=any(a.freezes for a in adaptations),
        )
        self._taps: dict[int, OutputCapture] = {}
        self._fused: Objective | None = None
        self._outputs: OutputCapture | None = None
        self._divided_groups = DividedGroups()

    # ---- start and end ----

    def start(self, checkpoint: str | None = None) -> None:
        """Check the adaptations against the model and tap its features.

        Args:
            checkpoint: The folder that the run resumes from, if it does.
        """
        self.checkpoint = checkpoint
        forget_compiled(self.trainer)
        for adaptation in self.adaptations:
            adaptation.setup(self.trainer)
        for layer in {objective.feature_layer for objective in self.objectives}:
            try:
                module = find_feature_module(self.model, layer)
            except ValueError as error:
                if layer is not None:
                    raise
                self._layout.module_of[layer] = error  # raised if an objective asks for features
                continue
            self._layout.module_of[layer] = module
            if id(module) not in self._taps:
                self._taps[id(module)] = OutputCapture(module)
        for objective in self.objectives:
            for module, extract in objective.taps(self.model).items():
                if extract is not None:
                    self._taps[id(module)] = OutputCapture(module, extract)
                elif id(module) not in self._taps:
                    self._taps[id(module)] = OutputCapture(module)
        self._outputs = OutputCapture(self.model, extract=lambda output: output)

    def begin(self) -> None:
        """The model is wrapped and the optimizer exists."""
        for adaptation in self.adaptations:
            adaptation.begin(self.trainer)

    def close(self) -> None:
        """Leave the model without a trace."""
        self._divided_groups.restore()
        for adaptation in self.adaptations:
            adaptation.close()
        for tap in self._all_taps():
            tap.remove()

    @property
    def rate_schedule(self) -> Schedule | None:
        """The learning-rate schedule that an adaptation brings instead of the Trainer's."""
        brought = [a for a in self.adaptations if a.rate_schedule is not None]
        if len(brought) > 1:
            raise ValueError(
                f"{' and '.join(a.name for a in brought)} each bring a learning-rate schedule; a "
                "run has one. Give rate_schedule to one of them."
            )
        return brought[0].rate_schedule if brought else None

    def _all_taps(self) -> list[OutputCapture]:
        return [*self._taps.values(), *([self._outputs] if self._outputs else [])]

    @contextmanager
    def loading_optimizer(self, checkpoint: str | None) -> Iterator[None]:
        """Around the reading of the main optimizer's state."""
        with ExitStack() as stack:
            state = (None if checkpoint is None else read_state(checkpoint)) or {}
            for adaptation in self.adaptations:
                own = state.get("adaptations", {}).get(adaptation.name, {})
                stack.enter_context(adaptation.around_optimizer_load(own))
            yield

    def resume(self, checkpoint: str) -> None:
        """Take the auxiliary state from this checkpoint once the modules are built."""
        self._resume_from = checkpoint

    # ---- one forward ----

    def _parts(self, inputs: Mapping[str, Any]) -> list[Part]:
        """Split a batch into what goes through the model together, without the domain column."""
        inputs = dict(inputs)
        apart = inputs.pop(TARGET_BATCH, None)
        if DOMAIN not in inputs:
            if self.data is not None:
                raise ValueError(UNPAIRED)
            rows = next((v.shape[0] for v in inputs.values() if isinstance(v, torch.Tensor)), 0)
            inputs[DOMAIN] = torch.zeros(rows, dtype=torch.long, device=self.trainer.args.device)
        parts = []
        for given in (inputs, *([dict(apart)] if apart is not None else [])):
            domain = given.pop(DOMAIN)
            columns = take_columns(given, len(domain))
            extra = {k: given.pop(k) for k in self.extra_inputs if k in given}
            parts.append(Part(given, domain, columns=columns, extra=extra))
        return parts

    @contextmanager
    def _recording(self, part: Part) -> Iterator[None]:
        taps = self._all_taps()
        for tap in taps:
            tap.record()
        try:
            yield
        finally:
            for tap in taps:
                tap.stop()
            captured = {key: tap.take() for key, tap in self._taps.items()}
            outputs = self._outputs.take() if self._outputs else []
        # An author's loss may run the model several times (R-Drop, adversarial training, one
        # forward per column): the first run over all rows is the plain one.
        size = len(part.domain)
        for key, values in captured.items():
            fitting = [v for v in values if v[0].shape[0] in (size, size * part.num_choices)]
            if fitting:
                part.hidden[key], mask = fitting[0]
                if mask is not None:
                    part.masks[key] = mask
        part.outputs = outputs[0] if outputs else None

    def _forward(self, model: nn.Module, parts: list[Part], num_items: Any) -> torch.Tensor:
        """The base loss on the first part; the features and outputs of all parts."""
        first = parts[0]
        with ExitStack() as stack:
            for adaptation in self.adaptations:
                stack.enter_context(adaptation.around_forward(first.inputs))
            with self._recording(first):
                if self._needs_no_labels(first):
                    self._forward_apart(model, first)
                    loss = torch.zeros((), device=self.trainer.args.device)
                else:
                    loss = self._explained_base_loss(model, first, num_items)
            if is_sentence_trainer(self.trainer) and not self._taps.keys() <= first.hidden.keys():
                self._say_extra_forward()
                with self._recording(first):
                    self._forward_apart(model, first)
        for part in parts[1:]:
            with self._recording(part):
                self._forward_apart(model, part)
        return loss

    def _explained_base_loss(self, model: nn.Module, part: Part, num_items: Any) -> torch.Tensor:
        """The base loss; where it fails on target rows only, that is said."""

        def loss(inputs: Mapping[str, Any]) -> torch.Tensor:
            return self._base_loss(model, dict(inputs), num_items)

        try:
            return loss(part.inputs)
        except Exception as error:
            reason = explained(error, part, self._label_names, loss)
            if reason is error:
                raise
            raise reason from error

    @property
    def _label_names(self) -> set[str]:
        return {*self.trainer.label_names, "labels", "shift_labels"}

    def _say_extra_forward(self) -> None:
        if not self._has_extra_forward:
            self._has_extra_forward = True
            logger.warning(
                "The training loss runs the model without gradients (cached losses) or on other "
                "rows than those of a batch (negatives), so the features of the source rows are "
                "computed by one more forward. It takes memory for all rows of a micro-batch: use "
                "a smaller per_device_train_batch_size if that is too much."
            )

    @property
    def _base_weight(self) -> float:
        """The factor of the task's own loss."""
        return math.prod(o.base_weight(self.progress) for o in self.objectives)

    def _needs_no_labels(self, part: Part) -> bool:
        """Whether there is no task's loss to compute: it does not count, and has no labels."""
        return not {*self.trainer.label_names, "labels"} & set(part.inputs) and not (
            self._base_weight
        )

    def _forward_apart(self, model: nn.Module, part: Part) -> None:
        """Run the model on rows alone, for their features and predictions; there is no loss."""
        if is_sentence_trainer(self.trainer):  # one forward per text column
            for features in sentence_inputs(self.trainer, self.model, part.inputs):
                model(features) if isinstance(self.model, nn.Sequential) else model(**features)
                if all(tap.captured for tap in self._taps.values()):
                    return  # only the first column's features are used
            return
        drop = () if is_encoder_decoder(self.model) else self.trainer.label_names
        taken = inspect.signature(unwrapped_base(self.model).forward).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
            # What the author's own loss takes from the batch before the model is called.
            drop = (*drop, *(part.inputs.keys() - taken.keys()))
        try:
            model(**{key: value for key, value in part.inputs.items() if key not in drop})
        except Exception as error:
            if bool((part.domain > 0).any()):
                error.add_note(TARGET_ROWS_FAIL)
            raise

    def _batch(self, parts: list[Part]) -> Batch:
        return Batch(parts, self._layout, self.progress, self.metrics)

    @property
    def progress(self) -> float:
        """`global_step / max_steps`."""
        state = self.trainer.state
        return state.global_step / max(1, state.max_steps)

    # ---- the first batch: probe the base loss, build the modules ----

    def ensure_ready(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """On the first batch of a run: probe the loss, build modules, read the checkpoint."""
        if self._ready:
            return
        self._ready = True
        # Some Trainers count tokens or keep metrics in compute_loss; the probe must not add to it.
        kept = {k: _copy_metrics(getattr(self.trainer, k, None)) for k in KEPT_METRICS}
        try:
            with preserved(self.model), torch.no_grad():
                model.eval()
                parts = self._parts(inputs)
                fusing = self._fusing(parts)
                if fusing is not None:
                    # Its point is to do without the logits of a whole batch: none here either.
                    # Where no row has a label, some are made up: the losses would be 0 or NaN.
                    parts = [with_labels(self.trainer, few_rows(part)) for part in parts]
                self._probe(model, parts)
                if fusing is not None and self._fuses_exactly(model, fusing, parts):
                    self._fused = fusing
        finally:
            for key, value in kept.items():
                if value is not None:
                    setattr(self.trainer, key, value)
        self._load()

    def _probe(self, model: nn.Module, parts: list[Part]) -> None:
        items = count_labels(self.trainer, parts[0].inputs)
        reference = items if items is not None and self.trainer.model_accepts_loss_kwargs else None
        if reference is None and self.trainer.compute_loss_func is not None:
            reference = items
        once = self._forward(model, parts, reference)
        unlabelled, unlabelled_items = once, reference
        self._layout.learn(parts)
        if reference is not None and getattr(self.trainer, "loss_is_scaled_for_ga", None) is None:
            labelled = parts[0]
            if self._any_process(int(reference) == 0):  # a loss over no label is NaN: ask again
                labelled = with_labels(self.trainer, labelled)
                reference = count_labels(self.trainer, labelled.inputs)
                assert reference is not None
                once = self._base_loss(model, dict(labelled.inputs), reference)
            twice = self._base_loss(model, dict(labelled.inputs), reference * 2)
            ignored = bool(torch.isclose(once, twice, rtol=1e-4, atol=0.0))
            self._ignores_num_items = self._any_process(ignored)
            if self._ignores_num_items:
                logger.info(
                    "The training loss ignores num_items_in_batch although the Trainer takes it "
                    "as scaled (transformers issue 47688): hf_adapt weights each micro-batch by "
                    "its share of the labels instead, so that gradient accumulation and several "
                    "processes give the gradient of one large batch."
                )
        elif reference is None and items is not None and trainer_divides(self.trainer, None):
            # The Trainer would take the mean of the micro-batches' means, which is not the mean
            # over the labels where these have unequal numbers of them.
            self._ignores_num_items = True
        batch = self._batch(parts)
        device = self.trainer.args.device
        for adaptation in self.adaptations:
            if adaptation.module is None:
                bound = batch
                if isinstance(adaptation, Objective):
                    bound = batch.for_objective(adaptation)
                with preserved_random_state(seed_for(adaptation.name, self.trainer.args.seed)):
                    adaptation.module = adaptation.build_modules(bound)
                if adaptation.module is not None:
                    adaptation.module.to(device=device, dtype=torch.float32)
            if isinstance(adaptation, Objective):
                with torch.autocast(device.type, enabled=False):
                    _components(adaptation, adaptation.loss(batch.for_objective(adaptation)))
        # After the objectives: one that cannot work here at all must not be advised an option.
        self._check_unlabelled_rows(model, parts[0], unlabelled_items, unlabelled)
        if self.memory.optimizer is None:
            self.memory.optimizer = AuxiliaryOptimizer(self.adaptations)

    def _fusing(self, parts: list[Part]) -> Objective | None:
        """The objective that may compute its term together with the task's loss."""
        able = [o for o in self.objectives if o.can_fuse(self.trainer)]
        reason: str | None = None
        if len(able) > 1:
            reason = f"{' and '.join(o.name for o in able)} cannot share one projection"
        elif len(parts) > 1:
            reason = "target rows go through the model apart (target_forward='separate')"
        elif able:
            others = [o for o in self.objectives if o is not able[0]]
            reason = needs_logits(self.trainer, others, parts[0])
        if reason is None:
            return able[0] if able else None
        for objective in able:
            objective.not_fused(reason)
        return None

    def _fuses_exactly(self, model: nn.Module, objective: Objective, parts: list[Part]) -> bool:
        """Whether the fused loss is what the model and the objective compute apart."""
        part = parts[0]
        items = count_labels(self.trainer, part.inputs)
        assert items is not None
        counted = self._counts_base(items)
        base = self._base_loss(model, dict(part.inputs), items if counted else None).float()
        if counted and self.trainer.args.average_tokens_across_devices:
            base = base / self.trainer.accelerator.num_processes  # as the Trainer multiplied it
        with torch.autocast(base.device.type, enabled=False):
            batch = self._batch(parts).for_objective(objective)
            apart = _components(objective, objective.loss(batch))
        term = apart.get(FUSED, apart.get(""))
        expected = term[0] if isinstance(term, tuple) else term
        assert isinstance(expected, torch.Tensor)
        one = torch.ones((), device=base.device)
        extra = getattr(part.outputs, "aux_loss", None)
        try:
            with self._recording(part):
                fused = objective.fused_loss(model, part, one, one, self.progress)
        except Exception as error:  # whatever an unknown architecture does with our hidden states
            reason: str | None = f"{type(error).__name__}: {error}"
        else:
            half = torch.is_autocast_enabled(base.device.type)
            half |= next(self.model.parameters()).dtype != torch.float32
            reason = difference(fused, base * items, expected, rough=half)
            if extra is not None:  # a router's, which may be smaller than any tolerance
                reason = "the model adds a loss of its own (aux_loss)"
        if not self._any_process(reason is not None):
            logger.info("%s computes its losses without whole logits.", objective.name)
            return True
        objective.not_fused(reason or "another process does")
        return False

    def _any_process(self, flag: bool) -> bool:
        """Whether it is so in any process: all must run the same forwards, which communicate."""
        accelerator = self.trainer.accelerator
        if accelerator.num_processes == 1:
            return flag
        return bool(accelerator.gather(torch.tensor([flag], device=accelerator.device)).any())

    def _check_unlabelled_rows(
        self, model: nn.Module, part: Part, items: Any, loss: torch.Tensor
    ) -> None:
        """Refuse a loss that is trained on target rows, whose labels it must not know."""
        hides = self.data is not None and not self.data.uses_target_labels
        if not self._any_process(hides and bool((part.domain > 0).any())):
            return
        if self._needs_no_labels(part):
            return
        depends = None
        # A forward with gradients and without a backward would upset what shards the model.
        if not (self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled):
            seen = dataclasses.replace(part, hidden={}, masks={})
            with torch.enable_grad(), self._recording(seen):
                again = self._base_loss(self.model, dict(part.inputs), items)
            depends = depends_on_target(again, seen.outputs, part.domain)
        if not self._any_process(depends is not None):
            alone = self._base_loss(model, rows_of(part.inputs, part.domain == 0), items)
            # Without a label in the batch both are NaN.
            depends = not torch.isclose(
                loss.float(), alone.float(), rtol=1e-3, atol=1e-5, equal_nan=True
            )
        if depends:
            raise ValueError(trains_on_target(self.model, self._label_names))

    def _load(self) -> None:
        if self._resume_from is None:
            return
        folder, self._resume_from = self._resume_from, None
        built = [a for a in self.adaptations if a.module is not None]
        found = load_weights(self.adaptations, folder)
        if not found and built:
            logger.warning(
                "%s holds no auxiliary modules (it was saved by a plain Trainer): %s start anew.",
                folder,
                ", ".join(a.name for a in built),
            )
        assert self.memory.optimizer is not None
        load_state(self.adaptations, self.memory.optimizer if found else None, folder)

    # ---- each optimizer step ----

    def begin_step(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Count the items of all micro-batches of the coming optimizer step, on all processes."""
        self._totals, self._label_total = {}, None
        if not batches or not isinstance(batches[0], Mapping):
            return  # rows that the Trainer makes into batches later (GRPO's prompts)
        if not self._ready:
            labelled = (b for b in batches if (count_labels(self.trainer, b) or 0) > 0)
            first = next(labelled, batches[0])  # a loss over no label is NaN and tells nothing
            self.ensure_ready(self.trainer.model_wrapped, self._prepared(first))
        counted: dict[str, torch.Tensor] = {}
        device = self.trainer.args.device
        for inputs in batches:
            parts = self._parts(inputs)
            counts = {"": count_labels(self.trainer, parts[0].inputs)}
            rows = Rows(parts, self._layout)
            for objective in self.objectives:
                items = objective.num_items(rows.for_objective(objective))
                if isinstance(items, Mapping):
                    counts.update({f"{objective.name}/{key}": n for key, n in items.items()})
                else:
                    counts[objective.name] = items
            for name, count in counts.items():
                if count is not None:
                    count = torch.as_tensor(count, dtype=torch.float64, device=device)
                    counted[name] = counted[name] + count if name in counted else count
        if counted and self.trainer.accelerator.num_processes > 1:
            table = torch.stack(list(counted.values()))
            table = self.trainer.accelerator.reduce(table, reduction="sum")
            counted = dict(zip(counted, table.unbind(), strict=True))
        self._label_total = counted.pop("", None)
        self._totals = counted

    def _prepared(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        prepared: Mapping[str, Any] = self.trainer._prepare_inputs(dict(inputs))
        return prepared

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> tuple[torch.Tensor, Any]:
        """The base loss and all terms on one micro-batch, scaled as the Trainer expects.

        Returns:
            The loss and the model's outputs.
        """
        self.ensure_ready(model, inputs)
        parts = self._parts(inputs)
        size = data_parallel_size(self.trainer)
        steps = self.trainer.current_gradient_accumulation_steps
        divided = steps if trainer_divides(self.trainer, num_items_in_batch) else 1
        if self._fused is not None:
            return self._compute_fused(
                model, self._fused, parts, steps, divided, num_items_in_batch
            )
        if self._ignores_num_items:
            mean = self._forward(model, parts, None)
            items = count_labels(self.trainer, parts[0].inputs)
            assert items is not None
            total = items if self._label_total is None else self._label_total
            loss = mean * (items / total.clamp(min=1)).to(mean.dtype) * (size * divided)
            loss = torch.where(items > 0, loss, torch.zeros_like(loss))  # a mean over none is NaN
        else:
            loss = self._forward(model, parts, num_items_in_batch)
            items = count_labels(self.trainer, parts[0].inputs)
            if items is not None:  # without a label in the whole step it is 0 / 0
                loss = torch.where((items > 0) | ~loss.isnan(), loss, torch.zeros_like(loss))
        # What this micro-batch adds to the step's loss, so that sums over the step are exact.
        self.metrics.add("loss/task", loss.detach() * (steps / divided), 1 / steps)
        base_weight = self._base_weight
        if base_weight != 1:  # so that the plain Trainer's loss stays what it is, bit for bit
            loss = (loss if base_weight else loss.nan_to_num(0.0, 0.0, 0.0)) * base_weight
        loss = self._add_terms(loss, parts, steps, divided, fused=None)
        return loss, parts[0].outputs

    def _compute_fused(
        self,
        model: nn.Module,
        objective: Objective,
        parts: list[Part],
        steps: int,
        divided: int,
        num_items_in_batch: Any,
    ) -> tuple[torch.Tensor, Any]:
        """The same, where an objective computes its term together with the base loss."""
        part, size = parts[0], data_parallel_size(self.trainer)
        device = self.trainer.args.device
        trainer = self.trainer
        if self._counts_base(num_items_in_batch):  # as the Trainer has it, first tokens included
            total = torch.as_tensor(num_items_in_batch, device=device)
            everywhere = trainer.args.average_tokens_across_devices
            processes = trainer.accelerator.num_processes if everywhere else 1
        else:
            items = count_labels(trainer, part.inputs)
            assert items is not None
            total = items if self._label_total is None else self._label_total
            processes = size
        base_scale = (processes / total.clamp(min=1)).to(torch.float32)
        term_total = self._totals.get(f"{objective.name}/{FUSED}", self._totals.get(objective.name))
        if term_total is None:  # an author's own loop, which counts nothing beforehand
            counts = objective.num_items(Rows(parts, self._layout).for_objective(objective))
            counts = counts[FUSED] if isinstance(counts, Mapping) else counts
            assert counts is not None
            term_total = counts.double() * steps
        term_scale = (size / term_total.to(device).clamp(min=1)).to(torch.float32)
        weight = objective.term_weight(self.progress)
        with ExitStack() as stack:
            for adaptation in self.adaptations:
                stack.enter_context(adaptation.around_forward(part.inputs))
            with self._recording(part):
                fused = objective.fused_loss(
                    model,
                    part,
                    base_scale * (divided * self._base_weight),
                    term_scale * (divided * weight),
                    self.progress,
                )
        part.outputs, part.is_fused = fused.outputs, True
        self.metrics.add("loss/task", fused.base_sum * base_scale * steps, 1 / steps)
        term = fused.term_sum * term_scale
        return self._add_terms(fused.loss, parts, steps, divided, (objective, term)), part.outputs

    def _counts_base(self, num_items_in_batch: Any) -> bool:
        """Whether the base loss is divided by the Trainer's own count."""
        counted = self.trainer.model_accepts_loss_kwargs and not self._ignores_num_items
        return counted and num_items_in_batch is not None

    def _add_terms(
        self,
        loss: torch.Tensor,
        parts: list[Part],
        steps: int,
        divided: int,
        fused: tuple[Objective, torch.Tensor] | None,
    ) -> torch.Tensor:
        """The loss with every objective's term added; one that is in it already is logged."""
        batch = self._batch(parts)
        size = data_parallel_size(self.trainer)
        with torch.autocast(loss.device.type, enabled=False):
            for objective in self.objectives:
                term = self._term(objective, batch.for_objective(objective), steps, size)
                whole = term.detach()
                if fused is not None and fused[0] is objective:
                    if term.requires_grad:  # it has other components, which are logged
                        self.metrics.add(f"{objective.name}/{FUSED}", fused[1] * steps, 1 / steps)
                    whole = whole + fused[1]
                self.metrics.add(f"loss/{objective.name}", whole * steps, 1 / steps)
                self.guard.add(objective.name, whole)
                weight = objective.term_weight(self.progress)
                if callable(objective.weight):
                    self.metrics.add(f"{objective.name}/weight", weight)
                if weight != 0:
                    loss = loss + (weight * divided) * term
        return loss

    def _term(self, objective: Objective, batch: Batch, steps: int, size: int) -> torch.Tensor:
        """The micro-batch's share of a term: the shares of a step add up to the term."""
        components = _components(objective, objective.loss(batch))
        share = torch.zeros((), device=self.trainer.args.device)
        for name, component in components.items():
            if isinstance(component, tuple):
                total = self._totals.get(f"{objective.name}/{name}")
                if total is None:
                    total = self._totals.get(objective.name)
                if total is None:
                    total = component[1].double() * steps
                part = component[0] * (size / total.clamp(min=1)).to(component[0].dtype)
            else:
                part = component / steps
            if name:
                self.metrics.add(f"{objective.name}/{name}", part.detach() * steps, 1 / steps)
            share = share + part
        return share

    # ---- around the optimizer step, logging, checkpoints ----

    def before_step(self) -> None:
        """An optimizer step begins."""
        for adaptation in self.adaptations:
            adaptation.before_step(self.trainer.state.global_step)

    def before_main_step(self) -> None:
        """Check the terms, make the auxiliary gradients ready and set the model's rates."""
        step = self.trainer.state.global_step
        self.guard.end_step(step)
        if self.memory.optimizer is not None:
            for name, norm in self.memory.optimizer.before_main_step(self.trainer).items():
                self.metrics.add(f"{name}/module_gradient_norm", norm)
        assert self.trainer.optimizer is not None
        self._divided_groups.apply(
            self.trainer.optimizer, [a.rate_factors(step) for a in self.adaptations]
        )

    def after_main_step(self) -> None:
        """Take the model's own rates back and step the auxiliary optimizer."""
        self._divided_groups.restore()
        if self.memory.optimizer is not None:
            if self._schedule is None:
                self._schedule = base_schedule(self.trainer)
            self.memory.optimizer.after_main_step(self.trainer, self._schedule)

    def drain_metrics(self) -> dict[str, float]:
        """What to add to a training log."""
        metrics = self.metrics.drain()
        for adaptation in self.adaptations:
            metrics.update(adaptation.log_values())
        for adaptation in self.adaptations:
            adaptation.on_log(metrics, self.progress)
        return metrics

    def on_evaluate(self, metrics: Mapping[str, float]) -> None:
        """An evaluation has ended."""
        for adaptation in self.adaptations:
            adaptation.on_evaluate(metrics, self.trainer.state.global_step)


class RunCallback(TrainerCallback):
    """Hears the Trainer's events for a run; in the callback list only while the run lasts."""

    def __init__(self, run: AdaptationRun) -> None:
        self.run = run

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the paired dataset its epoch (accelerate does not always)."""
        if self.run.data is not None:
            self.run.data.set_epoch(int(state.epoch or 0))

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


def _components(objective: Objective, value: Any) -> dict[str, Any]:
    """The components of what `loss` returned, checked."""
    components = value if isinstance(value, dict) else {"": value}
    for name, component in components.items():
        where = f"{type(objective).__name__}.loss" + (f" component {name!r}" if name else "")
        parts = component if isinstance(component, tuple) else (component,)
        if len(parts) > 2 or not all(isinstance(p, torch.Tensor) and p.ndim == 0 for p in parts):
            found = [tuple(p.shape) if isinstance(p, torch.Tensor) else type(p) for p in parts]
            raise ValueError(
                f"{where} returned {found}; expected a scalar tensor (the mean over the "
                "micro-batch) or a (sum, count) of two scalar tensors."
            )
        if len(parts) == 2 and type(objective).num_items is Objective.num_items:
            raise ValueError(
                f"{where} returned a (sum, count), which is divided by the number of items in the "
                "whole optimizer step: define num_items(self, rows) to count them before the "
                "forward (for example `return rows.num_features()`), or return the mean."
            )
    return components


def _copy_metrics(metrics: Any) -> Any:
    if not isinstance(metrics, dict):
        return None
    return copy.deepcopy(metrics)
