"""Models between the one that training began from and the one that it ended with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, overload

import torch
import transformers
from torch import nn

from hf_adapt.continual.matching import shared_weights
from hf_adapt.engine.weights import swapped
from hf_adapt.models.averages import blend
from hf_adapt.models.copies import copied
from hf_adapt.models.hub_names import check_hub_name
from hf_adapt.models.state import preserved
from hf_adapt.models.structure import has_adapters

Model = nn.Module | str | os.PathLike[str]


@overload
def interpolate(start: Model, tuned: Model, alphas: float) -> nn.Module: ...
@overload
def interpolate(start: Model, tuned: Model, alphas: Iterable[float]) -> list[nn.Module]: ...
def interpolate(
    start: Model, tuned: Model, alphas: float | Iterable[float]
) -> nn.Module | list[nn.Module]:
    r"""Blend a model with the one that it was tuned from: :math:`(1-\alpha)\theta_0+\alpha\theta`.

    A part of what was learnt is given up for much of what was forgotten; which alpha is best shows
    on the data of both: see [`interpolation_sweep`]. Parameters and floating-point buffers are
    blended, in float32; at 0 and 1 they are those of either model, bit for bit. A head that `start`
    lacks, or that has another shape or other label names there, stays that of `tuned`, and so does
    all else. Running statistics of batch norm are blended like weights, which is an approximation.

    Reference:
        Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (WiSE-FT), Eq. 1,
        arXiv:2109.01903.

    Args:
        start: The model that training began from, with any head or none: a model, a folder, or an
            id on the Hub. Neither model is changed.
        tuned: The model that training ended with.
        alphas: The share of `tuned`, from 0 to 1; or several of them.

    Returns:
        A copy of `tuned` with the blended weights; for several alphas a list of copies.

    Raises:
        ValueError: If the models are of different architectures, an alpha is out of range, or a
            model has adapters or quantised weights.

    Example:
        >>> start, tuned = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(start.weight, 2.0), nn.init.constant_(tuned.weight, 4.0)
        >>> [model.weight.item() for model in interpolate(start, tuned, [0.0, 0.25, 1.0])]
        [2.0, 2.5, 4.0]
    """
    one, other = _two_models(start, tuned)
    blended = _Blend(one, other)

    def between(alpha: float) -> nn.Module:
        weights, clone = blended(alpha), copied(other)
        with torch.no_grad():
            own = _tensors(clone)
            for name, value in weights.items():
                own[name].copy_(value)
        return clone

    if not isinstance(alphas, Iterable):
        return between(float(alphas))
    given = [float(alpha) for alpha in alphas]
    for alpha in given:
        check_alpha(alpha)
    return [between(alpha) for alpha in given]


def interpolation_sweep(
    start: Model,
    tuned: Model,
    alphas: Iterable[float],
    evaluate: Callable[[Any], Mapping[str, float]],
) -> list[dict[str, float]]:
    """Evaluate the models between two, in the memory of one more.

    Args:
        start: As in [`interpolate`].
        tuned: The same. Meanwhile it has the blended weights, afterwards its own again; so it may
            be the model of a Trainer.
        alphas: Shares of `tuned`, from 0 to 1.
        evaluate: Returns the scores of the model that it is given, which is in evaluation mode.

    Returns:
        For each alpha a dict of it, as `alpha`, and the scores; see [`plot_sweep`].

    Raises:
        ValueError: As `interpolate`.

    Example:
        ```python
        trainer.eval_dataset = {"movies": movies, "tweets": tweets}
        sweep = interpolation_sweep(
            "bert-base-uncased", trainer.model, [0, 0.25, 0.5, 0.75, 1],
            lambda model: trainer.evaluate(),
        )
        plot_sweep(sweep, "eval_movies_accuracy", "eval_tweets_accuracy").savefig("sweep.png")
        ```
    """
    one, other = _two_models(start, tuned)
    blended, given, found = _Blend(one, other), [float(alpha) for alpha in alphas], []
    for alpha in given:
        check_alpha(alpha)
    with preserved(other):
        other.eval()
        for alpha in given:
            with swapped(other, blended(alpha)):
                found.append({"alpha": alpha, **evaluate(other)})
    return found


def _two_models(start: Model, tuned: Model) -> tuple[nn.Module, nn.Module]:
    """Both models.

    Raises:
        ValueError: If they are one.
    """
    one, other = loaded(start), loaded(tuned)
    if one is other:
        raise ValueError(
            "start and tuned are the same model, which training has changed in place. Pass the "
            "folder or name that it was loaded from as start, or a copy made before training "
            "(copy.deepcopy(model))."
        )
    return one, other


class _Blend:
    """The weights between two models."""

    def __init__(self, start: nn.Module, tuned: nn.Module) -> None:
        for model in (start, tuned):
            _check(model)
        self.start, self.tuned = _tensors(start, all_names=True), _tensors(tuned)
        labels = [labels_of(getattr(model, "config", None)) for model in (start, tuned)]
        self.names = shared_weights(
            {name: tensor.shape for name, tensor in self.start.items()},
            {name: tensor.shape for name, tensor in self.tuned.items()},
            (getattr(start, "base_model_prefix", ""), getattr(tuned, "base_model_prefix", "")),
            labels[0] == labels[1],
        )

    def __call__(self, alpha: float) -> dict[str, torch.Tensor]:
        check_alpha(alpha)
        return {n: blend(self.start[o], self.tuned[n], alpha) for n, o in self.names.items()}


def check_alpha(alpha: float) -> None:
    """Refuse what lies beyond either model.

    Raises:
        ValueError: If it does.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(
            f"alpha={alpha} must lie from 0 (the model that training began from) to 1 (the tuned "
            "model)."
        )


def labels_of(config: Any) -> list[str] | None:
    """The names of a model's labels, in order."""
    names = getattr(config, "id2label", None)
    return None if names is None else [names[key] for key in sorted(names)]


def refuse_adapters(name: str) -> None:
    """Refuse what has the weights of adapters.

    Raises:
        ValueError: Always; says how to go on.
    """
    raise ValueError(
        f"{name} has adapters (PEFT), whose factors cannot be blended one by one: the blend of two "
        "products is not the product of two blends. Merge them into the weights first: "
        "model.merge_and_unload()."
    )


def loaded(model: Model) -> nn.Module:
    """The model, read from its folder or from the Hub if it is a name."""
    if isinstance(model, nn.Module):
        return model
    check_hub_name(model)
    if (Path(model) / "adapter_config.json").is_file():
        refuse_adapters(str(model))
    config = transformers.AutoConfig.from_pretrained(model)
    named = (getattr(config, "architectures", None) or ["AutoModel"])[0]
    cls: Any = getattr(transformers, named, transformers.AutoModel)
    found: nn.Module = cls.from_pretrained(model, dtype="auto")
    return found


def _check(model: nn.Module) -> None:
    if has_adapters(model):
        refuse_adapters(type(model).__name__)
    whole = [name for name, p in model.named_parameters() if not p.is_floating_point()]
    if whole:
        raise ValueError(
            f"{whole[0]} is {model.get_parameter(whole[0]).dtype}: quantised weights cannot be "
            "blended. Load the model without quantization_config."
        )


def _tensors(model: nn.Module, all_names: bool = False) -> dict[str, torch.Tensor]:
    """Parameters and floating-point buffers that are saved; tied ones once, or by all names."""
    saved = model.state_dict().keys()
    named = (
        *model.named_parameters(remove_duplicate=not all_names),
        *model.named_buffers(remove_duplicate=not all_names),
    )
    return {name: each for name, each in named if name in saved and each.is_floating_point()}
