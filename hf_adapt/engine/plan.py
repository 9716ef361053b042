"""Which adaptations and which target domains a Trainer was given, and its paired training data."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import datasets
import numpy as np
import torch

from hf_adapt.engine.adaptation import Adaptation, Objective
from hf_adapt.engine.columns import dataset_columns
from hf_adapt.engine.domains import (
    DOMAIN,
    PairedCollator,
    PairedDataset,
    PairedIterableDataset,
    TargetForward,
    is_map_style,
    label_columns,
    missing_columns_message,
    pair,
)
from hf_adapt.engine.supported import is_sentence_trainer, refuse_answers

if TYPE_CHECKING:
    from transformers import Trainer

HfDataset = (datasets.Dataset, datasets.IterableDataset)

SPLITS = (datasets.DatasetDict, datasets.IterableDatasetDict)

SOURCE_NAMES = (0, "source")
"""What the source is called in a `domain` column, unless the author says otherwise."""


@dataclass(eq=False)
class Plan:
    """Adaptations given together, with their target.

    Attributes:
        adaptations: What is added to the run.
        target_dataset: Target rows, prepared (tokenised) like the source; a list or a dict of
            datasets for several domains; None if `train_dataset` has a `domain` column.
        target_ratio: Target rows per source row; fractions are allowed.
        use_target_labels: Train on the target's labels too (semi-supervised adaptation, domain
            generalisation). By default they are hidden.
        target_forward: `"joint"`: source and target rows go through the model in one batch;
            `"separate"`: the loss sees source rows alone and the target rows get a forward of
            their own (for losses that do not ignore -100, or that couple the rows of a batch).
        source_domain: Which value of a `domain` column is the source (0 or "source" by default).
        origin: The callback that brought the plan, if one did.
    """

    adaptations: tuple[Adaptation, ...]
    target_dataset: Any = None
    target_ratio: float = 1.0
    use_target_labels: bool = False
    target_forward: TargetForward = "joint"
    source_domain: int | str | None = None
    origin: Any = None

    def __post_init__(self) -> None:
        for adaptation in self.adaptations:
            if not isinstance(adaptation, Adaptation):
                raise TypeError(_not_an_adaptation(adaptation))
        if self.target_dataset is not None:
            check_target(self.target_dataset)
            if not any(isinstance(a, Objective) or a.needs_target for a in self.adaptations):
                raise ValueError(
                    "A target_dataset was given without an adaptation that uses it, so it would "
                    "have no effect. Say what to do with it, for example "
                    "AdaptationCallback(MMD(), target_dataset=target)."
                )
        if not self.target_ratio > 0:
            raise ValueError(
                f"target_ratio={self.target_ratio} must be positive: the number of target rows "
                "that each source row brings along (0.5 is one for every second source row)."
            )
        if self.target_forward not in get_args(TargetForward):
            raise ValueError(
                f"target_forward={self.target_forward!r} is unknown: use 'joint' or 'separate'."
            )


def _not_an_adaptation(given: Any) -> str:
    """What to say of an argument that is no adaptation."""
    if isinstance(given, type) and issubclass(given, Adaptation):
        return f"Expected an Adaptation, got the class {given.__name__}: write {given.__name__}()."
    if isinstance(given, (list, tuple)) and given and isinstance(given[0], Adaptation):
        return (
            f"Expected an Adaptation, got a {type(given).__name__} of them: pass them one by one, "
            f"as in AdaptationCallback({', '.join(f'{type(a).__name__}()' for a in given)})."
        )
    shown = repr(given)
    return (
        f"Expected an Adaptation or Objective, got {type(given).__name__} "
        f"({shown if len(shown) < 80 else shown[:77] + '...'}). A target dataset is passed as "
        "target_dataset=..."
    )


def check_target(target: Any) -> None:
    """Refuse what is no dataset, or more than one without saying so.

    Raises:
        TypeError: If it is not a dataset.
        ValueError: If it is all the splits of one.
    """
    prepare = (
        "Load it, for example load_dataset('csv', data_files=..., split='train'), and tokenise it "
        "as the train_dataset was."
    )
    if isinstance(target, SPLITS):
        splits = [str(name) for name in target]
        raise ValueError(
            f"target_dataset is a {type(target).__name__} with the splits {', '.join(splits)}; all "
            "of them, a test split too, would be trained on as domains of their own. Choose one: "
            f"target_dataset=dataset[{splits[0] if splits else 'train'!r}], or load_dataset(..., "
            "split='train'). Several target domains are passed as a list or a plain dict."
        )
    if isinstance(target, (str, bytes, os.PathLike)):
        raise TypeError(
            f"target_dataset={str(target)[:80]!r} is a {type(target).__name__}, expected a "
            f"dataset. {prepare}"
        )
    if isinstance(target, datasets.Dataset | datasets.IterableDataset | torch.utils.data.Dataset):
        return
    if isinstance(target, Mapping):
        if not target or any(_is_column(each) for each in target.values()):
            raise TypeError(
                f"target_dataset is a {type(target).__name__} of columns ("
                f"{', '.join(map(str, target)) or 'none'}), expected a dataset, or a dict with a "
                "dataset for each domain. Use datasets.Dataset.from_dict(dict(columns))."
            )
        for each in target.values():
            check_target(each)
    elif isinstance(target, (list, tuple)):
        for each in target:
            if not isinstance(each, Mapping | tuple) or isinstance(each, SPLITS):  # else a row
                check_target(each)
    elif isinstance(target, (torch.Tensor, np.ndarray)):
        raise TypeError(
            f"target_dataset is a {type(target).__name__}, expected a dataset. {prepare}"
        )
    elif hasattr(target, "iloc"):
        raise TypeError(
            f"target_dataset is a {type(target).__name__}, whose rows are not read by number. Use "
            "datasets.Dataset.from_pandas(frame, preserve_index=False), and tokenise it as the "
            "train_dataset was."
        )
    elif isinstance(target, torch.utils.data.DataLoader | Iterator) or not (
        hasattr(target, "__getitem__") or hasattr(target, "__iter__")
    ):
        raise TypeError(
            f"target_dataset is a {type(target).__name__}, expected a dataset: rows that can be "
            f"read by number, or again and again. {prepare}"
        )


def _is_column(value: Any) -> bool:
    """Whether it is a column of a table rather than a dataset."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return True
    return (
        isinstance(value, list) and bool(value) and isinstance(value[0], list | str | int | float)
    )


def active_adaptations(plans: Sequence[Plan]) -> list[Adaptation]:
    """The adaptations that change the run, with unique names.

    Raises:
        ValueError: If two have the same name, or two freeze parts of the model.
    """
    active = [a for plan in plans for a in plan.adaptations if a.is_active]
    names = [a.name for a in active]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"Several adaptations are named {', '.join(map(repr, twice))}, so each would be "
            "counted twice. If the callback was added twice (a notebook cell that ran again), "
            "remove one with trainer.remove_callback(...), or make the Trainer anew. If both are "
            "meant, give one of them another name=."
        )
    freezing = [a.name for a in active if a.freezes]
    if len(freezing) > 1:
        raise ValueError(
            f"{' and '.join(freezing)} both decide what is frozen. Put what you want into one "
            "schedule."
        )
    return active


class DomainData:
    """The target domains of a run and the training set paired with them.

    Args:
        trainer: The Trainer whose `train_dataset` is the source.
        plans: The plans of the run; they must agree on the target.
    """

    def __init__(self, trainer: Trainer, plans: Sequence[Plan]) -> None:
        self.trainer = trainer
        refuse_answers(
            trainer,
            "rows of a target cannot stand beside its rows",
            "Adapt the model to the target first, with SFTTrainer and an objective on features "
            "(MMD, DANN), and train on the answers then. GradualUnfreezingCallback works here too, "
            "and Distillation with DPO, KTO and rewards.",
        )
        if getattr(trainer.args, "packing", False):
            raise ValueError(
                "packing=True merges rows, so source and target rows could not be told apart. "
                "Turn packing off."
            )
        plan = _agreed(plans)
        self._plan = plan
        source, targets = _split(trainer, plan)
        targets = [_prepared(trainer, source, target) for target in targets]
        for target in targets:
            _check_not_empty(target)
        self.num_domains = 1 + len(targets)
        self.separate = plan.target_forward == "separate" or is_sentence_trainer(trainer)
        source_rows = _without_unused_columns(trainer, source)
        self._used = _used_columns(trainer)
        _check_columns(trainer, source_rows, targets, self._used, plan.use_target_labels)
        target_rows = [_without_unused_columns(trainer, target) for target in targets]
        if is_map_style(source) and 0 < len(source) * plan.target_ratio < 1:
            raise ValueError(
                f"target_ratio={plan.target_ratio} of {len(source)} training rows is not even one "
                "target row in an epoch. Use a larger ratio."
            )
        seed = trainer.args.data_seed if trainer.args.data_seed is not None else trainer.args.seed
        self._source = source
        self._paired: PairedDataset | PairedIterableDataset = pair(
            source_rows, target_rows, plan.target_ratio, seed, is_sentence_trainer(trainer)
        )

    @property
    def uses_target_labels(self) -> bool:
        """Whether the target's labels are trained on too."""
        return self._plan.use_target_labels

    def set_epoch(self, epoch: int) -> None:
        """Draw the target rows of this epoch from here on."""
        self._paired.set_epoch(epoch)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the paired set and collator where the author's were, while a loader is built."""
        trainer = self.trainer
        dataset, collator = trainer.train_dataset, trainer.data_collator
        inner = collator
        if not isinstance(self._source, datasets.Dataset) and not is_sentence_trainer(trainer):
            # The Trainer cleans the rows of other datasets in the collator; ours are wrapped.
            inner = trainer._get_collator_with_removed_columns(collator, description="training")
        trainer.train_dataset = self._paired
        trainer.data_collator = PairedCollator(
            inner, trainer.label_names, self._plan.use_target_labels, self.separate, self._used
        )
        try:
            yield
        finally:
            trainer.train_dataset, trainer.data_collator = dataset, collator

    def is_paired(self, dataset: Any) -> bool:
        """Whether this is the paired set (its sampler is the source's)."""
        return dataset is self._paired

    @property
    def source(self) -> Any:
        """The source rows, as the author's sampler must see them."""
        return self._source


def _agreed(plans: Sequence[Plan]) -> Plan:
    """The one target that all plans share."""
    with_target = [plan for plan in plans if plan.target_dataset is not None]
    first = with_target[0] if with_target else plans[0]
    for plan in with_target[1:]:
        if plan.target_dataset is not first.target_dataset:
            raise ValueError(
                "Two adaptations were given different target datasets, but a batch has one set "
                "of target rows. Pass the same dataset to both, give target_dataset to one of "
                "them only, or a list of all target domains to one: target_dataset=[a, b]."
            )
        for option in ("target_ratio", "use_target_labels", "target_forward"):
            if getattr(plan, option) != getattr(first, option):
                raise ValueError(
                    f"Two adaptations of one run disagree on {option}: {getattr(first, option)!r} "
                    f"and {getattr(plan, option)!r}. Give the target and its options to one."
                )
    return first


def _split(trainer: Trainer, plan: Plan) -> tuple[Any, list[Any]]:
    """Source and targets: as given, or split by the `domain` column of `train_dataset`."""
    source: Any = trainer.train_dataset
    target = plan.target_dataset
    if source is None:
        raise ValueError("Training needs a train_dataset: it is the source domain.")
    if isinstance(source, Mapping):
        raise ValueError(
            f"train_dataset is a {type(source).__name__} of {', '.join(map(str, source))}, which "
            "the Trainer concatenates itself; target rows are paired with the rows of one dataset. "
            "Pass datasets.concatenate_datasets([...])."
        )
    if target is not None:
        if isinstance(target, Mapping) and not isinstance(target, HfDataset):
            return source, list(target.values())
        several = isinstance(target, (list, tuple)) and len(target) > 0
        if several and not isinstance(target[0], Mapping):  # else it is a list of rows
            return source, list(target)
        return source, [target]
    columns = dataset_columns(source, read_stream=True) or []
    if DOMAIN not in columns:
        needing = [a.name for a in plan.adaptations if a.needs_target]
        raise ValueError(
            f"{', '.join(needing) or 'The adaptation'} needs target rows: pass target_dataset=, "
            f"or a train_dataset with a {DOMAIN!r} column (found {columns or 'no column names'})."
        )
    if isinstance(source, datasets.IterableDataset):
        chosen = SOURCE_NAMES if plan.source_domain is None else (plan.source_domain,)
        return (
            source.filter(lambda row: _given_domain(row[DOMAIN]) in chosen),
            [source.filter(lambda row: _given_domain(row[DOMAIN]) not in chosen)],
        )
    stored = isinstance(source, datasets.Dataset)
    given = source[DOMAIN] if stored else [row[DOMAIN] for row in source]
    domains = np.asarray([_given_domain(value, i) for i, value in enumerate(given)])
    values = np.unique(domains).tolist()
    value = plan.source_domain
    if value is None:
        value = next((v for v in SOURCE_NAMES if v in values), None)
    if value not in values or len(values) < 2:
        raise ValueError(
            f"The {DOMAIN!r} column of train_dataset holds {values}: it needs a source and at "
            "least one other domain. Pass source_domain= to say which value is the source "
            "(0 or 'source' by default)."
        )

    def select(places: np.ndarray) -> Any:
        return source.select(places) if stored else [source[int(place)] for place in places]

    return (
        select(np.flatnonzero(domains == value)),
        [select(np.flatnonzero(domains == v)) for v in values if v != value],
    )


def _given_domain(value: Any, row: int | None = None) -> Any:
    """The value of a `domain` column.

    Raises:
        ValueError: If it is missing.
    """
    if value is None or value != value:  # NaN
        place = "A row" if row is None else f"Row {row}"
        raise ValueError(
            f"{place} of train_dataset has {value} in its {DOMAIN!r} column, so it is neither "
            "source nor target. Fill the column in, or leave such rows out: "
            f"train_dataset.filter(lambda row: row[{DOMAIN!r}] is not None)."
        )
    return value


def _prepared(trainer: Trainer, source: Any, target: Any) -> Any:
    """A raw target of a Trainer that tokenises its own datasets (TRL), tokenised by it."""
    prepare = getattr(trainer, "_prepare_dataset", None)
    if not callable(prepare):
        return target
    target_has_tokens, source_has_tokens = (
        "input_ids" in (dataset_columns(data, read_stream=True) or ()) for data in (target, source)
    )
    if target_has_tokens or not source_has_tokens:
        return target
    if isinstance(target, list):
        target = datasets.Dataset.from_list(target)
    if not isinstance(target, HfDataset):
        return target
    formatting = getattr(trainer, "_formatting_func", None)
    return prepare(target, trainer.processing_class, trainer.args, False, formatting, "target")


def _check_not_empty(target: Any) -> None:
    if hasattr(target, "__len__") and len(target) == 0:
        raise ValueError(
            "The target_dataset is empty: adaptation needs unlabelled target rows (an empty set "
            "is often the result of a filter or a wrong split name)."
        )


def _without_unused_columns(trainer: Trainer, dataset: Any) -> Any:
    if isinstance(dataset, datasets.Dataset) and not is_sentence_trainer(trainer):
        if DOMAIN in dataset.column_names:
            dataset = dataset.remove_columns(DOMAIN)
        return trainer._remove_unused_columns(dataset, description="training")
    return dataset


def _used_columns(trainer: Trainer) -> set[str] | None:
    """The columns that reach the collator, or None for all."""
    if not trainer.args.remove_unused_columns or is_sentence_trainer(trainer):
        return None
    trainer._set_signature_columns_if_needed()
    kept = trainer._kept_columns("training")  # type: ignore[attr-defined]  # AdaptationMixin's
    return {*(getattr(trainer, "_signature_columns", None) or ()), *kept}


def _check_columns(
    trainer: Trainer,
    source: Any,
    targets: Sequence[Any],
    used: Collection[str] | None,
    use_labels: bool,
) -> None:
    """Refuse a target without the source's model inputs, before anything is trained."""
    labels = {*label_columns(trainer.label_names, trainer.data_collator), DOMAIN}
    wanted = dataset_columns(source)
    for target in targets:
        found = dataset_columns(target)
        if wanted is None or found is None:
            continue  # streams without known columns are checked row by row
        missing = [
            name
            for name in wanted
            if name not in found and name not in labels and (used is None or name in used)
        ]
        if missing:
            raise ValueError(missing_columns_message(missing, found))
        own = [name for name in wanted if name in labels - {DOMAIN}]
        if use_labels and own and not any(name in found for name in own):
            raise ValueError(
                f"use_target_labels=True, but the target_dataset has none of the label columns "
                f"{', '.join(map(repr, own))} of the train_dataset; it has "
                f"{', '.join(map(repr, found))}. Rename its label column as in the train_dataset."
            )


def has_domain_needs(plans: Sequence[Plan], adaptations: Sequence[Adaptation]) -> bool:
    """Whether the run must pair its rows with target rows."""
    if any(a.needs_target for a in adaptations):
        return True
    active = set(map(id, adaptations))
    return any(
        plan.target_dataset is not None and any(id(a) in active for a in plan.adaptations)
        for plan in plans
    )
