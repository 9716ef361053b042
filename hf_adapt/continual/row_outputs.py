"""What a model gives for each row of a data set, in the order of the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F

from hf_adapt.continual.prepared_rows import check_tokenised
from hf_adapt.distillation.heads import Head
from hf_adapt.engine.batch import Batch
from hf_adapt.engine.callback import collect_items
from hf_adapt.engine.item_outputs import ItemOutputs, OutputCollector
from hf_adapt.engine.labels import IGNORED
from hf_adapt.models.heads import has_head
from hf_adapt.models.structure import is_encoder_decoder, unwrapped_base

if TYPE_CHECKING:
    from transformers import Trainer

ROW = "hf_adapt_row"
"""The column of a row's number."""


RowOutput = Literal["features", "losses", "logits"]
"""The mean of a row's last hidden states (N, D); the mean negative log-likelihood of its labels
(N, 1), NaN where it has none; a classifier's scores (N, C)."""


class _Numbered(torch.utils.data.Dataset[Any]):
    """Rows with their numbers."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return {**self.rows[place], ROW: place}


class _RowCollector(OutputCollector):
    """Collects one kind of output of rows: the features of items whose keys are row numbers."""

    columns = (ROW,)

    def __init__(self, what: RowOutput) -> None:
        super().__init__(pooling="mean")
        self.what = what
        self._numbers: Sequence[int] = ()

    def observe(
        self, inputs: Mapping[str, Any], columns: Mapping[str, Sequence[Any]], outputs: Any
    ) -> None:
        """Keep the rows of one batch."""
        self._numbers = columns[ROW]
        super().observe(inputs, columns, outputs)

    def _read(self, batch: Batch) -> ItemOutputs:
        batch = batch.for_objective(self._readers[0])
        (part,), model = batch.parts, batch.model
        if self.what == "losses" and (
            is_encoder_decoder(model) or has_head(model, "question_answering", "multiple_choice")
        ):
            raise ValueError(
                f"The losses of single rows are known of classifiers and decoders, and the model "
                f"is a {type(unwrapped_base(model)).__name__}. Use policy='random'."
            )
        values = batch.features()[0] if self.what == "features" else batch.logits()[0]
        if self.what == "logits" and self._layout.token_logits:
            raise ValueError(
                "Stored logits are one vector for each row, and this model predicts one for each "
                "token. Use Replay(memory) with KeepPredictions(on='replay'), which asks the "
                "starting model in each step."
            )
        numbers = torch.as_tensor(self._numbers, device=values.device)
        if self.what == "losses":
            counts = part.token_counts if self._layout.token_logits else torch.ones_like(numbers)
            values = _row_losses(values, batch.labels(), counts, Head.of(model))[:, None]
        none = torch.full_like(numbers, IGNORED)
        return ItemOutputs(values, values.new_zeros(len(values), 0), none, numbers)

    @property
    def _has_token_items(self) -> bool:
        return False


def row_outputs(trainer: Trainer, rows: Any, what: RowOutput) -> torch.Tensor:
    """Run a Trainer's model over rows and keep one kind of output, float32, in their order.

    Args:
        trainer: The Trainer; it is changed in place, as by [`adapt`].
        rows: Map-style rows, prepared like its `train_dataset`.
        what: What to keep.

    Raises:
        ValueError: If rows have no labels for a loss, or the model has no logits of rows.
    """
    check_tokenised(trainer, rows)
    return collect_items(trainer, _Numbered(rows), _RowCollector(what)).features


def _row_losses(
    logits: torch.Tensor, labels: torch.Tensor, counts: torch.Tensor, head: Head
) -> torch.Tensor:
    """The mean loss of each row over its items, (B,)."""
    kind = head.with_labels(labels).kind
    if kind in ("labels", "values"):
        given = labels.float().view_as(logits)
        losses = (
            F.binary_cross_entropy_with_logits(logits, given, reduction="none")
            if kind == "labels"
            else (logits - given).square() / 2
        ).mean(1)
        valid = torch.ones_like(losses)
    else:
        losses = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
        valid = (labels != IGNORED).to(losses.dtype)
    rows = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    total, number = (
        torch.zeros(len(counts), device=losses.device).index_add_(0, rows, each)
        for each in (losses.float() * valid, valid.float())
    )
    return total / number
