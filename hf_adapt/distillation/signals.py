"""A teacher's predictions: logits, or the most likely classes; in memory and as bytes."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import nn

from hf_adapt.distillation.divergences import ABSENT

HEADER = struct.Struct("<ii")
"""The number of items of a row, and the number of classes stored for each."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TopK:
    """A teacher's most likely classes, and the probability of all others together.

    Attributes:
        indices: (N, k) long.
        log_probabilities: (N, k) at `temperature`.
        log_tail: (N,) of all other classes together.
        temperature: The temperature of the teacher's softmax.
        classes: The softmax is over the first so many classes; None for all.
    """

    indices: torch.Tensor
    log_probabilities: torch.Tensor
    log_tail: torch.Tensor
    temperature: float
    classes: int | None = None

    @classmethod
    def of(cls, logits: torch.Tensor, k: int, temperature: float) -> TopK:
        """The k most likely classes of each item."""
        log_probabilities = torch.log_softmax(logits.float() / temperature, dim=-1)
        top, indices = log_probabilities.topk(min(k, logits.shape[-1]), dim=-1)
        rest = log_probabilities.scatter(-1, indices, -torch.inf)
        tail = rest.logsumexp(-1).clamp(min=-1e4)
        return cls(indices, top, tail, temperature, logits.shape[-1])


Signal = torch.Tensor | TopK
"""A teacher's predictions of N items: logits (N, C), or the most likely classes."""


def bucket_logits(
    student_logits: torch.Tensor, teacher: TopK, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Student and teacher as predictions over k classes and one bucket of all others.

    Merging classes can only bring two predictions closer: the forward or reverse KL between the
    buckets is the full one minus the tail's mass (the teacher's, for the forward KL) times the KL
    within the tail. It is exact where the teacher gives the tail no probability.

    Args:
        student_logits: (N, C); the classes of the teacher's softmax are compared.
        teacher: The stored classes.
        temperature: Softmax temperature of student and teacher. Must equal the one that the
            classes were stored at.

    Returns:
        Two (N, k + 1) tensors of logits, which are the buckets' log-probabilities when divided by
        the temperature.

    Raises:
        ValueError: If the temperature differs, or the student has fewer classes.
    """
    if abs(temperature - teacher.temperature) > 1e-6 * temperature:
        raise ValueError(
            f"The stored top-k predictions are those at temperature {teacher.temperature:g}, but "
            f"the distillation's is {temperature:g}. Use that temperature (not a schedule), or "
            "store full logits (top_k=None)."
        )
    classes = student_logits.shape[-1] if teacher.classes is None else teacher.classes
    if classes > student_logits.shape[-1]:
        raise ValueError(
            f"The stored top-k predictions are over {classes} classes and the student has only "
            f"{student_logits.shape[-1]}. Rebuild the cache, with this student or with "
            "`hf-adapt cache-teacher` (which keeps the tokenizer's classes, without padding)."
        )
    student = torch.log_softmax(student_logits[..., :classes].float() / temperature, dim=-1)
    indices = teacher.indices.to(student.device)
    top = student.gather(-1, indices)
    known = teacher.log_probabilities.to(student.device).float()
    if indices.shape[-1] == student.shape[-1]:
        return top * temperature, known * temperature
    rest = student.scatter(-1, indices, -torch.inf).logsumexp(-1, keepdim=True)
    tail = teacher.log_tail.to(student.device).float().unsqueeze(-1)
    return (
        torch.cat([top, rest], dim=-1) * temperature,
        torch.cat([known, tail], dim=-1) * temperature,
    )


@dataclass(frozen=True)
class SignalFormat:
    """How the predictions of a row are stored as bytes.

    Attributes:
        dtype: `"float32"`, `"float16"` or `"bfloat16"`.
        top_k: Store the k most likely classes; None for all logits.
        temperature: Of the softmax of the top k.
        classes: The top k are among the first so many classes; None for all.
    """

    dtype: str = "float32"
    top_k: int | None = None
    temperature: float | None = None
    classes: int | None = None

    def signal(self, logits: torch.Tensor) -> Signal:
        """What is stored of a row's logits."""
        if self.top_k is None:
            return logits
        assert self.temperature is not None
        # Of a padded vocabulary only what the student has can be among the top k.
        return TopK.of(logits[:, : self.classes], self.top_k, self.temperature)

    def encode(self, signal: Signal, ragged: bool) -> torch.Tensor:
        """The bytes of a row, (number, 1) uint8.

        Args:
            signal: The predictions of the row.
            ragged: Leave out the classes at the end that no item has (spans).
        """
        dtype = DTYPES[self.dtype]
        if isinstance(signal, TopK):
            shape = signal.indices.shape
            pieces = [
                signal.indices.to(torch.int32),
                signal.log_probabilities.to(dtype),
                signal.log_tail.float(),
            ]
        else:
            if ragged and len(signal):
                present = (signal > ABSENT / 2).any(0).nonzero().flatten().tolist()
                signal = signal[:, : max(present, default=-1) + 1]
            shape = signal.shape
            pieces = [signal.to(dtype)]
        content = HEADER.pack(*shape) + b"".join(tensor_bytes(piece) for piece in pieces)
        return torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy()).unsqueeze(1)

    def decode(self, block: torch.Tensor) -> Signal:
        """The predictions of a row from its bytes."""
        content = block.flatten()
        items, classes = HEADER.unpack(content[: HEADER.size].numpy().tobytes())
        dtype, at = DTYPES[self.dtype], HEADER.size

        def take(kind: torch.dtype, *shape: int) -> torch.Tensor:
            nonlocal at
            size = int(np.prod(shape)) * kind.itemsize
            values = content[at : at + size].clone().view(kind).view(*shape)
            at += size
            return values

        if self.top_k is None:
            return take(dtype, items, classes).float()
        assert self.temperature is not None
        indices = take(torch.int32, items, classes).long()
        top = take(dtype, items, classes).float()
        tail = take(torch.float32, items)
        return TopK(indices, top, tail, self.temperature, self.classes)


def joined(rows: Sequence[Signal], device: torch.device) -> Signal:
    """The predictions of rows as those of one batch; missing classes are absent."""
    if isinstance(rows[0], TopK):
        tops = cast("list[TopK]", list(rows))
        return TopK(
            torch.cat([row.indices for row in tops]).to(device),
            torch.cat([row.log_probabilities for row in tops]).to(device),
            torch.cat([row.log_tail for row in tops]).to(device),
            tops[0].temperature,
            tops[0].classes,
        )
    logits = cast("list[torch.Tensor]", list(rows))
    classes = max(row.shape[1] for row in logits)
    padded = [nn.functional.pad(row, (0, classes - row.shape[1]), value=ABSENT) for row in logits]
    return torch.cat(padded).to(device)


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """The content of a tensor."""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    content: bytes = flat.numpy().tobytes()
    return content
