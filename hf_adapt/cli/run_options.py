"""The command line of `hf-adapt run`, as settings of an experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from hf_adapt import alignment
from hf_adapt.experiments.config import Experiment, built_in
from hf_adapt.experiments.methods import read_method
from hf_adapt.experiments.settings import ConfigError, Settings, nearest

PLAIN = (
    "model",
    "num_train",
    "num_test",
    "balanced",
    "max_length",
    "text_column",
    "label_column",
    "group_column",
    "freeze_layers",
    "cache_prefix",
    "save_models",
    "choose",
    "diagnose",
    "output_dir",
)
"""Options that are keys of a configuration."""


def split_arguments(
    first: str | None, others: Sequence[str], options: Sequence[str]
) -> tuple[str | None, dict[str, Any]]:
    """The configuration's file, and options of `TrainingArguments`.

    Args:
        first: What stands where the file is expected.
        others: What the command does not know.
        options: The names of the options that it knows, for messages.

    Raises:
        ConfigError: If an option is none of `TrainingArguments` either.
    """
    words = [word for word in (first, *others) if word is not None]
    known = [each.name for each in fields(TrainingArguments) if each.init]
    file: str | None = None
    training: dict[str, Any] = {}
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            if file is not None:
                raise ConfigError(f"{word!r} is one argument too many: {file!r} is the file.")
            file = word
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in known:
            own = [f"--{each.replace('_', '-')}" for each in options if each != "context"]
            close = nearest(word, [*own, *(f"--{each}" for each in known)]).split(" Known")[0]
            raise ConfigError(f"The option {word} is unknown.{close} See hf-adapt run --help.")
        if not equals:
            has_value = words and not words[0].startswith("--")
            value = words.pop(0) if has_value else "true"
        training[name] = _value(value)
    return file, training


def _value(text: str) -> Any:
    values: dict[str, Any] = Settings.parse(f"value: {text}", "the command line").values
    return values["value"]


def experiment(
    file: str | None, flags: Mapping[str, Any], training: Mapping[str, Any]
) -> Experiment:
    """The experiment of a file, or the built-in one, changed by the options.

    Args:
        file: A YAML file.
        flags: Options by name, those that were given.
        training: Options of `TrainingArguments`.

    Raises:
        ConfigError: If an option or a key is wrong.
    """
    settings = built_in(flags.get("choose", False)) if file is None else Settings.read(file)
    values = settings.values
    for name in PLAIN:
        if name in flags:
            settings.set((name,), flags[name], f"--{name.replace('_', '-')}")
    for name, value in training.items():
        settings.set(("training", name), value, f"--{name}")
    if "seeds" in flags:
        settings.set(("seeds",), _seeds(flags["seeds"]), "--seeds")
    _choose_methods(settings, flags)
    _choose_pairs(settings, flags)
    if file is None and len(values.get("data", {})) < 2:
        raise ConfigError(
            "Give --source and --target, files with labelled and with unlabelled rows, or a "
            "CONFIG.yaml. See hf-adapt run --help."
        )
    if "output_dir" not in values:
        name = Path(file).stem if file is not None else "-".join(values["data"])
        settings.set(("output_dir",), str(Path("runs", name)), "--output-dir")
    return Experiment.read(settings, Path() if file is None else Path(file).parent)


def _seeds(text: str) -> Any:
    try:
        numbers = [int(each) for each in text.split(",") if each.strip()]
    except ValueError as error:
        raise ConfigError(f"--seeds {text}: expected 5, or 42,43.") from error
    if not numbers:
        raise ConfigError(f"--seeds {text!r}: expected 5, or 42,43.")
    return numbers if "," in text else numbers[0]


def _choose_methods(settings: Settings, flags: Mapping[str, Any]) -> None:
    methods = settings.values.get("methods")
    if not isinstance(methods, dict):
        return
    if chosen := flags.get("method"):
        for name in chosen:
            if name not in methods and name in alignment.__all__:
                methods[name] = [name]
            if name not in methods:
                raise ConfigError(
                    f"--method {name!r} is unknown.{nearest(name, methods)} Or the name of a class "
                    "of hf_adapt.alignment, such as DANN."
                )
        settings.values["methods"] = methods = {name: methods[name] for name in chosen}
    if "target_priors" in flags:
        priors = _value(flags["target_priors"])
        using = [name for name in methods if read_method(settings, name, methods[name]).uses_priors]
        if not using:
            raise ConfigError(
                "--target-priors: no method has an adaptation that uses class frequencies, such as "
                "SelfTraining or InformationMaximization."
            )
        for name in using:
            spec = methods[name]
            if not isinstance(spec, dict):
                methods[name] = {"adaptations": spec}
            settings.set(("methods", name, "target_priors"), priors, "--target-priors")


def _choose_pairs(settings: Settings, flags: Mapping[str, Any]) -> None:
    """Domains that are named by `--source` and `--target`, columns, and `--pair`."""
    data = settings.values.setdefault("data", {})
    if not isinstance(data, dict):
        return
    given = {side: flags[side] for side in ("source", "target") if side in flags}
    if len(given) == 1:
        raise ConfigError(
            f"--{next(iter(given))} is given alone: --source and --target are a pair."
        )
    if given:
        if len(set(given.values())) == 1:
            raise ConfigError(f"--source and --target are both {given['source']!r}.")
        names: list[str] = []
        domains = [value for value in given.values() if value in data]
        for side, value in given.items():
            if value in domains:
                names.append(value)
            else:
                free = (Path(value.partition(":")[0]).stem, side, f"{side} rows")
                name = next(each for each in free if each not in (*names, *domains))
                names.append(name)
                here = str(Path(value).resolve()) if Path(value).exists() else value
                settings.set(("data", name), {"train": here}, f"--{side}")
        for other in [other for other in data if other not in names]:
            del data[other]
        settings.set(("pairs",), [names], "--source")
    for option in {"text_column", "label_column", "group_column"} & flags.keys():
        for spec in data.values():
            if isinstance(spec, dict):
                spec.pop(option, None)
    if chosen := flags.get("pair"):
        pairs = [each.split(":") for each in chosen]
        settings.set(("pairs",), pairs, "--pair")
