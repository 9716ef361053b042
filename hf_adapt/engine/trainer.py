"""AdaptationMixin: the one place where adaptations meet the Trainer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer
from transformers.training_args import ParallelMode

from hf_adapt.engine.adaptation import Adaptation
from hf_adapt.engine.columns import column_collator, inputs_of, kept_columns
from hf_adapt.engine.domains import COLUMNS, DOMAIN, TargetForward
from hf_adapt.engine.normalisation import as_if_alone
from hf_adapt.engine.plan import DomainData, Plan, active_adaptations, has_domain_needs
from hf_adapt.engine.run import AdaptationRun, Memory, RunCallback
from hf_adapt.models.state import preserved_random_state

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

logger = logging.getLogger(__name__)


class AdaptationMixin(_Base):
    """Put before any Trainer class, lets adaptations take part in its training.

    Without an active adaptation every method is the Trainer's own. The saved model, the callback
    list and the author's attributes stay what the plain Trainer makes them.

    Args:
        *args: Passed on to the Trainer.
        objectives: What to add to training: objectives and other adaptations.
        target_dataset: Rows of the target domain, prepared like `train_dataset`; labels may be
            missing and are hidden. A list or dict of datasets for several target domains. May be
            left out if `train_dataset` has a `domain` column.
        target_ratio: Target rows that each source row brings along.
        use_target_labels: Train on the target's labels too.
        target_forward: `"joint"` or `"separate"`: one forward for both domains, or one for each.
        source_domain: Which value of a `domain` column is the source.
        **kwargs: Passed on to the Trainer.

    Example:
        >>> from transformers import Seq2SeqTrainer
        >>> class Mine(AdaptationMixin, Seq2SeqTrainer):
        ...     pass
        >>> [base.__name__ for base in Mine.__mro__[:4]]
        ['Mine', 'AdaptationMixin', 'Seq2SeqTrainer', 'Trainer']
    """

    # Class-level defaults: the Trainer's __init__ may call methods that are overridden here.
    _adaptation_plans: tuple[Plan, ...] = ()
    _adaptation_run: AdaptationRun | None = None
    _adaptation_memory: Memory | None = None
    _adaptation_columns: tuple[str, ...] = ()
    _adaptation_inputs: tuple[str, ...] = ()
    _adaptation_collating: tuple[Adaptation, ...] = ()

    def __init__(
        self,
        *args: Any,
        objectives: Sequence[Adaptation] | Adaptation | None = None,
        target_dataset: Any = None,
        target_ratio: float = 1.0,
        use_target_labels: bool = False,
        target_forward: TargetForward = "joint",
        source_domain: int | str | None = None,
        **kwargs: Any,
    ) -> None:
        if objectives:
            self._adaptation_plans = (
                Plan(
                    (objectives,) if isinstance(objectives, Adaptation) else tuple(objectives),
                    target_dataset,
                    target_ratio,
                    use_target_labels,
                    target_forward,
                    source_domain,
                ),
            )
        elif target_dataset is not None:
            raise ValueError(
                "target_dataset was given without objectives: pass objectives=[DANN()] or others."
            )
        super().__init__(*args, **kwargs)

    def add_adaptation_plan(self, plan: Plan) -> None:
        """Add adaptations to the runs to come."""
        self._adaptation_plans = (*self._adaptation_plans, plan)

    # ---- the run ----

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        run = self._start_adaptation_run()
        if run is None:
            return super()._inner_training_loop(*args, **kwargs)
        callback = RunCallback(run)
        self._adaptation_run, self._adaptation_memory = run, run.memory
        try:
            run.start(kwargs.get("resume_from_checkpoint"))
            self.callback_handler.callbacks.append(callback)
            output = super()._inner_training_loop(*args, **kwargs)
            run.guard.check()
            return output
        finally:
            self._adaptation_run = None
            self._adaptation_columns = self._adaptation_inputs = self._adaptation_collating = ()
            if callback in self.callback_handler.callbacks:
                self.callback_handler.callbacks.remove(callback)
            run.close()

    def _present_plans(self) -> list[Plan]:
        present = self.callback_handler.callbacks
        return [p for p in self._adaptation_plans if p.origin is None or p.origin in present]

    def _start_adaptation_run(self) -> AdaptationRun | None:
        plans = self._present_plans()
        adaptations = active_adaptations(plans)
        if not adaptations:
            self._adaptation_memory = None
            return None
        self._refuse_unsupported()
        self._adaptation_collating = tuple(a for a in adaptations if a.collates)
        self._adaptation_columns = tuple({name for a in adaptations for name in a.columns})
        wanted = {name for a in adaptations for name in a.extra_inputs(self)}
        self._adaptation_inputs = tuple(sorted(wanted - inputs_of(self))) if wanted else ()
        data = DomainData(self, plans) if has_domain_needs(plans, adaptations) else None
        return AdaptationRun(
            self,
            adaptations,
            data,
            self._base_loss,
            self._adaptation_memory,
            self._adaptation_inputs,
        )

    def _refuse_unsupported(self) -> None:
        if self.args.n_gpu > 1 and self.args.parallel_mode == ParallelMode.NOT_DISTRIBUTED:
            raise ValueError(
                f"The Trainer would use nn.DataParallel over {self.args.n_gpu} GPUs, whose "
                "replicas lose hooks and auxiliary gradients. Launch one process per GPU: "
                f"`torchrun --nproc_per_node {self.args.n_gpu} script.py` (or accelerate "
                "launch), or make one GPU visible with CUDA_VISIBLE_DEVICES=0."
            )
        if self.is_deepspeed_enabled and self.args.fp16:
            raise ValueError(
                "DeepSpeed's fp16 keeps its loss scale to itself, so the gradients of auxiliary "
                "modules could not be unscaled. Use bf16 with DeepSpeed."
            )

    def _base_loss(self, model: Any, inputs: dict[str, Any], num_items: Any) -> torch.Tensor:
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items)
        assert isinstance(loss, torch.Tensor)
        return loss

    # ---- data ----

    def get_train_dataloader(self) -> Any:
        """The author's loader, over source rows that bring their target rows along."""
        run = self._adaptation_run
        if run is None:
            return super().get_train_dataloader()
        with self._columns_for("training"):
            if run.data is None:
                return super().get_train_dataloader()
            with run.data.in_place():
                return super().get_train_dataloader()

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """The author's loader, with what adaptations add to the batches of an evaluation."""
        with self._columns_for("evaluation"):
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """The same for `predict()`."""
        with self._columns_for("test"):
            return super().get_test_dataloader(*args, **kwargs)

    def _columns_for(self, description: str) -> AbstractContextManager[None]:
        return column_collator(
            self, self._columns_beside(description), self._collating(description)
        )

    def _collating(self, description: str) -> list[Adaptation]:
        """The adaptations that change these batches."""
        if description == "training":
            return list(self._adaptation_collating)
        present = [a for plan in self._present_plans() for a in plan.adaptations if a.is_active]
        return [a for a in present if a.collates and a.collates_evaluation(self)]

    def _columns_beside(self, description: str) -> tuple[str, ...]:
        """The columns that lie beside these batches."""
        return self._adaptation_columns if description == "training" else ()

    def _kept_columns(self, description: str | None) -> tuple[str, ...]:
        """The columns to be kept of a dataset: the model does not see them."""
        what = (description or "").lower()
        read = tuple(name for a in self._collating(what) for name in a.row_columns)
        inputs = self._adaptation_inputs if what == "training" else ()
        return (*self._columns_beside(what), *inputs, *read)

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        with kept_columns(self, self._kept_columns(description)):
            return super()._remove_unused_columns(dataset, description)

    def _get_collator_with_removed_columns(
        self, data_collator: Any, description: str | None = None
    ) -> Any:
        with kept_columns(self, self._kept_columns(description)):
            return super()._get_collator_with_removed_columns(data_collator, description)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        run = self._adaptation_run
        if run is not None and run.data is not None:
            if train_dataset is None:
                train_dataset = self.train_dataset
            if run.data.is_paired(train_dataset):
                return super()._get_train_sampler(run.data.source)
        return super()._get_train_sampler(*(() if train_dataset is None else (train_dataset,)))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of one optimizer step; the items of each term are counted."""
        samples = super().get_batch_samples(*args, **kwargs)
        if self._adaptation_run is not None:
            self._adaptation_run.begin_step(samples[0])
        return samples

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """The author's, unless an adaptation brings a learning-rate schedule."""
        run = self._adaptation_run
        schedule = None if run is None else run.rate_schedule
        if schedule is None:
            return super().create_scheduler(num_training_steps, *args, **kwargs)
        if self.lr_scheduler is not None:
            raise ValueError(
                "The Trainer was given a learning-rate scheduler in optimizers=, and an "
                "adaptation brings a rate_schedule: a run has one. Drop one of the two."
            )
        assert self.optimizer is not None
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: schedule(min(1.0, step / max(1, num_training_steps)))
        )
        self._created_lr_scheduler = True  # so that the next train() makes its own
        return self.lr_scheduler

    def _track_num_input_tokens(self, inputs: Any) -> None:
        # The author's count is of the author's rows. (Before transformers 5 the Trainer counts
        # inside its loop, out of reach.)
        if DOMAIN in inputs:
            inputs = as_if_alone(inputs, inputs[DOMAIN] == 0)
        super()._track_num_input_tokens(inputs)  # type: ignore[no-untyped-call]

    # ---- one step ----

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The author's loss; in training, the terms of the active objectives added to it."""
        run = self._adaptation_run
        if run is None or not model.training or not torch.is_grad_enabled():
            return super().compute_loss(
                model,
                inputs,
                return_outputs=return_outputs,
                num_items_in_batch=num_items_in_batch,
                **kwargs,
            )
        loss, outputs = run.compute_loss(model, inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """The author's; during training it leaves the random state as it was.

        An evaluation at an epoch's end comes after the checkpoint of the epoch's last step and is
        not repeated on resume, so its draws would make the resumed run another one.
        """
        if self._adaptation_run is None:
            return super().evaluate(*args, **kwargs)
        with preserved_random_state():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """The author's; during training it leaves the random state as it was."""
        if self._adaptation_run is None:
            return super().predict(*args, **kwargs)
        with preserved_random_state():
            return super().predict(*args, **kwargs)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The author's; a `domain` column in evaluation data is not shown to the model."""
        hidden = {DOMAIN, COLUMNS} if self._adaptation_plans else set()
        if hidden & set(inputs):
            inputs = {key: value for key, value in inputs.items() if key not in hidden}
        return super().prediction_step(model, inputs, *args, **kwargs)

    # ---- logs and checkpoints ----

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The author's; each term, its weight and its diagnostics join the training log."""
        if self._adaptation_run is not None and "loss" in logs:
            logs.update(self._adaptation_run.drain_metrics())
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        if self._adaptation_run is not None:
            self._adaptation_run.guard.check()  # a run gone NaN must not replace a checkpoint
        return super()._save_checkpoint(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """The author's; auxiliary weights are put beside the model, in a file of their own."""
        if self._adaptation_memory is not None and self.args.should_save:
            self._adaptation_memory.save_weights(output_dir or str(self.args.output_dir))
        super().save_model(output_dir, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._adaptation_memory is not None and self.args.should_save:
            self._adaptation_memory.save_state(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        run = self._adaptation_run
        if run is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        with run.loading_optimizer(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            run.resume(checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self._adaptation_memory is not None and self.state.best_model_checkpoint:
            self._adaptation_memory.load_weights(self.state.best_model_checkpoint)


class AdaptationTrainer(AdaptationMixin, Trainer):
    """A `Trainer` that takes objectives and a target: see [`AdaptationMixin`].

    Example:
        ```python
        trainer = AdaptationTrainer(
            model=model, args=args, train_dataset=source, processing_class=tokenizer,
            objectives=[DANN()], target_dataset=target,
        )
        ```
    """
