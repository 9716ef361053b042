"""Several adaptations, trained one after the other, and the choice among them."""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from hf_adapt.alignment.priors import class_names, resolved_priors
from hf_adapt.alignment.recommended import candidates as recommended_candidates
from hf_adapt.engine.adaptation import Adaptation
from hf_adapt.engine.callback import adapt, collect_items, load_weights
from hf_adapt.engine.item_outputs import ItemOutputs, load_items, save_items
from hf_adapt.engine.streams import Stream
from hf_adapt.evaluation.selection import Candidate, Choice, choose
from hf_adapt.storage.text_file import write_text

logger = logging.getLogger(__name__)

BASELINE = "source only"
CHOICE_FILE = "choice.json"
ITEMS_FILE = "items.npz"
UNTRAINED_FILE = "untrained.npz"
MakeAdaptations = Callable[[], Sequence[Adaptation]]


@dataclass(frozen=True)
class Chosen:
    """What [`train_and_choose`] returns.

    Args:
        trainer: A Trainer whose model has the weights that were chosen.
        choice: Which, and why, candidate by candidate.
        folder: Where the chosen model is saved, a plain Hugging Face folder.
    """

    trainer: Trainer
    choice: Choice
    folder: str


def train_and_choose(
    make_trainer: Callable[[], Trainer],
    target_dataset: Any,
    candidates: Mapping[str, MakeAdaptations] | None = None,
    *,
    target_priors: Any = None,
) -> Chosen:
    """Train without adaptation and with each of several, and choose without target labels.

    It costs one training run for each candidate, four by default. Each is saved in a folder of its
    name under the Trainer's `output_dir`; an interrupted call finishes what is missing.

    Args:
        make_trainer: Returns a new Trainer with a new model each time, as for training on the
            source alone; its `eval_dataset` are held-out source rows with labels.
        target_dataset: Target rows, prepared like `train_dataset`; labels are hidden.
        candidates: Functions that return new adaptations, by name;
            [`hf_adapt.alignment.candidates`] by default. Source only is always among them.
        target_priors: The target's class frequencies, as `AdaptationCallback` takes them.

    Raises:
        ValueError: If there is no `eval_dataset`.

    Example:
        ```python
        def make_trainer():
            model = AutoModelForSequenceClassification.from_pretrained("bert-base-uncased")
            return Trainer(model, args, train_dataset=source, eval_dataset=source_dev,
                           processing_class=tokenizer)

        chosen = train_and_choose(make_trainer, target)
        print(chosen.choice)
        chosen.trainer.save_model("adapted")
        ```
    """
    given = dict(recommended_candidates() if candidates is None else candidates)
    given = {BASELINE: list, **{name: make for name, make in given.items() if name != BASELINE}}
    root, reference, found = None, None, []
    for name, make in given.items():
        trainer = make_trainer()
        root = Path(str(trainer.args.output_dir)) if root is None else root
        if reference is None:
            reference = _reference(trainer, root, target_dataset)
        trainer.args = copy.copy(trainer.args)  # it may be the same object each time
        trainer.args.output_dir = str(_folder(root, name))
        found.append(_candidate(name, trainer, make(), target_dataset, target_priors))
    assert root is not None and reference is not None
    trainer = make_trainer()
    prior = _known(trainer, target_priors, found)
    choice = choose(found, BASELINE, prior=prior, reference_features=reference.features)
    logger.warning("%s", choice)
    folder = _folder(root, choice.chosen)
    load_weights(trainer, str(folder))
    if trainer.args.should_save:
        write_text(root / CHOICE_FILE, json.dumps(choice.as_dict(), indent=1))
    return Chosen(trainer, choice, str(folder))


def _folder(root: Path, name: str) -> Path:
    return root / (re.sub(r"[^\w.-]+", "_", name).strip("_") or "unnamed")


def _candidate(
    name: str,
    trainer: Trainer,
    adaptations: Sequence[Adaptation],
    target_dataset: Any,
    target_priors: Any,
) -> Candidate:
    """Train a candidate, unless an earlier call has, and run it on both domains."""
    if trainer.eval_dataset is None or isinstance(trainer.eval_dataset, dict):
        raise ValueError(
            "train_and_choose compares the candidates on held-out source rows with labels: give "
            f"the Trainer one eval_dataset of them, got {type(trainer.eval_dataset).__name__}."
        )
    folder = Path(str(trainer.args.output_dir))
    file = folder / ITEMS_FILE
    if not file.exists():
        logger.warning("Training %s, in %s.", name, folder)
        if adaptations:
            used = any(each.uses_priors for each in adaptations)
            priors = target_priors if used else None
            adapt(trainer, *adaptations, target_dataset=target_dataset, target_priors=priors)
        last = None
        if folder.is_dir():
            last = get_last_checkpoint(str(folder))  # type: ignore[no-untyped-call]
        trainer.train(resume_from_checkpoint=last)
        trainer.save_model()
        source = collect_items(trainer, trainer.eval_dataset).labelled
        target = _target_items(trainer, target_dataset)
        if trainer.args.should_save:
            save_items(file, {"source": source, "target": target})
        trainer.accelerator.wait_for_everyone()
    return Candidate(name, **load_items(file))


def _target_items(trainer: Trainer, target_dataset: Any) -> ItemOutputs:
    streams = Stream.of(target_dataset).domains
    return ItemOutputs.joined([collect_items(trainer, rows, hides_labels=True) for rows in streams])


def _reference(trainer: Trainer, root: Path, target_dataset: Any) -> ItemOutputs:
    """What the model gives for the target before any training; kept, as candidates are."""
    file = root / UNTRAINED_FILE
    if not file.exists():
        found = _target_items(trainer, target_dataset)
        if trainer.args.should_save:
            save_items(file, {"target": found})
        trainer.accelerator.wait_for_everyone()
    return load_items(file)["target"]


def _known(trainer: Trainer, priors: Any, found: Sequence[Candidate]) -> Any:
    """The class frequencies as numbers, if they are known."""
    if priors is None or (isinstance(priors, str) and priors != "uniform"):
        return None
    return resolved_priors(priors, class_names(trainer, found[0].target.logits.shape[1]))
