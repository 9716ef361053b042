"""Averages of a run's weights, which forget less than the last ones."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from hf_adapt.engine.mixins import WeightAverage, WeightTransform
from hf_adapt.engine.training import optimized, unwrapped_model
from hf_adapt.models.averages import RunningAverage, blend, running_statistics

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

Kind = Literal["ema", "soup", "sfa"]
OPTIONS: dict[Kind, dict[str, float | None]] = {
    "ema": {"decay": None},
    "soup": {"start": 0.75, "every": 0.05},
    "sfa": {"every": 0.25, "beta": 0.5},
}
"""What each kind is set by, with the defaults."""


class AveragedWeights(WeightAverage, WeightTransform):
    r"""Averages the weights of a run, in one of three ways.

    - `"ema"`: an exponential moving average, :math:`\bar\theta \leftarrow d\,\bar\theta +
      (1-d)\,\theta` after each step, from the weights that training starts from.
    - `"soup"`: the mean of the weights at points of equal distance in the last part of the run.
    - `"sfa"`: at points of equal distance, the last of them the end of the run, the training itself
      goes on from :math:`(1-\beta)\,\theta + \beta\,\theta_0`, with the starting weights
      :math:`\theta_0`. No data of the past is needed.

    With `"ema"` and `"soup"`, training goes on with the raw weights, evaluations see the average,
    and the model has it when training has ended, so that `save_model` saves it; checkpoints keep
    the raw weights, with the average beside them. What is averaged is what the optimizer has: with
    LoRA the adapters. To average two finished models see [`interpolate`].

    Running statistics of batch norm are averaged like the weights they belong to. That is an
    approximation of the statistics that the averaged model would have; a warning says so.

    Reference:
        Polyak & Juditsky 1992, "Acceleration of stochastic approximation by averaging" (`"ema"` in
        its usual form); Izmailov et al. 2018, "Averaging weights leads to wider optima and better
        generalization", arXiv:1803.05407 (`"soup"`); Kleiman et al. 2025, "Soup to go: mitigating
        forgetting during continual learning with model averaging", arXiv:2501.05559 (`"sfa"`).
        Deviation: points are counted from the end of the run, so that it is one of them.

    Args:
        kind: `"ema"`, `"soup"` or `"sfa"`.
        decay: Decay of the moving average for each optimizer step, from 0 to below 1; by default
            one whose memory is a tenth of the run, 1 - 1 / (0.1 · max_steps). A fixed 0.9999 would
            never leave the start in a run of a few hundred steps.
        start: Where in the run the soup begins, from 0 to below 1; default 0.75.
        every: Distance of the points, a share of the run; default 0.05 for a soup, 0.25 for sfa.
        beta: How far sfa goes back to the starting weights, above 0 to 1; default 0.5. A head that
            is new goes back towards its random start too.
        final: Whether the model has the average of `"ema"` or `"soup"` when training has ended.
            `load_best_model_at_end` does not go together with that.

    Raises:
        ValueError: If an option is out of range or belongs to another kind.

    Example:
        ```python
        adapt(trainer, AveragedWeights("ema")).train()
        trainer.save_model()  # the average
        ```
    """

    name = "averaged_weights"

    def __init__(
        self,
        kind: Kind = "ema",
        *,
        decay: float | None = None,
        start: float | None = None,
        every: float | None = None,
        beta: float | None = None,
        final: bool = True,
    ) -> None:
        if kind not in OPTIONS:
            raise ValueError(
                f"AveragedWeights({kind!r}): expected one of {', '.join(get_args(Kind))}."
            )
        given = {"decay": decay, "start": start, "every": every, "beta": beta}
        given = {name: value for name, value in given.items() if value is not None}
        if others := sorted(given.keys() - OPTIONS[kind].keys()):
            raise ValueError(
                f"AveragedWeights({kind!r}) has no {', '.join(others)}; it is set by "
                f"{', '.join(OPTIONS[kind])}."
            )
        is_in_range = {
            "decay": lambda value: 0 <= value < 1,
            "start": lambda value: 0 <= value < 1,
            "every": lambda value: 0 < value <= 1,
            "beta": lambda value: 0 < value <= 1,
        }
        if wrong := [name for name, value in given.items() if not is_in_range[name](value)]:
            raise ValueError(
                f"AveragedWeights({', '.join(f'{n}={given[n]}' for n in wrong)}): decay and start "
                "must lie from 0 to below 1, every and beta above 0 and up to 1."
            )
        self.kind, self.options = kind, {**OPTIONS[kind], **given}
        self.replaces_final = final and kind != "sfa"
        self.average = RunningAverage()
        self.points: set[int] = set()
        self._count, self._step = 0, 0

    def setup(self, trainer: Trainer) -> None:
        """Forget the weights of an earlier run, so that no evaluation sees them."""
        self.average.weights, self._count = {}, 0

    def begin(self, trainer: Trainer) -> None:
        """Start at the weights that training starts from."""
        model, steps = unwrapped_model(trainer), trainer.state.max_steps
        self.average.start(model, self._names(trainer, model))
        if self.kind == "ema":
            given = self.options["decay"]
            self.average.decay = max(0.0, 1 - 10 / steps) if given is None else given
        else:
            self.points = points(steps, self.options.get("start"), self.options["every"])

    def _names(self, trainer: Trainer, model: nn.Module) -> list[str]:
        """What trains now or later, each tied weight once, and the statistics of batch norm."""
        statistics = running_statistics(model)
        norms = list(dict.fromkeys(name.rpartition(".")[0] for name in statistics))
        if norms:
            logger.warning(
                "AveragedWeights averages the running statistics of %d normalisation layers (%s%s) "
                "like weights, which only approximates the statistics of the averaged model. To "
                "recompute them, let it run over training rows in training mode, without gradients "
                "and with momentum=None.",
                len(norms),
                norms[0],
                ", …" if len(norms) > 1 else "",
            )
        return [*optimized(trainer, model), *statistics]

    def before_step(self, step: int) -> None:
        """Know the step."""
        self._step = step

    def after_optimizer_step(
        self, model: nn.Module, learning_rates: Mapping[nn.Parameter, float]
    ) -> None:
        """Take in the weights that the step has made, or go back towards the start."""
        if self.kind == "ema":
            self.average.take_in(self.average.decay)
        elif self._step + 1 in self.points:
            if self.kind == "soup":
                self.average.take_in(self._count / (self._count + 1))
            else:
                assert self.options["beta"] is not None
                own = self.average.own()
                for name, start in self.average.weights.items():
                    own[name].copy_(blend(start, own[name], 1 - self.options["beta"]))
            self._count += 1

    def averaged_weights(self) -> Mapping[str, torch.Tensor]:
        """The average; nothing while there is none."""
        has_average = self.kind == "ema" or (self.kind == "soup" and self._count > 0)
        return self.average.weights if has_average else {}

    def finish(self, trainer: Trainer) -> None:
        """Say so if the run ended before there was an average."""
        if self.kind == "soup" and not self._count:
            logger.warning(
                "The run ended at step %d, before the soup began (step %d): the model has its last "
                "weights.",
                trainer.state.global_step,
                min(self.points),
            )

    def state_dict(self) -> dict[str, Any]:
        """The average or the starting weights, which nothing else holds."""
        return {"kind": self.kind, "count": self._count, **self.average.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`.

        Raises:
            ValueError: If it is that of another kind, or of other weights.
        """
        if not state:
            logger.warning(
                "The checkpoint holds no AveragedWeights (it was saved by another Trainer, or with "
                "save_only_model=True): they start again, from the checkpoint's weights."
            )
            return
        if state["kind"] != self.kind:
            raise ValueError(
                f"The checkpoint was saved with AveragedWeights({state['kind']!r}), this run has "
                f"AveragedWeights({self.kind!r}). Resume with the same kind."
            )
        self._count = state["count"]
        self.average.load_state_dict(state)


def points(max_steps: int, start: float | None, every: float | None) -> set[int]:
    """The steps of equal distance, counted back from the end, that lie in the run from `start` on.

    Args:
        max_steps: Steps of the run.
        start: Where the first may lie, from 0 to 1; by default one distance after the beginning.
        every: Their distance, from 0 to 1.

    Example:
        >>> sorted(points(100, 0.75, 0.1))
        [80, 90, 100]
        >>> sorted(points(10, None, 0.25))
        [2, 5, 8, 10]
    """
    assert every is not None
    first = every if start is None else start
    shares = [1 - k * every for k in range(int(1 / every) + 1)]
    return {round(share * max_steps) for share in shares if share >= first - 1e-9} - {0}
