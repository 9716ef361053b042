"""Several tasks in one training: how a configuration says which rows they give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from hf_adapt.experiments.methods import RECOMMENDED, Method
from hf_adapt.experiments.settings import KeyPath, Settings
from hf_adapt.multitask import Mixture, MultiTask, TaskSpec, annealed, mix, temperature

KEYS = ("sampling", "size")
FUNCTIONS = {"temperature": temperature, "annealed": annealed}
"""What a sampling may call: `{temperature: 2}`, `{annealed: {epochs: 3, least: 0.1}}`."""


def mixed(given: Mapping[str, Any], datasets: Mapping[str, Any], seed: int = 0) -> Mixture:
    """The rows of several tasks as one data set.

    Args:
        given: `sampling` and `size`, as a configuration has them.
        datasets: The rows of each task.
        seed: Seed of the order.

    Raises:
        TypeError: If something is of a wrong kind.
        ValueError: If the shares do not add up, or there is no such task or sampling.
    """
    sampling = given.get("sampling", "proportional")
    if isinstance(sampling, Mapping) and len(sampling) == 1:
        name, options = next(iter(sampling.items()))
        if name in FUNCTIONS:
            called: Any = FUNCTIONS[name]
            sampling = called(**options) if isinstance(options, Mapping) else called(options)
    found = mix(datasets, sampling, given.get("size"), seed=seed)
    assert isinstance(found, Mixture)
    return found


def check_mixtures(
    settings: Settings, given: Any, methods: Mapping[str, Method], tasks: Sequence[str]
) -> None:
    """Refuse a mixture that cannot be made, and methods that do not fit it.

    Args:
        settings: For the places of errors.
        given: The experiment's `mixture`; None where it has none.
        methods: The methods by name.
        tasks: The names of the tasks.

    Raises:
        ConfigError: Naming the line.
    """
    if given is not None:
        if len(tasks) < 2:
            raise settings.error(("mixture",), "mixture: needs two tasks or more in data:.")
        _check_mixture(settings, ("mixture",), given, tasks)
    for name, method in methods.items():
        path: KeyPath = ("methods", name)
        if given is None and (method.mixes or method.mixture is not None):
            raise settings.error(
                path,
                f"methods: {name!r} trains several tasks together: the file needs mixture: in "
                "place of pairs:, as in 'mixture: {sampling: equal}'.",
            )
        if given is None:
            continue
        _check_method(settings, path, name, method)
        if method.mixture is not None:
            _check_mixture(settings, (*path, "mixture"), {**given, **method.mixture}, tasks)
        if method.mixes:
            try:
                _check_weights(method, tasks)
            except (TypeError, ValueError) as error:
                raise settings.error(path, f"methods: {name!r}: {error}") from error


def _check_mixture(settings: Settings, path: KeyPath, given: Any, tasks: Sequence[str]) -> None:
    if not isinstance(given, Mapping):
        raise settings.error(
            path, f"mixture: expected {{sampling: …, size: …}}, or {{}}, got {given!r}."
        )
    for key in given:
        if key not in KEYS:
            raise settings.unknown((*path, key), KEYS, "mixture: the key")
    size = given.get("size")
    if size is not None and type(size) is not int:
        raise settings.error((*path, "size"), f"size: expected a whole number, got {size!r}.")
    try:
        mixed(given, {task: [{}] for task in tasks})
    except (TypeError, ValueError) as error:
        key = "size" if size is not None and size < 1 else "sampling"
        raise settings.error((*path, key), f"mixture: {error}") from error


def _check_method(settings: Settings, path: KeyPath, name: str, method: Method) -> None:
    """A method of a mixture trains on labelled rows of the tasks, and on nothing else."""
    plain = Method(
        adaptations=method.adaptations,
        training=method.training,
        mixture=method.mixture,
        save=method.save,
    )
    if method != plain or method.adaptations == RECOMMENDED or method.reads_target:
        raise settings.error(
            path,
            f"methods: {name!r} needs a target, and the tasks of a mixture have none: "
            "adaptations without target rows, training, mixture and save are possible.",
        )
    if method.mixture is not None and not method.mixes:
        raise settings.error(
            (*path, "mixture"),
            f"methods: {name!r} has a mixture, and trains each task alone: add MultiTask.",
        )


def _check_weights(method: Method, tasks: Sequence[str]) -> None:
    """Build it for these tasks, so that weights of unknown ones are found before all runs."""
    specs = {task: TaskSpec(num_labels=2) for task in tasks}
    for each in method.build(lambda: nn.Linear(1, 1), specs):
        if isinstance(each, MultiTask):
            each.weighting.begin(list(tasks), [2] * len(tasks))
