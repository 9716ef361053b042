"""Methods as plain data: adaptations by their class names, with arguments."""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from typing import Any

from torch import nn

from hf_adapt import alignment, distillation, multitask, unfreezing
from hf_adapt.alignment.priors import NamedPriors
from hf_adapt.arguments import adaptations_of
from hf_adapt.engine import progress
from hf_adapt.engine.adaptation import Adaptation, Objective
from hf_adapt.engine.constructors import parameters
from hf_adapt.engine.streams import Stream
from hf_adapt.experiments.settings import KeyPath, Settings, nearest
from hf_adapt.multitask import LossWeights, MultiTask, TaskSpec

FAMILIES = (alignment, unfreezing, distillation, multitask)
RECOMMENDED = "recommended"
TARGET = "target"
UNLABELLED = "unlabelled"
GIVEN = "given"
CHOSEN = "chosen"
"""The row of the tables with the runs that were chosen."""
SURGERIES = {
    each.__name__: each
    for each in (
        multitask.aligned_mtl,
        multitask.cagrad,
        multitask.imtl_g,
        multitask.mgda,
        multitask.nash_mtl,
        multitask.pcgrad,
    )
}
"""What `surgery` of a `MultiTask` may name."""
SOME_TASKS = ("one task", "another task")
"""To build a `MultiTask` where no tasks are known."""
SET_BY_THE_FILE = ("tasks", "column")
"""Arguments of a `MultiTask` that its experiment gives."""


@dataclass(frozen=True)
class Method:
    """One way to train, as a row of the table.

    Args:
        adaptations: Plain data: names of classes, or `{name: arguments}`; or `"recommended"`.
        train_on: The domain whose labels are trained on. `"target"` is the bound; `"unlabelled"`
            trains on the target's rows without labels, for adaptations that need no source.
        target_priors: `"given"`: the class frequencies of the target's training rows, counted on
            their labels, which nothing else reads; `{"given": 0.1}`: the same, wrong by ten points;
            or what `target_priors=` of `AdaptationCallback` takes. None leaves it out.
        stream: Options of the [`Stream`] of target rows, such as `ratio`.
        training: `TrainingArguments` of this method alone.
        first: A stage that is trained before this one, on the same model: what source-free methods
            start from.
        pretrain: `TrainingArguments` of [`hf_adapt.alignment.adapt_pretrain`] on the target's
            texts, before this stage; None for no such stage.
        mixture: What differs in it from the `mixture` of the experiment, for a `MultiTask`.
        save: Keep its models.
    """

    adaptations: Any = ()
    train_on: str = "source"
    target_priors: Any = None
    stream: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    first: Method | None = None
    pretrain: Mapping[str, Any] | None = None
    mixture: Mapping[str, Any] | None = None
    save: bool = False

    @property
    def is_baseline(self) -> bool:
        """Whether it trains on the source's labels and nothing else."""
        return replace(self, save=False) == Method()

    @property
    def uses_priors(self) -> bool:
        """Whether it has adaptations that use the target's class frequencies."""
        return any(each.uses_priors for each in self.sketch)

    @property
    def reads_target(self) -> bool:
        """Whether it has adaptations that see rows of the target."""
        return any(reads_target(each) for each in self.sketch)

    @property
    def sketch(self) -> list[Adaptation]:
        """Its adaptations, to look at."""
        return self.build(lambda: nn.Linear(1, 1))

    @property
    def is_bound(self) -> bool:
        """Whether it trains on the target's labels."""
        return self.train_on == TARGET

    @property
    def mixes(self) -> bool:
        """Whether it trains several tasks together."""
        given = () if self.adaptations == RECOMMENDED else self.adaptations
        return any(_call(each)[0] == MultiTask.__name__ for each in given)

    def build(
        self, copied: Callable[[], nn.Module], tasks: Mapping[str, TaskSpec] | None = None
    ) -> list[Adaptation]:
        """New adaptations, for one run.

        Args:
            copied: Returns a copy of the model as it is now, for an adaptation that takes a
                `source_model`.
            tasks: The tasks of a `MultiTask`.
        """
        if self.adaptations == RECOMMENDED:
            return alignment.recommended()
        return [built(each, copied, tasks) for each in self.adaptations]

    def described(self) -> dict[str, Any]:
        """All that changes its result, as plain data."""
        described = {each.name: getattr(self, each.name) for each in fields(self)}
        del described["save"]
        if self.mixture is None:
            del described["mixture"]
        described["first"] = None if self.first is None else self.first.described()
        if self.adaptations == RECOMMENDED:
            described["adaptations"] = [type(each).__name__ for each in alignment.recommended()]
        return described


def read_method(settings: Settings, name: str, spec: Any, within: KeyPath = ()) -> Method:
    """Read a method of a configuration, and make sure that it can be built.

    Args:
        settings: For the places of errors; the method stands under `methods`.
        name: The method's name.
        spec: A list of adaptations, `"recommended"`, `"target"`, or a mapping with the arguments of
            [`Method`].
        within: Where it stands inside the method: `("first",)` for a first stage.

    Raises:
        ConfigError: Naming the line, and the nearest name.
    """
    path: KeyPath = ("methods", name, *within)
    if spec == TARGET:
        return Method(train_on=TARGET)
    adaptations: KeyPath = path
    if isinstance(spec, Mapping):
        known = [each.name for each in fields(Method)]
        if unknown := [key for key in spec if key not in known]:
            if all(isinstance(key, str) and key in adaptation_classes() for key in spec):
                raise settings.error(
                    path, f"methods: {name!r}: write a list, [{', '.join(spec)}: …]."
                )
            raise settings.unknown((*path, unknown[0]), known, f"methods: {name!r}: the key")
        spec = {key: value for key, value in spec.items() if value is not None}
        if isinstance(spec.get("pretrain"), bool):
            spec["pretrain"] = {} if spec["pretrain"] else None
        for key in ("training", "stream", "pretrain", "mixture"):
            if spec.get(key) is not None and not isinstance(spec[key], Mapping):
                raise settings.error(
                    (*path, key),
                    f"methods: {name!r}: {key} must hold options by name, got {spec[key]!r}.",
                )
        if not isinstance(spec.get("save", False), bool):
            raise settings.error(
                (*path, "save"), f"save: expected true or false, got {spec['save']!r}."
            )
        if "first" in spec:
            spec["first"] = read_method(settings, name, spec["first"], (*within, "first"))
        method = Method(**{**spec, "adaptations": spec.get("adaptations") or ()})
        adaptations = (*path, "adaptations")
    else:
        method = Method(adaptations=spec or ())
    if method.train_on not in ("source", TARGET, UNLABELLED):
        message = f"train_on must be source, target or unlabelled, and not {method.train_on!r}."
        raise settings.error((*path, "train_on"), message)
    given = method.adaptations
    if given != RECOMMENDED and (isinstance(given, str) or not isinstance(given, Sequence)):
        close = difflib.get_close_matches(str(given), (RECOMMENDED, TARGET), n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise settings.error(
            adaptations,
            f"methods: {name!r} must be a list such as [MMD, {{InformationMaximization: "
            f"{{weight: 0.5}}}}], or recommended, or target, got {given!r}.{hint}",
        )
    if given != RECOMMENDED:
        for number, each in enumerate(given):
            _check_adaptation(settings, (*adaptations, number), each)
    if method.train_on != UNLABELLED and (free := [a for a in method.sketch if a.source_free]):
        raise settings.error(
            path,
            f"methods: {name!r}: {type(free[0]).__name__} has no source, and trains on the "
            "target's rows: write {first: [], adaptations: [...], train_on: unlabelled}.",
        )
    if method.train_on == UNLABELLED and not given:
        raise settings.error(
            (*path, "train_on"), f"methods: {name!r}: rows without labels need an adaptation."
        )
    known = [each.name for each in fields(Stream) if each.name not in ("dataset", "priors")]
    for key in method.stream:
        if key not in known:
            raise settings.unknown((*path, "stream", key), known, "stream: the option")
    if not given and (method.target_priors is not None or method.stream):
        raise settings.error(
            path, f"methods: {name!r} has target_priors or stream, and no adaptations that use it."
        )
    if method.stream and not method.reads_target:
        raise settings.error(
            (*path, "stream"), f"methods: {name!r} has no adaptation that reads the target's rows."
        )
    if method.target_priors is not None:
        if problem := _problem_of_priors(method.target_priors):
            raise settings.error((*path, "target_priors"), f"target_priors: {problem}")
        if not method.uses_priors:
            raise settings.error(
                (*path, "target_priors"), f"methods: {name!r} has no adaptation that uses them."
            )
    return method


def _problem_of_priors(given: Any) -> str | None:
    """What is wrong with class frequencies, whatever the classes are."""
    named = (GIVEN, *typing.get_args(NamedPriors))
    if isinstance(given, str):
        return None if given in named else f"{given!r} is unknown.{nearest(given, named)}"
    if not isinstance(given, Mapping):
        return f"expected {', '.join(named)}, or the frequency of each class by name: {given!r}."
    if wrong := [value for value in given.values() if type(value) not in (int, float)]:
        return f"expected numbers, got {wrong[0]!r}."
    if is_shifted(given):
        return None if abs(given[GIVEN]) < 1 else f"given: {given[GIVEN]} is not between -1 and 1."
    total = sum(given.values())
    if min(given.values(), default=0) < 0 or not abs(total - 1) <= 1e-3:
        return f"the frequencies must be 0 or more and add up to 1; they add up to {total:g}."
    return None


def reads_target(adaptation: Adaptation) -> bool:
    """Whether an adaptation needs rows of the target, or sees them where there are some."""
    seen = adaptation.streams if isinstance(adaptation, Objective) else ()
    return TARGET in (*adaptation.needs_streams, *seen)


def _check_adaptation(settings: Settings, path: KeyPath, spec: Any) -> None:
    if isinstance(spec, Mapping) and len(spec) > 1:
        items = ", ".join(f"{{{key}: …}}" for key in spec)
        raise settings.error(path, f"an item of the list has one key; write [{items}].")
    name, arguments = _call(spec)
    if name not in adaptation_classes():
        raise settings.error(
            path, f"the adaptation {name!r} is unknown.{nearest(str(name), adaptation_classes())}"
        )
    _check_arguments(settings, (*path, name), name, arguments)
    try:
        built(spec, lambda: nn.Linear(1, 1))
    except (TypeError, ValueError) as error:
        raise settings.error(path, f"{name}: {error}") from error


def _check_arguments(settings: Settings, path: KeyPath, name: str, arguments: Any) -> None:
    if not isinstance(arguments, Mapping):
        raise settings.error(path, f"{name} takes its arguments by name: {{{name}: {{weight: 1}}}}")
    known, is_open = parameters(callables()[name])
    hidden = SET_BY_THE_FILE if name == MultiTask.__name__ else ()
    known = {each: kind for each, kind in known.items() if each not in hidden}
    for argument, value in arguments.items():
        if argument not in known and not is_open:
            raise settings.unknown((*path, argument), known, f"{name}: the argument")
        if is_call(value):
            inner, its = _call(value)
            _check_arguments(settings, (*path, argument, inner), inner, its)


def built(
    spec: Any,
    copied: Callable[[], nn.Module] | None = None,
    tasks: Mapping[str, TaskSpec] | None = None,
) -> Any:
    """What plain data stands for: `{name: arguments}` is a call, and all else is itself.

    Args:
        spec: The plain data.
        copied: Returns the model for an argument `source_model`.
        tasks: The tasks of a `MultiTask`.

    Example:
        >>> built({"MMD": {"weight": {"linear_ramp": {"end_value": 0.5}}}}).weight(1.0)
        0.5
    """
    name, arguments = _call(spec)
    if name == MultiTask.__name__:
        arguments = {**arguments, **_weights_and_surgery(arguments)}
        arguments["tasks"] = SOME_TASKS if tasks is None else tasks
    made = {key: built(value) if is_call(value) else value for key, value in arguments.items()}
    if copied is not None and "source_model" in inspect.signature(callables()[name]).parameters:
        made["source_model"] = copied()
    return callables()[name](**made)


def _weights_and_surgery(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What the `weighting` and the `surgery` of a `MultiTask` stand for, where they are named.

    Raises:
        ValueError: If there is none of that name, or it takes other arguments.
    """
    made: dict[str, Any] = {}
    weighting = arguments.get("weighting")
    if isinstance(weighting, Mapping) and not is_call(weighting):  # by task: numbers, schedules
        made["weighting"] = {k: built(v) if is_call(v) else v for k, v in weighting.items()}
    if isinstance(weighting, str):
        known = [name for name, value in callables().items() if _is_weighting(value)]
        if weighting not in known:
            raise ValueError(f"The weighting {weighting!r} is unknown.{nearest(weighting, known)}")
        made["weighting"] = callables()[weighting]()
    if (surgery := arguments.get("surgery")) is not None:
        name, options = _call(surgery)
        if name not in SURGERIES:
            raise ValueError(f"The surgery {name!r} is unknown.{nearest(name, SURGERIES)}")
        inspect.signature(SURGERIES[name]).bind(None, **options)  # refuses other options
        made["surgery"] = partial(SURGERIES[name], **options)
    return made


def _is_weighting(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, LossWeights) and value is not LossWeights


def is_call(value: Any) -> bool:
    """Whether plain data is a call of something that a configuration can name."""
    return isinstance(value, Mapping) and len(value) == 1 and next(iter(value)) in callables()


def _call(spec: Any) -> tuple[str, Any]:
    if isinstance(spec, Mapping) and len(spec) == 1:
        name, arguments = next(iter(spec.items()))
        return name, {} if arguments is None else arguments
    return spec if isinstance(spec, str) else repr(spec), {}


@cache
def adaptation_classes() -> dict[str, Any]:
    """The adaptations by name."""
    found = {k: v for family in FAMILIES for k, v in adaptations_of(family).items()}
    return dict(sorted(found.items()))


@cache
def callables() -> dict[str, Any]:
    """All that a configuration can call: classes of the families, and schedules of progress."""
    exported = {name: getattr(family, name) for family in FAMILIES for name in family.__all__}
    classes = {name: value for name, value in exported.items() if isinstance(value, type)}
    schedules = {
        name: value
        for name, value in vars(progress).items()
        if inspect.isfunction(value)
        and typing.get_type_hints(value).get("return") == progress.Schedule
    }
    return classes | schedules


def is_shifted(priors: Any) -> bool:
    """Whether `target_priors` are the true ones, made wrong on purpose."""
    return isinstance(priors, Mapping) and set(priors) == {GIVEN}


def shifted(shares: Mapping[str, float], points: float) -> dict[str, float]:
    """Class frequencies that are wrong on purpose, and still sum to 1.

    Args:
        shares: The share of each class.
        points: What is added to the most frequent class, of 1; the others give it in proportion.

    Example:
        >>> wrong = shifted({"ham": 0.8, "spam": 0.2}, -0.1)
        >>> {name: round(share, 3) for name, share in wrong.items()}
        {'ham': 0.7, 'spam': 0.3}
    """
    largest = max(shares, key=lambda name: shares[name])
    share = min(max(shares[largest] + points, 0.01), 0.99)
    rest = (1 - share) / max(1 - shares[largest], 1e-12)
    return {name: share if name == largest else value * rest for name, value in shares.items()}
