"""What adaptations ask of a Trainer: its model, its length, how it is parallel."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DynamoBackend, is_compiled_module
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_adapt.engine.mixins import BatchTransform
from hf_adapt.engine.streams import TARGET

if TYPE_CHECKING:
    from transformers import Trainer

    from hf_adapt.engine.adaptation import Adaptation
    from hf_adapt.engine.stream_data import StreamData

logger = logging.getLogger(__name__)


def unwrapped_model(trainer: Trainer) -> nn.Module:
    """The model with the parameters that the optimizer knows."""
    model: nn.Module = trainer.accelerator.unwrap_model(trainer.model)
    return model


def resumed_from(trainer: Trainer) -> Path | None:
    """The checkpoint that the run under way resumes from; None if it starts from the beginning.

    Known from `setup` on, where the model has the checkpoint's weights already. What an adaptation
    makes of the weights that a training starts from, it must find in the checkpoint again.
    """
    run = getattr(trainer, "_adaptation_run", None)
    return None if run is None or run.checkpoint is None else Path(run.checkpoint)


def saved_state(trainer: Trainer, adaptation: Adaptation) -> dict[str, Any]:
    """What the checkpoint holds of an adaptation that the run under way resumes from.

    Empty if there is nothing. For what must be known in `setup`, before `load_state_dict`.
    """
    run = getattr(trainer, "_adaptation_run", None)
    return {} if run is None else run.saved.of(adaptation)


def optimized(trainer: Trainer, model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model that the Trainer's optimizer has, tied ones once."""
    groups = [] if trainer.optimizer is None else trainer.optimizer.param_groups
    trained = {id(p) for group in groups for p in group["params"]}
    return {name: p for name, p in model.named_parameters() if id(p) in trained}


def fixed_parameters(trainer: Trainer) -> set[int]:
    """The ids of the parameters that adaptations of the run under way hold fixed."""
    run = getattr(trainer, "_adaptation_run", None)
    return set() if run is None else {id(p) for each in run.adaptations for p in each.fixed}


def streams_of_run(trainer: Trainer) -> StreamData | None:
    """The streams of the run under way; None without a run, or where nothing is paired."""
    run = getattr(trainer, "_adaptation_run", None)
    return None if run is None else run.data


def added_inputs(trainer: Trainer) -> set[str]:
    """The inputs that the Trainer's adaptations add for its own model, and for no other."""
    present = trainer._present_adaptations() if hasattr(trainer, "_present_adaptations") else ()
    transforms = [a for a in present if isinstance(a, BatchTransform)]
    return {name for adaptation in transforms for name in adaptation.added_inputs}


def target_datasets(trainer: Trainer) -> list[Any]:
    """The datasets of the target that the Trainer's adaptations were given."""
    plans = trainer._present_plans() if hasattr(trainer, "_present_plans") else ()
    streams = [plan.streams[TARGET] for plan in plans if TARGET in plan.streams]
    return [stream.dataset for stream in streams if stream.dataset is not None]


def forget_compiled(trainer: Trainer) -> None:
    """Let a compiled run start without what was compiled before in this process.

    Compiled code belongs to a model's class, is not guarded against hooks that come later
    (`skip_nnmodule_hook_guards`), and torch compiles no more once it has as many versions of it as
    it keeps, of which gradual unfreezing makes one per phase: the hooks of this run would not be
    called.
    """
    plugin = getattr(trainer.accelerator.state, "dynamo_plugin", None)
    compiles = plugin is not None and plugin.backend != DynamoBackend.NO
    assert trainer.model is not None
    if compiles or any(map(_is_compiled, trainer.model.modules())):
        torch.compiler.reset()


def _is_compiled(module: nn.Module) -> bool:
    """Whether the user compiled it: by `torch.compile(module)`, or `module.compile()`."""
    in_place = getattr(module, "_compiled_call_impl", None) is not None
    return in_place or bool(is_compiled_module(module))


def steps_per_epoch(trainer: Trainer) -> int | None:
    """Optimizer steps of an epoch of the run under way, or None for a stream without a length."""
    try:
        batches = len(trainer.callback_handler.train_dataloader)  # type: ignore[arg-type]
    except TypeError:
        return None
    return -(-batches // trainer.args.gradient_accumulation_steps)


def checkpoint_without_reentry(model: nn.Module) -> Callable[[], None]:
    """Let gradient checkpointing run in its non-reentrant form, which follows frozen parts.

    The reentrant form (the default of transformers 4) gives no gradient at all to layers above a
    frozen bottom, unless a hook gives the embeddings' output one, and then recomputes all of it.

    Returns:
        What puts the model's own form back.
    """
    changed: list[tuple[nn.Module, Any]] = []
    for module in model.modules():
        own = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(own, functools.partial) and own.keywords.get("use_reentrant", False):
            changed.append((module, own))
            keywords = {**own.keywords, "use_reentrant": False}
            module.__dict__["_gradient_checkpointing_func"] = functools.partial(
                own.func, *own.args, **keywords
            )

    def undo() -> None:
        for module, own in changed:
            module.__dict__["_gradient_checkpointing_func"] = own

    return undo


def refuse_changing_gradients(trainer: Trainer, what: str) -> None:
    """Refuse what cannot follow parameters that have a gradient in some steps only.

    Args:
        trainer: The Trainer, before its optimizer exists.
        what: What needs it, for the message.

    Raises:
        ValueError: Under DeepSpeed, FSDP 1, or static DDP graphs.
    """
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            f"{what} does not work with DeepSpeed, whose optimizer flattens all parameters before "
            "the first step. Use FSDP2 or DDP."
        )
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if trainer.is_fsdp_enabled and getattr(plugin, "fsdp_version", 1) != 2:
        raise ValueError(
            f"{what} does not work with FSDP version 1, which flattens parameters. Use FSDP2: "
            "fsdp_config={'version': 2}."
        )
    if getattr(trainer.args, "ddp_static_graph", None):
        raise ValueError(
            f"ddp_static_graph=True promises that the same parameters get gradients in every step, "
            f"which {what} changes. Drop it."
        )


def expect_unused_parameters(trainer: Trainer) -> Callable[[], None]:
    """Let DDP expect parameters without a gradient, from its wrapping of the model on.

    Returns:
        What puts the setting back.
    """
    arguments, handler = trainer.args, getattr(trainer.accelerator, "ddp_handler", None)
    before = arguments.ddp_find_unused_parameters
    handled = getattr(handler, "find_unused_parameters", None)
    if trainer.accelerator.num_processes > 1:
        if before is False:
            logger.warning(
                "ddp_find_unused_parameters=False was set, but frozen parameters get no gradient: "
                "this run uses True."
            )
        arguments.ddp_find_unused_parameters = True
        if handler is not None:  # the Trainer has read its arguments already
            handler.find_unused_parameters = True

    def undo() -> None:
        arguments.ddp_find_unused_parameters = before
        if handler is not None and handled is not None:
            handler.find_unused_parameters = handled

    return undo


def check_unused_parameters(trainer: Trainer) -> None:
    """Refuse a model that an earlier `train()` wrapped without expecting unused parameters.

    Raises:
        ValueError: If it did.
    """
    wrapped = trainer.model_wrapped
    if isinstance(wrapped, DistributedDataParallel) and not wrapped.find_unused_parameters:
        raise ValueError(
            "The model was wrapped for DDP by an earlier train() without find_unused_parameters, "
            "so freezing would fail. Add the callback before the first train(), or set "
            "ddp_find_unused_parameters=True."
        )


def check_in_optimizer(trainer: Trainer, parameters: dict[str, nn.Parameter], what: str) -> None:
    """Refuse an optimizer that lacks parameters that are to be trained.

    Args:
        trainer: The Trainer, with its optimizer.
        parameters: What must be there, by name.
        what: Who trains them, for the message.

    Raises:
        ValueError: Naming the missing parameters.
    """
    assert trainer.optimizer is not None
    known = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    missing = [name for name, parameter in parameters.items() if id(parameter) not in known]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(
            f"{what} trains {', '.join(missing[:5])}{more}, but the optimizer does not have them: "
            "it was made while they were frozen, or by your own code without them. Let the Trainer "
            "make it, or give it every parameter that is to be trained."
        )
