"""A fingerprint of the weights that the output of a prefix depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
import transformers
from torch import nn

from hf_adapt.engine.training import steps_per_epoch
from hf_adapt.models.layers import Stack
from hf_adapt.unfreezing.prefix.checks import modules_within

if TYPE_CHECKING:
    from transformers import Trainer

FORMAT = 1
SAMPLED = 16
"""Values of each frozen tensor that are compared before each forward."""


class PrefixFingerprint:
    """A hash of frozen weights, and whether they have changed since it was computed.

    Args:
        trainer: The Trainer of the run.
        model: The unwrapped model.
        stack: The stack of layers that the prefix belongs to.
        depth: Number of frozen layers.
        above: The ids of the parameters that come after them in the forward.

    Attributes:
        digest: The hash, of the weights and of `description`.
        description: What else determines the output of the prefix.
    """

    def __init__(
        self,
        trainer: Trainer,
        model: nn.Module,
        stack: Stack,
        depth: int,
        above: Collection[int],
    ) -> None:
        self.trainer, self.model, self.above = trainer, model, above
        arguments = trainer.args
        self.description = {
            "format": FORMAT,
            "model": type(model).__name__,
            "layers": f"{stack.path}, the lower {depth}",
            "attention": str(getattr(getattr(model, "config", None), "_attn_implementation", None)),
            "precision": "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "as loaded",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        self._rehash()

    def has_changed(self) -> bool:
        """Whether a weight has changed since the last call; all are hashed once per epoch."""
        self._steps_until_rehash -= 1
        (version, address, sample), before = self._sample(), self._sampled
        same = (version, address) == before[:2] and torch.equal(sample, before[2])
        if same and self._steps_until_rehash > 0:
            return False
        known = self.digest
        self._rehash()
        return self.digest != known

    def _rehash(self) -> None:
        digest = hashlib.blake2b(digest_size=12)
        digest.update(repr(sorted(self.description.items())).encode())
        self._tensors = self._prefix_tensors()
        for tensor in self._tensors:
            content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(content.numpy().data)
        self._sampled = self._sample()
        self._steps_until_rehash = steps_per_epoch(self.trainer) or 1000
        self.digest = digest.hexdigest()

    def _prefix_tensors(self) -> list[torch.Tensor]:
        """All tensors that the prefix's output depends on, and perhaps a few more."""
        later = modules_within(self.model, self.above)
        apart = set(self.above) | {  # also statistics that still follow the data
            id(buffer)
            for module in self.model.modules()
            if module in later or any(p.requires_grad for p in module.parameters(recurse=False))
            for buffer in module.buffers(recurse=False)
        }
        return [
            tensor
            for tensor in (*self.model.parameters(), *self.model.buffers())
            if not tensor.requires_grad and id(tensor) not in apart
        ]

    def _sample(self) -> tuple[int, int, torch.Tensor]:
        """What differs after nearly every change of the weights, and takes microseconds.

        A change in place raises a tensor's version; a change through `.data` does not, so some
        values are compared as well.
        """
        return (
            sum(t._version for t in self._tensors),
            hash(tuple(t.data_ptr() for t in self._tensors)),
            torch.cat(
                [
                    t.detach().flatten()[:: max(1, t.numel() // SAMPLED)].float()
                    for t in self._tensors
                ]
            ),
        )
