"""A choice among the runs of an experiment, without target labels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_adapt.alignment.priors import resolved_priors
from hf_adapt.engine.item_outputs import ItemOutputs, load_items, save_items
from hf_adapt.evaluation.selection import Candidate, Choice, choose
from hf_adapt.experiments.cell import Cell, cell_folder, reference_file
from hf_adapt.experiments.config import Experiment
from hf_adapt.experiments.methods import CHOSEN, GIVEN, Method, is_shifted
from hf_adapt.experiments.outputs import CHOICE_FILE, RunOutputs
from hf_adapt.experiments.summary import Results
from hf_adapt.experiments.training import untrained_outputs
from hf_adapt.storage.text_file import write_text


def candidates_of(experiment: Experiment) -> list[str]:
    """The methods to choose from: those that no target label has helped."""
    return [name for name, method in experiment.methods.items() if not _knows_labels(method)]


def _knows_labels(method: Method) -> bool:
    given = method.target_priors == GIVEN or is_shifted(method.target_priors)
    return method.is_bound or given or (method.first is not None and _knows_labels(method.first))


def choices(experiment: Experiment, results: Results) -> dict[tuple[str, str, int], Choice]:
    """The choice for each pair and seed; where source only has failed there is none."""
    names = candidates_of(experiment)
    baseline = next(name for name in names if experiment.methods[name].is_baseline)
    found = {}
    for source, target in experiment.pairs:
        reference = reference_items(experiment, source, target).features
        for seed in experiment.seeds:
            runs = {
                run["method"]: run
                for run in results
                if (run["source"], run["target"], run["seed"]) == (source, target, seed)
                and run["method"] in names
                and "error" not in run
            }
            folders = {n: cell_folder(experiment, Cell(source, target, n, seed)) for n in runs}
            made = [each for n in runs if (each := _candidate(n, folders[n])) is not None]
            if any(each.name == baseline for each in made):
                classes = list(runs[baseline]["target_predicted_shares"])
                prior = _known_priors(experiment, names, classes)
                found[source, target, seed] = choose(
                    made, baseline, prior=prior, reference_features=reference
                )
    return found


def reference_items(experiment: Experiment, source: str, target: str) -> ItemOutputs:
    """What the model gives for the target's rows before any training; kept on disk."""
    file = reference_file(experiment, source, target)
    if not file.exists():
        save_items(file, {"target": untrained_outputs(experiment, source, target)})
    return load_items(file)["target"]


def _candidate(name: str, folder: Path) -> Candidate | None:
    outputs = RunOutputs.load(folder)
    if outputs.source_dev is None or outputs.target_unlabelled is None:
        return None
    return Candidate(name, outputs.source_dev, outputs.target_unlabelled)


def _known_priors(experiment: Experiment, names: Sequence[str], classes: Sequence[str]) -> Any:
    """The class frequencies that a method was told, as numbers; None if none was."""
    told = [experiment.methods[name].target_priors for name in names]
    known = next((each for each in told if isinstance(each, Mapping)), None)
    return None if known is None else resolved_priors(known, dict(enumerate(classes)))


def with_chosen(
    experiment: Experiment, results: Results, found: Mapping[tuple[str, str, int], Choice]
) -> tuple[Experiment, list[Mapping[str, Any]]]:
    """The experiment and its results with a further row of the runs that were chosen."""
    runs = {(run["source"], run["target"], run["seed"], run["method"]): run for run in results}
    chosen = [
        {**runs[*key, choice.chosen], "method": CHOSEN, "model": None}
        for key, choice in found.items()
    ]
    methods = {**experiment.methods, CHOSEN: Method(adaptations=[], train_on="chosen")}
    return replace(experiment, methods=methods), [*results, *chosen]


def write_choices(
    experiment: Experiment, found: Mapping[tuple[str, str, int], Choice]
) -> list[Path]:
    """Write what was chosen and why beside the runs of each pair, the seeds in one file."""
    by_folder: dict[Path, list[dict[str, Any]]] = {}
    for (source, target, seed), choice in found.items():
        folder = cell_folder(experiment, Cell(source, target, choice.chosen, seed)).parent
        by_folder.setdefault(folder, []).append({"seed": seed, **choice.as_dict()})
    for folder, made in by_folder.items():
        write_text(folder / CHOICE_FILE, json.dumps(made, indent=1, ensure_ascii=False))
    return [folder / CHOICE_FILE for folder in by_folder]
