"""Saved models blended on disk, one weight at a time."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import safe_open

from hf_adapt.continual.interpolation import check_alpha, labels_of, refuse_adapters
from hf_adapt.continual.matching import shared_weights
from hf_adapt.models.averages import blend, wide
from hf_adapt.models.hub_names import check_hub_name

COPIED = (".json", ".txt", ".model", ".py", ".jinja")
"""Endings of the files that make a model beside its weights: configuration, tokenizer, code."""
OF_TRAINING = ("trainer_state.json", "all_results.json", "train_results.json", "eval_results.json")


class SavedModel:
    """The weights of a model in a folder, which are read when they are asked for.

    Args:
        name: The folder that `save_pretrained` wrote, or an id on the Hub.

    Raises:
        ValueError: If it has adapters, or no weights in safetensors files.
    """

    def __init__(self, name: str | os.PathLike[str]) -> None:
        check_hub_name(name)
        self.name = str(name)
        patterns = [f"*{ending}" for ending in (*COPIED, ".safetensors")]
        self.folder = (
            Path(name)
            if Path(name).is_dir()
            else Path(snapshot_download(str(name), allow_patterns=patterns))
        )
        if (self.folder / "adapter_config.json").is_file():
            refuse_adapters(self.name)
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            self.files = sorted({self.folder / name for name in named})
        else:
            self.files = [self.folder / "model.safetensors"]
        if missing := [file.name for file in self.files if not file.is_file()]:
            raise ValueError(
                f"{self.name} has no {missing[0]}. Weights are read from safetensors files: save "
                "the model with save_pretrained."
            )
        config = transformers.AutoConfig.from_pretrained(self.folder)
        self.labels = labels_of(config)
        named = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
        self.prefix = str(getattr(named, "base_model_prefix", ""))
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in self.files:
            file = self._stack.enter_context(safe_open(path, "pt"))
            for key in file.keys():
                part = file.get_slice(key)
                if part.get_dtype() in ("F64", "F32", "F16", "BF16"):
                    self.shapes[key] = tuple(part.get_shape())
                    self._files[key] = file

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor

    def close(self) -> None:
        """Close the files."""
        self._stack.close()


class Merge:
    """A blend of saved models, written as a model of its own.

    The weights of the last are copied as they are, and those that the others share are blended one
    at a time, so that no model is ever in memory.

    Args:
        models: Folders that `save_pretrained` wrote, or ids on the Hub.
        alpha: The share of the second of two models, from 0 to 1; see [`interpolate`]. None for the
            mean of all, which must then share all weights.

    Attributes:
        shared: The weights that are blended, by their names in the last model.
        kept: Those of the last model that another lacks, or has for other labels.

    Raises:
        ValueError: If the models do not fit.
    """

    def __init__(
        self, models: Sequence[str | os.PathLike[str]], alpha: float | None = None
    ) -> None:
        if alpha is not None:
            check_alpha(alpha)
            if len(models) != 2:
                raise ValueError(f"alpha blends two models, got {len(models)}.")
        elif len(models) < 2:
            raise ValueError(f"A mean needs two models or more, got {len(models)}.")
        self.alpha = alpha
        *self.others, self.model = self.models = [SavedModel(name) for name in models]
        self._names = [
            shared_weights(
                other.shapes,
                self.model.shapes,
                (other.prefix, self.model.prefix),
                other.labels == self.model.labels,
            )
            for other in self.others
        ]
        own = self.model.shapes
        self.shared = {name for name in own if all(name in names for names in self._names)}
        self.kept = [name for name in own if name not in self.shared]
        if alpha is None and self.kept:
            raise ValueError(
                f"The models do not share {', '.join(self.kept[:3])}, or have it for other labels. "
                "A mean is one of models of the same task: give them the same head."
            )

    def write(self, output: str | os.PathLike[str]) -> Iterator[int]:
        """Write the model; the folder appears when it is complete.

        Yields:
            How many of the shared weights are written.

        Raises:
            ValueError: If the folder is not empty.
        """
        output = Path(output)
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ValueError(f"{output} exists and is not empty. Name a new folder.")
        output.parent.mkdir(parents=True, exist_ok=True)
        part = output.with_name(f"{output.name}.{uuid.uuid4().hex[:8]}.part")
        part.mkdir()
        try:
            for file in sorted(self.model.folder.iterdir()):
                is_wanted = file.suffix in COPIED and file.name not in OF_TRAINING
                if (is_wanted and file.is_file()) or file in self.model.files:
                    shutil.copyfile(file, part / file.name)
            done = 0
            for source in self.model.files:
                with (part / source.name).open("r+b") as file:
                    for name, offset in _offsets(source).items():
                        if name in self.shared:
                            file.seek(offset)
                            file.write(_bytes(self._blended(name)))
                            done += 1
                            yield done
            if output.exists():
                output.rmdir()
            part.replace(output)
        finally:
            shutil.rmtree(part, ignore_errors=True)
            for model in self.models:
                model.close()

    def _blended(self, name: str) -> torch.Tensor:
        named = zip(self.others, self._names, strict=True)
        others = (other[names[name]] for other, names in named)
        if self.alpha is not None:
            return blend(next(others), self.model[name], self.alpha)
        return mean([*others, self.model[name]])


def mean(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """The mean in float32, in the dtype of the last; of equal tensors no bit changes."""
    first, *others = tensors
    total = wide(first).clone()
    for number, other in enumerate(others, 2):
        total.lerp_(wide(other).to(total.dtype), 1 / number)
    return total.to(others[-1].dtype if others else first.dtype)


def _offsets(path: Path) -> dict[str, int]:
    """Where the values of each weight begin in a safetensors file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {name: 8 + length + each["data_offsets"][0] for name, each in header.items()}


def _bytes(tensor: torch.Tensor) -> bytes:
    """The values as a safetensors file has them."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
