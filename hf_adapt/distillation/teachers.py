"""What a student learns from: a model or a function."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from hf_adapt.distillation.fingerprints import sampled_fingerprint
from hf_adapt.distillation.placement import may_be_moved, on_device_of, sharded_teacher
from hf_adapt.engine.columns import named_inputs
from hf_adapt.models.copies import bind_to_itself
from hf_adapt.models.heads import HEADS, has_head
from hf_adapt.models.hub_names import check_hub_name
from hf_adapt.models.structure import unwrapped_base

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

NOT_FOR_TEACHERS = ("num_items_in_batch", "shift_labels")


class Teacher:
    """The base class of teachers, which predict what the student learns.

    Attributes:
        name: The name in messages.
        module: The model that predicts, or None where there is none (yet).
        is_cached: Whether predictions are read from a cache.
    """

    name: str = "teacher"
    module: nn.Module | None = None
    is_cached: bool = False

    @property
    def source(self) -> Teacher | None:
        """The teacher that computes predictions: itself, or the one behind a cache."""
        return self

    def setup(self, trainer: Trainer, student: nn.Module) -> None:
        """Load and check the teacher; called before the dataloader and the optimizer exist."""

    def begin(self, trainer: Trainer) -> None:
        """Move to the device; called when the student is wrapped and the optimizer exists."""

    def before_step(self, step: int) -> None:
        """Called before the first forward of each optimizer step."""

    def __call__(self, **inputs: Any) -> Any:
        """The outputs for a batch, without gradients."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """The state to store in a checkpoint; a teacher's weights are not part of it."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""

    def close(self) -> None:
        """Called when the run ends."""


class ModelTeacher(Teacher):
    """A model, or the name of one, as the teacher.

    The model is frozen, put into evaluation mode and moved to the training device after the
    student is wrapped. A model that was loaded with `device_map` or is quantised stays where it is.

    Args:
        model: The model, or a folder or hub id, which is loaded with the student's class of head.
        dtype: Of the weights, when the model is loaded by name; the checkpoint's own by default.
        device_map: Passed to `from_pretrained`, when the model is loaded by name.
        shard: Shard the weights over the processes as the student's are (FSDP2, DeepSpeed ZeRO-3),
            for teachers that do not fit on one device. Without it each process holds the teacher.
        **load_options: Passed on to `from_pretrained`, such as `quantization_config`.

    Raises:
        TypeError: If `model` is neither a module nor a name.
        ValueError: If load options come with a model that is loaded already.

    Example:
        >>> ModelTeacher(torch.nn.Linear(2, 2)).name
        'Linear'
    """

    def __init__(
        self,
        model: str | nn.Module,
        dtype: str | torch.dtype | None = None,
        device_map: Any = None,
        shard: bool = False,
        **load_options: Any,
    ) -> None:
        if not isinstance(model, (str, nn.Module)):
            raise TypeError(
                f"A teacher must be a model, its name or folder, a callable, or a Teacher; got "
                f"{type(model).__name__}."
            )
        self.name = model if isinstance(model, str) else _name_of(model)
        self.shard = shard
        self.load_options = dict(load_options)
        if dtype is not None:
            self.load_options["dtype"] = dtype
        if device_map is not None:
            self.load_options["device_map"] = device_map
        self._is_sharded = False
        self._accepted: set[str] | None = None
        if isinstance(model, nn.Module):
            if self.load_options:
                raise ValueError(
                    f"{', '.join(self.load_options)} only apply when the teacher is loaded by "
                    "name; this one is loaded already. Load it with them, or pass its name."
                )
            self._take(model)

    def _take(self, model: nn.Module) -> None:
        bind_to_itself(model)
        self.module = model
        self._accepted = named_inputs(model)

    def setup(self, trainer: Trainer, student: nn.Module) -> None:
        """Load the teacher if a name was given; refuse one that shares the student's weights.

        Raises:
            ValueError: If teacher and student share parameters, or no head fits.
        """
        self.load(student)
        assert self.module is not None
        own = {id(parameter) for parameter in self.module.parameters()}
        shared = [name for name, p in student.named_parameters() if id(p) in own]
        if shared:
            raise ValueError(
                f"The teacher shares {len(shared)} parameters with the student ({shared[0]}, …), "
                "so training would change it. Pass a copy (copy.deepcopy(model)), or "
                "teacher=SelfTeacher() for the model's own average."
            )
        self.module.eval().requires_grad_(False)

    def load(self, student: nn.Module) -> None:
        """Load the teacher if a name was given, with the student's kind of head."""
        if self.module is None:
            self._take(load_teacher(self.name, student, self.load_options))

    def begin(self, trainer: Trainer) -> None:
        """Move or shard the teacher."""
        assert self.module is not None
        if self.shard:
            if not self._is_sharded:
                self.module, self._is_sharded = sharded_teacher(trainer, self.module), True
        elif may_be_moved(self.module):
            self.module.to(trainer.args.device)

    def state_dict(self) -> dict[str, Any]:
        """A fingerprint of the weights, to recognise them when training resumes."""
        if self.module is None or self._is_sharded:
            return {}
        return {"fingerprint": sampled_fingerprint(self.module)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Warn if the teacher has other weights than before."""
        assert self.module is not None
        if not self._is_sharded and state.get("fingerprint") != sampled_fingerprint(self.module):
            logger.warning(
                "The teacher %s has other weights than in the run that is resumed. A teacher that "
                "is a copy of the student's initial weights (copy.deepcopy(model)) must be copied "
                "from them again, not from the checkpoint's: load the initial weights for it.",
                self.name,
            )

    @property
    def inputs(self) -> set[str]:
        """The inputs of the model's forward; empty if it accepts any."""
        return self._accepted or set()

    def accepts(self, name: str) -> bool:
        """Whether the model's forward accepts this input."""
        return self._accepted is None or name in self._accepted

    def __call__(self, **inputs: Any) -> Any:
        """The model's outputs; inputs that it does not accept are left out."""
        assert self.module is not None
        if self.module.training:
            self.module.eval()
            logger.warning("The teacher was in training mode (dropout on): it was set to eval().")
        like = next((p for p in self.module.parameters() if p.is_floating_point()), None)
        given = {
            key: on_device_of(like, value) for key, value in inputs.items() if self.accepts(key)
        }
        return self.module(**given)


class CallableTeacher(Teacher):
    """A function of the inputs that returns logits, a dict or a model output.

    Args:
        function: Called with the teacher's inputs as one dict.

    Example:
        >>> teacher = CallableTeacher(lambda inputs: inputs["x"] * 2)
        >>> teacher(x=torch.ones(1)).tolist()
        [2.0]
    """

    def __init__(self, function: Callable[[dict[str, Any]], Any]) -> None:
        self.function = function
        self.name = getattr(function, "__qualname__", type(function).__name__)

    def __call__(self, **inputs: Any) -> Any:
        """The function's output for these inputs."""
        return self.function(inputs)


def as_teacher(teacher: Any) -> Teacher:
    """A [`Teacher`] from a model, a name, a folder or a function.

    Raises:
        TypeError: If it is none of these.

    Example:
        >>> type(as_teacher(lambda inputs: inputs["x"])).__name__
        'CallableTeacher'
    """
    if isinstance(teacher, Teacher):
        return teacher
    if isinstance(teacher, (str, nn.Module)):
        return ModelTeacher(teacher)
    if hasattr(teacher, "__fspath__"):
        return ModelTeacher(str(teacher))
    if callable(teacher):
        return CallableTeacher(teacher)
    raise TypeError(
        f"A teacher must be a model, its name or folder, a callable, or a Teacher; got "
        f"{type(teacher).__name__}."
    )


def load_teacher(name: str, student: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """Load a model by name with the student's kind of head.

    Raises:
        ValueError: If the head cannot be derived from the student's class, or there is no such
            folder.
    """
    check_hub_name(name)
    base = unwrapped_base(student)
    for head, classes in HEADS.items():
        if has_head(base, head) and hasattr(transformers, classes.auto_class):
            loader: Any = getattr(transformers, classes.auto_class)
            logger.info("Loading the teacher %s with %s.", name, classes.auto_class)
            model: nn.Module = loader.from_pretrained(name, **options)
            return model
    raise ValueError(
        f"The head of the teacher {name!r} cannot be derived from the student, a "
        f"{type(base).__name__}. Load the teacher yourself and pass the model."
    )


def _name_of(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    return str(getattr(config, "_name_or_path", "") or type(model).__name__)
