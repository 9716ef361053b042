"""The distillation objective: a student learns from its teacher's predictions and features."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_adapt.distillation.cache import CachedTeacher
from hf_adapt.distillation.checks import Classes, check_kinds
from hf_adapt.distillation.comparison import TeacherComparison, check_evaluation
from hf_adapt.distillation.compatibility import (
    bind_student,
    check_method,
    check_texts,
    open_cache,
)
from hf_adapt.distillation.divergences import Divergence
from hf_adapt.distillation.features import Captured, FeatureLoss
from hf_adapt.distillation.hooks import TeacherHooks, TeacherWeights
from hf_adapt.distillation.language_models.projections import (
    ChunkedOptions,
    OutputProjections,
    find_projections,
)
from hf_adapt.distillation.predictions import (
    common_classes,
    divergence_sum,
    student_outputs,
    teacher_factors,
)
from hf_adapt.distillation.sanity import TeacherSanity, ZeroTerm
from hf_adapt.distillation.signals import TopK
from hf_adapt.distillation.teacher_outputs import (
    TeacherOutput,
    call_teacher,
    capturing_teacher,
    teacher_inputs,
    teacher_output,
)
from hf_adapt.distillation.teachers import ModelTeacher
from hf_adapt.engine.adaptation import Objective, Term
from hf_adapt.engine.mixins import EvaluationObserver, FusedLoss, FusedObjective
from hf_adapt.engine.parts import Part
from hf_adapt.engine.progress import Schedule, value_at
from hf_adapt.engine.texts import column_names
from hf_adapt.engine.trainer_kinds import refuse_sentence_trainer
from hf_adapt.engine.training import unwrapped_model
from hf_adapt.models.capture import Extract

if TYPE_CHECKING:
    from transformers import Trainer

    from hf_adapt.engine.batch import Batch, Rows

logger = logging.getLogger(__name__)


class Distillation(TeacherHooks, EvaluationObserver, FusedObjective):
    r"""A student learns to predict what its teacher predicts.

    .. math::
        L = \lambda_{ce} L_{task} + \lambda_{kd} \frac{1}{N} \sum_{i=1}^{N}
        T^2 \, KL\!\left(\sigma(t_i / T) \,\middle\|\, \sigma(s_i / T)\right)

    over the N items (rows, tokens, starts and ends of answers) of the whole optimizer step. Rows
    without labels (target rows) are distilled too.

    It needs a teacher that is good on the rows that are distilled. Without one, unlabelled target
    rows are better used by an alignment objective ([`DANN`], [`MMD`]).

    To change a part of it, subclass and override one of `item_mask`, `teacher_inputs`,
    `teacher_forward`, `select_logits`, `divergence` and `distillation_loss`, here or in
    [`DistillationTrainer`].

    Reference:
        Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.
        Deviation: two separate weights, where others write one `alpha` (either way round).

    Args:
        teacher: A model, the folder or hub id of one, a callable (inputs) -> logits, a
            [`Teacher`] ([`CachedTeacher`], [`SelfTeacher`]), or a list of them.
        temperature: Softmax temperature of student and teacher; a positive number, or a schedule.
        kd_weight: Factor of the distillation term, or a schedule. The constant 0 turns the
            objective off: the run is then the plain Trainer's, whatever `ce_weight`.
        ce_weight: Factor of the task's own loss, or a schedule. With 0 batches need no labels.
        divergence: `"forward_kl"`, `"reverse_kl"`, `"jsd"`, `"mse"`, `JensenShannon(beta)` or a
            function (student_logits, teacher_logits, temperature) -> one value per item.
        teacher_weights: With several teachers: a factor for each (1/K by default), or a function
            (inputs, logits of each) -> (K,) or (K, N).
        features: [`HiddenStates`], [`SelfAttentionRelations`], [`AttentionMaps`],
            [`Contrastive`]: losses on layers, added to the divergence. They need one teacher with
            layers.
        logits_weight: Factor of the divergence beside `features`; 0 for features alone.
        teacher_processing_class: The teacher's tokenizer, if it differs from the student's.
            Classifiers get the text in each model's own tokens; language models are compared by
            universal logit distillation, which needs no common vocabulary.
        text_column: The column with the text, for a teacher with another tokenizer; two for pairs.
            A cell is a text or a list of words.
        chunked: Whether a language model's losses are computed without the logits of all tokens:
            None where possible, False never, True always (or an error).
        byte_budget: Memory for pieces of logits in these computations.
        evaluate: Also compare student and teacher in each evaluation: `eval_agreement` (share of
            items on which both predict the same), `eval_teacher_kl` (KL(teacher ‖ student), nats
            per item), `eval_calibration_error`, and with `compute_metrics` each metric of the
            teacher as `eval_teacher_<metric>` and the share of it that the student reaches as
            `eval_retained_<metric>`. The teacher then runs on the evaluation set too.
        name: Prefix of the logs; another one than the default also stands before these metrics
            (`eval_<name>_agreement`).

    Logs:
        `loss/distillation` (without `kd_weight`), `loss/task` (without `ce_weight`), each feature
        as `distillation/<its name>`, schedules' values, `distillation/agreement`: share of items
        on which both predict the same class (where the logits of all items are computed).

    Raises:
        ValueError: If a temperature or weight is out of range, or options do not fit each other.

    Example:
        ```python
        trainer.add_callback(AdaptationCallback(Distillation(teacher), target_dataset=unlabelled))
        ```
    """

    name = "distillation"

    def __init__(
        self,
        teacher: Any,
        temperature: float | Schedule = 2.0,
        kd_weight: float | Schedule = 0.5,
        ce_weight: float | Schedule = 0.5,
        divergence: str | Divergence = "forward_kl",
        teacher_weights: TeacherWeights | None = None,
        features: Sequence[FeatureLoss] = (),
        logits_weight: float = 1.0,
        teacher_processing_class: Any = None,
        text_column: str | Sequence[str] | None = None,
        chunked: bool | None = None,
        byte_budget: int | None = None,
        evaluate: bool = False,
        name: str | None = None,
    ) -> None:
        Objective.__init__(self, kd_weight, name=name)
        TeacherHooks.__init__(
            self,
            teacher,
            divergence,
            teacher_weights,
            features,
            teacher_processing_class,
            text_column,
        )
        if not callable(temperature) and not temperature > 0:
            raise ValueError(
                f"temperature={temperature} must be positive: logits are divided by it (2 is "
                "usual; 1 leaves them as they are)."
            )
        if not callable(ce_weight) and not ce_weight >= 0:
            raise ValueError(f"ce_weight={ce_weight} must be a number >= 0 or a schedule.")
        if not logits_weight >= 0:
            raise ValueError(f"logits_weight={logits_weight} must be a number >= 0.")
        if not self.features and logits_weight == 0:
            raise ValueError("logits_weight=0 without features leaves nothing to learn.")
        self.temperature, self.ce_weight = temperature, ce_weight
        self.logits_weight = logits_weight
        self.chunked, self.byte_budget = chunked, byte_budget
        self.evaluate = evaluate
        self.columns = column_names(text_column)
        self._projections: OutputProjections | None = None
        self._comparison: TeacherComparison | None = None
        self._sanity: list[TeacherSanity] = []
        self._zero_term = ZeroTerm(self.name, "")

    # ---- the run ----

    def setup(self, trainer: Trainer) -> None:
        """Load the teachers and compare them with the student, before anything is trained."""
        refuse_sentence_trainer(
            trainer,
            "Distillation",
            "Use the library's own losses, MSELoss or MarginMSELoss, on the teacher's predictions "
            "in a column 'label'. They can be combined with MMD and DANN.",
        )
        self.observes_evaluation(trainer)
        student = unwrapped_model(trainer)
        for teacher in self.teachers:
            teacher.setup(trainer, student)
            if isinstance(teacher, CachedTeacher):
                open_cache(self, teacher, trainer, callable(self.temperature))
        self._bind_to(trainer)
        if self.retokenizer is not None and not self.is_cross_tokenizer:
            check_texts(trainer, self.columns, self.evaluate)
        check_method(self, trainer, self.logits_weight)
        for feature in self.features:
            assert self.teachers[0].module is not None
            feature.setup(student, self.teachers[0].module)
        self._sanity = [TeacherSanity(teacher.name) for teacher in self.teachers]
        self._zero_term = ZeroTerm(self.name, ", ".join(teacher.name for teacher in self.teachers))
        self._projections = self._find_projections()

    def _bind_to(self, trainer: Trainer) -> None:
        bind_student(self, trainer)
        if self.evaluate and self.is_cross_tokenizer:
            logger.warning(
                "evaluate=True: language models with different tokenizers have no classes in "
                "common, so nothing is compared. Read loss/distillation in the log instead."
            )

    def begin(self, trainer: Trainer) -> None:
        """Move the teachers to their devices, after the student is wrapped."""
        self.autocast = trainer.accelerator.autocast
        for teacher in self.teachers:
            teacher.begin(trainer)

    def before_step(self, step: int) -> None:
        """Let a teacher that is the student's average follow it."""
        for teacher in self.teachers:
            teacher.before_step(step)

    def base_weight(self, progress: float) -> float:
        """The factor of the task's own loss."""
        return value_at(self.ce_weight, progress)

    def extra_inputs(self, trainer: Trainer) -> set[str]:
        """Inputs that a teacher accepts and the student does not, such as `token_type_ids`."""
        if self.teacher_processing_class is not None:
            return set()
        wanted: set[str] = set()
        for teacher in self.teachers:
            own = teacher.source
            if isinstance(own, ModelTeacher):
                own.load(unwrapped_model(trainer))
                wanted |= own.inputs
            elif isinstance(teacher, CachedTeacher):
                wanted |= teacher.inputs
        return wanted - {*trainer.label_names, "labels"}

    # ---- the loss ----

    def captures(self, model: nn.Module) -> Mapping[nn.Module, Extract | None]:
        """The student's layers that features compare."""
        return {m: e for feature in self.features for m, e in feature.student_captures.items()}

    def build_modules(self, batch: Batch) -> nn.Module | None:
        """Build the projections of the features."""
        if not self.features:
            return None
        part = batch.parts[0]
        captured = teacher_output(self, self.teachers[0], part).captured
        built = {
            feature.name: feature.build_modules(_captured(part, feature), captured)
            for feature in self.features
        }
        modules = {name: module for name, module in built.items() if module is not None}
        return nn.ModuleDict(modules) if modules else None

    def num_items(self, rows: Rows) -> torch.Tensor | dict[str, torch.Tensor]:
        """The number of items that each component sums over."""
        counts: dict[str, torch.Tensor] = {}
        for part in rows.parts:
            items = self.items(part)
            found = {"logits": self.head.num_items(items, self.num_labels)}
            found |= {feature.name: feature.num_items(part) for feature in self.features}
            _add(counts, found)
        return counts if self.features else counts["logits"]

    def loss(self, batch: Batch) -> Term | dict[str, Term]:
        """The divergence of the predictions, and each feature."""
        temperature = value_at(self.temperature, batch.progress)
        if not temperature > 0:
            raise ValueError(
                f"The schedule of the temperature gave {temperature} at progress "
                f"{batch.progress:.3f}; it must stay positive."
            )
        if callable(self.temperature):
            batch.log("temperature", temperature)
        sums: dict[str, torch.Tensor] = {}
        for part in batch.parts:
            self.items(part)  # decides the head, too
            found: dict[str, torch.Tensor] = {}
            if part.is_fused:
                captured = part.cache.pop((self, "captured"), {})
            else:
                outputs = [teacher_output(self, teacher, part) for teacher in self.teachers]
                captured = outputs[0].captured
                if self.logits_weight:
                    found["logits"] = self._predictions(batch, part, outputs, temperature)
            for feature in self.features:
                module = None
                if isinstance(self.module, nn.ModuleDict) and feature.name in self.module:
                    module = self.module[feature.name]
                found[feature.name] = feature.loss(
                    _captured(part, feature), captured, part, module, batch.progress
                )
            _add(sums, found)
        counts = self.num_items(batch)
        if isinstance(counts, dict):
            return {name: (value, counts[name]) for name, value in sums.items()}
        return (sums["logits"], counts) if sums else {}

    def _predictions(
        self, batch: Batch, part: Part, outputs: list[TeacherOutput], temperature: float
    ) -> torch.Tensor:
        """The sum over a micro-batch's items of the divergence from each teacher."""
        mask, own_outputs = self.items(part), student_outputs(self, part)
        student = self.select_logits(own_outputs, part.inputs, mask)
        signals = [output.signal for output in outputs]
        factors = teacher_factors(self, part.inputs, signals, student)
        total = student.sum() * 0.0 if len(student) == 0 else student.new_zeros(())
        total = total.float()
        labels = part.inputs.get("labels")
        for teacher, output, factor, sanity in zip(
            self.teachers, outputs, factors, self._sanity, strict=True
        ):
            own = student
            if labels is not None and not self.overridden("select_logits"):
                check_kinds(self.head, teacher.module, labels)
            if output.item_mask is not None:
                own = self.select_logits(own_outputs, part.inputs, output.item_mask)
            own, theirs = common_classes(self, own, output.signal, temperature, teacher)
            # Of the top k classes the last one stands for all others.
            has_classes = not isinstance(output.signal, TopK) and self.head.kind != "values"
            if torch.is_grad_enabled() and has_classes:
                sanity.observe(self.head, part, mask, theirs, batch.progress)
            if len(own) == 0:
                continue
            if has_classes and own.shape[-1] > 1 and not self.is_cross_tokenizer:
                agree = own.detach().argmax(-1).eq(theirs.argmax(-1)).float().mean()
                batch.log("agreement", agree, len(own))
            total = total + divergence_sum(self, own, theirs, temperature, factor)
        return self.logits_weight * total

    # ---- evaluation ----

    def observes_evaluation(self, trainer: Trainer) -> bool:
        """Whether student and teacher are compared; refuses an evaluation without logits."""
        if self.evaluate:
            check_evaluation(trainer)
        return self.evaluate

    def begin_evaluation(self, trainer: Trainer, prefix: str) -> None:
        """Prepare the teachers, also where nothing is being trained.

        Raises:
            ValueError: If there is no teacher to run.
        """
        student = unwrapped_model(trainer)
        for teacher in self.teachers:
            own = teacher.source
            if own is None:
                raise ValueError(
                    "The comparison with the teacher runs it on the evaluation set, but "
                    f"{teacher.name} has none behind it. Pass CachedTeacher(folder, teacher=model)."
                )
            if own.module is None or isinstance(own, ModelTeacher):
                own.setup(trainer, student)
            if isinstance(own, ModelTeacher):
                own.begin(trainer)
        if self.student is not student:
            self._bind_to(trainer)
        self.autocast = trainer.accelerator.autocast
        self._comparison = TeacherComparison(trainer, self)

    def observe(
        self, inputs: Mapping[str, Any], columns: Mapping[str, Sequence[Any]], outputs: Any
    ) -> None:
        """Compare student and teacher on a batch of an evaluation."""
        assert self._comparison is not None
        self._comparison.observe(inputs, columns, outputs)

    def end_evaluation(self, metrics: Mapping[str, float], prefix: str) -> Mapping[str, float]:
        """The metrics that are added to an evaluation's."""
        comparison, self._comparison = self._comparison, None
        found = {} if comparison is None else comparison.metrics(metrics, prefix)
        if self.name == type(self).name:
            return found
        # A second distillation beside the first one.
        start = f"{prefix}_"
        return {f"{start}{self.name}_{k.removeprefix(start)}": v for k, v in found.items()}

    # ---- losses without the logits of all tokens ----

    def _find_projections(self) -> OutputProjections | None:
        if self.chunked is False or Classes.of(self.student).vocabulary is None:
            return None
        found = find_projections(self, self.logits_weight)
        if isinstance(found, OutputProjections):
            return found
        self.not_fused(found)
        return None

    def not_fused(self, reason: str) -> None:
        """Log that whole logits are computed.

        Raises:
            ValueError: If `chunked=True`.
        """
        if self.chunked:
            raise ValueError(
                f"chunked=True is not supported here: {reason}. Set chunked=None, or change that."
            )
        super().not_fused(reason)

    def can_fuse(self, trainer: Trainer) -> bool:
        """Whether this is a language model whose losses need no whole logits."""
        return self._projections is not None

    def fused_loss(
        self,
        model: nn.Module,
        part: Part,
        base_factor: torch.Tensor,
        term_factor: torch.Tensor,
        progress: float,
    ) -> FusedLoss:
        """The task's loss and the divergence, from hidden states, piece by piece."""
        assert self._projections is not None
        labels, inputs = part.inputs["labels"], teacher_inputs(self, part)
        with torch.no_grad(), capturing_teacher(self) as take:
            hidden = self._projections.teacher_hidden(
                lambda: call_teacher(self, self.teachers[0], inputs)
            )
            part.cache[self, "captured"] = take()
        if torch.is_grad_enabled() and not self._sanity[0].is_done:
            with torch.no_grad():
                self._sanity[0].add(*self._projections.teacher_loss(hidden, labels))
        given = {k: v for k, v in part.inputs.items() if k not in self.label_names}
        if self.head.feeds_decoder and "decoder_input_ids" not in given:
            given["decoder_input_ids"] = inputs["decoder_input_ids"]
        options = ChunkedOptions(
            value_at(self.temperature, progress),
            self.divergence_function,
            self.num_classes,
            self.byte_budget,
        )
        factor = term_factor * self.logits_weight
        fused = self._projections.loss(
            model, given, hidden, labels, self.items(part), base_factor, factor, options
        )
        return fused._replace(term_sum=fused.term_sum * self.logits_weight)

    # ---- logs, checkpoints and the end ----

    def on_log(self, logs: dict[str, float], progress: float) -> None:
        """Warn of a term that is 0 from the start."""
        self._zero_term.observe(logs.get(f"loss/{self.name}"))

    def state_dict(self) -> dict[str, Any]:
        """The state of the teachers: never a teacher's weights, but a student's average."""
        return {str(i): state for i, t in enumerate(self.teachers) if (state := t.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of the teachers."""
        for index, teacher in enumerate(self.teachers):
            if str(index) in state:
                teacher.load_state_dict(state[str(index)])

    def close(self) -> None:
        """Close the teachers' files and release the models' layers."""
        self._projections = None
        for feature in self.features:
            feature.close()
        for teacher in self.teachers:
            teacher.close()


def _captured(part: Part, feature: FeatureLoss) -> Captured:
    """The student's outputs that a feature compares."""
    return {m: part.hidden[id(m)] for m in feature.student_captures if id(m) in part.hidden}


def _add(sums: dict[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    for name, value in values.items():
        sums[name] = sums[name] + value if name in sums else value
