"""A choice among the runs of an experiment, without target labels."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_adapt.alignment.neighbours import NeighbourObjective
from hf_adapt.alignment.priors import resolved_priors
from hf_adapt.engine.item_outputs import ItemOutputs, load_items, save_items
from hf_adapt.evaluation.contest import label_order
from hf_adapt.evaluation.selection import Candidate, Choice, choose
from hf_adapt.experiments.cell import Cell, cell_folder, reference_file
from hf_adapt.experiments.config import Experiment
from hf_adapt.experiments.data import named_frequencies
from hf_adapt.experiments.label_file import LabelFile
from hf_adapt.experiments.methods import CHOSEN, GIVEN, Method, is_shifted
from hf_adapt.experiments.outputs import CHOICE_FILE, RunOutputs
from hf_adapt.experiments.summary import Results
from hf_adapt.experiments.training import untrained_outputs
from hf_adapt.storage.text_file import write_text


def candidates_of(experiment: Experiment) -> list[str]:
    """The methods to choose from: no target label has helped them, and none trains on neighbours.

    What a method has trained cannot judge it.
    """
    return [
        name
        for name, method in experiment.methods.items()
        if not _knows_labels(method)
        and not any(isinstance(each, NeighbourObjective) for each in method.sketch)
    ]


def _knows_labels(method: Method) -> bool:
    given = method.target_priors == GIVEN or is_shifted(method.target_priors)
    return method.is_bound or given or (method.first is not None and _knows_labels(method.first))


def choices(
    experiment: Experiment,
    results: Results,
    files: Mapping[tuple[str, str], LabelFile],
    tell: Callable[[str], None],
) -> dict[tuple[str, str, int], Choice]:
    """The choice for each pair and seed; where there can be none, it is told why.

    Args:
        experiment: What was run.
        results: What came out.
        files: The labels that a person has given, for each pair.
        tell: Called with a sentence for a pair and seed without a choice.
    """
    names = candidates_of(experiment)
    found = {}
    for source, target in experiment.pairs:
        for seed in experiment.seeds:
            runs = {
                run["method"]: run
                for run in results
                if (run["source"], run["target"], run["seed"]) == (source, target, seed)
                and run["method"] in names
                and "error" not in run
            }
            try:
                given = files[source, target]
                found[source, target, seed] = _choice(experiment, given, seed, runs)
            except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
                tell(f"{source} → {target}, seed {seed}: no choice: {error}")
    return found


def _choice(experiment: Experiment, given: LabelFile, seed: int, runs: Mapping[str, Any]) -> Choice:
    """The choice among the runs of one pair and seed."""
    source, target = given.domains
    names = candidates_of(experiment)
    baseline = next(name for name in names if experiment.methods[name].is_baseline)
    if baseline not in runs:
        raise ValueError(f"{baseline} has failed.")
    made = []
    for name in runs:
        outputs = RunOutputs.load(cell_folder(experiment, Cell(source, target, name, seed)))
        if outputs.source_dev is None:
            raise ValueError("The source has no dev rows, which show whether it was lost.")
        assert outputs.target_unlabelled is not None
        made.append(Candidate(name, outputs.source_dev, outputs.target_unlabelled))
    prior = _known_priors(experiment, names, list(runs[baseline]["target_predicted_shares"]))
    reference = reference_items(experiment, source, target)
    if not reference.keys.equal(made[0].target.keys):
        raise ValueError("The rows of the target are others than the runs had: use --overwrite.")
    return choose(
        made,
        baseline,
        prior=prior,
        reference_features=reference.features,
        target_labels=given.labels(reference.keys),
    )


def reference_items(experiment: Experiment, source: str, target: str) -> ItemOutputs:
    """What the model gives for the target's rows before any training; kept on disk."""
    file = reference_file(experiment, source, target)
    if not file.exists():
        save_items(file, {"target": untrained_outputs(experiment, source, target)})
    return load_items(file)["target"]


def _known_priors(experiment: Experiment, names: Sequence[str], classes: Sequence[str]) -> Any:
    """The class frequencies that methods were told, as numbers; None if none was, or several."""
    told = [experiment.methods[name].target_priors for name in names]
    known: list[Any] = ["uniform" for each in told if isinstance(each, str) and each == "uniform"]
    for each in told:
        if isinstance(each, Mapping):
            known.append(named_frequencies(each))
    if not known or any(each != known[0] for each in known):  # several are a grid, not knowledge
        return None
    return resolved_priors(known[0], dict(enumerate(classes)))


def with_chosen(
    experiment: Experiment, results: Results, found: Mapping[tuple[str, str, int], Choice]
) -> tuple[Experiment, list[Mapping[str, Any]]]:
    """The experiment and its results with a further row of the runs that were chosen."""
    runs = {(run["source"], run["target"], run["seed"], run["method"]): run for run in results}
    chosen = [{**runs[*key, choice.chosen], "method": CHOSEN} for key, choice in found.items()]
    methods = {**experiment.methods, CHOSEN: Method(adaptations=[], train_on="chosen")}
    return replace(experiment, methods=methods), [*results, *chosen]


def _readable(file: Path) -> list[dict[str, Any]]:
    """What an earlier call has written; nothing where the file is damaged."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return [each for each in kept if isinstance(each["seed"], int)]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def write_to_label(
    experiment: Experiment,
    found: Mapping[tuple[str, str, int], Choice],
    files: Mapping[tuple[str, str], LabelFile],
    tell: Callable[[str], None],
) -> list[Path]:
    """Write the texts of each pair whose labels would decide, where none or too few are given."""
    written = []
    for pair in dict.fromkeys(key[:2] for key in found):
        made = [choice for key, choice in found.items() if key[:2] == pair]
        keys = reference_items(experiment, *pair).keys
        try:
            if files[pair].known:
                made = [choice for choice in made if choice.needs_labels]
            asked = {number for choice in made for number in choice.to_label}
            file = files[pair].write(keys[[n for n in label_order(len(keys)) if n in asked]])
        except OSError as error:  # open in a spreadsheet
            tell(f"No texts to label are written for {' → '.join(pair)}: {error}")
            continue
        if file is not None:
            written.append(file)
    return written


def write_choices(
    experiment: Experiment, found: Mapping[tuple[str, str, int], Choice]
) -> list[Path]:
    """Write what was chosen and why beside the runs of each pair, the seeds in one file."""
    by_folder: dict[Path, list[dict[str, Any]]] = {}
    for (source, target, seed), choice in found.items():
        run = cell_folder(experiment, Cell(source, target, choice.chosen, seed))
        entry = {"seed": seed, "run": run.name, **choice.as_dict()}
        by_folder.setdefault(run.parent, []).append(entry)
    for folder, made in by_folder.items():
        file = folder / CHOICE_FILE
        seeds = {each["seed"] for each in made}
        kept = _readable(file)
        both = [*(each for each in kept if each["seed"] not in seeds), *made]
        both.sort(key=lambda each: int(each["seed"]))
        write_text(file, json.dumps(both, indent=1, ensure_ascii=False))
    return [folder / CHOICE_FILE for folder in by_folder]
