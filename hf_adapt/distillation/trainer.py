"""DistillationTrainer: a Trainer with a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import Seq2SeqTrainer

from hf_adapt.distillation.arguments import DistillationArguments
from hf_adapt.distillation.divergences import Divergence
from hf_adapt.distillation.evaluating import TeacherComparison
from hf_adapt.distillation.features import FeatureLoss
from hf_adapt.distillation.objective import Distillation, TeacherWeights
from hf_adapt.engine.adaptation import Adaptation
from hf_adapt.engine.collating import COLUMNS
from hf_adapt.engine.columns import inputs_of
from hf_adapt.engine.progress import Schedule
from hf_adapt.engine.texts import column_names
from hf_adapt.engine.trainer import AdaptationTrainer


class DistillationTrainer(AdaptationTrainer):
    """A `Trainer` whose model learns from a teacher, on any head.

    The saved model is the student alone. `eval_loss` stays the task's loss. To change a part of the
    method, subclass and override `item_mask`, `teacher_inputs`, `teacher_forward`,
    `select_logits`, `divergence` or `distillation_loss`; the scaling for gradient accumulation and
    processes stays with the base.

    Reference:
        Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.

    Args:
        *args: Passed on to the Trainer.
        teacher: See [`Distillation`], as for the following.
        temperature: Of both predictions; a number or a schedule.
        kd_weight: Factor of the distillation term; 0 is the plain Trainer.
        ce_weight: Factor of the task's own loss.
        divergence: How far student and teacher are from each other.
        teacher_weights: With several teachers.
        features: Terms on layers.
        logits_weight: Factor of the divergence beside features.
        teacher_processing_class: The teacher's tokenizer, if it is another one.
        text_column: The column with the text, for a teacher with another tokenizer; two for pairs.
        chunked: Whether whole logits are avoided: None where it can be done, False never.
        byte_budget: Memory for pieces of logits.
        distillation_args: All of these but the functions and modules, as read by an
            `HfArgumentParser`, in place of the single arguments.
        evaluate_distillation: Let `evaluate()` also report `eval_agreement` (share of items on
            which student and teacher predict the same), `eval_teacher_kl` (KL(teacher ‖ student),
            nats per item), `eval_calibration_error`, and with `compute_metrics` each metric of
            the teacher as `eval_teacher_<metric>` and the share of it that the student has as
            `eval_retained_<metric>`. The teacher then runs on the evaluation set too.
        objectives: More to add to training, such as `DANN()`.
        **kwargs: Passed on to the Trainer (and `target_dataset` and its options).

    Raises:
        ValueError: If there is no teacher, or options do not fit or contradict each other.

    Example:
        ```python
        trainer = DistillationTrainer(
            model=student, teacher=teacher, args=args, train_dataset=train,
            temperature=2.0, kd_weight=0.5, ce_weight=0.5, processing_class=tokenizer,
        )
        trainer.train()
        ```
    """

    _distillation: Distillation | None = None
    _comparison: TeacherComparison | None = None
    _evaluated_inputs: tuple[str, ...] = ()

    def __init__(
        self,
        *args: Any,
        teacher: Any = None,
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
        distillation_args: DistillationArguments | None = None,
        evaluate_distillation: bool = False,
        objectives: Sequence[Adaptation] | None = None,
        **kwargs: Any,
    ) -> None:
        options: dict[str, Any] = {
            "temperature": temperature,
            "kd_weight": kd_weight,
            "ce_weight": ce_weight,
            "divergence": divergence,
            "text_column": column_names(text_column) or None,
        }
        if distillation_args is not None:
            given, defaults = options, DistillationArguments().options()
            options = distillation_args.options()
            for key, value in given.items():
                if value not in (defaults[key], options[key]):
                    raise ValueError(
                        f"{key}={value!r} and distillation_args with {key}={options[key]!r} "
                        "contradict each other. Give it in one of them."
                    )
            teacher = distillation_args.build_teacher() if teacher is None else teacher
            evaluate_distillation |= distillation_args.evaluate_distillation
        if teacher is None:
            raise ValueError(
                "DistillationTrainer needs a teacher: pass teacher= with a model, its folder or "
                "hub id, a callable or a CachedTeacher (or distillation_args with "
                "teacher_name_or_path)."
            )
        self._distillation = Distillation(
            teacher,
            teacher_weights=teacher_weights,
            features=features,
            logits_weight=logits_weight,
            teacher_processing_class=teacher_processing_class,
            chunked=chunked,
            byte_budget=byte_budget,
            **options,
        )
        self._distillation.hooks = self
        self._distillation.hooks_class = DistillationTrainer
        self.evaluate_distillation = evaluate_distillation
        super().__init__(*args, objectives=[self._distillation, *(objectives or ())], **kwargs)
        generates = getattr(self.args, "predict_with_generate", False)
        if evaluate_distillation and generates and isinstance(self, Seq2SeqTrainer):
            raise ValueError(
                "evaluate_distillation compares logits, and with predict_with_generate=True an "
                "evaluation generates texts. Switch off one of them."
            )

    @property
    def distillation(self) -> Distillation:
        """The objective."""
        assert self._distillation is not None
        return self._distillation

    # ---- the hooks ----

    def item_mask(
        self, inputs: Mapping[str, Any], domain: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Which items are distilled, (B,) or (B, T) bool; known before the forward.

        Args:
            inputs: The student's inputs, with labels.
            domain: (B,) long, 0 for source rows; None if all are.
        """
        return self.distillation.item_mask(inputs, domain)

    def teacher_inputs(
        self, inputs: Mapping[str, Any], columns: Mapping[str, Sequence[Any]]
    ) -> dict[str, Any]:
        """What the teacher sees.

        Args:
            inputs: The student's inputs, with labels.
            columns: The column `text_column`, one value per row, where it was given.
        """
        return self.distillation.teacher_inputs(inputs, columns)

    def teacher_forward(self, teacher: Any, inputs: Mapping[str, Any]) -> Any:
        """The teacher's outputs; called without gradients.

        Args:
            teacher: Called with the inputs as keywords; `teacher.module` is the model.
            inputs: What `teacher_inputs` returned.
        """
        return self.distillation.teacher_forward(teacher, inputs)

    def select_logits(
        self, outputs: Any, inputs: Mapping[str, Any], mask: torch.Tensor
    ) -> torch.Tensor:
        """The logits (N, C) of the items; called for the student and for the teacher.

        Args:
            outputs: What the model returned.
            inputs: The student's inputs, with labels.
            mask: What `item_mask` returned.
        """
        return self.distillation.select_logits(outputs, inputs, mask)

    def divergence(
        self, student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        """How far the student is from its teacher: (N, C) and (N, C) to (N,)."""
        return self.distillation.divergence(student_logits, teacher_logits, temperature)

    def distillation_loss(
        self, student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, int]:
        """The sum of the divergence over the items, and their number."""
        return self.distillation.distillation_loss(student_logits, teacher_logits, temperature)

    # ---- evaluation ----

    def _columns(self, description: str) -> tuple[str, ...]:
        if description == "training" or not self.evaluate_distillation:
            return super()._columns(description)
        return tuple(self.distillation.columns)

    def _kept_columns(self, description: str | None) -> tuple[str, ...]:
        kept = super()._kept_columns(description)
        evaluating = (description or "").lower() in ("evaluation", "test")
        if not (evaluating and self.evaluate_distillation):
            return kept
        wanted = set(self.distillation.extra_inputs(self)) - inputs_of(self)
        self._evaluated_inputs = tuple(sorted(wanted))
        return (*kept, *self._evaluated_inputs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The author's; with `evaluate_distillation` the teacher is compared on the same rows."""
        if not self.evaluate_distillation:
            return super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        self._comparison = TeacherComparison(self, self.distillation)
        try:
            output = super().evaluation_loop(*args, **kwargs)
            found = self._comparison.metrics(output.metrics or {}, prefix)
        finally:
            self._comparison = None
        return output._replace(metrics={**(output.metrics or {}), **found})

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Any,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The author's; the teacher sees the same rows."""
        if self._comparison is None:
            return super().prediction_step(
                model, inputs, prediction_loss_only, ignore_keys, **kwargs
            )
        columns = inputs.get(COLUMNS, {})
        own = {key: value for key, value in inputs.items() if key not in self._evaluated_inputs}
        result = super().prediction_step(model, own, False, ignore_keys, **kwargs)
        self._comparison.see(inputs, columns, result[1])
        return (result[0], None, None) if prediction_loss_only else result
