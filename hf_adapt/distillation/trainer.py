"""DistillationTrainer: a Trainer with a teacher."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

from hf_adapt.distillation.arguments import DistillationArguments
from hf_adapt.distillation.divergences import Divergence
from hf_adapt.distillation.features import FeatureLoss
from hf_adapt.distillation.hooks import HOOKS, TeacherWeights
from hf_adapt.distillation.objective import Distillation
from hf_adapt.engine.adaptation import Adaptation
from hf_adapt.engine.progress import Schedule
from hf_adapt.engine.texts import column_names
from hf_adapt.engine.trainer import AdaptationTrainer

P = ParamSpec("P")
R = TypeVar("R")


def _forwarded(hook: Callable[Concatenate[Distillation, P], R]) -> Callable[Concatenate[Any, P], R]:
    """The Trainer's version of a hook: it calls the objective's own, for `super()`."""

    @functools.wraps(hook)
    def forward(trainer: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return hook(trainer.distillation, *args, **kwargs)

    return forward


class DistillationTrainer(AdaptationTrainer):
    """A `Trainer` whose model learns from a teacher, on any head.

    The saved model is the student alone. `eval_loss` stays the task's loss. To change a part of the
    method, subclass and override `item_mask`, `teacher_inputs`, `teacher_forward`,
    `select_logits`, `divergence` or `distillation_loss`, which are those of [`Distillation`]; the
    scaling for gradient accumulation and processes stays with the base.

    Reference:
        Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.

    Args:
        *args: Passed on to the Trainer.
        teacher: See [`Distillation`], as for the following.
        temperature: Softmax temperature of student and teacher; a number or a schedule.
        kd_weight: Factor of the distillation term; 0 is the plain Trainer.
        ce_weight: Factor of the task's own loss.
        divergence: The divergence of student and teacher.
        teacher_weights: With several teachers, a factor for each.
        features: Losses on layers.
        logits_weight: Factor of the divergence beside features.
        teacher_processing_class: The teacher's tokenizer, if it differs from the student's.
        text_column: The column with the text, for a teacher with another tokenizer; two for pairs.
        chunked: Whether whole logits are avoided: None where possible, False never.
        byte_budget: Memory for pieces of logits.
        evaluate_distillation: Compare student and teacher in each evaluation: `evaluate` of
            [`Distillation`].
        distillation_args: The above except functions and modules, as read by an
            `HfArgumentParser`, in place of the single arguments.
        objectives: Further objectives and adaptations, such as `DANN()`.
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

    distillation: Distillation
    """The objective."""

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
        evaluate_distillation: bool = False,
        distillation_args: DistillationArguments | None = None,
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
            options = distillation_args.merged(options)
            teacher = distillation_args.build_teacher() if teacher is None else teacher
            evaluate_distillation |= distillation_args.evaluate_distillation
        if teacher is None:
            raise ValueError(
                "DistillationTrainer needs a teacher: pass teacher= with a model, its folder or "
                "hub id, a callable or a CachedTeacher (or distillation_args with "
                "teacher_name_or_path)."
            )
        self.distillation = Distillation(
            teacher,
            teacher_weights=teacher_weights,
            features=features,
            logits_weight=logits_weight,
            teacher_processing_class=teacher_processing_class,
            chunked=chunked,
            byte_budget=byte_budget,
            evaluate=evaluate_distillation,
            **options,
        )
        for hook in HOOKS:
            if hook in vars(self) or getattr(type(self), hook) is not _OWN_HOOKS[hook]:
                setattr(self.distillation, hook, getattr(self, hook))
        super().__init__(*args, objectives=[self.distillation, *(objectives or ())], **kwargs)
        self.distillation.observes_evaluation(self)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in HOOKS and "distillation" in vars(self):
            setattr(self.distillation, name, value)

    item_mask = _forwarded(Distillation.item_mask)
    teacher_inputs = _forwarded(Distillation.teacher_inputs)
    teacher_forward = _forwarded(Distillation.teacher_forward)
    select_logits = _forwarded(Distillation.select_logits)
    divergence = _forwarded(Distillation.divergence)
    distillation_loss = _forwarded(Distillation.distillation_loss)


_OWN_HOOKS = {hook: vars(DistillationTrainer)[hook] for hook in HOOKS}
"""The hooks that nobody has overridden, not even by assigning to the class."""
