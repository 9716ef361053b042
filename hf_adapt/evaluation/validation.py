"""Validation without target labels, in the Trainer's own evaluation."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_adapt.alignment.predictions import (
    LANGUAGE_MODELS,
    refuse_heads,
    refuse_other_problems,
)
from hf_adapt.alignment.priors import Priors, class_names, resolved_priors
from hf_adapt.engine.item_outputs import ItemOutputs, OutputCollector, halved, some_rows
from hf_adapt.engine.mixins import EvaluationObserver
from hf_adapt.engine.streams import TARGET, Stream
from hf_adapt.evaluation.arrays import extra
from hf_adapt.evaluation.collapsed import collapse
from hf_adapt.evaluation.neighborhoods import neighbor_agreement
from hf_adapt.evaluation.scores import NEED_SOURCE, VALIDATORS, TargetScores, strided
from hf_adapt.models.pooling import Pooling

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

ENSEMBLE, NEIGHBORS = "ensv", "neighbors"
OF_A_RUN = (ENSEMBLE, NEIGHBORS)
"""Validators that compare an evaluation with what came before it."""


class LabelFreeValidation(EvaluationObserver):
    """Adds metrics of unlabelled target rows to each evaluation, so that they can choose.

    They are named `eval_<name>_<validator>` and higher is better, so that `metric_for_best_model=
    "eval_target_iwv"`, early stopping, `load_best_model_at_end` and hyperparameter search work as
    with any metric. Labels of the target are never seen. The Trainer's `eval_dataset` should be
    held-out source rows with labels, which some validators compare with.

    Read `docs/choosing.md` before you trust one of them: each can be fooled, and a score of the
    target's predictions alone (entropy, im, nuclear_norm, snd) is highest for a collapsed model.

    Args:
        target_dataset: Target rows, prepared like `train_dataset`, of any kind that `evaluate`
            takes, or a list of such; the run's own target by default.
        validators: Which ones: `"entropy"`, `"im"` (information maximisation with the class
            frequencies), `"nuclear_norm"`, `"iwv"` and `"dev"` (importance-weighted), `"circular"`,
            `"class_ami"`, `"snd"`, `"class_balance"`, `"ensv"` (agreement with the mean of all
            evaluations of this run so far; for reading: the first agrees with itself),
            `"neighbors"` (whether rows that were alike before
            training are given the same class; only during training). All by default.
        prior: The target's class frequencies, as `target_priors=` takes them (numbers or
            `"uniform"`); the run's `target_priors` by default.
        max_items: So many rows and items of each side are used at most, spread evenly; of a stream
            the first.
        feature_layer: Dotted name of the module whose output the features are.
        pooling: `"mean"`, `"cls"`, `"last"`, `"tokens"`, a callable, or `"auto"`.
        name: Prefix of the metrics.

    Logs:
        Beside the validators `effective_sample_size` (of the weights), `a_distance`,
        `accuracy_estimate` (ATC, for reading, not for choosing) and `collapsed` (0 or 1). A value
        that cannot be trusted, below an effective sample size of 30, between domains that do not
        overlap, of too few rows or of a model gone NaN, is -inf, so that it is never chosen, as are
        all of a model that has collapsed.

    Raises:
        ValueError: If a validator is unknown, the model predicts no exclusive classes, or there is
            no target.

    Example:
        ```python
        args = TrainingArguments(..., eval_strategy="epoch", save_strategy="epoch",
                                 load_best_model_at_end=True,
                                 metric_for_best_model="eval_target_iwv")
        trainer = Trainer(model, args, train_dataset=source, eval_dataset=source_dev, callbacks=[
            AdaptationCallback(SelfTraining(), LabelFreeValidation(), target_dataset=target)])
        ```
    """

    name = "target"
    uses_priors = True
    observes_predictions = False  # predict() is about the rows that it is given

    def __init__(
        self,
        target_dataset: Any = None,
        *,
        validators: Sequence[str] = (*VALIDATORS, *OF_A_RUN),
        prior: Priors | None = None,
        max_items: int = 20_000,
        feature_layer: str | None = None,
        pooling: Pooling = "auto",
        name: str = "target",
    ) -> None:
        known = (*VALIDATORS, *OF_A_RUN)
        validators = (validators,) if isinstance(validators, str) else tuple(validators)
        if unknown := [each for each in validators if each not in known]:
            raise ValueError(f"The validators {unknown} are unknown: use {', '.join(known)}.")
        if max_items < 2:
            raise ValueError(f"max_items={max_items} must be at least 2.")
        self.target = None if target_dataset is None else Stream.of(target_dataset)
        if self.target is None:
            self.needs_streams = (TARGET,)
        self.validators = validators
        self.prior = prior
        self.max_items = max_items
        self.name = name
        self._options: dict[str, Any] = {"feature_layer": feature_layer, "pooling": pooling}
        self._source = OutputCollector(**self._options)
        self._ensemble: torch.Tensor | None = None
        self._ensemble_keys = torch.zeros(0, dtype=torch.long)
        self._reference: dict[str, torch.Tensor] = {}
        self._warned: set[str] = set()

    def setup(self, trainer: Trainer) -> None:
        """Refuse a model without classes; forget the evaluations of an earlier run."""
        self._check(trainer)
        self._ensemble, self._reference, self._warned = None, {}, set()
        if trainer.args.eval_strategy == "no":
            logger.warning(
                "LabelFreeValidation adds to evaluations, and this run makes none: pass "
                'eval_strategy="epoch" and an eval_dataset, or call trainer.evaluate() afterwards.'
            )

    def begin(self, trainer: Trainer) -> None:
        """Note which target rows are alike before anything is trained."""
        if NEIGHBORS in self.validators and trainer.state.global_step == 0:
            self._trainer = trainer
            items = self._target()
            self._reference = {"features": halved(items.features), "keys": items.keys}

    def _check(self, trainer: Trainer) -> None:
        extra("sklearn")  # rather than at the first evaluation
        refuse_other_problems(trainer.model, "LabelFreeValidation")
        heads = (*LANGUAGE_MODELS, "question_answering", "multiple_choice")
        refuse_heads(trainer.model, "LabelFreeValidation", *heads)
        best = str(trainer.args.metric_for_best_model or "").removeprefix("eval_")
        # With a dict of eval datasets the name of one stands before.
        if re.fullmatch(rf"(.*_)?{re.escape(self.name)}_{ENSEMBLE}", best):
            raise ValueError(
                f"metric_for_best_model={best!r} always takes the first checkpoint: the first "
                f"evaluation agrees with itself. Use {self.name}_{NEIGHBORS}."
            )
        own = "|".join((*VALIDATORS, *OF_A_RUN))
        if re.fullmatch(rf"((.*_)?{re.escape(self.name)}_)?({own})", best):
            if trainer.args.greater_is_better is False:
                raise ValueError(
                    f"metric_for_best_model={best!r} is better when it is higher, and "
                    "greater_is_better=False was given. Leave it out."
                )

    # ---- one evaluation ----

    def begin_evaluation(self, trainer: Trainer, prefix: str) -> None:
        """Collect what the model gives for the rows that are evaluated."""
        self._trainer = trainer
        self._check(trainer)
        self._source.begin_evaluation(trainer, prefix)

    def around_prediction(self, inputs: Mapping[str, Any]) -> AbstractContextManager[Any]:
        """Capture what the model gives."""
        return self._source.around_prediction(inputs)

    def observe(
        self, inputs: Mapping[str, Any], columns: Mapping[str, Sequence[Any]], outputs: Any
    ) -> None:
        """Keep it."""
        self._source.observe(inputs, columns, outputs)

    def end_evaluation(self, metrics: Mapping[str, float], prefix: str) -> Mapping[str, float]:
        """Run the model over the target; return all values."""
        self._source.close()
        source = strided(self._source.items.labelled, self.max_items)
        found = self._values(source, self._target())
        return {f"{prefix}_{self.name}_{key}": value for key, value in found.items()}

    def _target(self) -> ItemOutputs:
        """Run the model over the target."""
        trainer: Any = self._trainer
        collector = OutputCollector(hides_labels=True, **self._options)
        domains = [some_rows(rows, self.max_items) for rows in self._domains(trainer)]
        batches = [trainer.collect(rows, collector) for rows in domains]
        return strided(ItemOutputs.joined(batches), self.max_items)

    def _domains(self, trainer: Any) -> list[Any]:
        stream = self.target if self.target is not None else trainer.stream_options(TARGET)
        if stream is None or stream.dataset is None:
            raise ValueError(
                "LabelFreeValidation has no target rows: pass LabelFreeValidation(target), or "
                "target_dataset= to the callback that it is given to."
            )
        return list(stream.domains)

    def _prior(self, trainer: Any, classes: int) -> np.ndarray | None:
        given = self.prior
        if given is None and (stream := trainer.stream_options(TARGET)) is not None:
            given = stream.priors
        if given is None or (isinstance(given, str) and given != "uniform"):
            return None  # nothing is known of them
        return resolved_priors(given, class_names(trainer, classes)).numpy()

    def _values(self, source: ItemOutputs, target: ItemOutputs) -> dict[str, float]:
        outputs = (source.logits, source.features, target.logits, target.features)
        if not all(bool(torch.isfinite(each).all()) for each in outputs):
            self._warn("the model's outputs are NaN or infinite, so all values are -inf")
            return dict.fromkeys(self.validators, -math.inf)
        classes = target.logits.shape[1]
        prior = self._prior(self._trainer, classes)
        scores = TargetScores(source if len(source) else None, target, prior)
        found = scores.all([name for name in self.validators if name not in OF_A_RUN])
        if ENSEMBLE in self.validators:
            found[ENSEMBLE] = self._agreement(target)
        if NEIGHBORS in self.validators:
            found |= self._neighbors(target)
        if len(source):
            if {"iwv", "dev"} & {*self.validators}:
                found |= scores.measured("effective_sample_size", "a_distance")
            found |= scores.measured("accuracy_estimate")
        elif missing := [name for name in NEED_SOURCE if name in self.validators]:
            self._warn(f"the evaluated rows have no labels, so there is no {', '.join(missing)}")
        for problem, name in scores.problems.items():
            self._warn(f"{name} is -inf: {problem}")
        reason = collapse(target.logits, target.features, prior)
        if reason is not None:
            if len(target) > 1:  # some validators value it more than any sound model
                found |= dict.fromkeys({*self.validators} & found.keys(), -math.inf)
            logger.warning("%s: the model has collapsed: %s.", self.name, reason)
        found["collapsed"] = float(reason is not None)
        return found

    def _neighbors(self, target: ItemOutputs) -> dict[str, float]:
        """The agreement of neighbours, if it is known which they are."""
        if not self._reference:
            if self._trainer.is_in_train:
                self._warn("there are no features from before training, so there is no neighbors")
            return {}
        if not torch.equal(self._reference["keys"], target.keys):
            self._warn("the target rows are others than before training: no neighbors")
            return {}
        if len(target) < 2:
            return {NEIGHBORS: -math.inf}
        features, classes = self._reference["features"], target.logits.shape[1]
        return {NEIGHBORS: neighbor_agreement(target.logits, features, num_classes=classes)}

    def _warn(self, text: str) -> None:
        """Say something once in a run."""
        kind = text[:40]
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning("%s: %s.", self.name, text.rstrip("."))

    def _agreement(self, target: ItemOutputs) -> float:
        """The agreement with the mean of the evaluations of this run, this one included."""
        own = target.logits.softmax(1)
        same = self._ensemble is not None and torch.equal(self._ensemble_keys, target.keys)
        if self._ensemble is not None and not same:
            self._warn("the target rows are others than before, so ensv begins again")
        total = own + self._ensemble if same and self._ensemble is not None else own
        if self._trainer.is_in_train:
            self._ensemble, self._ensemble_keys = total, target.keys
        return float((own.argmax(1) == total.argmax(1)).double().mean())

    # ---- the checkpoint ----

    def state_dict(self) -> dict[str, Any]:
        """The sum of the evaluations' predictions, and the features before training."""
        state = {f"reference_{name}": value for name, value in self._reference.items()}
        if self._ensemble is not None:
            state |= {"ensemble": self._ensemble, "ensemble_keys": self._ensemble_keys}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        self._reference = {
            n: state[f"reference_{n}"] for n in ("features", "keys") if f"reference_{n}" in state
        }
        if "ensemble" in state:
            self._ensemble, self._ensemble_keys = state["ensemble"], state["ensemble_keys"]

    def close(self) -> None:
        """Remove the hooks."""
        self._source.close()
