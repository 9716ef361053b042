"""Where the soft targets come from: a model, a function, or the student's own past."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from hf_adapt.engine.columns import named_inputs
from hf_adapt.models.copies import bind_to_itself, copied
from hf_adapt.models.heads import HEADS, has_head
from hf_adapt.models.hub_names import check_hub_name
from hf_adapt.models.structure import unwrapped_base

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

NOT_FOR_TEACHERS = ("num_items_in_batch", "shift_labels")


class Teacher:
    """Something that predicts: what all teachers have in common.

    Attributes:
        name: How it is called in messages.
        module: The model that is called, or None where there is none (yet).
        is_cached: Whether predictions come from a store.
    """

    name: str = "teacher"
    module: nn.Module | None = None
    is_cached: bool = False

    @property
    def source(self) -> Teacher | None:
        """What computes predictions: the one behind a cache, else the teacher itself."""
        return self

    def setup(self, trainer: Trainer, student: nn.Module) -> None:
        """Called before the dataloader and the optimizer exist: check, load."""

    def begin(self, trainer: Trainer) -> None:
        """Called when the student is wrapped and the optimizer exists: move to the device."""

    def before_step(self, step: int) -> None:
        """Called before the first forward of each optimizer step."""

    def __call__(self, **inputs: Any) -> Any:
        """The outputs for a batch, without gradients."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What must survive in a checkpoint; a teacher's weights are not among it."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""

    def close(self) -> None:
        """Called when the run ends."""


class ModelTeacher(Teacher):
    """A model, or the name of one, as the teacher.

    It is frozen, put into evaluation mode and moved to the training device after the student is
    wrapped. A model that is spread by `device_map` or quantised stays where it is.

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
        """Load the teacher if it was named; refuse one that the student trains.

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
        """Load the teacher if it was named, with the student's kind of head."""
        if self.module is None:
            self._take(load_teacher(self.name, student, self.load_options))

    def begin(self, trainer: Trainer) -> None:
        """Move or shard the teacher."""
        assert self.module is not None
        if self.shard:
            if not self._is_sharded:
                self.module, self._is_sharded = _sharded(trainer, self.module), True
        elif _may_be_moved(self.module):
            self.module.to(trainer.args.device)

    def state_dict(self) -> dict[str, Any]:
        """A fingerprint of the weights, to know them again when training resumes."""
        if self.module is None or self._is_sharded:
            return {}
        return {"fingerprint": sampled_fingerprint(self.module)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Warn of a teacher with other weights than before."""
        assert self.module is not None
        if not self._is_sharded and state.get("fingerprint") != sampled_fingerprint(self.module):
            logger.warning(
                "The teacher %s has other weights than in the run that is resumed. A teacher made "
                "of the student's starting weights (copy.deepcopy(model)) must be made of them "
                "again, not of the checkpoint's: load these weights for it.",
                self.name,
            )

    @property
    def inputs(self) -> set[str]:
        """What the model's forward takes; empty if it takes anything."""
        return self._accepted or set()

    def accepts(self, name: str) -> bool:
        """Whether the model's forward takes this input."""
        return self._accepted is None or name in self._accepted

    def __call__(self, **inputs: Any) -> Any:
        """The model's outputs; inputs it does not take are left out."""
        assert self.module is not None
        if self.module.training:
            self.module.eval()
            logger.warning("The teacher was in training mode (dropout on): set to eval().")
        like = next((p for p in self.module.parameters() if p.is_floating_point()), None)
        given = {key: _as(value, like) for key, value in inputs.items() if self.accepts(key)}
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
        """What the function returns for these inputs."""
        return self.function(inputs)


class SelfTeacher(Teacher):
    """The student's own past: an exponential moving average of its weights, or earlier weights.

    It is kept and run in float32.

    Reference:
        Tarvainen & Valpola 2017, "Mean teachers are better role models", arXiv:1703.01780
        (`decay`); Furlanello et al. 2018, "Born-Again Neural Networks", arXiv:1805.04770 and Kim
        et al. 2021, "Self-Knowledge Distillation with Progressive Refinement of Targets",
        arXiv:2006.12000 (`every_steps`).

    Args:
        decay: Share of the average that stays at each optimizer step, from 0 to 1.
        every_steps: Instead of an average: take over the student's weights every so many steps.

    Raises:
        ValueError: If both or neither are given or out of range, or the model is sharded.

    Example:
        >>> SelfTeacher(decay=0.99).decay
        0.99
    """

    def __init__(self, decay: float | None = None, every_steps: int | None = None) -> None:
        if decay is None and every_steps is None:
            decay = 0.999
        if decay is not None and every_steps is not None:
            raise ValueError("SelfTeacher takes decay or every_steps, not both.")
        if decay is not None and not 0.0 <= decay <= 1.0:
            raise ValueError(f"SelfTeacher(decay={decay}): expected a number from 0 to 1.")
        if every_steps is not None and every_steps < 1:
            raise ValueError(f"SelfTeacher(every_steps={every_steps}): expected at least 1.")
        self.decay, self.every_steps = decay, every_steps
        self.name = "the student's own weights"
        self._student: nn.Module | None = None
        self._step: int | None = None
        self._loaded: dict[str, Any] = {}

    def setup(self, trainer: Trainer, student: nn.Module) -> None:
        """Copy the student."""
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                "SelfTeacher needs the student's whole weights on each process; FSDP and DeepSpeed "
                "shard them. Use DDP, or a saved model as the teacher."
            )
        self._student, self._step = student, None
        # In float32: small steps would be rounded away in half precision.
        self.module = copied(student).float().eval().requires_grad_(False)

    def begin(self, trainer: Trainer) -> None:
        """Start from the weights that training starts from (a checkpoint's are loaded by now)."""
        assert self.module is not None and self._student is not None
        self.module.to(trainer.args.device)
        self.module.load_state_dict(self._student.state_dict())
        self._step = None

    def before_step(self, step: int) -> None:
        """Follow the student by one step."""
        assert self.module is not None and self._student is not None
        if self._loaded:
            self.module.load_state_dict(self._loaded["weights"])
            self._step, self._loaded = int(self._loaded["step"]), {}
        if self._step is None and step > 0:
            logger.warning(
                "The checkpoint holds no average of the student (it was saved by another Trainer, "
                "or with save_only_model=True): it starts again, from the checkpoint's weights."
            )
        if self._step is None or step <= self._step:
            self._step = step if self._step is None else self._step
            return
        self._step = step
        if self.every_steps is not None:
            if step % self.every_steps == 0:
                self.module.load_state_dict(self._student.state_dict())
            return
        assert self.decay is not None
        with torch.no_grad():
            # Each tensor once: tied weights have several names in a state dict.
            own = dict(self._student.named_parameters())
            for name, average in self.module.named_parameters():
                average.lerp_(own[name].to(average.dtype), 1.0 - self.decay)
            buffers = dict(self._student.named_buffers())
            for name, buffer in self.module.named_buffers():
                buffer.copy_(buffers[name])

    def __call__(self, **inputs: Any) -> Any:
        """The average's outputs."""
        assert self.module is not None
        like = next(self.module.parameters())
        return self.module(**{key: _as(value, like) for key, value in inputs.items()})

    def state_dict(self) -> dict[str, Any]:
        """The average: it cannot be had from anything else. It is in checkpoints only."""
        if self.module is None or self._step is None:
            return {}
        weights = {key: value.cpu() for key, value in self.module.state_dict().items()}
        return {"weights": weights, "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the average back, at the next step."""
        self._loaded = state if "weights" in state else {}  # else another teacher's

    def close(self) -> None:
        """Let go of the student."""
        self._student = None


def sampled_fingerprint(module: nn.Module) -> str:
    """A hash of some of a model's weights, which tells two models apart in no time."""
    digest = hashlib.blake2b(digest_size=12)
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        if not value.is_meta:  # offloaded
            flat = value.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 64)].cpu().contiguous()
            digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def as_teacher(teacher: Any) -> Teacher:
    """A teacher of whatever was given for one.

    Raises:
        TypeError: If it is nothing that can teach.

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
        ValueError: If the head cannot be told from the student's class, or the name is a wrong
            path.
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
        f"Which head to load the teacher {name!r} with cannot be told from the student, a "
        f"{type(base).__name__}. Load the teacher yourself and pass the model."
    )


def _name_of(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    return str(getattr(config, "_name_or_path", "") or type(model).__name__)


def _as(value: Any, like: torch.Tensor | None) -> Any:
    """A tensor on the device of a weight, and in its dtype if it is made of numbers."""
    if like is None or not isinstance(value, torch.Tensor):
        return value
    return value.to(like.device, like.dtype if value.is_floating_point() else None)


def _may_be_moved(model: nn.Module) -> bool:
    """Whether `.to(device)` is right: not for models spread over devices or in 8 bits."""
    spread = getattr(model, "hf_device_map", None) or {}
    return len(set(spread.values())) <= 1 and getattr(model, "hf_quantizer", None) is None


def _sharded(trainer: Trainer, model: nn.Module) -> nn.Module:
    """The teacher, sharded as the student is."""
    accelerator = trainer.accelerator
    if trainer.is_deepspeed_enabled:
        import deepspeed  # type: ignore[import-not-found]

        config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
        # An engine without an optimizer knows two stages: everything, or nothing sharded.
        if config["zero_optimization"]["stage"] != 3:
            config["zero_optimization"]["stage"] = 0
        for key in ("optimizer", "scheduler"):
            config.pop(key, None)
        engine, *_ = deepspeed.initialize(model=model, config=config)
        sharded: nn.Module = engine.eval()
        return sharded
    if trainer.is_fsdp_enabled:
        from torch.distributed.fsdp import fully_shard

        from hf_adapt.models.layers import find_stacks

        modules = dict(model.named_modules())
        for stack in find_stacks(model):
            for layer in stack.layers:
                fully_shard(modules[layer])
        model.to(trainer.args.device)
        # Embeddings and head stay whole: losses without whole logits read the head's weight.
        fully_shard(model, reshard_after_forward=False)
        return model
    raise ValueError(
        "ModelTeacher(shard=True) shards the teacher as the student is, but this run uses neither "
        "FSDP nor DeepSpeed. Drop it, or pass device_map='auto' to spread the teacher."
    )
