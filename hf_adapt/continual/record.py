"""A record of several trainings: how well each task is known after each of them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list

from hf_adapt.continual.metrics import continual_metrics
from hf_adapt.continual.plots import score_map
from hf_adapt.engine.adaptation import Adaptation
from hf_adapt.engine.training import resumed_from, saved_state
from hf_adapt.storage.text_file import write_figure, write_text

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

Scores = dict[str, float]
LEVELS = ("average_accuracy", "learning_accuracy", "incremental_accuracy")
"""Metrics that are scores themselves, not differences of scores."""


@dataclass
class Record:
    """The scores of each task before all trainings and after each.

    Args:
        metric: What the scores are.
        baseline: Scores before the first training, by task; None if they were not measured.
        rows: Scores after each training, by the task that was trained, in the order of training;
            that of a task that is trained again is "task (2)".
    """

    metric: str
    baseline: Scores | None = None
    rows: dict[str, Scores] = field(default_factory=dict)

    @property
    def tasks(self) -> list[str]:
        """All tasks: those that were trained in their order, then the others."""
        scored = [self.baseline or {}, *self.rows.values()]
        return list(dict.fromkeys([*self.trained, *(task for scores in scored for task in scores)]))

    @property
    def trained(self) -> list[str]:
        """The task that each row has trained."""
        return [task_of(name, scores) for name, scores in self.rows.items()]

    def row_of(self, task: str, tasks: Collection[str]) -> str:
        """The row that a training of a task has: that of the last training, if it was of the task.

        Args:
            task: The task.
            tasks: All tasks, whose names no further row may have.
        """
        if self.trained[-1:] == [task]:
            return list(self.rows)[-1]
        name, number = task, 1
        while name in self.rows or (number > 1 and name in tasks):
            number += 1
            name = f"{task} ({number})"
        return name

    def table(self, *rows: Scores) -> list[list[float]]:
        """Scores with a column for each task, NaN where there is none."""
        return [[row.get(task, math.nan) for task in self.tasks] for row in rows]

    def metrics(self) -> dict[str, float]:
        """Those of [`continual_metrics`] that can be computed.

        Losses are negated, so that a positive BWT is a gain and forgetting a loss for them too.
        """
        sign = -1.0 if self.metric.endswith("loss") else 1.0
        matrix, before = (
            [[sign * score for score in row] for row in self.table(*rows)]
            for rows in (self.rows.values(), [self.baseline or {}])
        )
        trained = [self.tasks.index(task) for task in self.trained]
        found = continual_metrics(matrix, before[0], trained=trained)
        signed = {n: sign * value if n in LEVELS else value for n, value in found.items()}
        return {name: value for name, value in signed.items() if math.isfinite(value)}


def task_of(row: str, tasks: Collection[str]) -> str:
    """The task that a row has trained."""
    return row if row in tasks else row.rpartition(" (")[0]


class ContinualMetrics(Adaptation):
    """Records how well all tasks are known after each training, and prints what was forgotten.

    For one `train()` per task, with an `eval_dataset` that is a dict of all tasks. When a training
    has ended, all tasks are evaluated with the final weights (those of the best checkpoint, or an
    average, where the model has them) and become a row of a JSON file, which later trainings go on
    with, in this process or in another. Before each training the tasks are evaluated too: before
    the first of all for the baseline, before a later one to see that the model is the one that the
    last training has left (a warning says so if not). Average and learning accuracy, BWT, FWT and
    forgetting ([`continual_metrics`]) are printed and logged as `continual/bwt` and so on, and a
    heat map is drawn beside the file, where matplotlib is installed.

    Args:
        task: The task that is trained, a key of `eval_dataset`; by default the first of them that
            has no row yet. Training the last task again replaces its row; one before it has a
            further row, if the model is the one that the last training has left.
        metric: What is read of each evaluation, `eval_{task}_{metric}`: a name that
            `compute_metrics` returns, for which higher is better; or `"loss"`, for which lower is.
        path: The JSON file, or its folder; by default `continual_metrics.json` in the folder that
            `output_dir` lies in, so that `runs/movies` and `runs/tweets` share
            `runs/continual_metrics.json`. Give each sequence of trainings (each seed) a file of its
            own.
        known: Tasks that the model knows already, in the order in which it has learnt them. Their
            rows are the scores before the first training of all, from which forgetting counts.

    Raises:
        ValueError: Before training, if `eval_dataset` is no dict or lacks a task, if the metric is
            not among those of an evaluation, if the file belongs to another metric, or if a task
            is trained again by a model that has not gone through the trainings in the file.

    Example:
        ```python
        tasks = {"movies": movies_test, "tweets": tweets_test}
        trainer = Trainer(model, args, train_dataset=tweets, eval_dataset=tasks, ...)
        adapt(trainer, Replay(memory), ContinualMetrics("tweets", known=["movies"])).train()
        ```
    """

    name = "continual"

    def __init__(
        self,
        task: str | None = None,
        metric: str = "accuracy",
        path: str | Path | None = None,
        known: Sequence[str] = (),
    ) -> None:
        self.task, self.metric, self.path = task, metric, path
        self.known = [known] if isinstance(known, str) else list(known)
        self.record = Record(metric)
        self._file, self._row, self._own = Path(), "", list[str]()

    def setup(self, trainer: Trainer) -> None:
        """Read the file, and check that all tasks can be evaluated."""
        beside = Path(trainer.args.output_dir or ".").absolute().parent
        self._file = beside if self.path is None else Path(self.path)
        if self.path is None or self._file.is_dir():
            self._file /= "continual_metrics.json"
        if not isinstance(trainer.eval_dataset, Mapping) or not trainer.eval_dataset:
            raise ValueError(
                "ContinualMetrics evaluates several tasks: eval_dataset must be a dict of data "
                f"sets by task, got {type(trainer.eval_dataset).__name__}. Pass eval_dataset="
                "{'movies': ..., 'tweets': ...}."
            )
        if self.metric != "loss" and trainer.compute_metrics is None:
            raise ValueError(
                f"ContinualMetrics reads eval_<task>_{self.metric}, and the Trainer has no "
                "compute_metrics. Pass one that returns it, or metric='loss'."
            )
        self.record = self._read(trainer)
        tasks = list(trainer.eval_dataset)
        if missing := [task for task in self.record.tasks if task not in tasks]:
            raise ValueError(
                f"{self._file} has scores of {', '.join(missing)}, which eval_dataset lacks; it "
                f"has {', '.join(tasks)}. Add them, so that they are evaluated after this training "
                "too, or pass another path."
            )
        if unknown := [task for task in self.known if task not in tasks or task == self.task]:
            raise ValueError(
                f"known={self.known}: {', '.join(unknown)} is trained now, or none of the tasks of "
                f"eval_dataset, which has {', '.join(tasks)}."
            )
        self._row = self._choose(tasks, saved_state(trainer, self).get("row"))

    def _read(self, trainer: Trainer) -> Record:
        """What the main process finds in the file; other machines may not see it."""
        text: list[Any] = [None]
        if trainer.is_world_process_zero() and self._file.is_file():
            text = [self._file.read_text(encoding="utf-8")]
        broadcast_object_list(text)
        if text[0] is None:
            return Record(self.metric)
        try:
            content = json.loads(text[0])
            record = Record(content["metric"], content["baseline"], content["rows"])
            record.table(*record.rows.values(), record.baseline or {})  # are they scores by task?
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self._file} is no record of ContinualMetrics ({error!r}). Move it away, or pass "
                "another path."
            ) from error
        if record.metric != self.metric:
            raise ValueError(
                f"{self._file} records {record.metric}, not {self.metric}. Pass metric="
                f"{record.metric!r}, or another path."
            )
        return record

    def _choose(self, tasks: list[str], resumed: str | None) -> str:
        """The row of the task that is trained."""
        task = self.task or (None if resumed is None else task_of(resumed, tasks))
        if task is not None and task not in tasks:
            raise ValueError(
                f"ContinualMetrics({task!r}): no such task in eval_dataset, which has "
                f"{', '.join(tasks)}."
            )
        if task is None:
            left = [each for each in tasks if each not in (*self.record.trained, *self.known)]
            if not left:
                raise ValueError(
                    f"{self._file} has a row for each task of eval_dataset. To train one again, "
                    "name it (task=...); to start anew, delete the file or pass another path."
                )
            task = left[0]
        is_resumed = resumed is not None and task_of(resumed, tasks) == task
        row = resumed if is_resumed and resumed else self.record.row_of(task, tasks)
        if found := [name for name in self.record.rows if name not in (*self._own, row)]:
            logger.warning(
                "ContinualMetrics goes on with %s, which has rows for %s; the task trained now is "
                "%s. Pass another path= (or task=) if that is not so.",
                self._file,
                ", ".join(found),
                task,
            )
        return row

    def begin(self, trainer: Trainer) -> None:
        """Evaluate all tasks before the first training of all."""
        if resumed_from(trainer) is not None:
            return
        scores, rows = self._evaluate(trainer), self.record.rows
        if self.record.baseline is not None or rows:
            if rows and self._row not in rows:
                self._compare(scores, list(rows.values())[-1])
            return
        self.record.baseline = scores
        self.record.rows = {task: scores for task in self.known}
        self._own += self.known
        self._write(trainer)

    def _compare(self, scores: Scores, before: Scores) -> None:
        """Say so if the model is not the one that the last training has left.

        Raises:
            ValueError: If a task is trained again: this is most likely another sequence.
        """
        known = [task for task in self.record.trained if task in before and task in scores]
        other = {task for task in known if abs(scores[task] - before[task]) > 0.005}
        numbers = ", ".join(f"{t} {before[t]:.4f}, now {scores[t]:.4f}" for t in sorted(other))
        if other and self._row not in scores:
            raise ValueError(
                f"{self._file} has rows of {', '.join(self.record.rows)}, and {self._row} would be "
                f"a further training of the same model; but this one scores otherwise ({numbers}), "
                "so it is that of another sequence. Give each sequence of trainings (each seed) a "
                "path of its own, or move the file away."
            )
        if other:
            logger.warning(
                "The model scores otherwise than after the last training in %s (%s): if it is that "
                "of another run (another seed), give ContinualMetrics a path= of its own, or what "
                "was forgotten is counted from the wrong scores.",
                self._file,
                numbers,
            )

    def state_dict(self) -> dict[str, Any]:
        """The row, so that a resumed run does not take the next one."""
        return {"row": self._row}

    def finish(self, trainer: Trainer) -> None:
        """Evaluate all tasks, and write, print and log what came of it."""
        try:
            scores = self._evaluate(trainer)
        except ValueError as error:  # the training is done, and must not be lost
            logger.error("ContinualMetrics has no row for this training. %s", error)
            return
        self.record.rows[self._row] = scores
        self._own.append(self._row)
        self._write(trainer)
        found = self.record.metrics()
        trainer.log({f"{self.name}/{name}": value for name, value in found.items()})
        if trainer.is_world_process_zero():
            words = {n: n.replace("accuracy", self.metric).replace("_", " ") for n in found}
            numbers = ", ".join(f"{words[n]} {value:.4f}" for n, value in found.items())
            print(f"After {self._row} ({len(self.record.rows)} trained): {numbers}")

    def _evaluate(self, trainer: Trainer) -> Scores:
        """The score of each task."""
        found = trainer.evaluate()
        assert isinstance(trainer.eval_dataset, Mapping)
        names = {task: f"eval_{task}_{self.metric}" for task in trainer.eval_dataset}
        if missing := [name for name in names.values() if name not in found]:
            raise ValueError(
                f"The evaluation returned no {', '.join(missing)}; it returned "
                f"{', '.join(sorted(found))}. Pass metric= the name that compute_metrics uses."
            )
        return {task: float(found[name]) for task, name in names.items()}

    def _write(self, trainer: Trainer) -> None:
        if not trainer.is_world_process_zero():
            return
        write_text(self._file, json.dumps(asdict(self.record), indent=1) + "\n")
        if self.record.rows and find_spec("matplotlib") is not None:
            before = {} if self.record.baseline is None else {"(before)": self.record.baseline}
            rows = {**before, **self.record.rows}
            table = self.record.table(*rows.values())
            figure = score_map(list(rows), self.record.tasks, table, self.metric)
            write_figure(self._file.with_suffix(".png"), figure)
