"""The model of a further task: the Trainer's own model with another head."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.generic import find_labels

from hf_adapt.engine.columns import named_inputs
from hf_adapt.models.heads import HEADS, HeadName, has_head
from hf_adapt.models.structure import is_encoder_decoder, unwrapped_base

if TYPE_CHECKING:
    from transformers import Trainer

Collator = Callable[[list[Any]], Any]
TEXT_HEADS: tuple[HeadName, ...] = ("masked_lm", "causal_lm", "conditional_generation")
"""Heads whose scores are those of a vocabulary."""
TaskLoss = Callable[[Any, torch.Tensor], torch.Tensor]
ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]

LABELS = ("labels", "label", "label_ids")
"""The columns that a collator takes for labels."""


@dataclass(eq=False)
class TaskSpec:
    """One of several tasks: what its rows' labels are, and which head learns them.

    Args:
        labels_column: The column of its labels, where it is not called `labels` or `label`.
        num_labels: The size of its head; for several classes their names do as well.
        head: The kind of its head, as `"token_classification"` (see `hf_adapt.models.heads.HEADS`),
            or `"shared"`: the Trainer's model itself, its head and loss too, as for text to text or
            for labelled rows of another domain. By default a head of its own of the kind that the
            Trainer's model has; language models are shared.
        problem_type: Of a head that classifies rows: `"regression"`, `"multi_label_classification"`
            or `"single_label_classification"`.
        loss: The loss, from the outputs and the labels: a mean over the labels. By default the
            head's own. A task whose head is the Trainer's model's takes the Trainer's
            `compute_loss_func`.
        metrics: The Trainer's `compute_metrics` for evaluations of this task.
        collator: Makes a batch of its rows, labels included. By default the Trainer's own for a
            head of the same kind, else one that pads with the Trainer's tokenizer.

    Raises:
        ValueError: If the head or the problem is unknown.

    Example:
        >>> TaskSpec("tags", num_labels=["noun", "verb"], head="token_classification").size
        2
    """

    labels_column: str | None = None
    num_labels: int | Sequence[str] | None = None
    loss: TaskLoss | None = None
    metrics: Callable[[Any], dict[str, float]] | None = None
    head: HeadName | Literal["shared"] | None = None
    problem_type: ProblemType | None = None
    collator: Collator | None = None

    def __post_init__(self) -> None:
        for value, known in (
            (self.head, (None, "shared", *HEADS)),
            (self.problem_type, (None, *get_args(ProblemType))),
        ):
            if value not in known:
                names = ", ".join(map(repr, known[1:]))
                raise ValueError(f"TaskSpec: {value!r} is unknown: use {names}.")

    @property
    def size(self) -> int | None:
        """How many classes or numbers its head gives, if that is known."""
        given = self.num_labels
        return given if given is None or isinstance(given, int) else len(given)


class TaskModel:
    """A model whose body is that of the Trainer's model and whose head is its own.

    Args:
        model: The Trainer's model, unwrapped; LoRA adapters in it are shared as well.
        name: The task.
        spec: Its description.

    Attributes:
        model: The model: what [`export`] writes.
        own: The weights that it has for itself, by their names.
        labels: The inputs that are its labels.

    Raises:
        ValueError: If the architecture has no such head, or cannot share its body.
    """

    def __init__(self, model: nn.Module, name: str, spec: TaskSpec) -> None:
        base = unwrapped_base(model)
        self.name, self.spec = name, spec
        self.body = _body_of(model, name)
        self.head = spec.head or kind_of(base)
        if self.head is None or self.head == "shared":
            raise ValueError(
                f"The head of the task {name!r} is not known: {type(base).__name__} has none of "
                f"its own. Pass TaskSpec(head=...), one of {', '.join(map(repr, HEADS))}."
            )
        self.model = self._made(cast(PreTrainedModel, base))
        shared = {id(p) for p in self.body.parameters()}
        self.own = {n: p for n, p in self.model.named_parameters() if id(p) not in shared}
        self.labels = labels_of(self.model)
        if not self.own:
            raise ValueError(
                f"The head of the task {name!r} has no weights of its own: pass "
                "TaskSpec(head='shared'), which trains the Trainer's model on its rows."
            )

    def _made(self, base: PreTrainedModel) -> PreTrainedModel:
        config = self._config(base)
        auto: Any = getattr(transformers, HEADS[cast(HeadName, self.head)].auto_class)
        try:
            with torch.device("meta"):  # its body is not needed
                made = cast(PreTrainedModel, auto.from_config(config))
        except ValueError as error:
            raise ValueError(
                f"There is no {self.head} head for {type(base).__name__} ({config.model_type}), "
                f"which the task {self.name!r} asks for: {error}"
            ) from error
        prefix = made.base_model_prefix
        own_body = getattr(made, prefix, None)
        if type(own_body) is not type(self.body):
            raise ValueError(
                f"{type(made).__name__}, the model of the task {self.name!r}, cannot share the "
                f"{type(self.body).__name__} of {type(base).__name__}: its body is a "
                f"{type(own_body).__name__}."
            )
        pools = [getattr(each, "pooler", None) is not None for each in (own_body, self.body)]
        if pools == [True, False]:
            raise ValueError(
                f"The head of the task {self.name!r} needs the pooler of {type(self.body).__name__}"
                f", which {type(base).__name__} has not. Make this task the first, and load the "
                "model with its head."
            )
        setattr(made, prefix, self.body)
        device = next(self.body.parameters()).device
        for child in made.children():
            if child is not self.body:
                child.to_empty(device=device).float()
                for parameter in child.parameters():
                    nn.init.zeros_(parameter)
                child.apply(made._init_weights)
        made.tie_weights()
        dtype = next(self.body.parameters()).dtype
        if dtype != torch.float32:
            # The head is trained in float32, so the two meet under autocast.
            made.forward = functools.wraps(made.forward)(
                functools.partial(_autocast, made.forward, device.type, dtype)
            )
        return made

    def _config(self, base: PreTrainedModel) -> Any:
        config = copy.deepcopy(base.config)
        size = 2 if self.head == "question_answering" else self.spec.size
        if self.head in TEXT_HEADS:
            return config
        if size is None:
            raise ValueError(
                f"The task {self.name!r} needs the size of its head: TaskSpec(num_labels=...)."
            )
        given = self.spec.num_labels
        names = [f"LABEL_{i}" for i in range(size)] if isinstance(given, int | None) else given
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}
        config.problem_type = self.spec.problem_type
        return config

    def loss(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The mean loss over the labels of a batch."""
        for name, child in self.model.named_children():
            if name != self.model.base_model_prefix:
                child.train(self.body.training)
        if self.spec.loss is None:
            loss: torch.Tensor = self.model(**inputs).loss
            return loss.float()
        labels = {name: inputs[name] for name in self.labels if name in inputs}
        rest = {name: value for name, value in inputs.items() if name not in labels}
        given: Any = next(iter(labels.values())) if len(labels) == 1 else labels
        return self.spec.loss(self.model(**rest), given).float()

    def collator(self, trainer: Trainer, needs_labels: bool = True) -> TaskCollator:
        """What makes a batch of the rows of this task.

        Args:
            trainer: The Trainer.
            needs_labels: Whether rows without labels are refused; a collator of the task's own may
                make them.
        """
        own = self.spec.collator is not None
        takes_all = own or not trainer.args.remove_unused_columns
        return TaskCollator(
            self.name,
            self._collate(trainer),
            self.spec.labels_column,
            self.labels,
            None if takes_all else {*(named_inputs(self.model) or ()), *self.labels},
            needs_labels and not own,
        )

    def _collate(self, trainer: Trainer) -> Collator:
        if self.spec.collator is not None:
            return self.spec.collator
        model = trainer.accelerator.unwrap_model(trainer.model)
        if kind_of(unwrapped_base(model)) == self.head:
            return cast(Collator, trainer.data_collator)
        tokenizer = trainer.processing_class
        if tokenizer is None:
            tokenizer = getattr(trainer.data_collator, "tokenizer", None)
        if tokenizer is None or not hasattr(tokenizer, "pad"):
            raise ValueError(
                f"The rows of the task {self.name!r} need a collator: pass a tokenizer to the "
                "Trainer (processing_class=), or TaskSpec(collator=...)."
            )
        by_token = self.head in ("token_classification", "masked_lm", "causal_lm")
        kind: Any = (
            transformers.DataCollatorForTokenClassification
            if by_token
            else transformers.DataCollatorWithPadding
        )
        return cast(Collator, kind(tokenizer))


class TaskCollator:
    """Makes a batch of the rows of one task, under the names that its model knows.

    Args:
        task: The task, for messages.
        collator: What is given the rows.
        labels_column: The column of their labels, if it is another than a collator knows.
        labels: The model's inputs that are labels.
        inputs: The columns that the collator is given, beside labels; None for all.
        needs_labels: Whether rows without labels are refused.

    Raises:
        ValueError: If a row has no labels, or two columns of them.
    """

    def __init__(
        self,
        task: str,
        collator: Collator,
        labels_column: str | None,
        labels: Sequence[str],
        inputs: Collection[str] | None,
        needs_labels: bool,
    ) -> None:
        self.task, self.collator, self.labels_column = task, collator, labels_column
        self.labels, self.needs_labels = list(labels), needs_labels
        self.inputs = None if inputs is None else {*inputs, *LABELS}

    def __call__(self, rows: list[Any]) -> Any:
        """Make a batch."""
        return self.collator([self.row(row) for row in rows])

    def row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row as the collator is given it."""
        row = {k: v for k, v in row.items() if v is not None}  # a column of another task
        inputs = row if self.inputs is None else self.inputs
        found = {k: v for k, v in row.items() if k in inputs and k != self.labels_column}
        if self.labels_column is not None and self.labels_column in row:
            if twice := sorted(set(LABELS) & found.keys()):
                raise ValueError(
                    f"A row of the task {self.task!r} has the columns {self.labels_column!r} and "
                    f"{', '.join(map(repr, twice))}, and a batch has one set of labels. Remove the "
                    "column that is none of this task."
                )
            found["labels"] = row[self.labels_column]
        given = [name for name in (*LABELS, *self.labels) if name in found]
        if self.labels_column is not None and "labels" not in found:
            given = []
        if (not given and self.needs_labels) or len({*LABELS} & {*given}) > 1:
            what = f"the label columns {', '.join(given)}" if given else "no labels"
            raise ValueError(
                f"A row of the task {self.task!r} has {what}; its columns are "
                f"{', '.join(map(repr, row))}. Name the column of its labels in "
                "TaskSpec(labels_column=...)."
            )
        return found


def labels_of(model: nn.Module) -> list[str]:
    """The inputs of a model that are its labels."""
    return list(find_labels(type(model)))  # type: ignore[no-untyped-call]  # transformers' own


def kind_of(model: nn.Module) -> HeadName | None:
    """The kind of head that a model has."""
    return next((name for name in HEADS if has_head(model, name)), None)


def shares_head(model: nn.Module, spec: TaskSpec) -> bool:
    """Whether a task is learnt by the model's own head."""
    return spec.head == "shared" or (spec.head is None and has_head(model, *TEXT_HEADS))


def _body_of(model: nn.Module, name: str) -> PreTrainedModel:
    base = unwrapped_base(model)
    config: Any = getattr(model, "active_peft_config", None)
    if config is not None and config.is_prompt_learning:
        raise ValueError(
            f"The task {name!r} needs a head of its own, and the adapters of the model "
            f"({config.peft_type}) are prompts, which belong to the whole model. Use LoRA."
        )
    body = getattr(base, "base_model", None)
    if isinstance(body, PreTrainedModel) and body is not base and not is_encoder_decoder(base):
        return body
    raise ValueError(
        f"The task {name!r} needs a head of its own on {type(base).__name__}, which has no body "
        "that heads could share. Encoder-decoders learn several tasks as text to text: "
        "TaskSpec(head='shared')."
    )


def _autocast(
    forward: Callable[..., Any], device: str, dtype: torch.dtype, *args: Any, **kwargs: Any
) -> Any:
    runs_already = torch.is_autocast_enabled(device)
    with nullcontext() if runs_already else torch.autocast(device, dtype=dtype):
        return forward(*args, **kwargs)
