"""The settings of a distillation on a command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hf_adapt.distillation.cache import CachedTeacher
from hf_adapt.distillation.divergences import DIVERGENCES, JensenShannon
from hf_adapt.distillation.objective import Distillation
from hf_adapt.distillation.teachers import ModelTeacher, Teacher
from hf_adapt.engine.callback import adapt
from hf_adapt.engine.texts import column_names

if TYPE_CHECKING:
    from transformers import Trainer


@dataclass
class DistillationArguments:
    """The settings that `HfArgumentParser` reads and `DistillationTrainer` accepts.

    Example:
        >>> from transformers import HfArgumentParser
        >>> (args,) = HfArgumentParser(DistillationArguments).parse_args_into_dataclasses(
        ...     ["--teacher_name_or_path", "teacher/", "--temperature", "4"]
        ... )
        >>> args.options()["temperature"]
        4.0
    """

    teacher_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or hub id of the teacher."}
    )
    temperature: float = field(
        default=2.0, metadata={"help": "Softmax temperature of student and teacher."}
    )
    kd_weight: float = field(
        default=0.5, metadata={"help": "Factor of the distillation term; 0 turns it off."}
    )
    ce_weight: float = field(default=0.5, metadata={"help": "Factor of the task's own loss."})
    divergence: str = field(
        default="forward_kl",
        metadata={
            "help": "Divergence of student and teacher.",
            "choices": list(DIVERGENCES),
        },
    )
    jsd_beta: float = field(
        default=0.5, metadata={"help": "Weight of the teacher in --divergence jsd."}
    )
    teacher_dtype: str | None = field(
        default=None,
        metadata={"help": "dtype of the teacher's weights: float32, bfloat16, float16."},
    )
    teacher_device_map: str | None = field(
        default=None, metadata={"help": "How to spread the teacher over devices: 'auto'."}
    )
    shard_teacher: bool = field(
        default=False, metadata={"help": "Shard the teacher as the student is (FSDP2, ZeRO-3)."}
    )
    teacher_cache: str | None = field(
        default=None, metadata={"help": "Folder in which the teacher's predictions are stored."}
    )
    teacher_top_k: int | None = field(
        default=None,
        metadata={"help": "Store only the k most likely of the teacher's classes there."},
    )
    text_column: list[str] | None = field(
        default=None,
        metadata={"help": "Column with the text, for a teacher's own tokenizer; two for pairs."},
    )
    evaluate_distillation: bool = field(
        default=False, metadata={"help": "Compare student and teacher in each evaluation."}
    )

    def options(self) -> dict[str, Any]:
        """Keyword arguments of [`Distillation`]."""
        return {
            "temperature": self.temperature,
            "kd_weight": self.kd_weight,
            "ce_weight": self.ce_weight,
            "divergence": JensenShannon(self.jsd_beta)
            if self.divergence == "jsd"
            else self.divergence,
            "text_column": column_names(self.text_column) or None,
        }

    def merged(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options, where single arguments that were given are no others.

        Raises:
            ValueError: If an argument contradicts the options.
        """
        options, defaults = self.options(), DistillationArguments().options()
        for key, value in given.items():
            if value not in (defaults[key], options[key]):
                raise ValueError(
                    f"{key}={value!r} and distillation_args with {key}={options[key]!r} "
                    "contradict each other. Give it in one of them."
                )
        return options

    def add_to(self, trainer: Trainer, prepare: Any = None) -> None:
        """Add [`Distillation`] to a Trainer of any class, where a teacher is named.

        Args:
            trainer: The Trainer; it is changed in place.
            prepare: Not needed: the teacher sees the training rows.

        Raises:
            ValueError: If options are given without a teacher.
        """
        teacher = self.build_teacher()
        if teacher is not None:
            adapt(
                trainer,
                Distillation(teacher, evaluate=self.evaluate_distillation, **self.options()),
            )
        elif self != DistillationArguments():
            raise ValueError(
                "Options of a distillation were given without a teacher. Name its folder or hub id "
                "with --teacher_name_or_path."
            )

    def build_teacher(self) -> Teacher | None:
        """The teacher that the arguments name, or None.

        Raises:
            ValueError: If `teacher_top_k` comes without a `teacher_cache`.
        """
        teacher: Teacher | None = None
        if self.teacher_top_k is not None and self.teacher_cache is None:
            raise ValueError("teacher_top_k is for a cache: name its folder with teacher_cache.")
        if self.teacher_name_or_path is not None:
            teacher = ModelTeacher(
                self.teacher_name_or_path,
                dtype=self.teacher_dtype,
                device_map=self.teacher_device_map,
                shard=self.shard_teacher,
            )
        if self.teacher_cache is None:
            return teacher
        temperature = self.temperature if self.teacher_top_k is not None else None
        return CachedTeacher(self.teacher_cache, teacher, self.teacher_top_k, temperature)
