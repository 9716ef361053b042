"""Several adaptations, trained one after the other, and the choice among them."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Trainer

from hf_adapt.alignment.priors import class_names, resolved_priors
from hf_adapt.alignment.recommended import candidates as recommended_candidates
from hf_adapt.engine.adaptation import Adaptation
from hf_adapt.engine.callback import adapt, collect_items, keys_of_rows, load_weights
from hf_adapt.engine.item_outputs import ItemOutputs, load_items, save_items, some_rows
from hf_adapt.engine.labels import IGNORED
from hf_adapt.engine.pairing import is_map_style
from hf_adapt.engine.streams import Stream
from hf_adapt.evaluation.contest import UNTOLD, agreed_labels, aligned_labels
from hf_adapt.evaluation.selection import Candidate, Choice, Verdict, choose
from hf_adapt.models.state import preserved_random_state
from hf_adapt.storage.checkpoints import last_whole_checkpoint
from hf_adapt.storage.text_file import write_text

logger = logging.getLogger(__name__)

BASELINE = "source only"
CHOICE_FILE, ITEMS_FILE, SETTINGS_FILE = "choice.json", "items.npz", "candidate.json"
UNTRAINED_FILE = "untrained.npz"
MakeAdaptations = Callable[[], Sequence[Adaptation]]

UNRELATED = re.compile(
    r".*_dir|local_rank|disable_tqdm|run_name|project|trackio_.*|report_to|log_.*|logging_(?!nan).*"
    r"|hub_.*|push_to_hub.*|skip_memory_metrics|eval_accumulation_steps"
    r"|dataloader_(num_workers|pin_memory|persistent_workers|prefetch_factor)"
)
"""Training arguments that change no weight."""


@dataclass(frozen=True)
class Chosen:
    """What [`train_and_choose`] returns.

    Args:
        trainer: A Trainer whose model has the weights that were chosen.
        choice: Which, and why, candidate by candidate.
        folder: Where the chosen model is saved, a plain Hugging Face folder.
        target_dataset: The rows that the candidates were compared on.
        keys: Those of the items that [`Choice`] numbers.
    """

    trainer: Trainer
    choice: Choice
    folder: str
    target_dataset: Any = field(repr=False)
    keys: torch.Tensor = field(repr=False)

    @cached_property
    def to_label(self) -> tuple[int, ...]:
        """The numbers of the target's rows on which the candidates disagree, in random order.

        Label the first fifty, leaving none out, and choose again with `labelled_target`. Empty
        where rows have no number (streams, several data sets) or no single label (tokens). All rows
        are read for it.
        """
        domains = Stream.of(self.target_dataset).domains
        if len(domains) > 1 or not is_map_style(domains[0]) or not self.choice.to_label:
            return ()
        found = keys_of_rows(self.trainer, domains[0]).tolist()
        number_of = {key: number for number, key in enumerate(found)}
        asked = self.keys[list(self.choice.to_label)].tolist()
        return tuple(number_of[key] for key in asked if key in number_of)


def train_and_choose(
    make_trainer: Callable[[], Trainer],
    target_dataset: Any,
    candidates: Mapping[str, MakeAdaptations] | None = None,
    *,
    target_priors: Any = None,
    labelled_target: Any = None,
    labels_are_random: bool = False,
) -> Chosen:
    """Train without adaptation and with each of several, and choose without target labels.

    It costs one training run for each candidate, three by default. Each is saved in a folder of its
    name under the Trainer's `output_dir`; an interrupted call finishes what is missing. All start
    from the same random state. A candidate that fails is left out of the choice, and tried again by
    the next call.

    Args:
        make_trainer: Returns a new Trainer with a new model each time, as for training on the
            source alone; its `eval_dataset` are held-out source rows with labels.
        target_dataset: Target rows, prepared like `train_dataset`; labels are hidden.
        candidates: Functions that return new adaptations, by name;
            [`hf_adapt.alignment.candidates`] by default. Source only is always among them.
        target_priors: The target's class frequencies, as `AdaptationCallback` takes them.
        labelled_target: A few of the target's rows, prepared like `train_dataset`, whose labels
            decide (see [`choose`]); they change no training. Call it once without, label the first
            rows of [`Chosen`]'s `to_label` (-100 for what nobody could tell), and call it again:
            what is trained is kept.
        labels_are_random: Whether these rows were drawn at random from all the target's instead.

    Raises:
        TypeError: If a candidate is no function.
        ValueError: If there is no labelled `eval_dataset`, two names have one folder, the
            frequencies are not those of the classes, a labelled row is not one of the target's or
            has two labels, or a folder holds a candidate that was trained in another way.

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
    with preserved_random_state():
        first = make_trainer()
    root = Path(str(first.args.output_dir))
    _check(first, given, root)
    with preserved_random_state():
        untrained = _untrained(first, root, target_dataset)
    keys = untrained["target"].keys
    prior = _known(first, target_priors, untrained["target"].logits.shape[1])
    labels = _labels(first, labelled_target, keys)
    logger.warning("Training %d models: %s.", len(given), ", ".join(given))
    found: list[Candidate] = []
    failed: list[Verdict] = []
    for name, make in given.items():
        with preserved_random_state():
            trainer = make_trainer()
            if trainer is first or trainer.model is first.model:
                raise ValueError("make_trainer() must return a new Trainer and model each time.")
            trainer.args = copy.copy(trainer.args)  # it may be the same object each time
            trainer.args.output_dir = str(_folder(root, name))
            adaptations = make()
            _refuse_other_settings(name, trainer, adaptations, target_priors)
            try:
                found.append(_candidate(name, trainer, adaptations, target_dataset, target_priors))
            except Exception as error:  # gone NaN, out of memory, not for this model
                if name == BASELINE:
                    raise
                logger.exception("%s failed.", name)
                failed.append(Verdict(name, False, f"dropped: it failed: {error}", {}))
    reference = untrained["target"].features
    choice = choose(
        found,
        BASELINE,
        prior=prior,
        reference_features=reference,
        target_labels=labels,
        labels_are_random=labels_are_random,
    )
    choice = replace(choice, candidates=(*choice.candidates, *failed))
    logger.warning("%s", choice)
    folder = _folder(root, choice.chosen)
    load_weights(first, str(folder))
    if first.args.should_save:
        write_text(root / CHOICE_FILE, json.dumps(choice.as_dict(), indent=1))
    return Chosen(first, choice, str(folder), target_dataset, keys)


def _check(trainer: Trainer, given: Mapping[str, Any], root: Path) -> None:
    """Refuse what would be found wrong after hours of training."""
    for name, make in given.items():
        if not callable(make):
            raise TypeError(
                f"Expected a function that returns new adaptations for {name!r}, got {make!r}. "
                "Write {'MMD': lambda: [MMD()]}."
            )
    folders = [_folder(root, name) for name in given]
    if len({str(each).lower() for each in folders}) < len(folders):
        raise ValueError(f"Of the candidates {', '.join(given)} two have the same folder: rename.")
    if trainer.eval_dataset is None or isinstance(trainer.eval_dataset, dict):
        raise ValueError(
            "train_and_choose compares the candidates on held-out source rows with labels: give "
            f"the Trainer one eval_dataset of them, got {type(trainer.eval_dataset).__name__}."
        )


def _folder(root: Path, name: str) -> Path:
    return root / (re.sub(r"[^\w.-]+", "_", name).strip("_") or "unnamed")


def _untrained(trainer: Trainer, root: Path, target_dataset: Any) -> dict[str, ItemOutputs]:
    """What the model gives for both domains before any training; kept, as candidates are."""
    for rows in Stream.of(target_dataset).domains:
        few = [collect_items(trainer, some_rows(rows, 8), hides_labels=True) for _ in range(2)]
        if not few[0].keys.equal(few[1].keys):
            raise ValueError(
                "The target rows are others each time they are read (a random transform, or a "
                "collator that draws random numbers), and candidates are compared on the same "
                "rows. Pass rows that stay as they are."
            )
    found = {
        "source": collect_items(trainer, trainer.eval_dataset),
        "target": _target_items(trainer, target_dataset),
    }
    if not len(found["source"].labelled):
        raise ValueError(
            "The rows of eval_dataset have no labels, and candidates are compared on held-out "
            "source rows with labels."
        )
    file = root / UNTRAINED_FILE
    if trainer.args.should_save and not file.exists():
        save_items(file, found)
    trainer.accelerator.wait_for_everyone()
    kept = load_items(file)
    if not all(kept[name].keys.equal(each.keys) for name, each in found.items()):
        raise ValueError(
            f"{root} holds candidates that were compared on other rows. Take another output_dir, "
            "or remove the folder."
        )
    return kept


def _target_items(trainer: Trainer, target_dataset: Any) -> ItemOutputs:
    streams = Stream.of(target_dataset).domains
    return ItemOutputs.joined([collect_items(trainer, rows, hides_labels=True) for rows in streams])


def _labels(trainer: Trainer, rows: Any, keys: torch.Tensor) -> NDArray[np.int64] | None:
    """The labels of the items with these keys, -100 where there is none; None without rows."""
    if rows is None or (is_map_style(rows) and not len(rows)):
        return None
    try:
        with preserved_random_state():
            found = collect_items(trainer, rows)
    except IndexError as error:  # of the loss
        raise ValueError(
            f"A label of labelled_target is none of the model's classes: {error} Number them as in "
            "train_dataset, and give -100 to rows without one."
        ) from error
    if is_map_style(rows) and len(found) > len(rows):
        raise ValueError(
            "labelled_target decides among classifiers of rows. This model classifies tokens, and "
            "those of one row are no random sample. Leave it out."
        )
    if not len(found.labelled):
        raise ValueError("The rows of labelled_target have no labels. Leave it out, or add them.")
    if strange := int((~torch.isin(found.keys, keys)).sum()):
        raise ValueError(
            f"{strange} of the {len(found)} rows of labelled_target are not among those of "
            "target_dataset. Prepare its rows in the same way, and leave them among the target's."
        )
    labels = [UNTOLD if label == IGNORED else label for label in found.labels.tolist()]
    known, disputed = agreed_labels(zip(found.keys.tolist(), labels, strict=True))
    if disputed:
        raise ValueError(
            f"labelled_target has {len(disputed)} rows with two labels each: to the model they are "
            "equal. Decide on one."
        )
    return aligned_labels(known, keys)


def _known(trainer: Trainer, priors: Any, classes: int) -> Any:
    """The class frequencies as numbers, if they are known."""
    if priors is None or (isinstance(priors, str) and priors != "uniform"):
        return None
    return resolved_priors(priors, class_names(trainer, classes))


def _candidate(
    name: str,
    trainer: Trainer,
    adaptations: Sequence[Adaptation],
    target_dataset: Any,
    target_priors: Any,
) -> Candidate:
    """Train a candidate, unless an earlier call has, and run it on both domains."""
    folder = Path(str(trainer.args.output_dir))
    items = folder / ITEMS_FILE
    if items.exists():
        logger.warning("%s is kept from an earlier call, in %s.", name, folder)
    else:
        logger.warning("Training %s, in %s.", name, folder)
        last = last_whole_checkpoint(folder)
        if trainer.args.should_save:
            settings = _described(trainer, adaptations, target_priors)
            write_text(folder / SETTINGS_FILE, settings)
        if adaptations:
            used = any(each.uses_priors for each in adaptations)
            priors = target_priors if used else None
            adapt(trainer, *adaptations, target_dataset=target_dataset, target_priors=priors)
        trainer.train(resume_from_checkpoint=last)
        trainer.save_model()
        source = collect_items(trainer, trainer.eval_dataset).labelled
        target = _target_items(trainer, target_dataset)
        if trainer.args.should_save:
            save_items(items, {"source": source, "target": target})
        trainer.accelerator.wait_for_everyone()
    return Candidate(name, **load_items(items))


def _refuse_other_settings(
    name: str, trainer: Trainer, adaptations: Sequence[Adaptation], priors: Any
) -> None:
    """Refuse to go on with what was trained in another way."""
    folder = Path(str(trainer.args.output_dir))
    settings = folder / SETTINGS_FILE
    trained = (folder / ITEMS_FILE).exists() or last_whole_checkpoint(folder) is not None
    if not (trained and settings.exists()):
        return
    if settings.read_text(encoding="utf-8") != _described(trainer, adaptations, priors):
        raise ValueError(
            f"{folder} holds {name!r} as it was trained with another model, other rows, settings "
            "or adaptations. Take another output_dir, or remove the folder."
        )


def _described(trainer: Trainer, adaptations: Sequence[Adaptation], priors: Any) -> str:
    """A hash of how a candidate is trained, as far as it can be told from outside."""
    # transformers annotates neither the arguments nor what this returns.
    given = trainer.args.to_dict()  # type: ignore[no-untyped-call]
    arguments = {key: value for key, value in given.items() if not UNRELATED.fullmatch(key)}
    methods = [
        (type(each).__name__, {key: _told(value) for key, value in vars(each).items()})
        for each in adaptations
    ]
    config = getattr(trainer.model, "config", None)
    model = {} if config is None else {**config.to_dict(), "from": config.name_or_path}
    model.pop("transformers_version", None)
    rows: Any = trainer.train_dataset
    known = getattr(rows, "_fingerprint", None) or (len(rows) if hasattr(rows, "__len__") else None)
    if isinstance(rows, (list, tuple)):
        known = [len(rows), *map(_told, some_rows(rows, 16))]
    found = [arguments, methods, type(trainer.model).__name__, model, known, repr(priors)]
    text = json.dumps(found, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _told(value: Any) -> Any:
    """A setting as plain data; a schedule by its values; None for all that is more."""
    if isinstance(value, (int, float, str, bool, type(None))):
        return value
    if isinstance(value, (list, tuple)):
        return [_told(each) for each in value]
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().float().numpy()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufSU":
        return hashlib.sha256(value.tobytes()).hexdigest()
    if isinstance(value, Mapping):
        return {str(key): _told(each) for key, each in value.items()}
    if inspect.isfunction(value):
        try:
            return [round(float(value(step / 10)), 6) for step in range(11)]
        except Exception:  # another kind of function
            return value.__qualname__
    return None
