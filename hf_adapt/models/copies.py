"""Copies of models that compute with their own weights."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

WITHOUT_MODEL = (type, types.GenericAlias)
"""Callables that refer to no model and cannot be rebuilt."""


def copied(model: nn.Module) -> nn.Module:
    """A deep copy whose output follows its own weights; see [`bind_to_itself`]."""
    clone = copy.deepcopy(model)
    bind_to_itself(clone)
    return clone


def bind_to_itself(model: nn.Module) -> None:
    """Let the copy of a patched model compute with its own weights.

    Libraries replace the `forward` of an instance with a function (TRL's SFTTrainer, accelerate
    under mixed precision). `copy.deepcopy` does not copy functions, so their closures still refer
    to the original, and the copy returns the original's output whatever its own weights are. Here
    these functions are rebuilt for the copy. A model that is not such a copy stays as it is.

    References that this cannot find (globals, other objects, hooks) are detected when the copy
    first runs: see [`WeightsInUse`].

    Raises:
        ValueError: If the model's `forward` runs a model outside of it, of which it is not a copy.
    """
    own = set(model.modules())
    for module in own:
        patched = {k: v for k, v in vars(module).items() if callable(v) and not isinstance(v, type)}
        pairs: dict[nn.Module, nn.Module] = {}
        for other in _reached(list(patched.values())) - own:
            if _is_copy(module, other):
                names = dict(module.named_modules())
                pairs |= {m: names[n] for n, m in other.named_modules() if n in names}
        module.__dict__.update(_rebuilt(patched, pairs, {}))
        strange = [
            other
            for other in _reached(vars(module).get("forward")) - own
            if next(other.parameters(), None) is not None
        ]
        if strange:
            raise ValueError(
                f"The forward of this {type(module).__name__} was replaced by a function that runs "
                f"a {type(strange[0]).__name__} outside of it, as in a copy of a model whose "
                "forward was replaced: its predictions would not follow its own weights. Save the "
                "model and load it again with from_pretrained, or pass a function as the teacher "
                "(teacher=lambda inputs: model(**inputs))."
            )


class WeightsInUse(TorchFunctionMode):
    """Records which of a model's weights are used while the context is open.

    Args:
        model: The model whose weights are watched.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.names: set[str] = set()

    def __enter__(self) -> Any:
        """Start recording; compiled models run eagerly, so that their operations are seen."""
        self._eager = torch.compiler.set_stance("force_eager")
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        """Stop recording."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._eager.__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record the weights among the arguments of a function of torch."""
        result = func(*args, **(kwargs or {}))
        if result is None or isinstance(result, (torch.Tensor, tuple)):  # not a shape or a dtype
            for value in (*args, *(kwargs or {}).values()):
                for one in value if isinstance(value, (list, tuple)) else (value,):
                    if id(one) in self._names:
                        self.names.add(self._names[id(one)])
        return result

    def check(self, teacher: str) -> None:
        """Refuse a teacher that computed with the model's weights.

        Raises:
            ValueError: If there are any; names one of them.
        """
        if self.names:
            raise ValueError(
                f"The teacher ({teacher}) runs on {len(self.names)} of the student's own weights "
                f"({min(self.names)}, …), like a copy whose forward or hooks refer to the "
                "original model: its predictions would follow the student's. Remove the replaced "
                "forward or the hooks before you copy the model, or save the model and load it "
                "again with from_pretrained as the teacher."
            )


def _reached(value: Any) -> set[nn.Module]:
    """The modules that a callable refers to."""
    seen: dict[int, tuple[Any, Any]] = {}
    _rebuilt(value, {}, seen)
    return {found for found, _ in seen.values() if isinstance(found, nn.Module)}


def _is_copy(module: nn.Module, other: nn.Module) -> bool:
    """Whether `module` has its `forward` from `other`, of which it is a copy."""
    one, two = (vars(m).get("forward") for m in (module, other))
    return type(module) is type(other) and _code(one) is _code(two) and one is not None


def _code(value: Any) -> Any:
    """What copies of a callable have in common."""
    if isinstance(value, types.MethodType):
        return value.__func__
    if isinstance(value, functools.partial):
        return value.func
    return value if isinstance(value, types.FunctionType) else type(value)


def _rebuilt(
    value: Any, pairs: Mapping[nn.Module, nn.Module], seen: dict[int, tuple[Any, Any]]
) -> Any:
    """The callable with some modules replaced; itself if it refers to none of them."""
    if id(value) in seen:
        return seen[id(value)][1]
    seen[id(value)] = (value, value)  # a function may refer to itself

    def again(part: Any) -> Any:
        return _rebuilt(part, pairs, seen)

    made = value
    if isinstance(value, nn.Module):
        made = pairs.get(value, value)
    elif isinstance(value, types.MethodType):
        function, owner = again(value.__func__), again(value.__self__)
        if function is not value.__func__ or owner is not value.__self__:
            made = types.MethodType(function, owner)
    elif isinstance(value, types.FunctionType):
        made = _rebuilt_function(value, again)
    elif isinstance(value, (tuple, list, dict)) and type(value) in (tuple, list, dict):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        new = {key: again(part) for key, part in parts}
        if any(new[key] is not value[key] for key in new):
            made = new if isinstance(value, dict) else type(value)(new.values())
    elif isinstance(value, functools.partial):
        function, args, keywords = (again(p) for p in (value.func, value.args, value.keywords))
        if (function, args, keywords) != (value.func, value.args, value.keywords):
            made = functools.partial(function, *args, **keywords)
            made.__dict__.update(again(vars(value)))
    elif callable(value) and hasattr(value, "__dict__") and not isinstance(value, WITHOUT_MODEL):
        new = again(vars(value))
        if new is not vars(value):
            made = object.__new__(type(value))  # accelerate's refuse copy.copy
            made.__dict__.update(new)
    seen[id(value)] = (value, made)
    return made


def _rebuilt_function(value: types.FunctionType, again: Callable[[Any], Any]) -> Any:
    contents = [_content(cell) for cell in value.__closure__ or ()]
    new = [again(content) for content in contents]
    state = [again(part) for part in (value.__defaults__, value.__kwdefaults__, vars(value))]
    before = [*contents, value.__defaults__, value.__kwdefaults__, vars(value)]
    if all(one is other for one, other in zip([*new, *state], before, strict=True)):
        return value
    cells = tuple(
        cell if one is other else types.CellType(one)
        for cell, one, other in zip(value.__closure__ or (), new, contents, strict=True)
    )
    made = types.FunctionType(
        value.__code__, value.__globals__, value.__name__, state[0], cells or None
    )
    made.__kwdefaults__, made.__doc__ = state[1], value.__doc__
    made.__qualname__, made.__module__ = value.__qualname__, value.__module__
    made.__dict__.update(state[2])
    return made


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is filled later
        return None
