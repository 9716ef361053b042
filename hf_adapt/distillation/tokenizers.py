"""A teacher with another tokenizer: its own tokens, and a loss without a common vocabulary."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from hf_adapt.engine.texts import column_names, text_of

logger = logging.getLogger(__name__)


def universal_logit_distance(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    r"""Distance of the sorted probabilities of two predictions over different vocabularies.

    .. math::
        d = \sum_{v} \lvert p_{(v)} - q_{(v)} \rvert

    with the v-th largest probabilities of teacher and student, 0 beyond the smaller vocabulary.
    Crude: with a common vocabulary use [`forward_kl`], which compares each class with itself.

    Reference:
        Boizard et al. 2024, "Towards Cross-Tokenizer Distillation: the Universal Logit
        Distillation Loss for LLMs", Eq. 6, arXiv:2402.12030.
        Deviation: with a temperature, which the paper does not have.

    Args:
        student_logits: Scores over the student's vocabulary.
        teacher_logits: Scores over the teacher's.
        temperature: Softmax temperature of student and teacher.

    Shape:
        - student: (N, V_s), teacher: (N, V_t); output: (N,), from 0 to 2.

    Example:
        >>> a, b = torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 9.0, -99.0]])
        >>> round(universal_logit_distance(a, b).item(), 5)
        0.0
    """
    student = (student_logits.float() / temperature).softmax(-1).sort(-1, descending=True).values
    teacher = (teacher_logits.float() / temperature).softmax(-1).sort(-1, descending=True).values
    size = max(student.shape[-1], teacher.shape[-1])
    student = F.pad(student, (0, size - student.shape[-1]))
    teacher = F.pad(teacher, (0, size - teacher.shape[-1]))
    return (student - teacher).abs().sum(-1)


class Retokenizer:
    """Tokenises the text of a batch with the teacher's tokenizer.

    The text is read from a column that is kept beside the batch. Without one the student's tokens
    are decoded, without what the student's tokenizer lost (case, unknown characters, truncated
    text).

    Args:
        student: The student's tokenizer, which decodes.
        teacher: The teacher's tokenizer.
        text_column: A column of the rows, or two for pairs. A cell is a text or a list of words,
            which are joined with spaces.
        positions: The number of positions of the teacher; None where only the tokenizer has a
            limit. Longer rows are truncated, with one warning.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        text_column: str | Sequence[str] | None = None,
        positions: int | None = None,
    ) -> None:
        self.student, self.teacher = student, teacher
        self.text_columns = column_names(text_column)
        self.max_length = token_limit(teacher, positions)
        self._has_warned = False
        if text_column is None and student is None:
            raise ValueError(
                "A teacher with a tokenizer of its own needs the text: pass text_column= with a "
                "column of the rows, or give the Trainer processing_class= so that the student's "
                "tokens can be decoded."
            )
        if text_column is None:
            logger.warning(
                "The teacher's text is decoded from the student's tokens, without what that "
                "tokenizer changed or truncated. Pass text_column= to keep the text."
            )

    def rows(
        self, inputs: Mapping[str, Any], columns: Mapping[str, Sequence[Any]]
    ) -> dict[str, torch.Tensor]:
        """The teacher's inputs for whole rows (classification)."""
        ids = inputs["input_ids"]
        first, *second = self._texts(inputs, columns)
        encoded = self.teacher(
            first,
            *second,
            padding=True,
            truncation=self.max_length is not None,
            max_length=self.max_length,
            return_tensors="pt",
        )
        if any(own.overflowing for own in getattr(encoded, "encodings", None) or ()):
            self._warn_truncated()
        return {key: value.to(ids.device) for key, value in encoded.items()}

    def _texts(
        self, inputs: Mapping[str, Any], columns: Mapping[str, Sequence[Any]]
    ) -> list[list[str]]:
        """The texts of the rows, for each text column."""
        if self.text_columns:
            made = []
            for column in self.text_columns:
                cells = columns.get(column, [None] * len(inputs["input_ids"]))
                places = (f"row {number} of the batch" for number in range(len(cells)))
                made.append([text_of(c, column, p) for c, p in zip(cells, places, strict=True)])
            return made
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        rows = [
            row if mask is None else row[mask[i].bool()]
            for i, row in enumerate(ids.detach().cpu() if mask is None else ids.detach())
        ]
        decoded: list[str] = self.student.batch_decode(
            [row.tolist() for row in rows], skip_special_tokens=True
        )
        return [decoded]

    def _warn_truncated(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "Some rows have more of the teacher's own tokens than its %d positions: they are "
                "truncated there, so the teacher does not see the end of these texts.",
                self.max_length,
            )

    def completions(
        self, inputs: Mapping[str, Any], item_mask: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The teacher's inputs for a language model, and which of its tokens are distilled.

        The text before the first distilled token and the text after it are tokenised separately,
        so that both models are compared on the same text.

        Args:
            inputs: The student's inputs.
            item_mask: (B, T) of the student's tokens.
        """
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        rows, masks = [], []
        for row in range(len(ids)):
            real = torch.ones_like(ids[row]).bool() if mask is None else mask[row].bool()
            own, chosen = ids[row][real].tolist(), item_mask[row][real].tolist()
            begin = chosen.index(True) if True in chosen else len(own)
            end = len(chosen) - chosen[::-1].index(True) if True in chosen else begin
            # A tokenizer may put a special token first; the teacher's own is put there instead.
            before = self._encode(own[:begin], special=True)
            after = self._encode(own[begin:end], special=False)
            kept = slice(None, self.max_length)
            if self.max_length is not None and len(before) + len(after) > self.max_length:
                self._warn_truncated()
                if getattr(self.teacher, "truncation_side", "right") == "left":
                    kept = slice(-self.max_length, None)
            rows.append((before + after)[kept])
            masks.append(([False] * len(before) + [True] * len(after))[kept])
        longest = max(1, *(len(row) for row in rows))
        pad = self.teacher.pad_token_id
        pad = (self.teacher.eos_token_id or 0) if pad is None else pad
        padded = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
        attention = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows])
        items = torch.tensor([m + [False] * (longest - len(m)) for m in masks])
        items[:, 0] = False  # nothing predicts the first token
        device = ids.device
        return (
            {"input_ids": padded.to(device), "attention_mask": attention.to(device)},
            items.to(device),
        )

    def _encode(self, ids: list[int], special: bool) -> list[int]:
        text = self.student.decode(ids, skip_special_tokens=True)
        encoded: list[int] = self.teacher(text, add_special_tokens=special)["input_ids"]
        if special and encoded and encoded[-1] == self.teacher.eos_token_id and len(encoded) > 1:
            encoded = encoded[:-1]
        return encoded


def token_limit(tokenizer: Any, positions: int | None) -> int | None:
    """The largest number of tokens of a row, by tokenizer and model; None for any number.

    Saved tokenizers often have a limit of 1e30, which is none.

    Example:
        >>> from types import SimpleNamespace
        >>> token_limit(SimpleNamespace(model_max_length=int(1e30)), 512)
        512
    """
    limit = getattr(tokenizer, "model_max_length", None) or 0
    known = [limit] if 0 < limit < 1_000_000 else []
    return min([*known, *([] if positions is None else [positions])], default=None)


def paired_positions(
    student_mask: torch.Tensor, teacher_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of the first items of each row, equally many in both, so that they pair by position.

    Shape:
        - student_mask: (B, T_s), teacher_mask: (B, T_t); outputs: the same.

    Example:
        >>> one, two = torch.tensor([[True, True, True]]), torch.tensor([[False, True, True]])
        >>> [mask.tolist() for mask in paired_positions(one, two)]
        [[[True, True, False]], [[False, True, True]]]
    """
    number = torch.minimum(student_mask.sum(1), teacher_mask.sum(1)).unsqueeze(1)
    return (
        student_mask & (student_mask.cumsum(1) <= number),
        teacher_mask & (teacher_mask.cumsum(1) <= number),
    )


def same_vocabulary(student: Any, teacher: Any) -> bool:
    """Whether two tokenizers have the same ids for the same tokens, as far as is known."""
    if student is teacher:
        return True
    if not (hasattr(student, "get_vocab") and hasattr(teacher, "get_vocab")):
        return False
    return bool(student.get_vocab() == teacher.get_vocab())
