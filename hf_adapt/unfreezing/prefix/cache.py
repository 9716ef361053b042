"""A cache of what the frozen lower layers of a model return."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from hf_adapt.engine.streams import TRAINING
from hf_adapt.engine.training import steps_per_epoch, streams_of_run
from hf_adapt.models.groups import LayerGroup
from hf_adapt.models.state import preserved
from hf_adapt.storage.row_store import RowStore, row_keys
from hf_adapt.unfreezing.prefix.checks import (
    cacheable_stack,
    hooked_module,
    hooks_of,
    modules_within,
    output_tensors,
    why_not_cached,
)
from hf_adapt.unfreezing.prefix.fingerprint import PrefixFingerprint
from hf_adapt.unfreezing.prefix.folder import PrefixFolder
from hf_adapt.unfreezing.prefix.layers import PrefixLayers, PrefixOutput, Wrapper

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

Forwards = Literal["training", "all", "none"]
"""Those of training; those in evaluation mode as well, in a pass over a stream; none."""

MOST_CHANGES = 3
"""Changes of the frozen weights after which a phase is no longer cached."""
CHECKED_BATCHES = 2
"""Number of batches at the start of a phase, and of batches with padding, whose stored output is
compared with the computed one."""
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
"""Largest relative difference due to rounding, by dtype; `HALF_TOLERANCE` in half precision."""
HALF_TOLERANCE = 3e-2


class FrozenPrefix:
    """Starts the forwards of training and of passes over a stream at the lowest layer that trains.

    A row is identified by a hash of its own inputs without padding, so new, changed and augmented
    rows are computed. The folder is named by a hash of the frozen weights. The first batches that
    are read are computed as well, and compared. The first forward of training is always computed.
    Where its embeddings take a gradient (FGM), training is never served, and only passes are. Where
    the prefix has a hook that it did not have at the start of the phase, nothing is.

    Args:
        trainer: The Trainer of the run, with its dataloader.
        model: The unwrapped model.
        groups: Its layer groups.
        folder: Folder of the rows; by default one in the output folder, which is removed when the
            run is complete.

    Raises:
        ValueError: If the prefix of this model, or in this run, cannot be cached.
    """

    def __init__(
        self,
        trainer: Trainer,
        model: nn.Module,
        groups: Sequence[LayerGroup],
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        self.trainer, self.model, self.groups = trainer, model, groups
        self.folder = PrefixFolder(trainer, folder)
        self.stack = cacheable_stack(trainer, model)
        self._layers = [model.get_submodule(name) for name in self.stack.layers]
        self._signature = inspect.signature(model.forward)
        self._store: RowStore | None = None
        self._prefix = PrefixLayers()
        self._reset_forward()
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]
        self._serves: Forwards = "training"
        self._is_comparing = self._trains = False
        self._rows_read = self._rows_seen = 0

    def _reset_forward(self) -> None:
        self._keys: list[bytes] = []
        self._spans: list[tuple[int, int]] | None = None
        self._output: PrefixOutput | None = None

    @property
    def _depth(self) -> int:
        """The number of layers that are cached in this phase."""
        return len(self._prefix.layers)

    # ---- phases ----

    def start_phase(self, trained: frozenset[str], num_steps: int | None = None) -> None:
        """Find the frozen lower layers and whether caching them pays.

        Args:
            trained: The groups that train from now on.
            num_steps: Optimizer steps of the phase; None to cache however long it lasts.
        """
        self._close_store()
        self._prefix = PrefixLayers(self._layers[: self._frozen_depth(trained)])
        self._expect_new_rows()
        self._changes = 0
        self._wrappers: list[Wrapper] = []
        if self._depth == 0:
            return
        epoch = steps_per_epoch(self.trainer)
        if epoch is not None and num_steps is not None and num_steps <= epoch:
            logger.info(
                "The frozen prefix is not cached in this phase: it lasts %d steps, no more than "
                "an epoch, so nothing would be read.",
                num_steps,
            )
            self._prefix = PrefixLayers()
            return
        hooked = hooked_module(self._prefix.layers)
        if hooked is not None:
            self._give_up(f"a forward hook on its {hooked} reads it (a feature_layer=?)")
            return
        above = self._parameters_above(trained)
        others = {id(parameter) for parameter in self.model.parameters()} - above
        self._beneath = modules_within(self.model, others)
        self._hooks = hooks_of(self._beneath)
        self._fingerprint = PrefixFingerprint(
            self.trainer, self.model, self.stack, self._depth, above
        )

    def _expect_new_rows(self) -> None:
        """Let the next batch open a store, and compare the first batches read from it."""
        self._is_new = self._is_untrained = True
        self._only_sweeps = False
        self._unchecked = dict.fromkeys(("all", "padded"), CHECKED_BATCHES)

    def _frozen_depth(self, trained: frozenset[str]) -> int:
        """The number of layers from the bottom that are frozen, together with all that is below."""
        level_of = {group.name: group.level for group in self.groups}
        level_of_parameter = {n: g.level for g in self.groups for n in g.parameters}
        lowest = min(level_of[name] for name in trained)
        depth = 0
        for name, layer in zip(self.stack.layers, self._layers, strict=True):
            levels = {v for n, v in level_of_parameter.items() if n.startswith(name + ".")}
            if any(p.requires_grad for p in layer.parameters()):
                break
            if levels and max(levels) > lowest:
                break  # something below trains
            depth += 1
        return depth

    def _parameters_above(self, trained: frozenset[str]) -> set[int]:
        """The ids of the parameters that come after the prefix in the forward."""
        cached, later = (
            tuple(name + "." for name in names)
            for names in (self.stack.layers[: self._depth], self.stack.layers[self._depth :])
        )
        level_of = {n: group.level for group in self.groups for n in group.parameters}
        top = max(
            (level for name, level in level_of.items() if name.startswith(cached)),
            default=min(group.level for group in self.groups if group.name in trained),
        )
        return {
            id(parameter)
            for name, parameter in self.model.named_parameters()
            if name.startswith(later) or level_of.get(name, top) > top
        }

    def _open_store(self, hidden: torch.Tensor, rows: int) -> bool:
        """Open the store for rows like these; False if that is not possible."""
        row_bytes = hidden.numel() * hidden.element_size() / rows  # padding included
        what = f"the output of the lower {self._depth} of {len(self._layers)} layers"
        try:
            self._store = self.folder.open_store(
                self._fingerprint, what, hidden, row_bytes, self._num_rows()
            )
        except OSError as error:
            self._give_up(str(error))
            return False
        return True

    def _num_rows(self) -> int | None:
        """The number of rows that an epoch brings, or passes over the streams; None if unknown."""
        data = streams_of_run(self.trainer)
        if self._serves == "all":  # a pass
            if data is None:
                return None  # rows that are no part of the run are scored
            try:
                read = [data.rows_of(name) for name in (TRAINING, *data.streams)]
            except ValueError:
                return None  # another stream has no length
            return sum(len(dataset) for datasets in read for _, dataset in datasets)
        source = self.trainer.train_dataset if data is None else data.source
        if not hasattr(source, "__len__"):
            return None
        ratios = {} if data is None else data.table.ratios
        read_too = sum(r for name, r in ratios.items() if data and name not in data.table.unread)
        return round(len(source) * (1 + read_too))  # type: ignore[arg-type]

    def _give_up(self, why: str) -> None:
        """Continue without a cache in this phase: slower, but correct."""
        logger.warning("The frozen prefix is not cached in this phase: %s.", why)
        self._prefix.restore()
        self._prefix = PrefixLayers()
        self._close_store()

    @contextmanager
    def serving(self, forwards: Forwards) -> Iterator[None]:
        """Which forwards are served and kept, while the context is open."""
        before, self._serves = self._serves, forwards
        try:
            yield
        finally:
            self._serves = before

    # ---- one forward ----

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._is_comparing:
            return
        self._reset_forward()
        self._trains = module.training and torch.is_grad_enabled()
        trains = self._serves == "training" and self._trains and not self._only_sweeps
        if self._depth == 0 or not (trains or self._serves == "all"):
            return
        if not hooks_of(self._beneath) <= self._hooks:
            return
        if self._fingerprint.has_changed():
            logger.warning(
                "A frozen weight has changed since the prefix was cached (an exponential average, "
                "another callback?): its rows are computed again."
            )
            self._close_store()
            self._expect_new_rows()
            self._changes += 1
            if self._changes > MOST_CHANGES:
                self._give_up(f"its weights have changed {self._changes} times")
                return
        inputs = self._inputs(args, kwargs)
        if inputs is None:
            return
        self._keys, self._spans = row_keys(inputs)
        self._positions = None if self._spans is None else inputs["attention_mask"].shape[1]
        self._rows_seen += len(self._keys)
        if self._store is not None and not all(key in self._store for key in self._keys):
            self._store.refresh()
        first = self._trains and self._is_untrained
        if self._store is not None and not first and all(key in self._store for key in self._keys):
            hidden = self._store.batch(self._keys, self._positions)
            if hidden is not None:
                if self._is_due_for_check() and not self._same(args, kwargs, hidden, inputs):
                    return
                self._skip_layers(hidden)
                self._rows_read += len(self._keys)
                return
        self._output = self._prefix.capture()

    def _is_due_for_check(self) -> bool:
        """Whether this is one of the first batches read, of all or of those with padding."""
        kinds = ["all"]
        if self._spans is not None and any(hi - lo != self._positions for lo, hi in self._spans):
            kinds.append("padded")
        due = [kind for kind in kinds if self._unchecked[kind] > 0]
        for kind in due:
            self._unchecked[kind] -= 1
        return bool(due)

    def _inputs(self, args: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """The inputs of the prefix by name; None if the states inside the model are requested."""
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

    # ---- computing and storing ----

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._is_comparing:
            return
        self._prefix.restore()
        captured, keys, spans = self._output, self._keys, self._spans
        self._reset_forward()
        if captured is None or captured.hidden is None or self._depth == 0:
            return
        hidden = captured.hidden
        if self._is_new or (self._trains and self._is_untrained):
            if (problem := why_not_cached(captured, len(keys))) is not None:
                self._give_up(problem)
                return
            if hidden.requires_grad:
                self._only_sweeps = True
                logger.info(
                    "The frozen prefix is computed in training, for a gradient of the embeddings "
                    "(FGM, VAT), and read in passes over a stream."
                )
                return
            self._is_untrained = self._is_untrained and not self._trains
        if self._is_new:
            self._wrappers = [wrapper for wrapper in captured.wrappers if wrapper is not None]
            if spans is not None and hidden.shape[1] != self._positions:
                self._give_up("the layers' output has another length than the attention mask")
                return
            if not self._open_store(hidden, len(keys)):
                return
            self._is_new = False
        self._store_rows(hidden, keys, spans)

    def _store_rows(
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

    def _skip_layers(self, hidden: torch.Tensor) -> None:
        hidden = hidden.to(self.trainer.args.device, non_blocking=True)
        self._prefix.skip(self._wrappers, hidden)

    def _same(
        self, args: Any, kwargs: dict[str, Any], hidden: torch.Tensor, inputs: Mapping[str, Any]
    ) -> bool:
        """Whether the model's outputs are the same from stored rows as from computed ones."""
        self._is_comparing = True
        outputs = []
        try:
            for from_store in (False, True):
                # Batch norm, and custom models, may count each forward.
                with torch.no_grad(), preserved(self.model):
                    if from_store:
                        self._skip_layers(hidden)
                    outputs.append(output_tensors(self.model(*args, **kwargs)))
                self._prefix.restore()
        except RuntimeError as error:
            self._give_up(f"the upper layers cannot start from stored rows ({error})")
            return False
        finally:
            self._prefix.restore()
            self._is_comparing = False
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
                    f"the model's output from stored rows differs by {difference:.2g} from the "
                    "computed one: the lower layers depend on the padding, on other rows or on "
                    "something outside, or later layers read more of them"
                )
                return False
        return True

    # ---- logs and end ----

    def log_values(self) -> dict[str, float]:
        """The share of rows that were read instead of computed since the last call."""
        seen, read, self._rows_seen, self._rows_read = self._rows_seen, self._rows_read, 0, 0
        return {"unfreezing/cached_share": read / seen} if seen else {}

    def _close_store(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None

    def close(self) -> None:
        """Remove the hooks, and the rows if the run is complete."""
        for handle in self._handles:
            handle.remove()
        self._prefix.restore()
        self._close_store()
        self.folder.remove_if_complete()
