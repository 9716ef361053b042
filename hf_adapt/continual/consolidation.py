"""Weights that matter for earlier tasks are held near their values: L2-SP, EWC, MAS and SI."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from hf_adapt.continual.adapters import HeldWeights
from hf_adapt.continual.importance import unit_of
from hf_adapt.continual.importance_folder import SavedImportance, check_shapes, save_importance
from hf_adapt.continual.importance_sources import (
    MAS,
    SI,
    Fisher,
    Previous,
    known_importance,
)
from hf_adapt.continual.pulls import LowRankPull, WeightPull
from hf_adapt.engine.mixins import GradientTransform, WeightTransform
from hf_adapt.engine.progress import Schedule, value_at
from hf_adapt.engine.training import resumed_from, unwrapped_model
from hf_adapt.models.groups import matches
from hf_adapt.models.heads import weights_of_the_head

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

Form = Literal["decoupled", "gradient", "rates"]
Importance = Fisher | MAS | SI | Previous

STRENGTHS: dict[Form, float] = {"decoupled": 100.0, "gradient": 100.0, "rates": 1.0}
"""The default strength of each form."""


class Consolidation(GradientTransform, WeightTransform):
    r"""Hold the weights that matter for earlier tasks near the values that training starts from.

    .. math::
        L = L_{task} + \frac{\lambda}{2} \sum_i F_i (\theta_i - \theta^*_i)^2

    F says how much a weight matters: 1 for all (L2-SP), the Fisher information (EWC, also online),
    MAS or SI. It needs no row of the past during training. Where such rows may be kept,
    [`Replay`] forgets less; the two work together.

    `form="decoupled"` pulls after each step of the optimizer, as AdamW's weight decay does but
    towards θ*, at the parameter's own learning rate η: it is stable for every λ, and the
    optimizer's averages see the task alone.

    .. math::
        \theta \leftarrow \frac{\theta + \eta \lambda F \theta^*}{1 + \eta \lambda F}

    `form="gradient"` adds λ F (θ - θ*) to the gradients before they are clipped, which is the
    gradient of the loss above; under Adam a weight whose gradient is mostly the penalty's then
    moves by η whatever λ is, and with plain SGD it diverges for ηλF > 2. `form="rates"` shortens
    the steps of weights that matter: θ ← θ_old + r (θ_new - θ_old), r = 1 - λ F / max F, for any
    optimizer.

    With LoRA the penalty is on the change ΔW = s B A of the weights, F being that of the weights W
    under the adapter, and A and B are pulled by its gradient or by proximal steps.

    Reference:
        Li et al. 2018, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks"
        (L2-SP), arXiv:1802.01483; Kirkpatrick et al. 2017 (EWC), arXiv:1612.00796. The decoupled
        form is that of Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization",
        arXiv:1711.05101, as a proximal step.

    Args:
        importance: F: None for 1, [`Fisher`], [`MAS`], [`SI`], the folder of an importance that was
            saved, or a tensor for each weight's name (as [`fisher_diagonal`] returns).
        strength: λ, or a schedule of it; a constant 0 turns it off. Under Adam, in the decoupled
            form, a weight with F = 1 stays within about 1/λ of its start. By default 100; what is
            useful lies between 10 (L2-SP) and 1000 or more (Fisher). For rates a number up to 1,
            the default.
        form: How it is applied.
        start: θ*, as a model or by name, if not the weights that training starts from. Weights that
            it lacks are not held.
        skip: Weights that are not held: names of modules or parameters, or regular expressions. By
            default, where all weights matter alike, the classification head, which is usually new;
            else none.
        save_to: A folder for the importance and the final weights, for the next task:
            `Consolidation("folder")`, or `Fisher(rows, previous="folder")`.
        name: Prefix of what is logged and stored.

    Logs:
        `consolidation/penalty`: λ/2 Σ F (θ - θ*)².

    Raises:
        TypeError: If the importance or the start is none.
        ValueError: If an option is out of range, the importance or the start belongs to another
            model, the adapters are not LoRA, or the checkpoint that training resumes from does not
            hold the start.

    Example:
        >>> Consolidation(strength=10.0).form
        'decoupled'
    """

    def __init__(
        self,
        importance: Importance | None = None,
        strength: float | Schedule | None = None,
        *,
        form: Form = "decoupled",
        start: nn.Module | Mapping[str, torch.Tensor] | None = None,
        skip: str | Sequence[str] | None = None,
        save_to: str | os.PathLike[str] | None = None,
        name: str | None = None,
    ) -> None:
        if form not in get_args(Form):
            raise ValueError(f"form={form!r} is unknown: use {', '.join(map(repr, STRENGTHS))}.")
        strength = STRENGTHS[form] if strength is None else strength
        limit = 1.0 if form == "rates" else float("inf")
        if (not callable(strength) and not 0 <= strength <= limit) or strength == float("inf"):
            raise ValueError(
                f"strength={strength} must be a finite number >= 0{' and <= 1' * (limit == 1)}, or "
                "a schedule; 0 turns the consolidation off."
            )
        if form == "rates" and importance is None:
            raise ValueError(
                "form='rates' needs an importance, as Fisher(rows): all weights alike "
                "would be a lower learning rate."
            )
        if save_to is not None and importance is None:
            raise ValueError("save_to= keeps an importance, and importance=None has none.")
        if start is not None and not isinstance(start, (nn.Module, Mapping)):
            raise TypeError(
                f"start= is a {type(start).__name__}: expected a model, or a dict with a tensor "
                "for each weight's name."
            )
        if start is not None and isinstance(importance, SI):
            raise ValueError("SI holds the weights that its training starts from: drop start=.")
        if importance is not None and not isinstance(importance, (Fisher, MAS, SI)):
            known_importance(importance)
        self.importance, self.strength, self.form = importance, strength, form
        self.start, self.save_to = start, save_to
        self.skip = None if skip is None else [skip] if isinstance(skip, str) else list(skip)
        if name is not None:
            self.name = name
        self._held: HeldWeights | None = None
        self._pulls: list[WeightPull | LowRankPull] = []
        self._found: dict[str, torch.Tensor] | None = None
        self._start: dict[str, torch.Tensor] = {}
        self._key: str | None = None
        self._unit = 1.0
        self._now = 0.0

    @property
    def is_active(self) -> bool:
        """False where the strength is the constant 0."""
        return callable(self.strength) or self.strength != 0

    # ---- the start of a run ----

    def setup(self, trainer: Trainer) -> None:
        """Find the weights, their start and their importance; a resumed run has saved the two."""
        self.close()
        self._trainer = trainer
        model = unwrapped_model(trainer)
        held = HeldWeights.of(model, self._skipped(model))
        if not held.weights:
            raise ValueError("Consolidation holds no weight: none trains, or all are in skip=.")
        if held.adapted and (self.form == "rates" or isinstance(self.importance, SI)):
            what = "SI" if isinstance(self.importance, SI) else "form='rates'"
            raise ValueError(
                f"{what} follows single weights, and with LoRA a weight is a product of two "
                "factors. Use Fisher or MAS, in the form 'decoupled' or 'gradient'."
            )
        if self.start is not None:
            held = held.only(self._there(held))
        self._held = held
        past: dict[str, torch.Tensor] = {}
        if isinstance(self.importance, SI):
            past = self.importance.begin(held.plain, resumed_from(trainer) is not None)
        if resumed_from(trainer) is None:
            self._hold(self._importance_of(model, past), self._starts())
        elif isinstance(self.importance, (str, os.PathLike)):
            saved = self._read(self.importance, checks_weights=False)
            self._key = saved.key
            starts = self._starts()
            if self.start is None:
                starts |= {n: v for n, v in saved.weights.items() if n in starts}
            self._hold(dict(saved.importance), starts)

    def _skipped(self, model: nn.Module) -> list[str]:
        """The patterns of weights that are not held: if nothing says otherwise, a new head."""
        names = [name for name, _ in model.named_parameters()]
        if idle := [p for p in self.skip or () if not any(matches(p, name) for name in names)]:
            raise ValueError(
                f"skip={idle} names no weight of the model, whose weights are "
                f"{', '.join(names[:2])}, …, {names[-1]}."
            )
        if self.skip is not None or self.importance is not None or self.start is not None:
            return self.skip or []
        trains = {name for name, p in model.named_parameters() if p.requires_grad}
        head = [name for name in weights_of_the_head(model) if name in trains]
        if head:
            logger.info("Consolidation leaves the head free: %s.", ", ".join(head))
        return [re.escape(name) for name in head]

    def _there(self, held: HeldWeights) -> list[str]:
        """The names of the weights that the given start has."""
        given, own = self._given(), {**held.plain, **held.factors}
        if wide := [n for n, p in own.items() if n in given and given[n].shape != p.shape]:
            raise ValueError(
                f"start= has the shape {tuple(given[wide[0]].shape)} for {wide[0]}, and the model "
                f"{tuple(own[wide[0]].shape)}. Pass the model that this one was made from; a head "
                f"that is new is left free with skip={wide}."
            )
        names = [name for name in held.plain if name in given]
        for each in held.adapted:
            if all(n in given for n, p in held.factors.items() if p is each.a or p is each.b):
                names.append(each.name)
        if not names:
            raise ValueError(
                f"start= has none of the weights that train ({', '.join(list(own)[:3])}, ...); it "
                f"has {', '.join(list(given)[:3])}, .... Pass a model of the same class, or a dict "
                "with the names of model.named_parameters()."
            )
        return names

    def _given(self) -> Mapping[str, torch.Tensor]:
        if isinstance(self.start, nn.Module):
            return dict(self.start.named_parameters(remove_duplicate=False))
        return self.start or {}

    def _starts(self) -> dict[str, torch.Tensor]:
        """The weights that are pulled to."""
        assert self._held is not None
        given = self._given()
        now = self._held.now()
        return {n: given[n].detach().to(p, copy=True) if n in given else p for n, p in now.items()}

    def _importance_of(
        self, model: nn.Module, past: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor] | None:
        """The importance of the weights in this run; None for 1 throughout."""
        source = self.importance
        if source is None:
            return None
        if not isinstance(source, (Fisher, MAS, SI)):
            given = self._read(source)
            self._key, self._unit = given.key, given.unit
            return dict(given.importance)
        total = past
        if source.previous is not None and not past:
            total = self._read(source.previous).in_own_units
        if not isinstance(source, SI):
            found = source.compute(model, self._trainer)
            assert self._held is not None
            total = {
                name: found[name] + source.decay * total[name].to(found[name])
                if name in total
                else found[name]
                for name in self._held.weights
            }
        return self._in_units(total)

    def _in_units(self, total: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The importance of all tasks together, divided as its source says."""
        assert isinstance(self.importance, Fisher | MAS | SI)
        self._unit = unit_of(total, self.importance.normalize)
        return {name: value / self._unit for name, value in total.items()}

    def _read(self, given: Previous, checks_weights: bool = True) -> SavedImportance:
        """An importance that is known, if it fits the model."""
        assert self._held is not None
        own = self._held.weights
        saved = known_importance(given).named_as(own)
        held = {
            name: value
            for name, value in saved.importance.items()
            if not any(matches(pattern, name) for pattern in self.skip or ())
        }
        check_shapes(held, own, saved.origin)
        saved = replace(saved, importance=held)
        if checks_weights:
            saved.check_weights({**self._held.plain, **self._held.factors})
        return saved

    def _hold(
        self, importance: dict[str, torch.Tensor] | None, start: dict[str, torch.Tensor]
    ) -> None:
        """Pull to a start from now on."""
        assert self._held is not None
        self._found, self._start = importance, start
        held = self._held if importance is None else self._held.only(importance)
        plain, adapted = held.plain, held.adapted

        def of(name: str, weight: torch.Tensor) -> torch.Tensor:
            assert importance is not None
            return importance[name].to(weight.device, torch.float32)

        self._pulls = []
        if plain:
            known = None if importance is None else [of(n, w) for n, w in plain.items()]
            starts = [start[name].to(weight) for name, weight in plain.items()]
            self._pulls.append(WeightPull(list(plain.values()), starts, known))
        for each in adapted:
            factors = held.factors_of(each, start)
            known_one = None if importance is None else of(each.name, each.weight)
            self._pulls.append(LowRankPull(each, factors, known_one))

    # ---- each step ----

    def before_step(self, step: int) -> None:
        """Set the strength of this step."""
        if not self._start:
            raise ValueError(
                f"{resumed_from(self._trainer)} was saved without Consolidation, so the weights "
                "that training started from are not known. Start a new training from it: load it "
                "as the model, and call train() without resume_from_checkpoint."
            )
        self._now = value_at(self.strength, step / max(1, self._trainer.state.max_steps))
        if not 0 <= self._now <= (1.0 if self.form == "rates" else float("inf")):
            raise ValueError(
                f"The schedule of the strength gave {self._now} at step {step}; it must stay >= 0"
                f"{', and <= 1 with form=' + repr(self.form) if self.form == 'rates' else ''}."
            )

    def transform_gradients(self, model: nn.Module) -> None:
        """Write the penalty's gradient; SI sees those of the task before."""
        if isinstance(self.importance, SI):
            self.importance.see_gradients()
        if self.form == "gradient" and self._now:
            for pull in self._pulls:
                pull.add_gradient(self._now)

    def before_optimizer_step(self, model: nn.Module) -> None:
        """Keep the weights whose steps are to be shortened."""
        if self.form == "rates" and self._now:
            for pull in self._pulls:
                assert isinstance(pull, WeightPull)
                pull.remember()

    def after_optimizer_step(
        self, model: nn.Module, learning_rates: Mapping[nn.Parameter, float]
    ) -> None:
        """Pull the weights, or shorten their steps."""
        for pull in self._pulls if self._now else ():
            if self.form == "decoupled":
                pull.move(self._now, learning_rates)
            elif self.form == "rates":
                assert isinstance(pull, WeightPull)
                pull.shorten(self._now)
        if isinstance(self.importance, SI):
            self.importance.see_step()

    @torch.no_grad()
    def on_log(self, logs: dict[str, float], progress: float) -> None:
        """Add the penalty."""
        if self.form != "rates" and self._pulls:
            penalty = torch.stack([pull.penalty() for pull in self._pulls]).sum()
            logs[f"{self.name}/penalty"] = self._now * float(penalty)

    # ---- the end of a run, and checkpoints ----

    def finish(self, trainer: Trainer) -> None:
        """Keep the importance for the next task."""
        if isinstance(self.importance, SI):
            before = {name: value * self._unit for name, value in (self._found or {}).items()}
            self._found = self._in_units(self.importance.finish(self._start, before))
        if self.save_to is not None and trainer.is_world_process_zero():
            assert self._found is not None
            model = unwrapped_model(trainer)
            save_importance(os.fspath(self.save_to), self._found, model, self._unit)

    def close(self) -> None:
        """Forget the model."""
        self._held, self._pulls, self._found, self._start, self._key = None, [], None, {}, None
        if isinstance(self.importance, SI):
            self.importance.close()

    def state_dict(self) -> dict[str, Any]:
        """The start and the importance, unless they lie in a folder, and the path of SI."""
        if self._key is not None:  # adapters may be newer than the folder
            factors = {} if self._held is None else self._held.factors
            start = {n: v for n, v in self._start.items() if n in factors}
            return {"key": self._key, **({"start": _on_cpu(start)} if start else {})}
        known = None if self._found is None else _on_cpu(self._found)
        state: dict[str, Any] = {"start": _on_cpu(self._start), "importance": known}
        state |= {"unit": self._unit, "kind": type(self.importance).__name__}
        if isinstance(self.importance, SI):
            state["path"] = _on_cpu(self.importance.path)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        kind = type(self.importance).__name__
        if state.get("key") != self._key or (self._key is None and state["kind"] != kind):
            raise ValueError(
                f"Training resumes with another importance ({kind}) than it began with, or the "
                "folder has been written again since. Resume with the one that it began with."
            )
        if self._key is not None:
            self._hold(self._found, {**self._start, **state.get("start", {})})
        else:
            self._unit = state["unit"]
            self._hold(state["importance"], state["start"])
        if isinstance(self.importance, SI):
            for name, value in self.importance.path.items():
                value.copy_(state["path"][name])


def _on_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.cpu() for name, value in tensors.items()}
