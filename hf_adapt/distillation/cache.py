"""A teacher whose predictions are computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn

from hf_adapt.distillation.checks import Classes
from hf_adapt.distillation.divergences import ABSENT
from hf_adapt.distillation.teachers import ModelTeacher, SelfTeacher, Teacher, as_teacher
from hf_adapt.models.structure import unwrapped_base
from hf_adapt.storage.row_store import RowStore, row_keys, write_description

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

FORMAT = 2
HEADER = struct.Struct("<ii")
"""Number of items and of stored classes of a row."""

OF_NO_EFFECT = (
    "architectures",
    "dtype",  # that of each weight is looked at
    "problem_type",  # models set it when they see labels
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
"""Settings of a model that do not change what it predicts, but change when it is saved or used."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TopK:
    """A teacher's most likely classes, and how much the others have together.

    Attributes:
        indices: (N, k) long.
        log_probabilities: (N, k) at `temperature`.
        log_tail: (N,) of all other classes together.
        temperature: What the teacher's logits were divided by.
        classes: The probabilities are those over the first so many classes; None for all.
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
"""What a teacher says of N items: logits (N, C), or the most likely classes."""


def bucket_logits(
    student_logits: torch.Tensor, teacher: TopK, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Student and teacher as predictions over k classes and one bucket of all others.

    Merging classes can only bring two predictions closer: the forward or reverse KL between the
    buckets is the full one minus the tail's mass (the teacher's, for the forward KL) times the KL
    within the tail. It is exact where the teacher gives the tail nothing.

    Args:
        student_logits: (N, C); the classes that the teacher's probabilities are over are compared.
        teacher: The stored classes.
        temperature: Of both; must be that of the store.

    Returns:
        Two (N, k + 1) tensors of logits, which are the buckets' log-probabilities when divided by
        the temperature.

    Raises:
        ValueError: If the temperature is another, or the student has fewer classes.
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
            f"{student_logits.shape[-1]}. Make the folder anew, with this student or with "
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


class CachedTeacher(Teacher):
    """Predictions of a teacher, computed once and read from memory-mapped files afterwards.

    A row is found by a hash of its own tokens (without padding) and of which of its tokens are
    distilled, so a changed row is never mistaken for another. With a `teacher`, rows that are not
    there yet are computed and kept: from the second epoch on no teacher runs. Without one, a row
    that is not there is an error. `hf-adapt cache-teacher` fills a folder beforehand.

    Full logits of a classifier take a few bytes a row; those of a language model take
    4 × vocabulary bytes a token, so use `top_k` there (8 × k + 4 bytes a token).

    Args:
        folder: Where the predictions are kept; made if missing.
        teacher: What computes those that are missing: a model, a name, a callable; None to read
            only.
        top_k: Keep only the k most likely classes, and the others' mass together.
        temperature: Needed with `top_k`: that of the distillation.
        dtype: `"float32"`, `"float16"` or `"bfloat16"`.

    Raises:
        ValueError: If the options do not fit, or the folder was made by another teacher, with
            another tokenizer or other options.

    Example:
        ```python
        DistillationTrainer(model=student, teacher=CachedTeacher("cache/", teacher=model), ...)
        ```
    """

    is_cached = True

    def __init__(
        self,
        folder: str | Path,
        teacher: Any = None,
        top_k: int | None = None,
        temperature: float | None = None,
        dtype: str = "float32",
    ) -> None:
        if top_k is not None and top_k < 1:
            raise ValueError(f"CachedTeacher(top_k={top_k}): top_k must be at least 1.")
        if top_k is not None and temperature is None:
            raise ValueError(
                f"CachedTeacher(top_k={top_k}) needs the temperature of the distillation "
                "(temperature=2.0, or --temperature 2), because the mass of all other classes is "
                "kept at that temperature."
            )
        if temperature is not None and not temperature > 0:
            raise ValueError(
                f"CachedTeacher(temperature={temperature}): the temperature must be positive, that "
                "of the distillation (2 is usual)."
            )
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is unknown: use {', '.join(DTYPES)}.")
        if isinstance(teacher, SelfTeacher):
            raise ValueError(
                "The student's own average changes with every step, so its predictions cannot be "
                "kept. Pass SelfTeacher() itself as the teacher."
            )
        self.folder = Path(folder)
        self.teacher = None if teacher is None else as_teacher(teacher)
        self.top_k, self.dtype = top_k, dtype
        self.temperature = temperature if top_k is not None else None
        self.name = f"predictions in {self.folder}"
        self.computed = 0
        self.processing_class: Any = None  # that of the teacher's inputs, if not the Trainer's
        self.hooks: list[str] = []  # those that say what is asked, as far as a user has his own
        self._is_full = False
        self._store: RowStore | None = None
        self._stands: dict[str, Any] = {}

    @property
    def module(self) -> nn.Module | None:  # type: ignore[override]
        """The teacher behind the cache."""
        return None if self.teacher is None else self.teacher.module

    @property
    def source(self) -> Teacher | None:
        """The teacher behind the cache."""
        return self.teacher

    def setup(self, trainer: Trainer, student: nn.Module) -> None:
        """Open the folder and compare it with the teacher and the tokenizer at hand."""
        if self.teacher is not None:
            self.teacher.setup(trainer, student)
        sizes = [Classes.of(model).vocabulary for model in (student, self.module)]
        self.open(
            self.processing_class or trainer.processing_class,
            trainer.args.process_index,
            min((size for size in sizes if size is not None), default=None),
            str(trainer.accelerator.mixed_precision),
        )

    def open(
        self,
        processing_class: Any,
        process: int = 0,
        classes: int | None = None,
        autocast: str = "no",
    ) -> None:
        """Open the folder, or begin it.

        Args:
            processing_class: The tokenizer of the teacher's inputs.
            process: Index of this process, which names its files.
            classes: The top k of a new folder are those of the first so many classes, over which
                they are normalised; None for all. One that is there keeps to its own number.
            autocast: The mixed precision in which the teacher is asked.

        Raises:
            ValueError: If the folder holds something else.
        """
        path = self.folder / "description.json"
        now = {**self._description(processing_class), "autocast": autocast}
        now["classes"] = None if self.top_k is None else classes
        if path.exists():
            self._stands = json.loads(path.read_text(encoding="utf-8"))
            self._check(self._stands, now)
            if self.teacher is None:
                self.top_k = self._stands["top_k"]
                self.temperature, self.dtype = self._stands["temperature"], self._stands["dtype"]
        elif self.teacher is None:
            raise ValueError(
                f"{self.folder} holds no teacher's predictions (there is no description.json), and "
                "no teacher was given to compute them. Make it with `hf-adapt cache-teacher`, or "
                "pass CachedTeacher(folder, teacher=model)."
            )
        else:
            self._stands = now
            if process == 0:
                write_description(self.folder, now)
        self._store = RowStore(self.folder, process, torch.uint8, (1,))

    def _description(self, processing_class: Any) -> dict[str, Any]:
        teacher = self.teacher
        return {
            "format": FORMAT,
            "teacher": getattr(teacher, "name", None),
            "teacher_fingerprint": None if teacher is None else teacher_fingerprint(teacher),
            "inputs": sorted(teacher.inputs) if isinstance(teacher, ModelTeacher) else [],
            **Classes.of(self.module)._asdict(),
            "tokenizer": getattr(processing_class, "name_or_path", None),
            "tokenizer_fingerprint": tokenizer_fingerprint(processing_class),
            "top_k": self.top_k,
            "temperature": self.temperature,
            "dtype": self.dtype,
            "hooks": self.hooks,
        }

    def _check(self, stands: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        if stands.get("format") != FORMAT:
            raise ValueError(
                f"{self.folder} has format {stands.get('format')}, this version reads {FORMAT}. "
                "Make it anew with `hf-adapt cache-teacher`."
            )
        own = ("top_k", "temperature", "dtype") if self.teacher is not None else ()
        if self.teacher is not None and stands["teacher_fingerprint"] is None:
            own = ("teacher", *own)  # a function has only its name
        for key in ("teacher_fingerprint", "tokenizer_fingerprint", "hooks", *own):
            known, found = stands.get(key), now.get(key)
            optional = key == "tokenizer_fingerprint" and (known is None or found is None)
            optional |= key == "teacher_fingerprint" and self.teacher is None
            if known != found and not optional:
                what = "set of hooks" if key == "hooks" else key.removesuffix("_fingerprint")
                raise ValueError(
                    f"{self.folder} was made with another {what}: "
                    f"{stands.get(what, known)!r} ({key} {known}), not {now.get(what, found)!r} "
                    f"({found}). Use the one it was made "
                    "with (or none, if the folder has all rows), or another folder."
                )
        if stands["autocast"] not in ("no", now["autocast"]):
            logger.warning(
                "The predictions in %s were computed in %s; this run's mixed precision is %r.",
                self.folder,
                stands["autocast"],
                now["autocast"],
            )

    @property
    def inputs(self) -> set[str]:
        """What the teacher takes, as far as the folder says; known before it is opened."""
        path = self.folder / "description.json"
        if not path.exists():
            return set()
        return set(json.loads(path.read_text(encoding="utf-8")).get("inputs", ()))

    @property
    def classes(self) -> Classes:
        """What the teacher predicts over, as far as the folder says."""
        names = self._stands.get("names")
        return Classes(None if names is None else tuple(names), self._stands.get("vocabulary"))

    def begin(self, trainer: Trainer) -> None:
        """Move the teacher behind the cache to its device."""
        if self.teacher is not None:
            self.teacher.begin(trainer)

    def __call__(self, **inputs: Any) -> Any:
        """The outputs of the teacher behind the cache."""
        assert self.teacher is not None
        return self.teacher(**inputs)

    def signal(
        self,
        teacher_inputs: Mapping[str, Any],
        mask: torch.Tensor,
        counts: Sequence[int],
        compute: Callable[[], torch.Tensor],
        ragged: bool = False,
    ) -> Signal:
        """What the teacher says of the chosen items, from the store where it is there.

        Args:
            teacher_inputs: What the teacher sees; the rows are found by it.
            mask: (B,) or (B, T): which items are distilled.
            counts: Number of items of each row.
            compute: Asks the teacher for the logits of the whole batch, (N, C).
            ragged: Whether rows have classes of their own, padded on the right (spans).

        Raises:
            ValueError: If a row is missing and there is no teacher.
        """
        store = self._opened()
        keys = _keys(teacher_inputs, mask)
        blocks = [store.row(key) if key in store else None for key in keys]
        if any(block is None for block in blocks):
            store.refresh()  # another process may have it by now
            blocks = [store.row(key) if key in store else None for key in keys]
        missing = sum(block is None for block in blocks)
        device = mask.device
        if not missing:
            rows = [self._decode(cast(Any, block)[0]) for block in blocks]
            found = [len(row.indices if isinstance(row, TopK) else row) for row in rows]
            if found != list(counts):
                raise ValueError(
                    f"{self.folder} holds {sum(found)} items for a batch in which item_mask has "
                    f"{sum(counts)}: it was made with another item_mask. Make it anew."
                )
            return self._joined(rows, device)
        if self.teacher is None:
            raise ValueError(
                f"{missing} of {len(keys)} rows of this batch are not in {self.folder} "
                f"({len(store)} rows of teacher {self._stands.get('teacher')!r}): it was made from "
                "other data, or the rows were tokenised, truncated or masked in another way. Make "
                "it from these rows, or pass CachedTeacher(folder, teacher=model) to add them."
            )
        logits = compute()
        if len(logits) != sum(counts):
            raise ValueError(
                f"select_logits gave {len(logits)} items where item_mask has {sum(counts)}; a "
                "cached teacher needs as many. Override both, or neither."
            )
        signals = [self._signal_of(part) for part in torch.split(logits, list(counts))]
        for key, row, block in zip(keys, signals, blocks, strict=True):
            if block is None:
                self.computed += 1
                self._keep(key, self._encode(row, ragged))
        # What was computed is rounded as what will be read, so every epoch sees the same.
        return self._joined([self._decode(self._encode(row, ragged)) for row in signals], device)

    def _keep(self, key: bytes, block: torch.Tensor) -> None:
        """Store a row; a full disk stops the storing, not the training."""
        if self._is_full:
            return
        try:
            self._opened().add(key, block, 0)
        except OSError as error:
            self._is_full = True
            logger.warning(
                "The teacher's predictions can no longer be kept in %s (%s): rows that are not "
                "there are computed in every epoch.",
                self.folder,
                error,
            )

    def _opened(self) -> RowStore:
        if self._store is None:
            raise RuntimeError("CachedTeacher.open() was not called.")
        return self._store

    def _signal_of(self, logits: torch.Tensor) -> Signal:
        if self.top_k is None:
            return logits
        assert self.temperature is not None
        # Of a padded vocabulary only what the student has can be among the top k.
        return TopK.of(logits[:, : self._stands["classes"]], self.top_k, self.temperature)

    def _encode(self, signal: Signal, ragged: bool) -> torch.Tensor:
        dtype = DTYPES[self.dtype]
        if isinstance(signal, TopK):
            shape = signal.indices.shape
            parts = [
                signal.indices.to(torch.int32),
                signal.log_probabilities.to(dtype),
                signal.log_tail.float(),
            ]
        else:
            logits = signal
            if ragged and len(signal):
                present = (signal > ABSENT / 2).any(0).nonzero().flatten().tolist()
                logits = signal[:, : max(present, default=-1) + 1]
            shape = logits.shape
            parts = [logits.to(dtype)]
        content = HEADER.pack(*shape) + b"".join(_bytes(part) for part in parts)
        return torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy()).unsqueeze(1)

    def _decode(self, block: torch.Tensor) -> Signal:
        content = block.flatten()
        items, classes = HEADER.unpack(content[: HEADER.size].numpy().tobytes())
        dtype, at = DTYPES[self.dtype], HEADER.size

        def take(kind: torch.dtype, *shape: int) -> torch.Tensor:
            nonlocal at
            size = int(np.prod(shape)) * torch.empty((), dtype=kind).element_size()
            values = content[at : at + size].clone().view(kind).view(*shape)
            at += size
            return values

        if self.top_k is None:
            return take(dtype, items, classes).float()
        assert self.temperature is not None
        indices = take(torch.int32, items, classes).long()
        top = take(dtype, items, classes).float()
        tail = take(torch.float32, items)
        return TopK(indices, top, tail, self.temperature, self._stands["classes"])

    def _joined(self, rows: Sequence[Signal], device: torch.device) -> Signal:
        if self.top_k is None:
            logits = cast("list[torch.Tensor]", list(rows))
            classes = max(row.shape[1] for row in logits)
            padded = [
                nn.functional.pad(row, (0, classes - row.shape[1]), value=ABSENT) for row in logits
            ]
            return torch.cat(padded).to(device)
        tops = cast("list[TopK]", list(rows))
        return TopK(
            torch.cat([row.indices for row in tops]).to(device),
            torch.cat([row.log_probabilities for row in tops]).to(device),
            torch.cat([row.log_tail for row in tops]).to(device),
            tops[0].temperature,
            tops[0].classes,
        )

    def close(self) -> None:
        """Close the files."""
        if self.teacher is not None:
            self.teacher.close()
        if self._store is not None:
            self._store.close()
            self._store = None


def _bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    content: bytes = flat.numpy().tobytes()
    return content


def _keys(teacher_inputs: Mapping[str, Any], mask: torch.Tensor) -> list[bytes]:
    """A hash of what the teacher sees of each row, and of which of its items are distilled."""
    size = len(mask)
    mask = mask.cpu()
    tensors = {
        key: value.cpu()
        for key, value in teacher_inputs.items()
        if isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == size
    }
    decoder = {key: tensors.pop(key) for key in list(tensors) if key.startswith("decoder_")}
    # Absent means 0, so a student that takes no segments finds what was made with them.
    segments = tensors.pop("token_type_ids", None)
    attention = tensors.get("attention_mask")
    if mask.ndim == 2 and attention is not None and attention.shape == mask.shape and not decoder:
        tensors["item_mask"] = mask
        mask = mask.any(1)
    keys, spans = row_keys(tensors)
    whole = []
    for row, key in enumerate(keys):
        digest = hashlib.blake2b(key, digest_size=16)
        if mask.ndim == 1 and not bool(mask[row]):
            digest.update(b"not distilled")
        if mask.ndim == 2:  # what follows the last item has no influence on it
            chosen = mask[row].nonzero().flatten()
            end = int(chosen[-1]) + 1 if len(chosen) else 0
            for name in sorted(decoder):
                digest.update(name.encode() + _bytes(decoder[name][row, :end]))
            digest.update(_bytes(mask[row, :end]))
        if segments is not None and bool(segments[row].any()):
            low, high = spans[row] if spans is not None else (0, segments.shape[1])
            digest.update(b"token_type_ids" + _bytes(segments[row, low:high]))
        whole.append(digest.digest())
    return whole


def teacher_fingerprint(teacher: Teacher) -> str | None:
    """A hash of a teacher's weights, kind and settings; None where it has none (a function)."""
    module = teacher.module
    if module is None:
        return None
    digest = hashlib.blake2b(digest_size=12)
    digest.update(type(module).__name__.encode())
    config = getattr(unwrapped_base(module), "config", None)
    settings: dict[str, Any] = getattr(config, "to_diff_dict", dict)()
    # What weights do not show: the number of heads, the window, the base of rotations, ...
    digest.update(json.dumps(_computing(settings), sort_keys=True, default=str).encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _computing(settings: Mapping[Any, Any]) -> dict[str, Any]:
    """A configuration without what changes no prediction, at all depths."""
    return {
        str(key): _computing(value) if isinstance(value, Mapping) else value
        for key, value in settings.items()
        if key not in OF_NO_EFFECT and not str(key).startswith("_")
    }


def tokenizer_fingerprint(processing_class: Any) -> str | None:
    """A hash of a tokenizer's vocabulary and rules; None where there is no tokenizer."""
    backend = getattr(processing_class, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        for state_of_last_call in ("padding", "truncation"):
            rules.pop(state_of_last_call, None)
    elif hasattr(processing_class, "get_vocab"):
        rules = {"class": type(processing_class).__name__, "vocab": processing_class.get_vocab()}
    else:
        return None
    content = json.dumps(rules, sort_keys=True).encode()
    return hashlib.blake2b(content, digest_size=12).hexdigest()
