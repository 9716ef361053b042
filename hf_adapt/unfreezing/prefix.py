"""The frozen bottom of a model, computed once per example and then read from disk."""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from hf_adapt.engine.training import steps_per_epoch
from hf_adapt.models.groups import LayerGroup
from hf_adapt.models.state import preserved
from hf_adapt.storage.row_store import RowStore, row_keys, write_description
from hf_adapt.unfreezing.prefix_checks import (
    cacheable_stack,
    hooked_module,
    output_tensors,
    random_states,
    skipping_forward,
    why_not_kept,
    wrapper_of,
)

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

CACHE_FOLDER = "_frozen_prefix_cache"
"""In the output folder; what starts with an underscore is not pushed to the hub."""
MOST_CHANGES = 3
"""Changes of the frozen weights after which a phase is not cached any longer."""
FORMAT = 1
SAMPLED = 16
"""Values of each frozen tensor that are looked at before each forward."""
CHECKED_BATCHES = 2
"""Batches read from the store at the start of a phase, and batches with padding among them, that
are computed as well and compared."""
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
"""Relative difference that rounding explains, by dtype; half precision gets `HALF_TOLERANCE`."""
HALF_TOLERANCE = 3e-2


class FrozenPrefix:
    """Starts the forward of training batches at the lowest layer that trains.

    A row is found by a hash of its own inputs without padding, so a changed row, a new one or one
    that augmentation changed is computed, never mistaken. The folder is named by a hash of the
    frozen weights. The first batches that are read are computed too, and compared.

    Args:
        trainer: The Trainer of the run, with its dataloader.
        model: The unwrapped model.
        groups: Its layer groups.
        folder: Where to keep the rows; in the output folder by default, where they are removed
            when the run is complete.

    Raises:
        ValueError: If the model or the run can have no cached prefix.
    """

    def __init__(
        self,
        trainer: Trainer,
        model: nn.Module,
        groups: Sequence[LayerGroup],
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        self.trainer, self.model, self.groups = trainer, model, groups
        self.temporary = folder is None
        self.root = Path(folder or Path(str(trainer.args.output_dir)) / CACHE_FOLDER)
        self.stack = cacheable_stack(trainer, model)
        self._layers = [model.get_submodule(name) for name in self.stack.layers]
        self._signature = inspect.signature(model.forward)
        self._store: RowStore | None = None
        self._made: list[Path] = []
        self._depth = 0
        self._reset_forward()
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]
        self._busy = False
        self._replayed = self._seen = 0

    def _reset_forward(self) -> None:
        self._keys: list[bytes] = []
        self._spans: list[tuple[int, int]] | None = None
        self._patched: list[tuple[nn.Module, Any]] = []
        self._capture: Any = None
        self._random_before: list[torch.Tensor] = []

    # ---- phases ----

    def start_phase(self, trained: frozenset[str], num_steps: int) -> None:
        """Find how much of the bottom is frozen and open its store.

        Args:
            trained: The groups that train from now on.
            num_steps: How long the phase lasts.
        """
        self._close_store()
        self._depth = self._frozen_depth(trained)
        self._start_anew()
        self._changes = 0
        self._formats: list[Callable[[torch.Tensor], Any]] = []
        if self._depth == 0:
            return
        epoch = steps_per_epoch(self.trainer)
        if epoch is not None and num_steps <= epoch:
            logger.info(
                "The frozen prefix is not cached in this phase: it lasts %d steps, no more than "
                "an epoch, so nothing would be read.",
                num_steps,
            )
            self._depth = 0
            return
        hooked = hooked_module(self._layers[: self._depth])
        if hooked is not None:
            self._give_up(f"a forward hook on its {hooked} reads it (a feature_layer=?)")
            return
        self._fingerprint()
        self._until_rehash = epoch or 1000

    def _start_anew(self) -> None:
        """The next batch opens a store; the first that are read from it are checked."""
        self._is_new = True
        self._unchecked = dict.fromkeys(("all", "padded"), CHECKED_BATCHES)

    def _frozen_depth(self, trained: frozenset[str]) -> int:
        """How many layers from the bottom are frozen, with all that lies below them."""
        level_of = {group.name: group.level for group in self.groups}
        place = {n: group.level for group in self.groups for n in group.parameters}
        lowest = min(level_of[name] for name in trained)
        depth = 0
        for name, layer in zip(self.stack.layers, self._layers, strict=True):
            levels = {place[n] for n in place if n.startswith(name + ".")}
            if any(p.requires_grad for p in layer.parameters()):
                break
            if levels and max(levels) > lowest:
                break  # something below trains
            depth += 1
        return depth

    def _prefix_tensors(self) -> list[torch.Tensor]:
        """All that the prefix's output depends on, and perhaps a little more."""
        later = tuple(name + "." for name in self.stack.layers[self._depth :])
        following = {  # statistics that go on following the data
            id(buffer)
            for module in self.model.modules()
            if any(p.requires_grad for p in module.parameters(recurse=False))
            for buffer in module.buffers(recurse=False)
        }
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        return [
            tensor
            for name, tensor in named
            if not tensor.requires_grad
            and not name.startswith(later)
            and id(tensor) not in following
        ]

    def _fingerprint(self) -> None:
        """Hash the frozen weights and what else decides the prefix's output."""
        digest = hashlib.blake2b(digest_size=12)
        arguments = self.trainer.args
        self._description = {
            "format": FORMAT,
            "model": type(self.model).__name__,
            "layers": f"{self.stack.path}, the lower {self._depth}",
            "attention": str(
                getattr(getattr(self.model, "config", None), "_attn_implementation", None)
            ),
            "precision": "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "as loaded",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        digest.update(repr(sorted(self._description.items())).encode())
        tensors = self._prefix_tensors()
        for tensor in tensors:
            content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(content.numpy().data)
        self._tensors = tensors
        self._quick = self._quick_look()
        self._hash = digest.hexdigest()

    def _quick_look(self) -> tuple[int, int, torch.Tensor]:
        """What changes with nearly every change of the weights, and costs microseconds.

        In-place changes raise the version; writes by `.data` do not, so some values are looked at.
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

    def _prefix_changed(self) -> bool:
        """Whether somebody changed a frozen weight; all are hashed once per epoch."""
        self._until_rehash -= 1
        now, before = self._quick_look(), self._quick
        same = now[:2] == before[:2] and torch.equal(now[2], before[2])
        if same and self._until_rehash > 0:
            return False
        self._until_rehash = steps_per_epoch(self.trainer) or 1000
        known = self._hash
        self._fingerprint()
        return self._hash != known

    def _open(self, hidden: torch.Tensor, rows: int) -> bool:
        """Open the store for rows like these; say what it will need."""
        folder = self.root / self._hash
        positions = (
            sum(hi - lo for lo, hi in self._spans) if self._spans else hidden[..., 0].numel()
        )
        row_bytes = hidden[0, 0].numel() * hidden.element_size() * positions / rows
        number = self._num_rows(rows)
        present = sum(f.stat().st_size for f in folder.glob("rows-*.bin"))
        self.root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.root).free
        if number is None:
            needed, total = 0.0, "each row takes"
            size = row_bytes
        else:
            needed = max(0.0, row_bytes * number - present)
            total, size = f"{number:,} rows will take about", row_bytes * number
        if self.trainer.is_world_process_zero():
            there = f", {_bytes(present)} of which are there" if present else ""
            print(
                f"hf_adapt: caching the output of the lower {self._depth} of {len(self._layers)} "
                f"layers in {folder}: {total} {_bytes(size)}{there}; {_bytes(free)} are free.",
                flush=True,
            )
        if needed > free:
            self._give_up(f"{_bytes(needed)} are needed in {self.root} and {_bytes(free)} are free")
            return False
        others = sorted(f.name for f in self.root.iterdir() if f.is_dir() and f != folder)
        others = [name for name in others if self.root / name not in self._made]
        if others:
            logger.warning(
                "%s holds rows of other prefixes (other weights, layers, precision or versions), "
                "which are not used: %s.",
                self.root,
                ", ".join(others),
            )
        process = self.trainer.args.process_index
        try:
            self._store = RowStore(folder, process, hidden.dtype, tuple(hidden.shape[2:]))
            if process == 0:
                write_description(folder, self._description)
        except OSError as error:
            self._give_up(f"{error}")
            return False
        if folder not in self._made:
            self._made.append(folder)
        return True

    def _num_rows(self, rows: int) -> int | None:
        dataset = self.trainer.train_dataset
        if not hasattr(dataset, "__len__"):
            return None
        brought = rows / self.trainer.args.per_device_train_batch_size  # target rows come along
        return round(len(dataset) * max(1.0, brought))  # type: ignore[arg-type]

    def _give_up(self, why: str) -> None:
        """Go on without a cache in this phase: slower, and right."""
        logger.warning("The frozen prefix is not cached in this phase: %s.", why)
        self._depth = 0
        self._close_store()

    # ---- one forward ----

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._busy:
            return
        self._reset_forward()
        if self._depth == 0 or not (module.training and torch.is_grad_enabled()):
            return
        if self._prefix_changed():
            logger.warning(
                "A frozen weight has changed since the prefix was cached (an exponential average, "
                "another callback?): its rows are computed anew."
            )
            self._close_store()
            self._start_anew()
            self._changes += 1
            if self._changes > MOST_CHANGES:
                self._give_up(f"its weights have changed {self._changes} times")
                return
        inputs = self._inputs(args, kwargs)
        if inputs is None:
            return
        self._keys, self._spans = row_keys(inputs)
        self._positions = None if self._spans is None else inputs["attention_mask"].shape[1]
        self._seen += len(self._keys)
        if self._store is not None and not all(key in self._store for key in self._keys):
            self._store.refresh()
        if self._store is not None and all(key in self._store for key in self._keys):
            hidden = self._store.batch(self._keys, self._positions)
            if hidden is not None:
                if self._to_check() and not self._same(args, kwargs, hidden, inputs):
                    return
                self._replay(hidden)
                self._replayed += len(self._keys)
                return
        self._start_capture()

    def _to_check(self) -> bool:
        """Whether this is one of the first batches read, of all or of those with padding."""
        kinds = ["all"]
        if self._spans is not None and any(hi - lo != self._positions for lo, hi in self._spans):
            kinds.append("padded")
        due = [kind for kind in kinds if self._unchecked[kind] > 0]
        for kind in due:
            self._unchecked[kind] -= 1
        return bool(due)

    def _inputs(self, args: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """What the prefix sees, by name; None if its own states are asked for."""
        try:
            bound = dict(self._signature.bind_partial(*args, **kwargs).arguments)
        except TypeError:
            return None
        inputs: dict[str, Any] = {}
        if any(isinstance(value, tuple) for value in bound.values()):
            return None  # positional tensors without names
        for name, value in bound.items():
            inputs.update(value if isinstance(value, Mapping) else {name: value})
        config = getattr(self.model, "config", None)
        for flag in ("output_hidden_states", "output_attentions"):
            asked = inputs.get(flag)
            if asked or (asked is None and getattr(config, flag, False)):
                return None
        labels = {*self.trainer.label_names, "labels", "label"}
        found = {
            name: value
            for name, value in inputs.items()
            if isinstance(value, torch.Tensor)
            and value.ndim > 0
            and name not in labels
            and not name.startswith("decoder_")
        }
        return found or None

    # ---- computing and keeping ----

    def _start_capture(self) -> None:
        self._capture = {}
        self._random_before = random_states()
        for number, layer in enumerate(self._layers[: self._depth]):
            last = number == self._depth - 1
            self._patch(layer, self._captured(layer.forward, number, last))

    def _patch(self, layer: nn.Module, forward: Callable[..., Any]) -> None:
        self._patched.append((layer, layer.__dict__.get("forward")))
        layer.forward = forward

    def _captured(self, forward: Any, number: int, last: bool) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            self._capture[number] = wrapper_of(output)
            if last:
                self._capture["hidden"] = output[0] if isinstance(output, tuple) else output
                self._capture["random"] = random_states()
            return output

        return run

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._busy:
            return
        self._unpatch()
        capture, keys, spans = self._capture, self._keys, self._spans
        before = self._random_before
        self._reset_forward()
        if not capture or "hidden" not in capture or self._depth == 0:
            return
        hidden = capture["hidden"]
        if self._is_new:
            formats = [capture.get(number) for number in range(self._depth)]
            problem = why_not_kept(hidden, formats, len(keys), before, capture["random"])
            if problem is not None:
                self._give_up(problem)
                return
            self._formats = [f for f in formats if f is not None]
            if spans is not None and hidden.shape[1] != self._positions:
                self._give_up("the layers' output has another length than the attention mask")
                return
            if not self._open(hidden, len(keys)):
                return
            self._is_new = False
        self._keep(hidden, keys, spans)

    def _keep(
        self, hidden: torch.Tensor, keys: list[bytes], spans: list[tuple[int, int]] | None
    ) -> None:
        assert self._store is not None
        hidden = hidden.detach().cpu()
        try:
            for row, key in enumerate(keys):
                lo, hi = spans[row] if spans is not None else (0, hidden.shape[1])
                self._store.add(key, hidden[row, lo:hi], lo)
        except OSError as error:
            self._give_up(
                f"{error} after {len(self._store):,} rows in {self._store.folder}; the run goes on"
            )

    # ---- reading ----

    def _replay(self, hidden: torch.Tensor) -> None:
        hidden = hidden.to(self.trainer.args.device, non_blocking=True)
        for number, layer in enumerate(self._layers[: self._depth]):
            value = hidden if number == self._depth - 1 else None
            self._patch(layer, skipping_forward(self._formats[number], value))

    def _same(
        self, args: Any, kwargs: dict[str, Any], hidden: torch.Tensor, inputs: Mapping[str, Any]
    ) -> bool:
        """Compute the batch both ways, once, and compare the outputs of the model."""
        self._busy = True
        outputs = []
        try:
            for replayed in (False, True):
                # Batch norm, and models of one's own, count each forward.
                with torch.no_grad(), preserved(self.model):
                    if replayed:
                        self._replay(hidden)
                    outputs.append(output_tensors(self.model(*args, **kwargs)))
                self._unpatch()
        except RuntimeError as error:
            self._give_up(f"the upper layers cannot start from kept rows ({error})")
            return False
        finally:
            self._unpatch()
            self._busy = False
        mask = inputs.get("attention_mask")
        tolerance = TOLERANCE.get(hidden.dtype, HALF_TOLERANCE)
        if self.trainer.accelerator.mixed_precision != "no":  # autocast starts inside the model
            tolerance = HALF_TOLERANCE
        for one, other in zip(*outputs, strict=True):
            if mask is not None and mask.ndim == 2 and one.shape[:2] == mask.shape:
                one, other = one[mask.bool()], other[mask.bool()]
            difference = float((one - other).norm() / one.norm().clamp(min=1e-12))
            if not difference <= tolerance:
                self._give_up(
                    f"the model's output from the kept rows differs by {difference:.2g} from the "
                    "computed one: the lower layers depend on the padding, on other rows or on "
                    "something outside, or later layers read more of them"
                )
                return False
        return True

    def _unpatch(self) -> None:
        for layer, forward in self._patched:
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = forward
        self._patched = []

    # ---- logs and end ----

    def log_values(self) -> dict[str, float]:
        """The share of rows that were read instead of computed, since the last call."""
        seen, replayed, self._seen, self._replayed = self._seen, self._replayed, 0, 0
        return {"unfreezing/cached_share": replayed / seen} if seen else {}

    def _close_store(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None

    def close(self) -> None:
        """Take the hooks off; remove the rows of a run that is complete."""
        for handle in self._handles:
            handle.remove()
        self._unpatch()
        self._close_store()
        state, control = self.trainer.state, self.trainer.control
        finished = state.global_step >= state.max_steps or control.should_training_stop
        if self.temporary and finished and sys.exc_info()[0] is None:
            self.trainer.accelerator.wait_for_everyone()
            if self.trainer.is_local_process_zero():
                shutil.rmtree(self.root, ignore_errors=True)


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
