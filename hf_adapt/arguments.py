"""Command-line options for scripts with an `HfArgumentParser`, generated from the constructors.

Three lines let an official script adapt:

    from hf_adapt import AdaptationArguments
    parser = HfArgumentParser((…, TrainingArguments, AdaptationArguments))
    adaptation_args.add_to(trainer, lambda rows: rows.map(preprocess_function, batched=True))

and it takes `--dann_weight 0.1 --target_file tweets.csv`. An option is the name that a method logs
under, then the argument's name. Arguments that are no plain values (functions, modules, data) are
left out.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import logging
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import datasets
import yaml

from hf_adapt import alignment, continual, unfreezing
from hf_adapt.continual import DarkReplay, Replay, ReplayMemory
from hf_adapt.distillation.row_files import read_splits
from hf_adapt.engine.adaptation import Adaptation
from hf_adapt.engine.callback import adapt
from hf_adapt.engine.collating import DOMAIN
from hf_adapt.engine.columns import dataset_columns
from hf_adapt.engine.constructors import descriptions, parameters
from hf_adapt.engine.streams import TARGET

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

Prepare = Callable[[datasets.Dataset], Any]
ArgumentsT = TypeVar("ArgumentsT", bound="MethodArguments")
PLAIN = (bool, int, float, str)
FILES = ".csv, .tsv, .json, .jsonl or .parquet; several are joined"


# ---- options ----


def _plain_type(annotation: Any) -> Any:
    """The type of an argument on a command line; None where it is no plain value."""
    if annotation in PLAIN or get_origin(annotation) is Literal:
        return annotation
    if get_origin(annotation) in (Union, types.UnionType):  # a number | a schedule of it: a number
        found = map(_plain_type, get_args(annotation))
        return next((each for each in found if each is not None), None)
    if get_origin(annotation) in (list, Sequence):
        item = _plain_type(get_args(annotation)[0])
        return types.GenericAlias(list, (item,)) if item in PLAIN else None
    return None


def _options(cls: type[Adaptation]) -> Iterator[tuple[str, str, Any, str]]:
    """The options of a method: name, argument, type and help."""
    bases = [each for each in reversed(cls.__mro__) if issubclass(each, Adaptation)]
    described = {k: v for each in bases for k, v in descriptions(each).items()}
    for name, parameter in parameters(cls)[0].items():
        kind = _plain_type(parameter.annotation)
        if kind is not None and name != "name":
            text = re.split(r"(?<=[.:]) (?=[A-Z])", described[name])[0].rstrip(":")
            default = parameter.default
            if isinstance(default, list | tuple):
                default = " ".join(map(str, default))
            if isinstance(default, PLAIN):
                text += f" (default: {default})"
            yield f"{cls.name}_{name}", name, kind, f"{cls.__name__}: {text}"


def adaptations_of(family: types.ModuleType) -> dict[str, type[Adaptation]]:
    """The adaptations that a family exports, by the names of their classes."""
    exported = {name: getattr(family, name) for name in family.__all__}
    return {
        name: value
        for name, value in exported.items()
        if isinstance(value, type) and issubclass(value, Adaptation)
    }


def _option(text: str, **metadata: Any) -> Any:
    """A field that is None unless it is given."""
    # Naming the default, without a character of it, keeps argparse from adding "default: None".
    metadata["help"] = text.replace("%", "%%") + "%(default).0s"
    return field(default=None, metadata=metadata)


def _with_options(
    *families: types.ModuleType,
) -> Callable[[type[ArgumentsT]], type[ArgumentsT]]:
    """Make a class a dataclass with the options of the adaptations of families."""
    methods = {name: cls for each in families for name, cls in adaptations_of(each).items()}

    def decorate(made: type[ArgumentsT]) -> type[ArgumentsT]:
        def add(name: str, kind: Any, text: str, **metadata: Any) -> None:
            made.__annotations__[name] = Union[kind, None]  # noqa: UP007 - a type made here
            setattr(made, name, _option(text, **metadata))

        text = "Methods to use, with their defaults where no option of theirs is given."
        add("adaptation", list[str], text, choices=sorted(methods))
        for cls in methods.values():
            for name, _, kind, text in _options(cls):
                if not hasattr(made, name):  # else it is inherited, or has a text of its own
                    add(name, kind, text)
        made.methods = methods
        return dataclass(made)

    return decorate


# ---- what all families share ----


@dataclass
class MethodArguments:
    """Options of methods; a method is used if `adaptation` names it or an option of it is given."""

    adaptation: list[str] | None = None
    methods: ClassVar[Mapping[str, type[Adaptation]]] = {}
    _argument_group_name: ClassVar[str] = "adaptation"

    def __post_init__(self) -> None:
        for name in _several(self.adaptation):
            if name not in self.methods:
                near = difflib.get_close_matches(name, self.methods, n=1, cutoff=0.4)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise ValueError(
                    f"adaptation: {name!r} is unknown.{hint} Known: {', '.join(self.methods)}."
                )

    def used(self, family: types.ModuleType) -> dict[type[Adaptation], dict[str, Any]]:
        """The methods of a family that are used, with the arguments that are given."""
        found = {}
        for name, cls in adaptations_of(family).items():
            given = {argument: getattr(self, option) for option, argument, *_ in _options(cls)}
            given = {argument: value for argument, value in given.items() if value is not None}
            if given or name in _several(self.adaptation):
                found[cls] = given
        return found

    def add_to(self, trainer: Trainer, prepare: Prepare | None = None) -> None:
        """Add the methods that the options name to a Trainer, before `train()`.

        Args:
            trainer: The Trainer; it is changed in place.
            prepare: Prepares the rows of a file as the script prepared its training rows; None
                where the files hold inputs of the model.

        Raises:
            ValueError: If a file is missing or cannot be read, or an option is out of range.
        """


def _several(given: str | Sequence[str] | None) -> list[str]:
    """A list of names; a configuration file may have one alone."""
    return [given] if isinstance(given, str) else list(given or ())


def _read(files: Any, trainer: Trainer, prepare: Prepare | None) -> Any:
    """The rows of files, prepared; None where there are no files."""
    if not _several(files):
        return None
    with trainer.args.main_process_first(desc="reading and preparing the rows of a file"):
        found = [read_splits(file) for file in _several(files)]
        tables = [splits.get("train", next(iter(splits.values()))) for splits in found]
        rows = datasets.concatenate_datasets(tables)
        return rows if prepare is None else prepare(rows)


# ---- the families ----


@_with_options(alignment)
class AlignmentArguments(MethodArguments):
    """Options that adapt a script's model to a target without labels.

    A target without a method is adapted to by the recommended one.

    Example:
        >>> from transformers import HfArgumentParser
        >>> words = ["--dann_weight", "0.3", "--target_file", "tweets.csv"]
        >>> (args,) = HfArgumentParser(AlignmentArguments).parse_args_into_dataclasses(words)
        >>> args.dann_weight, args.target_file
        (0.3, ['tweets.csv'])
    """

    target_file: list[str] | None = _option(f"Rows of the target, labels not needed: {FILES}.")
    target_priors: dict[str, float] | str | None = _option(
        "How frequent each class is in the target, for the methods that use it: "
        "'{ham: 0.87, spam: 0.13}', uniform, predicted, source or estimate."
    )

    def add_to(self, trainer: Trainer, prepare: Prepare | None = None) -> None:
        """Add the methods of this family: see [`MethodArguments`]."""
        super().add_to(trainer, prepare)
        made = []
        for cls, given in self.used(alignment).items():
            if "source_model" in inspect.signature(cls).parameters:
                given = {"source_model": copy.deepcopy(trainer.model), **given}
            made.append(cls(**given))
        needing = [type(each).__name__ for each in made if TARGET in each.needs_streams]
        needing += ["target_priors"] if self.target_priors is not None else []
        if needing and not self.target_file:
            if DOMAIN not in (dataset_columns(trainer.train_dataset) or ()):
                raise ValueError(
                    f"{', '.join(needing)}: the target's rows are missing. Name their file with "
                    f"--target_file, or mark them by a column {DOMAIN!r} in the training rows."
                )
        priors = self.target_priors
        if isinstance(priors, str):
            priors = yaml.safe_load(priors)
        target = _read(self.target_file, trainer, prepare)
        if made or target is not None:
            adapt(trainer, *made, target_dataset=target, target_priors=priors)


@_with_options(continual)
class ContinualArguments(MethodArguments):
    """Options for learning on without forgetting what the model has learned before.

    A memory without a method that uses it is replayed.

    Example:
        >>> from transformers import HfArgumentParser
        >>> words = ["--replay_ratio", "0.5", "--memory_file", "reviews.csv"]
        >>> (args,) = HfArgumentParser(ContinualArguments).parse_args_into_dataclasses(words)
        >>> args.used(continual)
        {<class 'hf_adapt.continual.replay.Replay'>: {'ratio': 0.5}}
    """

    memory_file: list[str] | None = _option(f"Labelled rows of earlier tasks, to replay: {FILES}.")
    memory_size: int | None = _option("How many of these rows to keep; by default all.")

    def add_to(self, trainer: Trainer, prepare: Prepare | None = None) -> None:
        """Add the methods of this family: see [`MethodArguments`]."""
        super().add_to(trainer, prepare)
        used = self.used(continual)
        needing = [cls for cls in used if "memory" in inspect.signature(cls).parameters]
        if self.memory_file and not needing:
            logger.warning("A memory was given without a method that uses it: using Replay.")
            used[Replay], needing = {}, [Replay]
        elif (needing or self.memory_size is not None) and not self.memory_file:
            names = ", ".join(cls.__name__ for cls in needing) or "memory_size"
            raise ValueError(
                f"{names}: rows of earlier tasks are missing. Name their file with --memory_file."
            )
        rows = _read(self.memory_file, trainer, prepare)
        for cls in needing:
            size = len(rows) if self.memory_size is None else self.memory_size
            has_logits = issubclass(cls, DarkReplay)
            memory = ReplayMemory.from_dataset(rows, size, trainer=trainer, logits=has_logits)
            used[cls] = {"memory": memory, **used[cls]}
        if used:
            adapt(trainer, *(cls(**given) for cls, given in used.items()))


@_with_options(unfreezing)
class UnfreezingArguments(MethodArguments):
    """Options for gradual unfreezing and layer-wise learning rates.

    Example:
        >>> UnfreezingArguments(unfreezing_layer_decay=0.9).used(unfreezing)
        {<class 'hf_adapt.unfreezing.adaptation.GradualUnfreezing'>: {'layer_decay': 0.9}}
    """

    unfreezing_schedule: str | None = _option(
        "GradualUnfreezing: Which groups train when: the file of a plan, as `hf-adapt schedule "
        "--output` writes it, or LPFT, Plateau or RandomLayers with their defaults; by default one "
        "group more in each phase, from the head down."
    )

    def add_to(self, trainer: Trainer, prepare: Prepare | None = None) -> None:
        """Add the methods of this family: see [`MethodArguments`]."""
        super().add_to(trainer, prepare)
        for cls, given in self.used(unfreezing).items():
            if given.get("schedule") in ("LPFT", "Plateau", "RandomLayers"):
                given["schedule"] = getattr(unfreezing, given["schedule"])()
            adapt(trainer, cls(**given))


@_with_options(alignment, continual, unfreezing)
class AdaptationArguments(AlignmentArguments, ContinualArguments, UnfreezingArguments):
    """The options of all three families, for a script that parses its own with `HfArgumentParser`.

    Distillation has its own: [`DistillationArguments`].

    Example:
        ```python
        parser = HfArgumentParser((TrainingArguments, AdaptationArguments))
        training_args, adaptation_args = parser.parse_args_into_dataclasses()
        trainer = Trainer(model, training_args, train_dataset=train)
        adaptation_args.add_to(trainer, lambda rows: rows.map(preprocess_function, batched=True))
        trainer.train()
        ```
    """
