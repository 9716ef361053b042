"""AdaptationMixin: the one place where adaptations meet the Trainer."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import ProgressCallback, Trainer
from transformers.integrations.integration_utils import MLflowCallback
from transformers.training_args import ParallelMode

from hf_adapt.engine.adaptation import Adaptation
from hf_adapt.engine.checkpoint import AuxiliaryState
from hf_adapt.engine.collating import (
    COLUMNS,
    DOMAIN,
    AdaptationCollator,
    UnlabelledCollator,
)
from hf_adapt.engine.columns import inputs_of, kept_columns, model_inputs
from hf_adapt.engine.gradients import check_whole_gradients
from hf_adapt.engine.item_outputs import ItemOutputs, OutputCollector
from hf_adapt.engine.mixins import (
    BatchTransform,
    EvaluationObserver,
    EvaluationView,
    RowRouting,
)
from hf_adapt.engine.model_card import TITLE, card_section
from hf_adapt.engine.pairing import is_map_style
from hf_adapt.engine.plan import Plan, active_adaptations, streams_of
from hf_adapt.engine.run import AdaptationRun
from hf_adapt.engine.run_callback import RunCallback
from hf_adapt.engine.selection import as_if_alone
from hf_adapt.engine.stream_data import StreamData
from hf_adapt.engine.sweep import Read, Sweep
from hf_adapt.models.hashing import row_keys
from hf_adapt.models.state import preserved_random_state
from hf_adapt.storage.text_file import write_text

if TYPE_CHECKING:
    from hf_adapt.engine.adaptation import Objective
    from hf_adapt.engine.streams import Stream

    _Base = Trainer
else:
    _Base = object

logger = logging.getLogger(__name__)


class AdaptationMixin(_Base):
    """Put before any Trainer class, lets adaptations take part in its training.

    Without an active adaptation every method is the Trainer's own. The saved model, the callback
    list and the user's attributes stay what the plain Trainer makes them.

    Args:
        *args: Passed on to the Trainer.
        objectives: What to add to training: objectives and other adaptations. With a target and
            none, the recommended ones ([`hf_adapt.alignment.recommended`]).
        target_dataset: Rows of the target domain, prepared like `train_dataset`; labels may be
            missing and are hidden. A list or dict of datasets for several target domains, or a
            [`Stream`] of them with options. May be left out if `train_dataset` has a `domain`
            column.
        target_priors: How frequent each class is in the target, for the methods that use it: a dict
            by label name, an array, `"uniform"`, `"predicted"`, `"source"` or `"estimate"` (see
            [`hf_adapt.alignment.priors`]).
        streams: Further streams of rows by name: datasets or [`Stream`]s.
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
    _adaptation_auxiliary: AuxiliaryState | None = None
    _adaptation_active: tuple[Adaptation, ...] = ()
    _adaptation_inputs: tuple[str, ...] = ()
    _adaptation_observers: tuple[tuple[EvaluationObserver, ...], tuple[str, ...]] = ((), ())
    """Those of the evaluation under way, and the inputs that are only for them."""
    _adaptation_collector: OutputCollector | None = None
    _adaptation_past: tuple[Sequence[Adaptation], StreamData | None] | None = None
    """What took part in the last run, and its streams: a model card says so."""
    _adaptation_is_viewed = False
    """Whether an evaluation is under way in which the Trainer's model is another."""

    def __init__(
        self,
        *args: Any,
        objectives: Sequence[Adaptation] | Adaptation | None = None,
        target_dataset: Any = None,
        target_priors: Any = None,
        streams: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        has_target = target_dataset is not None or target_priors is not None
        if objectives or streams or has_target:
            given = [objectives] if isinstance(objectives, Adaptation) else objectives or []
            plan = Plan.of(given, target_dataset, streams, target_priors=target_priors)
            self._adaptation_plans = (plan,)
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
        self._adaptation_run, self._adaptation_auxiliary = run, run.auxiliary
        try:
            run.start(kwargs.get("resume_from_checkpoint"))
            self.callback_handler.callbacks.append(callback)
            output = super()._inner_training_loop(*args, **kwargs)
            run.finish()
            self._adaptation_past = (run.adaptations, run.data)
            return output
        finally:
            self._adaptation_run = None
            self._adaptation_active, self._adaptation_inputs = (), ()
            if callback in self.callback_handler.callbacks:
                self.callback_handler.callbacks.remove(callback)
            run.close()

    def _present_plans(self) -> list[Plan]:
        present = self.callback_handler.callbacks
        return [p for p in self._adaptation_plans if p.origin is None or p.origin in present]

    def _present_adaptations(self) -> list[Adaptation]:
        return [a for plan in self._present_plans() for a in plan.adaptations if a.is_active]

    def _start_adaptation_run(self) -> AdaptationRun | None:
        plans = self._present_plans()
        adaptations = active_adaptations(plans)
        streams = streams_of(plans, adaptations)
        if not adaptations and not streams:
            self._adaptation_auxiliary = None
            return None
        self._refuse_unsupported(adaptations)
        self._adaptation_active = tuple(adaptations)
        is_routed = any(isinstance(a, RowRouting) for a in adaptations)
        wanted = {name for a in adaptations for name in a.extra_inputs(self)}
        self._adaptation_inputs = tuple(sorted(wanted - inputs_of(self))) if wanted else ()
        return AdaptationRun(
            self,
            adaptations,
            StreamData(self, streams, adaptations) if streams or is_routed else None,
            self._base_loss,
            self._adaptation_auxiliary,
            self._adaptation_inputs,
        )

    def _refuse_unsupported(self, adaptations: Sequence[Adaptation]) -> None:
        check_whole_gradients(self, adaptations)
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

    def sweep(
        self,
        objective: Objective,
        stream: str,
        read: Read,
        weights: Mapping[str, torch.Tensor] | None = None,
        forward: bool = True,
    ) -> dict[str, torch.Tensor]:
        """Run the model over all rows of a stream, between two steps of training.

        Objectives that keep the same (by the same function) of a stream share one pass of a step.

        Args:
            objective: Whose features and streams the batches show.
            stream: The stream's name; `"train"` for the training rows.
            read: What to keep of a batch: tensors with one entry per item.
            weights: Other weights that the model has meanwhile, by their names.
            forward: False where `read` needs no features or predictions, but labels or keys alone.

        Returns:
            What was kept of all rows, of all processes, on the CPU.

        Raises:
            ValueError: If the rows cannot be read by number.
        """

        def made() -> dict[str, torch.Tensor]:
            return self._sweep().run(objective, stream, read, weights, forward)

        if weights is not None or self._adaptation_run is None:
            return made()
        seen = (objective.feature_layer, objective.pooling, frozenset(objective.streams))
        return self._adaptation_run.passed((stream, read, forward, *seen), made)

    def check_sweep(self, stream: str) -> None:
        """Refuse rows that `sweep` cannot read, or not find again.

        Raises:
            ValueError: If they cannot be read by number, or change each time they are read.
        """
        self._sweep().check(stream)

    def _sweep(self) -> Sweep:
        run = self._adaptation_run
        assert run is not None, "sweep() and check_sweep() are for adaptations, in a run"
        data = run.data if run.data is not None else StreamData(self, {}, [])
        columns, transforms = self._columns("training"), self._transforms("training")
        return Sweep(self, run.step, data, columns, transforms)

    def stream_options(self, stream: str) -> Stream | None:
        """The options of a stream of the run under way, or of the next one, if it has it."""
        run = self._adaptation_run
        if run is None:
            plans = self._present_plans()
            return streams_of(plans, active_adaptations(plans)).get(stream)
        return run.data.streams.get(stream) if run.data is not None else None

    # ---- data ----

    def get_train_dataloader(self) -> Any:
        """The Trainer's own loader, over training rows that bring their companions along."""
        run = self._adaptation_run
        if run is None:
            return super().get_train_dataloader()
        if run.data is None:
            with self._collating("training"):
                return super().get_train_dataloader()
        with run.data.in_place(self._columns("training"), self._transforms("training")):
            return super().get_train_dataloader()

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own loader, with what adaptations add to the batches of an evaluation."""
        with self._collating("evaluation"):
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """The same for `predict()`."""
        with self._collating("test"):
            return super().get_test_dataloader(*args, **kwargs)

    @contextmanager
    def _collating(self, description: str) -> Iterator[None]:
        """Put our collator where the user's was, while a loader is built."""
        columns, transforms = self._columns(description), self._transforms(description)
        if not columns and not transforms:
            yield
            return
        before = self.data_collator
        self.data_collator = AdaptationCollator(
            before,
            columns,
            transforms,
            label_names=self.label_names,
            inputs=model_inputs(self),
        )
        try:
            yield
        finally:
            self.data_collator = before

    def _seeing(self, description: str) -> list[Adaptation]:
        """The adaptations that see these batches."""
        if description == "training":
            return list(self._adaptation_active)
        return list(self._observers())

    def _observers(self) -> list[EvaluationObserver]:
        """The adaptations that see the batches of evaluations; a weight of 0 changes nothing."""
        if self._adaptation_collector is not None:
            return [self._adaptation_collector]
        if self._adaptation_is_viewed:
            return []
        given = [a for plan in self._present_plans() for a in plan.adaptations]
        observers = [a for a in given if isinstance(a, EvaluationObserver)]
        return [a for a in observers if a.observes_evaluation(self)]

    def _transforms(self, description: str) -> list[BatchTransform]:
        """The adaptations that change these batches."""
        if description == "training":
            return [a for a in self._seeing(description) if isinstance(a, BatchTransform)]
        present = [a for a in self._present_adaptations() if isinstance(a, BatchTransform)]
        return [a for a in present if a.transforms_evaluation(self)]

    def _columns(self, description: str) -> tuple[str, ...]:
        """The columns that lie beside these batches."""
        seeing = [a for a in self._seeing(description) if not isinstance(a, BatchTransform)]
        return tuple({name for a in seeing for name in a.columns})

    def _kept_columns(self, description: str | None) -> tuple[str, ...]:
        """The columns to be kept of a dataset: the model does not see them."""
        what = (description or "").lower()
        read = tuple(name for a in self._transforms(what) for name in a.columns)
        inputs = self._adaptation_inputs
        if what != "training":
            inputs = self._observed_inputs()
        return (*self._columns(what), *inputs, *read)

    def _observed_inputs(self) -> tuple[str, ...]:
        """Inputs of evaluation batches that are for observers and not for the model."""
        wanted = {name for a in self._observers() for name in a.extra_inputs(self)}
        return tuple(sorted(wanted - inputs_of(self))) if wanted else ()

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        run = self._adaptation_run
        if run is not None and run.data is not None and run.data.keeps_columns(dataset):
            return dataset
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

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own; after the last backward of a step, adaptations see the gradients."""
        loss = super().training_step(*args, **kwargs)
        if self._adaptation_run is not None and self.accelerator.sync_gradients:
            self._adaptation_run.after_backward()
        return loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own, with the weights that an adaptation holds fixed in this run."""
        run = self._adaptation_run
        with nullcontext() if run is None else run.all_weights():
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own, unless an adaptation has a learning-rate schedule."""
        run = self._adaptation_run
        schedule = None if run is None else run.lr_schedule
        if schedule is None:
            return super().create_scheduler(num_training_steps, *args, **kwargs)
        if self.lr_scheduler is not None:
            raise ValueError(
                "The Trainer was given a learning-rate scheduler in optimizers=, and an "
                "adaptation has a lr_schedule: a run has one. Drop one of the two."
            )
        assert self.optimizer is not None
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: schedule(min(1.0, step / max(1, num_training_steps)))
        )
        self._created_lr_scheduler = True  # so that the next train() makes its own
        return self.lr_scheduler

    def _track_num_input_tokens(self, inputs: Any) -> None:
        # The Trainer counts the user's rows. (Before transformers 5 the Trainer counts
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
        """The Trainer's own loss; in training, the terms of the active objectives added to it."""
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
        """The Trainer's own; during training it leaves the random state as it was.

        An evaluation at an epoch's end comes after the checkpoint of the epoch's last step and is
        not repeated on resume, so its draws would make the resumed run another one.
        """
        with self._evaluating(), self._viewed(args, kwargs, "eval"):
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own; during training it leaves the random state as it was."""
        with self._evaluating(), self._viewed(args, kwargs, "test"):
            return super().predict(*args, **kwargs)

    @contextmanager
    def _viewed(self, args: Any, kwargs: Any, prefix: str) -> Iterator[None]:
        """The Trainer's model is that of another task, where an adaptation says so."""
        prefix = kwargs.get("metric_key_prefix", args[2] if len(args) > 2 else prefix)
        views = [a for a in self._present_adaptations() if isinstance(a, EvaluationView)]
        with ExitStack() as stack:
            before = self.model
            for view in views:
                stack.enter_context(view.around_evaluation(self, prefix))
            stack.callback(setattr, self, "_adaptation_is_viewed", self._adaptation_is_viewed)
            self._adaptation_is_viewed |= self.model is not before
            yield

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        if self._adaptation_run is None:
            yield
            return
        with preserved_random_state(), self._adaptation_run.weights.swapped_in():
            yield

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own; observers see its batches and add metrics."""
        observers = self._observers()
        if kwargs.get("description", args[1] if len(args) > 1 else None) == "Prediction":
            observers = [each for each in observers if each.observes_predictions]
        if not observers:
            return super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        for observer in observers:
            observer.begin_evaluation(self, prefix)
        self._adaptation_observers = (tuple(observers), self._observed_inputs())
        try:
            output = super().evaluation_loop(*args, **kwargs)
        finally:
            self._adaptation_observers = ((), ())
        metrics = dict(output.metrics or {})
        for observer in observers:
            found = observer.end_evaluation(metrics, prefix)
            if twice := sorted(found.keys() & metrics.keys()):
                logger.warning(
                    "%s replaces the metrics %s of an evaluation, which something else has made.",
                    observer.name,
                    ", ".join(twice),
                )
            metrics.update(found)
        return output._replace(metrics=metrics)

    def collect(self, dataset: Any, collector: OutputCollector) -> ItemOutputs:
        """Run the model over a data set, as an evaluation does, and keep what it gives.

        Args:
            dataset: Rows, prepared like `train_dataset`; of any kind that `predict` takes.
            collector: Says what is kept.
        """
        before = self.callback_handler.eval_dataloader
        self._adaptation_collector = collector
        try:
            with self._labels_hidden(collector.hides_labels):
                loader = self.get_test_dataloader(dataset)
                with self._evaluating(), self._bar_of_its_own():
                    self.evaluation_loop(loader, "Collecting", prediction_loss_only=True)
        finally:
            self._adaptation_collector = None
            self.callback_handler.eval_dataloader = before
            collector.close()
        return collector.items

    def row_keys(self, dataset: Any) -> torch.Tensor:
        """The keys of rows by their content, in their order, in every process; no model runs.

        Args:
            dataset: Rows that can be read by number; their labels are hidden.
        """
        with self._labels_hidden(), preserved_random_state():
            loader = self.get_test_dataloader(dataset)
            rows = torch.utils.data.DataLoader(  # the Trainer's own may sort the rows
                loader.dataset, self.args.eval_batch_size, collate_fn=loader.collate_fn
            )
            return torch.cat([row_keys(batch) for batch in rows])

    @contextmanager
    def _labels_hidden(self, hides: bool = True) -> Iterator[None]:
        """The collator sees no labels meanwhile."""
        collate = self.data_collator
        if hides:
            known: list[Any] = [self.train_dataset, self.eval_dataset]
            sized = [d for d in known if is_map_style(d) and not isinstance(d, dict) and len(d)]
            like = sized[0][0] if sized else None
            self.data_collator = UnlabelledCollator(collate, self.label_names, like)
        try:
            yield
        finally:
            self.data_collator = collate

    @contextmanager
    def _bar_of_its_own(self) -> Iterator[None]:
        """The Trainer's progress bar of a prediction ends before, and afterwards again."""
        bars = [c for c in self.callback_handler.callbacks if isinstance(c, ProgressCallback)]
        try:
            for callback in bars:
                callback.on_evaluate(self.args, self.state, self.control)  # type: ignore[no-untyped-call]
            yield
        finally:
            for callback in bars:
                callback.on_evaluate(self.args, self.state, self.control)  # type: ignore[no-untyped-call]

    def prediction_step(
        self,
        model: Any,
        inputs: Any,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The Trainer's own; what lies beside a batch is shown to observers, not to the model."""
        observers, extra = self._adaptation_observers
        hidden = {DOMAIN, COLUMNS} if self._adaptation_plans or observers else set()
        if any(observer.hides_labels for observer in observers):
            hidden |= {*self.label_names, "labels"}
        own = inputs
        if {*hidden, *extra} & set(inputs):
            own = {key: value for key, value in inputs.items() if key not in {*hidden, *extra}}
        if not observers:
            return super().prediction_step(model, own, prediction_loss_only, ignore_keys, **kwargs)
        seen = self._prepare_inputs({k: v for k, v in inputs.items() if k not in hidden})
        with ExitStack() as stack:
            for observer in observers:
                stack.enter_context(observer.around_prediction(seen))
            result = super().prediction_step(model, own, False, ignore_keys, **kwargs)
        for observer in observers:
            observer.observe(seen, inputs.get(COLUMNS, {}), result[1])
        return (result[0], None, None) if prediction_loss_only else result

    # ---- logs and checkpoints ----

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's own; each term, its weight and its diagnostics join the training log."""
        if self._adaptation_run is not None and "loss" in logs:
            found = self._adaptation_run.drain_metrics()
            if any(isinstance(each, MLflowCallback) for each in self.callback_handler.callbacks):
                # Its store of files has a file `loss`, so that a folder `loss` is not possible.
                found = {re.sub("^loss/", "losses/", name): each for name, each in found.items()}
            logs.update(found)
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        if self._adaptation_run is not None:
            self._adaptation_run.step.guard.check()  # a run gone NaN must not replace a checkpoint
        return super()._save_checkpoint(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """The Trainer's own; auxiliary weights are put beside the model, in a file of their own."""
        if self._adaptation_auxiliary is not None and self.args.should_save:
            self._adaptation_auxiliary.save_weights(output_dir or str(self.args.output_dir))
        super().save_model(output_dir, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's own, and what the adaptations of the last run were."""
        super().create_model_card(*args, **kwargs)
        path = Path(self.args.output_dir or ".") / "README.md"
        if self._adaptation_past is not None and self.is_world_process_zero():
            card = path.read_text("utf-8").partition(f"\n{TITLE}\n")[0]
            section = card_section(self, *self._adaptation_past)
            write_text(path, f"{card.rstrip()}\n\n{section}")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._adaptation_auxiliary is not None and self.args.should_save:
            self._adaptation_auxiliary.save_state(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        run = self._adaptation_run
        if run is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        with run.loading_optimizer():
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            run.resume()

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self._adaptation_auxiliary is not None and self.state.best_model_checkpoint:
            self._adaptation_auxiliary.load_weights(self.state.best_model_checkpoint)


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
