"""The distillation objective: a student learns from its teacher's predictions and features."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from hf_adapt.distillation.cache import CachedTeacher, Signal, TopK, bucket_logits
from hf_adapt.distillation.checks import (
    Classes,
    TeacherSanity,
    check_kinds,
    check_labels,
    check_regression,
    check_sequence_length,
    shared_vocabulary,
)
from hf_adapt.distillation.divergences import ABSENT, Divergence, logit_mse
from hf_adapt.distillation.evaluating import item_labels
from hf_adapt.distillation.features import Captured, FeatureLoss
from hf_adapt.distillation.fused import FusedHeads
from hf_adapt.distillation.hooks import Lesson, TeacherHooks
from hf_adapt.distillation.teachers import ModelTeacher, Teacher
from hf_adapt.distillation.tokenizers import universal_logit_distance
from hf_adapt.engine.adaptation import Objective, Term
from hf_adapt.engine.mixins import FusedLoss, FusedObjective
from hf_adapt.engine.parts import Part
from hf_adapt.engine.progress import Schedule, value_at
from hf_adapt.engine.supported import refuse_sentence_trainer
from hf_adapt.engine.texts import check_dataset, column_names, named_datasets
from hf_adapt.engine.training import added_inputs, target_datasets, unwrapped_model
from hf_adapt.models.capture import Extract, capturing
from hf_adapt.models.structure import find_feature_module, unwrapped_base

if TYPE_CHECKING:
    from transformers import Trainer

    from hf_adapt.engine.batch import Batch, Rows

logger = logging.getLogger(__name__)

LOGIT_SCALES = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
)
"""What some models do to their logits after the projection."""

ZEROS = 3
"""Logs without any loss after which something is wrong; a learning rate that starts at 0 gives two
with a teacher that starts as the student."""

TeacherWeights = Sequence[float] | Callable[[Mapping[str, Any], list[torch.Tensor]], torch.Tensor]
"""A factor for each teacher, or a function (inputs, logits of each) -> (K,) or (K, N)."""


class Distillation(TeacherHooks, FusedObjective):
    """A student learns to predict what its teacher predicts.

    The training loss becomes ``ce_weight`` times the task's own loss plus ``kd_weight`` times the
    divergence of the student's predictions from the teacher's, as a mean over the items (rows,
    tokens, starts and ends of answers) of the whole optimizer step. Rows without labels (target
    rows) are distilled too.

    To change a part of it, subclass and override one of `item_mask`, `teacher_inputs`,
    `teacher_forward`, `select_logits`, `divergence` and `distillation_loss`, here or in
    [`DistillationTrainer`].

    Reference:
        Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.
        Deviation: two weights of their own, where others write one `alpha` (either way round).

    Args:
        teacher: A model, the folder or hub id of one, a callable (inputs) -> logits, a
            [`Teacher`] ([`CachedTeacher`], [`SelfTeacher`]), or a list of them.
        temperature: Student's and teacher's logits are divided by it; a positive number, or a
            schedule of it.
        kd_weight: Factor of the term, or a schedule of it. The constant 0 turns the objective off:
            the run is then the plain Trainer's, whatever `ce_weight`.
        ce_weight: Factor of the task's own loss, or a schedule. With 0 batches need no labels.
        divergence: `"forward_kl"`, `"reverse_kl"`, `"jsd"`, `"mse"`, `JensenShannon(beta)` or a
            function (student_logits, teacher_logits, temperature) -> one value per item.
        teacher_weights: With several teachers: a factor for each (1/K by default), or a function
            (inputs, logits of each) -> (K,) or (K, N).
        features: [`HiddenStates`], [`SelfAttentionRelations`], [`AttentionMaps`],
            [`Contrastive`]: terms on layers, added to the divergence. They need one teacher with
            layers.
        logits_weight: Factor of the divergence beside `features`; 0 for features alone.
        teacher_processing_class: The teacher's tokenizer, if it is another one. Classifiers get
            the text in each model's own tokens; language models are compared by universal logit
            distillation, which needs no common vocabulary.
        text_column: The column with the text, for a teacher with another tokenizer; two for pairs.
            A cell is a text or a list of words.
        chunked: Whether a language model's losses are computed without whole logits: None where
            it can be done, False never, True or else an error.
        byte_budget: Memory that these computations may use for pieces of logits.
        name: Prefix of the logs.

    Logs:
        `loss/distillation` (without `kd_weight`), `loss/task` (without `ce_weight`), each feature
        as `distillation/<its name>`, schedules' values, `distillation/agreement`: share of items
        on which both predict the same class (where whole logits are computed).

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
        name: str | None = None,
    ) -> None:
        Objective.__init__(self, kd_weight, name=name)
        TeacherHooks.__init__(
            self, teacher, divergence, features, teacher_processing_class, text_column
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
        self.temperature, self.ce_weight = temperature, ce_weight
        self.teacher_weights = teacher_weights
        self.logits_weight = logits_weight
        self.chunked, self.byte_budget = chunked, byte_budget
        self.columns = column_names(text_column)
        self._fused: FusedHeads | None = None
        self._sanity: list[TeacherSanity] = []
        self._asked_before: list[Lesson] = []
        self._is_checked = False
        self._zeros: int | None = 0
        self.is_said_apart = False
        self._check_options()

    def _check_options(self) -> None:
        several = len(self.teachers) > 1
        weights = self.teacher_weights
        if weights is not None and not callable(weights) and len(weights) != len(self.teachers):
            raise ValueError(
                f"{len(weights)} teacher_weights for {len(self.teachers)} teachers: give one each."
            )
        if several and (self.features or self.teacher_processing_class is not None):
            raise ValueError(
                "features and teacher_processing_class need one teacher, not a list of "
                f"{len(self.teachers)}. Distil from the others in a second Distillation with "
                "another name= and ce_weight=1 (the objectives' factors multiply)."
            )
        if not self.features and self.logits_weight == 0:
            raise ValueError("logits_weight=0 without features leaves nothing to learn.")
        if self.features and self.teachers[0].is_cached:
            raise ValueError(
                "A cached teacher keeps predictions, not hidden states: features need the teacher "
                "itself. Drop features, or pass the model."
            )
        names = [feature.name for feature in self.features]
        if len(set(names)) < len(names) or "logits" in names:
            raise ValueError(f"features are named {names}: give each a name= of its own.")
        if self.text_column is not None and self.teacher_processing_class is None:
            raise ValueError(
                "text_column is read by a teacher with its own tokenizer: pass "
                "teacher_processing_class= too."
            )

    # ---- the run ----

    def setup(self, trainer: Trainer) -> None:
        """Load the teachers and compare them with the student, before anything is trained."""
        refuse_sentence_trainer(
            trainer,
            "Distillation",
            "Use the library's own losses, MSELoss or MarginMSELoss, on the teacher's predictions "
            "in a column 'label'. They can be combined with MMD and DANN.",
        )
        for teacher in self.teachers:
            if isinstance(teacher, CachedTeacher):
                teacher.processing_class = self.teacher_processing_class
                teacher.hooks = self._overridden("teacher_forward", "select_logits")
            teacher.setup(trainer, unwrapped_model(trainer))
        tops = [t for t in self.teachers if isinstance(t, CachedTeacher) and t.top_k is not None]
        if tops and callable(self.temperature):
            raise ValueError(
                f"{tops[0].name} are the top {tops[0].top_k} at temperature "
                f"{tops[0].temperature}, and the distillation's temperature is a schedule. Give "
                "that number, or store full logits (top_k=None)."
            )
        student = self._bind(trainer)
        self._check(trainer.processing_class)
        if self._retokenizer is not None and not self.is_cross_tokenizer:
            targets = target_datasets(trainer)
            given = [*named_datasets(trainer.train_dataset, targets)]
            evaluated = trainer.eval_dataset
            if getattr(self.hooks, "evaluate_distillation", False) and evaluated is not None:
                parts = evaluated.items() if isinstance(evaluated, dict) else [("", evaluated)]
                given += [("eval_dataset" + f"[{key!r}]" * bool(key), data) for key, data in parts]
            for name, dataset in given:
                check_dataset(dataset, self.columns, name)
        overridden = self._overrides("divergence", "distillation_loss", "select_logits")
        if self.logits_weight and not overridden:
            check_regression(student, self.head, self.divergence_function)
        if self._overrides("distillation_loss") and callable(self.teacher_weights):
            raise ValueError(
                "distillation_loss gives one sum for all items, so teacher_weights cannot weigh "
                "them one by one. Override divergence instead, or give numbers."
            )
        cached = any(teacher.is_cached for teacher in self.teachers)
        if cached and self.is_cross_tokenizer:
            raise ValueError(
                "A language model with another tokenizer is asked anew in each step: its positions "
                "depend on both. Pass the teacher itself, not a CachedTeacher."
            )
        if cached and getattr(trainer.data_collator, "mlm", False):
            logger.warning(
                "The data collator masks other tokens in each epoch, so a cached teacher's "
                "predictions are hardly ever found again. Mask once beforehand, or drop the cache."
            )
        if self.features and self._retokenizer is not None:
            raise ValueError(
                f"{', '.join(type(feature).__name__ for feature in self.features)} compare layers "
                "token by token, or pool them with the student's mask, and a teacher with another "
                "tokenizer has other tokens. Drop features, or use a teacher with the student's "
                "tokenizer."
            )
        for feature in self.features:
            module = self.teachers[0].module
            if module is None:
                raise ValueError(
                    f"{type(feature).__name__} needs a teacher with layers; "
                    f"{type(self.teachers[0]).__name__} has none."
                )
            feature.setup(student, module)
        self._sanity = [TeacherSanity(teacher.name) for teacher in self.teachers]
        self._zeros = 0
        self._fused = self._fusable()

    def _bind(self, trainer: Trainer) -> nn.Module:
        """Take from the Trainer what is needed to ask the teachers."""
        student = unwrapped_model(trainer)
        self.bind(student, trainer.label_names, trainer.processing_class)
        self._added_inputs = set(added_inputs(trainer))
        return student

    def _check(self, tokenizer: Any) -> None:
        """Compare labels, vocabularies and lengths of student and teachers."""
        own = Classes.of(self._student)
        shared = []
        for teacher in self.teachers:
            theirs = Classes.of(teacher.module)
            if teacher.module is None and isinstance(teacher, CachedTeacher):
                theirs = teacher.classes
            if not self._overrides("select_logits"):
                check_labels(own, theirs)
                check_kinds(self.head, teacher.module)
            if self._retokenizer is None:
                shared.append(shared_vocabulary(own, theirs, tokenizer))
                if teacher.module is not None:
                    check_sequence_length(self._student, teacher.module)
        self._classes = min((size for size in shared if size is not None), default=None)
        self._is_checked = True

    def _fusable(self) -> FusedHeads | None:
        """Student's and teacher's heads, if the losses can be computed from hidden states.

        Raises:
            ValueError: If they cannot, and `chunked=True` says that they must.
        """
        if self.chunked is False or Classes.of(self._student).vocabulary is None:
            return None
        teacher, reason = self.teachers[0], None
        if self._overrides("select_logits", "divergence", "distillation_loss", "teacher_forward"):
            reason = "a hook is overridden"
        elif self._retokenizer is not None:
            reason = "the teacher has another tokenizer"
        elif len(self.teachers) > 1 or type(teacher) is not ModelTeacher:
            kinds = ", ".join(type(one).__name__ for one in self.teachers)
            reason = f"the teacher is not one model ({kinds})"
        elif self.logits_weight == 0 or self.teacher_weights is not None:
            reason = "logits_weight=0 or teacher_weights are given"
        else:
            assert teacher.module is not None
            if (fused := FusedHeads.of(self._student, teacher.module, self.head)) is not None:
                return fused
            reason = "a head is not a plain projection of hidden states"
        self.not_fused(reason)
        return None

    def not_fused(self, reason: str) -> None:
        """Say that whole logits are computed.

        Raises:
            ValueError: If `chunked=True`.
        """
        if self.chunked:
            raise ValueError(f"chunked=True cannot be had: {reason}. Drop the one or the other.")
        super().not_fused(reason)

    def begin(self, trainer: Trainer) -> None:
        """Move the teachers to their devices, after the student is wrapped."""
        self._autocast = trainer.accelerator.autocast
        for teacher in self.teachers:
            teacher.begin(trainer)

    def before_step(self, step: int) -> None:
        """Let a teacher that is the student's average follow it."""
        for teacher in self.teachers:
            teacher.before_step(step)

    def base_weight(self, progress: float) -> float:
        """The factor of the task's own loss."""
        return value_at(self.ce_weight, progress)

    def captures(self, model: nn.Module) -> Mapping[nn.Module, Extract | None]:
        """The student's layers that features look at."""
        return {m: e for feature in self.features for m, e in feature.student_taps.items()}

    def build_modules(self, batch: Batch) -> nn.Module | None:
        """The projections of the features."""
        if not self.features:
            return None
        part = batch.parts[0]
        lesson = self._lesson(self.teachers[0], part)
        built = {
            feature.name: feature.build_modules(self._seen(part, feature), lesson.seen)
            for feature in self.features
        }
        modules = {name: module for name, module in built.items() if module is not None}
        return nn.ModuleDict(modules) if modules else None

    def num_items(self, rows: Rows) -> torch.Tensor | dict[str, torch.Tensor]:
        """How many items each component sums over."""
        if not self.features:
            return torch.stack([self._count(part) for part in rows.parts]).sum()
        counts: dict[str, torch.Tensor] = {}
        for part in rows.parts:
            found = {"logits": self._count(part)}
            found |= {feature.name: feature.num_items(part) for feature in self.features}
            for name, count in found.items():
                counts[name] = counts[name] + count if name in counts else count
        return counts

    def extra_inputs(self, trainer: Trainer) -> set[str]:
        """What a teacher takes and the student does not, such as `token_type_ids`."""
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

    def _count(self, part: Part) -> torch.Tensor:
        self.head = self.head.with_labels(part.inputs.get("labels"))
        mask = self.hooks.item_mask(part.inputs, part.domain)
        return self.head.num_items(mask, self._num_labels)

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
            self.head = self.head.with_labels(part.inputs.get("labels"))
            if fused := part.is_fused:  # these losses have asked the teacher already
                lessons, self._asked_before = self._asked_before, []
            else:
                lessons = [self._lesson(teacher, part) for teacher in self.teachers]
            found: dict[str, torch.Tensor] = {}
            if not fused and self.logits_weight:
                found["logits"] = self._predictions(batch, part, lessons, temperature)
            for feature in self.features:
                module = None
                if isinstance(self.module, nn.ModuleDict) and feature.name in self.module:
                    module = self.module[feature.name]
                seen = self._seen(part, feature)
                found[feature.name], _ = feature.loss(
                    seen, lessons[0].seen, part, module, batch.progress
                )
            for name, value in found.items():
                sums[name] = sums[name] + value if name in sums else value
        counts = self.num_items(batch)
        if isinstance(counts, dict):
            return {name: (value, counts[name]) for name, value in sums.items()}
        return (sums["logits"], counts) if sums else {}

    def _seen(self, part: Part, feature: FeatureLoss) -> Captured:
        return {m: part.hidden[id(m)] for m in feature.student_taps if id(m) in part.hidden}

    def _predictions(
        self, batch: Batch, part: Part, lessons: list[Lesson], temperature: float
    ) -> torch.Tensor:
        """The sum over the part's items of the divergence from each teacher."""
        mask = self.hooks.item_mask(part.inputs, part.domain)
        outputs = self._with_logits(part)
        student: torch.Tensor = self.hooks.select_logits(outputs, part.inputs, mask)
        weights = self._weights(part.inputs, [lesson.signal for lesson in lessons], student)
        total = student.sum() * 0.0 if len(student) == 0 else student.new_zeros(())
        total = total.float()
        for teacher, lesson, weight, sanity in zip(
            self.teachers, lessons, weights, self._sanity, strict=True
        ):
            own = student
            labels = part.inputs.get("labels")
            if labels is not None and not self._overrides("select_logits"):
                check_kinds(self.head, teacher.module, labels)
            if lesson.item_mask is not None:
                own = self.hooks.select_logits(outputs, part.inputs, lesson.item_mask)
            own, theirs = self._compared(own, lesson.signal, temperature, teacher)
            # Of top classes the last one is all others.
            has_classes = not isinstance(lesson.signal, TopK) and self.head.kind != "values"
            if torch.is_grad_enabled() and has_classes:
                sanity.see(self.head, part, mask, theirs, batch.progress)
            if len(own) == 0:
                continue
            if has_classes and own.shape[-1] > 1 and not self.is_cross_tokenizer:
                agree = own.detach().argmax(-1).eq(theirs.argmax(-1)).float().mean()
                batch.log("agreement", agree, len(own))
            total = total + self._summed(own, theirs, temperature, weight)
        return self.logits_weight * total

    def _with_logits(self, part: Part) -> Any:
        """The student's outputs; with logits, where a language model was run without (TRL)."""
        outputs = part.outputs
        if self.head.kind != "causal_lm" or getattr(outputs, "log_probs", None) is None:
            return outputs
        hidden = part.hidden.get(id(find_feature_module(self._student, None)))
        base = unwrapped_base(self._student)
        config = base.config.get_text_config()  # type: ignore[union-attr, operator]
        scaling = [name for name in LOGIT_SCALES if getattr(config, name, None) not in (None, 1.0)]
        if hidden is None or scaling:
            raise ValueError(
                f"{type(base).__name__} was run without logits, and they cannot be had from its "
                f"last hidden state ({', '.join(scaling) or 'which was not seen'}). Let the "
                "Trainer compute its loss from logits, or use DistillationTrainer."
            )
        return {"logits": base.get_output_embeddings()(hidden)}  # type: ignore[operator]

    def _summed(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        temperature: float,
        weight: float | torch.Tensor,
    ) -> torch.Tensor:
        if self.is_cross_tokenizer:
            return weight * universal_logit_distance(student, teacher, temperature).sum()
        if isinstance(weight, torch.Tensor) and weight.ndim == 1:
            values: torch.Tensor = self.hooks.divergence(student, teacher, temperature)
            return (weight * values).sum()
        value: torch.Tensor
        value, count = self.hooks.distillation_loss(student, teacher, temperature)
        if int(count) != len(student):
            raise ValueError(
                f"distillation_loss returned a count of {int(count)} for {len(student)} items. The "
                "sum is divided by the items of the whole optimizer step, which are counted before "
                "the forward: override item_mask to distil fewer items."
            )
        if value.ndim:
            raise ValueError(
                f"distillation_loss returned a sum of shape {tuple(value.shape)}; expected a "
                "scalar: the sum over the items."
            )
        return weight * value

    def _weights(
        self, inputs: Mapping[str, Any], signals: Sequence[Signal], student: torch.Tensor
    ) -> Sequence[float | torch.Tensor]:
        if self.teacher_weights is None:
            return [1.0 / len(signals)] * len(signals)
        if not callable(self.teacher_weights):
            return list(self.teacher_weights)
        if any(isinstance(signal, TopK) for signal in signals):
            raise ValueError(
                "teacher_weights as a function sees each teacher's logits; a top-k store does not "
                "have them. Give numbers, or store full logits."
            )
        given = torch.as_tensor(
            self.teacher_weights(inputs, cast("list[torch.Tensor]", list(signals))),
            device=student.device,
        )
        if given.shape not in ((len(signals),), (len(signals), len(student))):
            raise ValueError(
                f"teacher_weights returned shape {tuple(given.shape)}; expected ({len(signals)},) "
                f"or ({len(signals)}, {len(student)}): a factor for each teacher (and item)."
            )
        return list(given.float().unbind())

    def _compared(
        self, student: torch.Tensor, signal: Signal, temperature: float, teacher: Teacher
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of both over the same classes."""
        if isinstance(signal, TopK):
            if self.divergence_function is logit_mse:
                raise ValueError(
                    "divergence='mse' compares logits, and a top-k store keeps probabilities. Use "
                    "a divergence of probabilities, or store full logits."
                )
            return bucket_logits(student, signal, temperature)
        theirs = signal.to(student.device)
        if self.is_cross_tokenizer:
            return student, theirs
        if self._classes is not None:
            return student[:, : self._classes], theirs[:, : self._classes]
        if self.head.kind == "spans" and theirs.shape[1] < student.shape[1]:
            # A store keeps each row's own tokens; the batch may be padded further.
            more = student.shape[1] - theirs.shape[1]
            theirs = nn.functional.pad(theirs, (0, more), value=ABSENT)
        if student.shape != theirs.shape:
            raise ValueError(
                f"The student predicts {tuple(student.shape)} (items, classes) and the teacher "
                f"{teacher.name!r} {tuple(theirs.shape)}. Both must predict the same classes of "
                "the same items: use a teacher with the student's labels, or override "
                "select_logits and item_mask."
            )
        return student, theirs

    # ---- evaluation ----

    def prepare_evaluation(self, trainer: Trainer) -> None:
        """Make the teachers ready, also where nothing is being trained.

        Raises:
            ValueError: If there is no teacher to run.
        """
        student = unwrapped_model(trainer)
        known = self._is_checked and self._student is student
        for teacher in self.teachers:
            own = teacher.source
            if own is None:
                raise ValueError(
                    f"evaluate_distillation runs the teacher on the evaluation set, but "
                    f"{teacher.name} has none behind it. Pass CachedTeacher(folder, teacher=model)."
                )
            if own.module is None or isinstance(own, ModelTeacher):
                own.setup(trainer, student)
            if isinstance(own, ModelTeacher):
                own.begin(trainer)
        if not known:
            self._bind(trainer)
            self._check(trainer.processing_class)
        self._autocast = trainer.accelerator.autocast

    def evaluated(
        self, inputs: Mapping[str, Any], columns: Mapping[str, Sequence[Any]], predicted: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, list[int], Any] | None:
        """Predictions of both on a batch of an evaluation.

        Args:
            inputs: The student's inputs, with labels.
            columns: The columns beside the batch.
            predicted: The student's logits, as `prediction_step` gives them.

        Returns:
            Logits (N, C) of the student and of the teachers' weighted mixture, the items' labels or
            None, the number of items of each row, the first teacher's outputs; None where they
            cannot be compared.
        """
        if self.is_cross_tokenizer:
            return None
        self.head = self.head.with_labels(inputs.get("labels"))
        mask = self.hooks.item_mask(inputs)
        if self.head.kind == "spans":
            outputs: Any = dict(zip(("start_logits", "end_logits"), predicted, strict=False))
        else:
            outputs = predicted[0] if isinstance(predicted, (tuple, list)) else predicted
        student = self.hooks.select_logits(outputs, inputs, mask).float()
        whole, signals = None, []
        teacher_inputs = self.hooks.teacher_inputs(inputs, columns)
        for teacher in self.teachers:
            own = teacher.source
            found = self._called(own, teacher_inputs)
            whole = found if whole is None else whole
            logits = self.hooks.select_logits(found, inputs, mask).float().to(student.device)
            signals.append(logits)
        shares = torch.stack(
            [
                torch.as_tensor(weight, device=student.device).expand(len(student))
                for weight in self._weights(inputs, signals, student)
            ]
        ).clamp(min=0.0)
        logs = [logits[:, : self._classes].log_softmax(-1) for logits in signals]
        mean = (torch.stack(logs) + (shares / shares.sum(0)).log().unsqueeze(-1)).logsumexp(0)
        student = student[:, : self._classes]
        if self.head.kind == "values":  # no classes to agree on
            student, mean = student[:, :1], mean[:, :1]
        return student, mean, item_labels(self.head, inputs, mask), self._row_counts(mask), whole

    # ---- losses without whole logits ----

    def can_fuse(self, trainer: Trainer) -> bool:
        """Whether this is a language model whose losses need no whole logits."""
        return self._fused is not None

    def fused_loss(
        self,
        model: nn.Module,
        part: Part,
        base_factor: torch.Tensor,
        term_factor: torch.Tensor,
        progress: float,
    ) -> FusedLoss:
        """The task's loss and the divergence, from hidden states, piece by piece."""
        assert self._fused is not None
        labels = part.inputs["labels"]
        mask = self.hooks.item_mask(part.inputs, part.domain)
        inputs = self.hooks.teacher_inputs({**part.inputs, **part.extra}, part.columns)
        with torch.no_grad(), capturing(self._teacher_taps()) as take:
            hidden = self._fused.teacher_hidden(lambda: self._called(self.teachers[0], inputs))
            self._asked_before = [Lesson(mask, take())]
        if torch.is_grad_enabled() and not self._sanity[0].is_done:
            with torch.no_grad():
                self._sanity[0].add(*self._fused.teacher_loss(hidden, labels))
        student_inputs = {k: v for k, v in part.inputs.items() if k not in self._label_names}
        if self._feeds_decoder and "decoder_input_ids" not in student_inputs:
            student_inputs["decoder_input_ids"] = inputs["decoder_input_ids"]
        fused = self._fused.loss(
            model,
            student_inputs,
            hidden,
            labels,
            mask,
            base_factor,
            term_factor * self.logits_weight,
            temperature=value_at(self.temperature, progress),
            divergence=self.divergence_function,
            vocabulary=self._classes,
            byte_budget=self.byte_budget,
        )
        return fused._replace(term_sum=fused.term_sum * self.logits_weight)

    # ---- logs, checkpoints and the end ----

    def on_log(self, logs: dict[str, float], progress: float) -> None:
        """Point out a term that is 0 from the start."""
        value = logs.get(f"loss/{self.name}")
        if value is None or self._zeros is None:
            return
        self._zeros = self._zeros + 1 if value == 0.0 else None
        if self._zeros == ZEROS:
            self._zeros = None
            logger.warning(
                "loss/%s was exactly 0 in the first %d logs, so nothing is learnt from the teacher "
                "(%s). Does it predict with the student's own weights (the student itself, or a "
                "function that runs it), or does item_mask choose no items?",
                self.name,
                ZEROS,
                ", ".join(teacher.name for teacher in self.teachers),
            )

    def state_dict(self) -> dict[str, Any]:
        """What the teachers must keep: never their own weights, but a student's average."""
        states = {str(i): state for i, t in enumerate(self.teachers) if (state := t.state_dict())}
        return states

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give the teachers their state back."""
        for index, teacher in enumerate(self.teachers):
            if str(index) in state:
                teacher.load_state_dict(state[str(index)])

    def close(self) -> None:
        """Let go of the teachers' files and of the models' layers."""
        self._asked_before, self._fused = [], None
        for feature in self.features:
            feature.close()
        for teacher in self.teachers:
            teacher.close()
