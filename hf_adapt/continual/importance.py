"""How much each weight matters for rows of the past: the Fisher information and MAS."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_adapt.continual.adapters import HeldWeights
from hf_adapt.continual.prepared_rows import LABELS, Collator, row_batches
from hf_adapt.distillation.heads import Head
from hf_adapt.engine.auxiliary import seed_for
from hf_adapt.engine.columns import named_inputs
from hf_adapt.models.state import preserved

if TYPE_CHECKING:
    from accelerate import Accelerator

Normalization = Literal["median", "mean", "max"]

MAX_CLASSES = 128
"""The most classes over which `exact=True` takes an expectation: one backward for each."""
MEDIAN_VALUES = 10**6
"""How many weights a median is taken of, at least."""


def fisher_diagonal(
    model: nn.Module,
    rows: Any,
    data_collator: Collator | None = None,
    *,
    batch_size: int = 8,
    max_rows: int | None = None,
    exact: bool = False,
    normalize: Normalization | None = None,
    seed: int = 0,
    accelerator: Accelerator | None = None,
) -> dict[str, torch.Tensor]:
    r"""The diagonal of a model's Fisher information: how much each weight matters for some rows.

    .. math::
        F_i = \mathbb{E}_x \mathbb{E}_{y \sim p_\theta(y|x)}
        \left[ (\partial_i \log p_\theta(y|x))^2 \right]

    The labels y are the model's own, so that rows of a classifier need none. It is the mean over
    the items: rows, or tokens of taggers and language models (those with a label; without labels
    all real tokens of a causal language model). The weights are those that train; with LoRA they
    are the frozen weights W under the adapters, as for ΔW = BA, never A and B.

    By default it is estimated with one backward for each batch: with labels drawn from the model
    and the gradient g of the batch's mean loss over B items, B · g² is unbiased for any B, as the
    scores of different items have mean 0 and are independent. (Squared batch means with the labels
    of the data, as are common in public code, are not: with B = 64 they are 50 times too small.)

    Reference:
        Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks",
        arXiv:1612.00796; the estimator: Liu et al. 2023, "Sophia", Algorithm 2 (Gauss-Newton-
        Bartlett), arXiv:2305.14342.

    Args:
        model: A classifier of rows or tokens, with one label or several, a regression (of unit
            variance), a question answering or language model.
        rows: Prepared rows (a dataset or a list of dicts), or an iterable of batches, such as a
            DataLoader.
        data_collator: Makes a batch of rows; by default transformers' `default_data_collator`.
        batch_size: Rows in a batch.
        max_rows: How many rows to use; they are drawn at random. All by default.
        exact: Take the expectation over y item by item and class by class, instead of drawing it:
            one backward for each. For few rows and classes.
        normalize: Divide by the `"median"` (without zeros), the `"mean"` or the `"max"` of all
            weights. The values differ by orders of magnitude, few are far above the mean, and all
            shrink as a model fits: with the median the strength of a penalty means about the same
            for each model.
        seed: Seed of the labels and rows that are drawn.
        accelerator: Shares the batches between its processes; each gets the whole result.

    Returns:
        For each weight's name a float32 tensor of its shape. The model is left as it was: its
        gradients, modes, buffers and the random state.

    Raises:
        ValueError: If there are no rows or items, a token task has no labels, or `exact` meets too
            many classes.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> size = dict(hidden_size=4, num_attention_heads=1, num_hidden_layers=1, vocab_size=9)
        >>> model = BertForSequenceClassification(BertConfig(**size, intermediate_size=4))
        >>> fisher = fisher_diagonal(model, [{"input_ids": [1, 2]}, {"input_ids": [3, 4]}])
        >>> fisher["classifier.weight"].shape
        torch.Size([2, 4])
    """
    score = _exact_squares if exact else _sampled_squares
    batches = row_batches(rows, data_collator, model, 1 if exact else batch_size, max_rows, seed)
    found = _mean_over_items(model, batches, score, seed, accelerator, "Fisher information")
    return normalized(found, normalize)


def mas_importance(
    model: nn.Module,
    rows: Any,
    data_collator: Collator | None = None,
    *,
    max_rows: int | None = None,
    normalize: Normalization | None = None,
    seed: int = 0,
    accelerator: Accelerator | None = None,
) -> dict[str, torch.Tensor]:
    r"""Memory-aware synapses: how much each weight changes the predictions for some rows.

    .. math::
        \Omega_i = \mathbb{E}_x
        \left| \partial_i \lVert F_\theta(x) \rVert_2^2 \right|

    F(x) are the logits of a row; of its tokens, the mean of their squared norms. It needs no
    labels, but for the tokens of taggers, and one backward for each row.

    Reference:
        Aljundi et al. 2018, "Memory Aware Synapses", Eq. 4 and section 4.3, arXiv:1711.09601.

    Args:
        model: The model.
        rows: As for [`fisher_diagonal`], as are the others.
        data_collator: See there.
        max_rows: See there.
        normalize: See there.
        seed: See there.
        accelerator: See there.

    Returns:
        For each weight's name a float32 tensor of its shape.

    Raises:
        ValueError: If there are no rows, or a token task has no labels.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> size = dict(hidden_size=4, num_attention_heads=1, num_hidden_layers=1, vocab_size=9)
        >>> model = BertForSequenceClassification(BertConfig(**size, intermediate_size=4))
        >>> bool(mas_importance(model, [{"input_ids": [1, 2]}])["classifier.weight"].sum() > 0)
        True
    """
    batches = row_batches(rows, data_collator, model, 1, max_rows, seed)
    found = _mean_over_items(model, batches, _row_sensitivities, seed, accelerator, "MAS")
    return normalized(found, normalize)


def normalized(
    importance: dict[str, torch.Tensor], by: Normalization | None
) -> dict[str, torch.Tensor]:
    """An importance in other units.

    Args:
        importance: A tensor for each weight's name.
        by: What becomes 1, of all weights together: their `"median"` (without zeros), their
            `"mean"` or their `"max"`.

    Raises:
        ValueError: If `by` is unknown.

    Example:
        >>> normalized({"w": torch.tensor([0.0, 1.0, 3.0, 90.0])}, "median")["w"]
        tensor([ 0.0000,  0.3333,  1.0000, 30.0000])
    """
    unit = unit_of(importance, by)
    return importance if unit == 1 else {name: value / unit for name, value in importance.items()}


def unit_of(importance: Mapping[str, torch.Tensor], by: Normalization | None) -> float:
    """What [`normalized`] divides by; 1 where all values are 0."""
    values = importance.values()
    if by is None or not importance:
        return 1.0
    if by == "max":
        scale = max(float(value.max()) for value in values)
    elif by == "mean":
        total = sum(float(value.sum(dtype=torch.float64)) for value in values)
        scale = total / sum(value.numel() for value in values)
    elif by == "median":
        step = max(1, sum(value.numel() for value in values) // MEDIAN_VALUES)
        some = torch.cat([value.flatten()[::step] for value in values])
        some = some[some > 0]
        scale = float(some.median()) if len(some) else 0.0
    else:
        raise ValueError(f"normalize={by!r} is unknown: use 'median', 'mean', 'max' or None.")
    return scale or 1.0


# ---- the gradients of a batch ----

Squares = Callable[
    ["_Predictions", Sequence[nn.Parameter]], tuple[Iterator[Sequence[torch.Tensor]], int]
]
"""What is added up of a batch, in parts, each with a tensor per weight, and over how many items."""


class _Predictions:
    """A model's predictions for the items of a batch.

    Attributes:
        logits: (N, C) the scores of the classes of each distribution, in float32.
        head: Their kind.
        mask: The items among the rows or tokens.
        generator: What is random.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], seed: int) -> None:
        device = next(model.parameters()).device
        given = {k: v.to(device) for k, v in inputs.items() if isinstance(v, torch.Tensor)}
        self.head = Head.of(model).with_labels(given.get("labels"))
        if self.head.kind == "tokens" and "labels" not in given:
            raise ValueError(
                f"{type(model).__name__} predicts tokens, and the rows have no labels, which say "
                f"which tokens count (not -100); they have {', '.join(given)}. Keep the labels of "
                "the rows."
            )
        self.mask = self.head.item_mask(given)
        hidden = set() if self.head.feeds_decoder else LABELS
        taken = named_inputs(model) or given.keys()
        outputs = model(**{k: v for k, v in given.items() if k in taken and k not in hidden})
        self.logits = self.head.select(outputs, given, self.mask).float()
        self.generator = torch.Generator(device).manual_seed(seed)

    @property
    def num_items(self) -> int:
        """The number of rows or tokens."""
        return int(self.mask.sum())

    @property
    def owners(self) -> torch.Tensor:
        """(N,) the row of each distribution."""
        counts = self.head.row_counts(self.mask, len(self.logits) // max(1, len(self.mask)))
        rows = torch.arange(len(counts), device=self.logits.device)
        return rows.repeat_interleave(torch.tensor(counts, device=rows.device))


def _sampled_squares(
    found: _Predictions, weights: Sequence[nn.Parameter]
) -> tuple[Iterator[Sequence[torch.Tensor]], int]:
    """B² g² of labels that are drawn: the square of the summed scores."""
    logits, generator = found.logits, found.generator
    if found.head.kind == "values":
        noise = torch.randn(logits.shape, generator=generator, device=logits.device)
        score = (noise * logits).sum()
    else:
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
        score = logits.log_softmax(-1).gather(1, drawn).sum()
    gradients = _gradients(score, weights, last=True)
    return iter([[g.square() for g in gradients]]), found.num_items


def _exact_squares(
    found: _Predictions, weights: Sequence[nn.Parameter]
) -> tuple[Iterator[Sequence[torch.Tensor]], int]:
    """The squared scores of each distribution's classes, by their probabilities."""
    logits = found.logits
    if logits.shape[-1] > MAX_CLASSES:
        raise ValueError(
            f"exact=True takes one backward for each item and class, and there are "
            f"{logits.shape[-1]} classes (at most {MAX_CLASSES}). Use exact=False, which is "
            "unbiased too."
        )
    is_values = found.head.kind == "values"
    scores = logits if is_values else logits.log_softmax(-1)
    shares = torch.ones_like(logits) if is_values else logits.detach().softmax(-1)

    def parts() -> Iterator[Sequence[torch.Tensor]]:
        for score, share in zip(scores.flatten(), shares.flatten(), strict=True):
            yield [g.square() * share for g in _gradients(score, weights)]

    return parts(), found.num_items


def _row_sensitivities(
    found: _Predictions, weights: Sequence[nn.Parameter]
) -> tuple[Iterator[Sequence[torch.Tensor]], int]:
    """The absolute gradient of each row's squared norm."""
    owners, items = found.owners, found.mask.reshape(len(found.mask), -1).sum(1)

    def parts() -> Iterator[Sequence[torch.Tensor]]:
        for row in items.nonzero().flatten().tolist():
            norm = found.logits[owners == row].square().sum() / items[row]
            yield [g.abs() for g in _gradients(norm, weights)]

    return parts(), int((items > 0).sum())


def _gradients(
    score: torch.Tensor, weights: Sequence[nn.Parameter], last: bool = False
) -> list[torch.Tensor]:
    found: Any  # None for what the score does not depend on
    found = torch.autograd.grad(score, list(weights), retain_graph=not last, allow_unused=True)
    pairs = zip(weights, found, strict=True)
    return [torch.zeros_like(w).float() if g is None else g.float() for w, g in pairs]


# ---- the rows ----


def _mean_over_items(
    model: nn.Module,
    batches: tuple[int | None, Iterator[Callable[[], Mapping[str, Any]]]],
    squares: Squares,
    seed: int,
    accelerator: Accelerator | None,
    title: str,
) -> dict[str, torch.Tensor]:
    """Add up what a function finds in each batch, over all processes, and divide by the items."""
    weights = HeldWeights.of(model).weights
    if not weights:
        raise ValueError(
            f"{title}: no weight of the model requires a gradient. Turn them on first: "
            "model.requires_grad_(True)."
        )
    rank = 0 if accelerator is None else accelerator.process_index
    processes = 1 if accelerator is None else accelerator.num_processes
    with _ready(model, weights):
        sums = [torch.zeros_like(w, dtype=torch.float32) for w in weights.values()]
        total = 0
        bar = tqdm(batches[1], title, batches[0], disable=rank > 0 or None, leave=False)
        for number, batch in enumerate(bar):
            if number % processes != rank:
                continue
            torch.manual_seed(seed_for(f"batch {number}", seed))  # of a collator that draws
            found = _Predictions(model, batch(), seed_for(f"labels {number}", seed))
            parts, items = squares(found, list(weights.values()))
            total += items
            for part in parts if items else ():
                torch._foreach_add_(sums, list(part))
    if accelerator is not None and processes > 1:
        count = torch.tensor(total, device=accelerator.device)
        total = int(accelerator.reduce(count, reduction="sum"))
        sums = [accelerator.reduce(each, reduction="sum") for each in sums]
    if not total:
        raise ValueError(
            f"{title}: there is no item to compute it from: the rows are empty, or all their "
            "labels are -100. Pass the prepared rows of the earlier task."
        )
    torch._foreach_div_(sums, total)
    return dict(zip(weights, sums, strict=True))


@contextmanager
def _ready(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Evaluation mode without autocast, and gradients of frozen weights; all is restored."""
    frozen = {name: weight for name, weight in weights.items() if not weight.requires_grad}
    for name, weight in frozen.items():
        if not weight.is_floating_point():
            raise ValueError(
                f"{name} is quantised ({weight.dtype}) and has no gradient. Compute the importance "
                "on the model in bfloat16, or use Consolidation(importance=None)."
            )
    device = next(model.parameters()).device.type
    try:
        with preserved(model), torch.enable_grad(), torch.autocast(device, enabled=False):
            model.eval()
            for weight in frozen.values():
                weight.requires_grad_(True)
            yield
    finally:
        for weight in frozen.values():
            weight.requires_grad_(False)
