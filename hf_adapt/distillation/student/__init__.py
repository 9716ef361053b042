"""A student that starts from its teacher's weights."""

from hf_adapt.distillation.student.creation import student_from_teacher

__all__ = ["student_from_teacher"]
