"""What an experiment is: a model, domains, methods, seeds, and how to train."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from transformers import TrainingArguments

from hf_adapt.alignment.recommended import candidates
from hf_adapt.experiments.methods import CHOSEN, RECOMMENDED, Method, read_method
from hf_adapt.experiments.mixture import check_mixtures
from hf_adapt.experiments.settings import ConfigError, KeyPath, Settings
from hf_adapt.experiments.tasks import TASKS, Task

FIRST_SEED = 42

TRAINING_DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "learning_rate": 1e-4,
    "logging_steps": 20,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": torch.cuda.is_available(),
}
"""What differs from the defaults of `TrainingArguments`."""

_PLAIN_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    str(int): ((int,), "a whole number"),
    str(bool): ((bool,), "true or false"),
    str(str): ((str,), "a text"),
    str(int | None): ((int, type(None)), "a whole number"),
    str(str | None): ((str, type(None)), "a text"),
}

_NUMBERS = {int: "a whole number", float: "a number", bool: "true or false"}

POSITIVE = ("max_length", "num_train", "num_test")

SET_BY_THE_RUN = ("output_dir", "seed", "resume_from_checkpoint", "do_train", "do_eval")


@dataclass(frozen=True)
class DomainFiles:
    """Where the rows of a domain are.

    Args:
        train: A csv, tsv, json, jsonl or parquet file, a folder made by `save_to_disk`, or a hub id
            (`id:configuration`).
        dev: Rows that are not trained on, in the same way; split off by default.
        test: Rows to test on, in the same way; split off by default.
        text_column: Column with the text, or whatever the task reads; by default the experiment's.
        label_column: Column with the label; by default the experiment's. One that is named here
            must be there.
        group_column: Column with the group of a row; by default the experiment's.
        task: What is predicted, where the experiment is a mixture; by default the experiment's.
        num_train: Training rows, at most; by default the experiment's.
    """

    train: str
    dev: str | None = None
    test: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    group_column: str | None = None
    task: str | None = None
    num_train: int | None = None


@dataclass(frozen=True)
class Experiment:
    """Methods × pairs of domains × seeds, or methods × tasks × seeds.

    Args:
        data: Domains by name; the tasks, where there is a mixture.
        methods: Methods by name, in the order of the table.
        pairs: (source, target) names; each task with itself, where there is a mixture.
        model: Folder or hub id of the model that every run starts from.
        task: What the model's head predicts.
        seeds: The seed of each run of a method.
        training: `TrainingArguments`.
        freeze_layers: Train neither the embeddings nor the first N layers; 0 trains all.
        cache_prefix: Compute the frozen layers once per row for all runs. Turns their dropout off.
        max_length: Tokens of a text that are read.
        text_column: Column with the text in every domain; by default the task's.
        label_column: Column with the label in every domain; a target may lack it.
        group_column: Column with the group that a row is in (a dialect, a hospital): the accuracy
            on each group of the target's test rows is measured, for the report. None for none.
        num_train: Training rows of each domain, at most.
        num_test: Dev and test rows of each domain, at most.
        balanced: Keep as many rows of every label, in all splits; for study only, as it needs the
            target's labels.
        save_models: Save every model.
        choose: Choose one of the methods for each pair and seed, without target labels.
        diagnose: Measure the distance of the domains in every layer of every model, for the report.
        mixture: The rows of a training of all tasks together: `sampling` and `size` of
            [`hf_adapt.multitask.mix`]. None for pairs of domains.
        output_dir: Folder of the results, with `~` and variables; a relative one starts in the
            current directory.
    """

    data: Mapping[str, DomainFiles]
    methods: Mapping[str, Method]
    pairs: Sequence[tuple[str, str]]
    model: str = "sentence-transformers/all-MiniLM-L6-v2"
    task: str = "sequence-classification"
    seeds: Sequence[int] = (FIRST_SEED, FIRST_SEED + 1, FIRST_SEED + 2)
    training: Mapping[str, Any] = field(default_factory=dict)
    freeze_layers: int = 0
    cache_prefix: bool = False
    max_length: int = 128
    text_column: str | None = None
    label_column: str | None = None
    group_column: str | None = None
    num_train: int | None = None
    num_test: int | None = None
    balanced: bool = False
    save_models: bool = False
    choose: bool = False
    diagnose: bool = False
    mixture: Mapping[str, Any] | None = None
    output_dir: str = "runs/experiment"

    def task_of(self, domain: str) -> Task:
        """What is predicted on a domain."""
        return TASKS[self.kind_of(domain)]

    def kind_of(self, domain: str) -> str:
        """The name of what is predicted on a domain."""
        return self.data[domain].task or self.task

    def group_column_of(self, domain: str) -> str | None:
        """The column with the group of a row in a domain, if it is named."""
        return self.data[domain].group_column or self.group_column

    @property
    def prefix_folder(self) -> str | None:
        """The folder in which all runs keep what the frozen layers return, if they do."""
        if not (self.cache_prefix and self.freeze_layers):
            return None
        return str(Path(self.output_dir, "frozen_prefix"))

    @property
    def baseline(self) -> str | None:
        """The method that others are compared with: source only; each task alone in a mixture.

        Alone, a task may have training arguments of its own, such as more steps.
        """
        are = self.methods.items()
        if self.mixture is not None:
            return next((name for name, method in are if not method.adaptations), None)
        return next((name for name, method in are if method.is_baseline), None)

    @classmethod
    def read(cls, settings: Settings, folder: Path = Path()) -> Experiment:
        """Check a configuration and fill in the defaults.

        Args:
            settings: The configuration.
            folder: Where relative paths of data and of the model start.

        Raises:
            ConfigError: Naming the line of what is wrong, and the nearest right name.
        """
        values = dict(settings.values)
        known = [each.name for each in fields(cls)]
        for key in values:
            if key not in known:
                raise settings.unknown((str(key),), known, "the key")
        for key in ("data", "methods"):
            if not isinstance(values.get(key), dict) or not values[key]:
                raise settings.error((key,), f"{key}: is missing, or is no mapping of names.")
        _check_types(settings, values, cls, ())
        task = values.get("task", cls.task)
        if task not in TASKS:
            raise settings.unknown(("task", task), TASKS, "the task")
        values["data"] = {
            str(name): _domain(settings, str(name), given, folder)
            for name, given in values["data"].items()
        }
        values["methods"] = {
            str(name): read_method(settings, str(name), spec)
            for name, spec in values["methods"].items()
        }
        if values.get("mixture") is None:
            values["pairs"] = _pairs(settings, values.get("pairs", "all"), list(values["data"]))
        else:
            _check_mixture_keys(settings, values)
            values["pairs"] = [(name, name) for name in values["data"]]
        check_mixtures(settings, values.get("mixture"), values["methods"], list(values["data"]))
        for name, domain in values["data"].items():
            if domain.task not in (None, task) and values.get("mixture") is None:
                raise settings.error(
                    ("data", name, "task"),
                    f"data: the domains of pairs have one task, {task}. Several tasks need "
                    "mixture: in place of pairs:.",
                )
        values["seeds"] = _seeds(settings, values.get("seeds", len(cls.seeds)))
        given = {} if values.get("training") is None else values["training"]
        _check_training(settings, ("training",), given)
        values["training"] = TRAINING_DEFAULTS | given
        for name, method in values["methods"].items():
            path: KeyPath = ("methods", name)
            stage: Method | None = method
            while stage is not None:
                _check_training(settings, (*path, "training"), stage.training)
                _check_training(settings, (*path, "pretrain"), stage.pretrain or {})
                path, stage = (*path, "first"), stage.first
        if values.get("choose") and not any(m.is_baseline for m in values["methods"].values()):
            raise settings.error(
                ("choose",),
                "a choice needs a method without adaptation to compare with: add "
                "'source only: []' to methods, or --method 'source only'.",
            )
        if values.get("choose") and CHOSEN in values["methods"]:
            raise settings.error(
                ("methods", CHOSEN), f"{CHOSEN!r} is the row of what was chosen: rename the method."
            )
        if "model" in values:
            values["model"] = _located(values["model"], folder)
        if "output_dir" in values:
            values["output_dir"] = _expanded(values["output_dir"])
        return cls(**values)


def built_in(choose: bool = False) -> Settings:
    """The configuration of `--source A --target B`, to which the two domains are added.

    Args:
        choose: Whether there are several adaptations, to choose from.
    """
    adaptations: dict[str, Any] = {RECOMMENDED: RECOMMENDED}
    if choose:
        adaptations = {name: [name] for name in candidates()}
    return Settings(
        {"methods": {"source only": [], **adaptations}, "seeds": 1, "save_models": True}
    )


def _check_types(settings: Settings, values: Mapping[str, Any], cls: type, path: Any) -> None:
    hints = get_type_hints(cls)
    for key, value in values.items():
        expected = _PLAIN_TYPES.get(str(hints[key]))
        if expected is None:
            continue
        kinds, name = expected
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise settings.error((*path, key), f"{key}: expected {name}, got {value!r}.")
        if type(value) is int and value < 0:
            raise settings.error((*path, key), f"{key}: {value} must not be negative.")
        if value == 0 and key in POSITIVE:
            raise settings.error((*path, key), f"{key}: 0 leaves nothing; expected 1 or more.")


def _domain(settings: Settings, name: str, given: Any, folder: Path) -> DomainFiles:
    if isinstance(given, str):
        given = {"train": given}
    if not isinstance(given, dict) or "train" not in given:
        raise settings.error(
            ("data", name),
            f"data: {name!r} must be a file or hub id, or {{train: …, dev: …, test: …}} of them.",
        )
    known = [each.name for each in fields(DomainFiles)]
    for key in given:
        if key not in known:
            raise settings.unknown(("data", name, str(key)), known, f"data: {name!r}: the key")
    _check_types(settings, given, DomainFiles, ("data", name))
    task = given.get("task")
    if task is not None and task not in TASKS:
        raise settings.unknown(("data", name, "task", task), TASKS, f"data: {name!r}: the task")
    paths = {key: _located(given[key], folder) for key in ("train", "dev", "test") if key in given}
    return DomainFiles(**given | paths)


def _located(name: str, folder: Path) -> str:
    """A path with `~` and variables expanded, from this folder; another name as it is."""
    expanded = _expanded(name)
    return str(folder / expanded) if (folder / expanded).exists() else expanded


def _expanded(name: str) -> str:
    return os.path.expanduser(os.path.expandvars(name))


def _check_mixture_keys(settings: Settings, values: Mapping[str, Any]) -> None:
    """What does not go with a mixture."""
    for key, reason in (
        ("pairs", "a file has mixture: or pairs:, and not both"),
        ("choose", "a choice is made among adaptations to a target, and a mixture has none"),
        ("diagnose", "distances are those of two domains; use {MultiTask: {diagnose_every: 10}}"),
        ("cache_prefix", "the layers below several heads are computed in each step"),
    ):
        if values.get(key):
            raise settings.error((key,), f"{key}: {reason}. Leave it out.")
    task = values.get("task", Experiment.task)
    kinds = {domain.task or task for domain in values["data"].values()}
    if "image-classification" in kinds and len(kinds) > 1:
        raise settings.error(
            ("data",), f"data: no model reads both texts and images: {', '.join(sorted(kinds))}."
        )


def _pairs(settings: Settings, given: Any, domains: Sequence[str]) -> list[tuple[str, str]]:
    if given == "all":
        if len(domains) < 2:
            raise settings.error(("data",), "pairs: all needs at least two domains in data:.")
        return list(itertools.permutations(domains, 2))
    if not isinstance(given, list) or not given:
        raise settings.error(("pairs",), "pairs must be all, or [[source, target], …].")
    pairs: list[tuple[str, str]] = []
    for number, pair in enumerate(given):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise settings.error(("pairs", number), f"pairs: expected [source, target]: {pair!r}.")
        for name in pair:
            if name not in domains:
                raise settings.unknown(("pairs", number, name), domains, "pairs: the domain")
        if pair[0] == pair[1]:
            raise settings.error(
                ("pairs", number), f"pairs: {pair[0]!r} is paired with itself; name two domains."
            )
        if tuple(pair) in pairs:
            raise settings.error(
                ("pairs", number), f"pairs: {pair!r} stands here a second time; leave it out."
            )
        pairs.append((pair[0], pair[1]))
    return pairs


def _seeds(settings: Settings, given: Any) -> list[int]:
    if isinstance(given, int) and not isinstance(given, bool) and given > 0:
        return list(range(FIRST_SEED, FIRST_SEED + given))
    if isinstance(given, list) and given and all(type(each) is int for each in given):
        for number, seed in enumerate(given):
            if seed < 0:
                raise settings.error(("seeds", number), f"seeds: {seed} must not be negative.")
            if seed in given[:number]:
                raise settings.error(
                    ("seeds", number), f"seeds: {seed} stands here a second time; leave it out."
                )
        return given
    raise settings.error(
        ("seeds",), f"seeds: expected a number of seeds, or a list of seeds, got {given!r}."
    )


def _check_training(settings: Settings, path: Any, given: Any) -> None:
    if not isinstance(given, Mapping):
        raise settings.error(
            path, f"{path[-1]} must hold TrainingArguments by name, got {given!r}."
        )
    hints = get_type_hints(TrainingArguments)
    known = [each.name for each in fields(TrainingArguments) if each.init]
    for key, value in given.items():
        if key in SET_BY_THE_RUN:
            raise settings.error((*path, key), f"training: {key} is set by each run.")
        if key not in known:
            close = [name for name in known if name[0] == str(key)[:1]] or known
            raise settings.unknown((*path, str(key)), close, "training: the argument")
        kinds = set(get_args(hints[key]) or (hints[key],))
        if kinds - {type(None)} <= {int, float, bool}:  # the others take texts and more
            fits = type(value) in kinds or (type(value) is int and float in kinds)
            if not fits:
                expected = " or ".join(_NUMBERS[kind] for kind in _NUMBERS if kind in kinds)
                raise settings.error(
                    (*path, str(key)), f"training: {key}: expected {expected}, got {value!r}."
                )


__all__ = ["ConfigError", "DomainFiles", "Experiment", "built_in"]
