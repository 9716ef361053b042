"""A teacher whose predictions are computed once and stored on disk."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from hf_adapt.distillation.checks import Classes
from hf_adapt.distillation.fingerprints import (
    item_keys,
    teacher_fingerprint,
    tokenizer_fingerprint,
)
from hf_adapt.distillation.self_teacher import SelfTeacher
from hf_adapt.distillation.signals import DTYPES, Signal, SignalFormat, TopK, joined
from hf_adapt.distillation.teachers import ModelTeacher, Teacher, as_teacher
from hf_adapt.storage.row_store import RowStore, write_description

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

FORMAT = 2


class CachedTeacher(Teacher):
    """Predictions of a teacher, computed once and read from memory-mapped files afterwards.

    A row is found by a hash of its own tokens (without padding) and of which of its tokens are
    distilled, so a changed row is never mistaken for another. With a `teacher`, missing rows are
    computed and stored: from the second epoch on no teacher runs. Without one, a missing row is an
    error. `hf-adapt cache-teacher` fills a folder beforehand.

    Full logits of a classifier take a few bytes a row; those of a language model take
    4 × vocabulary bytes a token, so use `top_k` there (8 × k + 4 bytes a token).

    Args:
        folder: The folder of the predictions; created if missing.
        teacher: Computes missing predictions: a model, a name, a callable; None to read only.
        top_k: Store only the k most likely classes, and the probability of the others together.
        temperature: Softmax temperature of the distillation; required with `top_k`.
        dtype: `"float32"`, `"float16"` or `"bfloat16"`.

    Raises:
        ValueError: If the options do not fit, or the folder was built with another teacher,
            tokenizer or other options.

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
                "(temperature=2.0, or --temperature 2), because the probability of all other "
                "classes is stored at that temperature."
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
                "stored. Pass SelfTeacher() itself as the teacher."
            )
        self.folder = Path(folder)
        self.teacher = None if teacher is None else as_teacher(teacher)
        self.format = SignalFormat(dtype, top_k, None if top_k is None else temperature)
        self.name = f"predictions in {self.folder}"
        self.computed = 0
        self._is_full = False
        self._store: RowStore | None = None
        self._description: dict[str, Any] = {}

    @property
    def module(self) -> nn.Module | None:  # type: ignore[override]
        """The model behind the cache."""
        return None if self.teacher is None else self.teacher.module

    @property
    def source(self) -> Teacher | None:
        """The teacher behind the cache."""
        return self.teacher

    def setup(self, trainer: Trainer, student: nn.Module) -> None:
        """Load the teacher behind the cache; [`open`] comes next."""
        if self.teacher is not None:
            self.teacher.setup(trainer, student)

    def open(
        self,
        processing_class: Any,
        process: int = 0,
        classes: int | None = None,
        autocast: str = "no",
        hooks: Sequence[str] = (),
    ) -> None:
        """Open the folder, or start a new one.

        Args:
            processing_class: The tokenizer of the teacher's inputs.
            process: Index of this process, which names its files.
            classes: The top k of a new folder are among the first so many classes, over which
                they are normalised; None for all. An existing folder keeps its own number.
            autocast: The mixed precision in which the teacher is run.
            hooks: Names of the user's versions of the hooks that change the predictions.

        Raises:
            ValueError: If the folder holds something else.
        """
        found = self._read_description()
        asked = {
            **self._describe(processing_class),
            "hooks": list(hooks),
            "autocast": autocast,
            "classes": None if self.format.top_k is None else classes,
        }
        if found is not None:
            self._check(found, asked)
        elif self.teacher is None:
            raise ValueError(
                f"{self.folder} holds no teacher's predictions (there is no description.json), and "
                "no teacher was given to compute them. Fill it with `hf-adapt cache-teacher`, or "
                "pass CachedTeacher(folder, teacher=model)."
            )
        elif process == 0:
            write_description(self.folder, asked)
        self._description = asked if found is None else found
        keys = ("dtype", "top_k", "temperature", "classes")
        self.format = SignalFormat(**{key: self._description[key] for key in keys})
        self._store = RowStore(self.folder, process, torch.uint8, (1,))

    def _read_description(self) -> dict[str, Any] | None:
        path = self.folder / "description.json"
        if not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def _describe(self, processing_class: Any) -> dict[str, Any]:
        teacher = self.teacher
        return {
            "format": FORMAT,
            "teacher": getattr(teacher, "name", None),
            "teacher_fingerprint": teacher_fingerprint(self.module),
            "inputs": sorted(teacher.inputs) if isinstance(teacher, ModelTeacher) else [],
            **Classes.of(self.module)._asdict(),
            "tokenizer": getattr(processing_class, "name_or_path", None),
            "tokenizer_fingerprint": tokenizer_fingerprint(processing_class),
            "top_k": self.format.top_k,
            "temperature": self.format.temperature,
            "dtype": self.format.dtype,
        }

    def _check(self, found: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
        if found.get("format") != FORMAT:
            raise ValueError(
                f"{self.folder} has format {found.get('format')}, this version reads {FORMAT}. "
                "Rebuild it with `hf-adapt cache-teacher`."
            )
        own = ("top_k", "temperature", "dtype") if self.teacher is not None else ()
        if self.teacher is not None and found["teacher_fingerprint"] is None:
            own = ("teacher", *own)  # a function has only its name
        for key in ("teacher_fingerprint", "tokenizer_fingerprint", "hooks", *own):
            stored, given = found.get(key), asked.get(key)
            optional = key == "tokenizer_fingerprint" and (stored is None or given is None)
            optional |= key == "teacher_fingerprint" and self.teacher is None
            if stored != given and not optional:
                what = "set of hooks" if key == "hooks" else key.removesuffix("_fingerprint")
                raise ValueError(
                    f"{self.folder} was made with another {what}: "
                    f"{found.get(what, stored)!r} ({key} {stored}), not {asked.get(what, given)!r} "
                    f"({given}). Use the one it was made "
                    "with (or none, if the folder has all rows), or another folder."
                )
        if found["autocast"] not in ("no", asked["autocast"]):
            logger.warning(
                "The predictions in %s were computed in %s; this run's mixed precision is %r.",
                self.folder,
                found["autocast"],
                asked["autocast"],
            )

    @property
    def inputs(self) -> set[str]:
        """The teacher's inputs, as far as the folder names them; known before it is opened."""
        return set((self._read_description() or {}).get("inputs", ()))

    @property
    def classes(self) -> Classes:
        """The teacher's classes, as far as the folder names them."""
        names = self._description.get("names")
        return Classes(None if names is None else tuple(names), self._description.get("vocabulary"))

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
        """The teacher's predictions of the chosen items, read from the folder where possible.

        Args:
            teacher_inputs: The teacher's inputs, by which rows are found.
            mask: (B,) or (B, T): which items are distilled.
            counts: Number of items of each row.
            compute: Runs the teacher; returns the logits of the whole batch, (N, C).
            ragged: Whether rows have classes of their own, padded on the right (spans).

        Raises:
            ValueError: If a row is missing and there is no teacher.
        """
        store = self._opened()
        keys = item_keys(teacher_inputs, mask)
        blocks = self._read(keys)
        if any(block is None for block in blocks):
            store.refresh()  # another process may have it by now
            blocks = self._read(keys)
        missing = sum(block is None for block in blocks)
        if not missing:
            rows = [self.format.decode(block) for block in cast("list[torch.Tensor]", blocks)]
            found = [len(row.indices if isinstance(row, TopK) else row) for row in rows]
            if found != list(counts):
                raise ValueError(
                    f"{self.folder} holds {sum(found)} items for a batch in which item_mask has "
                    f"{sum(counts)}: it was made with another item_mask. Rebuild it."
                )
            return joined(rows, mask.device)
        if self.teacher is None:
            raise ValueError(
                f"{missing} of {len(keys)} rows of this batch are not in {self.folder} "
                f"({len(store)} rows of teacher {self._description.get('teacher')!r}): it was made "
                "from other data, or the rows were tokenised, truncated or masked differently. "
                "Fill it with these rows, or pass CachedTeacher(folder, teacher=model) to add them."
            )
        logits = compute()
        if len(logits) != sum(counts):
            raise ValueError(
                f"select_logits returned {len(logits)} items where item_mask has {sum(counts)}; a "
                "cached teacher needs as many. Override both, or neither."
            )
        rows = [self.format.signal(row) for row in torch.split(logits, list(counts))]
        encoded = [self.format.encode(row, ragged) for row in rows]
        for key, content, block in zip(keys, encoded, blocks, strict=True):
            if block is None:
                self.computed += 1
                self._keep(key, content)
        # Rounded as what will be read, so that every epoch sees the same.
        return joined([self.format.decode(content) for content in encoded], mask.device)

    def _read(self, keys: Sequence[bytes]) -> list[torch.Tensor | None]:
        """The stored bytes of rows, None for a row that is missing or damaged."""
        store = self._opened()
        found = [store.row(key) if key in store else None for key in keys]
        return [None if row is None else row[0] for row in found]

    def _keep(self, key: bytes, content: torch.Tensor) -> None:
        """Store a row; a full disk stops the storing, not the training."""
        if self._is_full:
            return
        try:
            self._opened().add(key, content, 0)
        except OSError as error:
            self._is_full = True
            logger.warning(
                "The teacher's predictions can no longer be kept in %s (%s): missing rows are "
                "computed in every epoch.",
                self.folder,
                error,
            )

    def _opened(self) -> RowStore:
        if self._store is None:
            raise RuntimeError("CachedTeacher.open() was not called.")
        return self._store

    def close(self) -> None:
        """Close the files."""
        if self.teacher is not None:
            self.teacher.close()
        if self._store is not None:
            self._store.close()
            self._store = None
