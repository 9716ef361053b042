"""Adversarial discriminative domain adaptation: the model becomes the target's encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_adapt.alignment.dann import DANN
from hf_adapt.engine.progress import Schedule
from hf_adapt.models.capture import capturing
from hf_adapt.models.pooling import pool, token_mask
from hf_adapt.models.structure import find_feature_module, is_encoder_decoder

if TYPE_CHECKING:
    from transformers import Trainer

    from hf_adapt.engine.batch import Batch
    from hf_adapt.engine.parts import Part


def _of_source(domain: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Which rows are of a source; further sources are numbered after the targets."""
    return (domain == 0) | (domain >= batch.num_domains)


class ADDA(DANN):
    """Adversarial discriminative domain adaptation: a second stage after training on the source.

    The model, trained on the source before, becomes an encoder for the target: a discriminator
    tells its features of target rows from those that the frozen source model gives for source rows,
    and its gradient is reversed. The head stays as it is, and the task's loss is off, so that
    source labels are not needed; nothing but the head's fixed weights keeps the classes in their
    places. Use it where the target alone matters and the domains look so different that one encoder
    does not fit both; with [`DANN`], which goes on training on the labels, less can go wrong. Give
    it a tenth to a thirtieth of the first stage's learning rate: as there is no other loss, Adam's
    steps do not shrink with λ (film reviews → tweets: 54 % at 3e-4, 78 % at 1e-5, 69 % before).

    Reference:
        Tzeng et al. 2017, "Adversarial Discriminative Domain Adaptation", arXiv:1702.05464.
        Deviation: the reversed gradient of [`DANN`] with its bound instead of inverted labels.

    Args:
        source_model: The model that was trained on the source, on its own: a copy of the Trainer's
            model, or loaded from the same folder. It is frozen.
        weight: Peak λ, or a schedule of it; a constant 0 turns the objective off.
        **adversary: Further arguments of [`DANN`]: `ramp`, `feature_layer`, `pooling`,
            `hidden_sizes`, `dropout`, `learning_rate`, `weight_decay`, `name`, `bounded`,
            `several_sources`.

    Logs:
        As [`DANN`], under `adda`.

    Raises:
        ValueError: As [`DANN`]; if the source model is the model that is trained.

    Example:
        ```python
        trainer.train()  # on the source
        adapted = Trainer(copy.deepcopy(trainer.model), args, train_dataset=source, ...)
        adapt(adapted, ADDA(trainer.model), target_dataset=target).train()
        ```
    """

    name = "adda"

    def __init__(
        self, source_model: nn.Module, weight: float | Schedule = 0.1, **adversary: Any
    ) -> None:
        super().__init__(weight, **adversary)
        self.source_model = source_model
        self._trained: list[nn.Parameter] = []
        self._label_names: set[str] = set()

    def setup(self, trainer: Trainer) -> None:
        """Freeze the source model, and the model's head.

        Raises:
            ValueError: If the two models share weights, or are encoder-decoders.
        """
        super().setup(trainer)
        model = trainer.model
        assert model is not None
        if is_encoder_decoder(model):
            raise ValueError(
                "ADDA runs a frozen copy of the model on rows without labels, from which the "
                f"decoder of {type(model).__name__} would have no inputs. Use DANN."
            )
        shared = {id(p) for p in model.parameters()} & {
            id(p) for p in self.source_model.parameters()
        }
        if shared:
            raise ValueError(
                "ADDA's source_model is the model that is trained, so that it would change with "
                "it. Pass a copy: ADDA(copy.deepcopy(model))."
            )
        self._trained = [p for p in self.source_model.parameters() if p.requires_grad]
        self.source_model.requires_grad_(False).eval().to(trainer.args.device)
        encoder = {id(p) for p in find_feature_module(model, None).parameters()}
        self.fixed = [p for p in model.parameters() if p.requires_grad and id(p) not in encoder]
        self._label_names = {*trainer.label_names, "labels"}

    def base_weight(self, progress: float) -> float:
        """0: the task is not trained."""
        return 0.0

    def discriminated(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's features of target rows, and the source model's of source rows."""
        features, domain = batch.features()
        is_source = _of_source(domain, batch)
        parts = [part for part in batch.parts if bool(_of_source(part.domain, batch).any())]
        if not parts:
            return features, domain
        source = torch.zeros_like(features)
        source[is_source] = torch.cat([self._source_features(batch, part) for part in parts])
        return torch.where(is_source.unsqueeze(1), source, features), domain

    @torch.no_grad()
    def _source_features(self, batch: Batch, part: Part) -> torch.Tensor:
        """What the source model gives for the source rows of a part."""
        chosen = part.select(_of_source(part.domain, batch))
        module = find_feature_module(self.source_model, self.feature_layer)
        with capturing({module: None}) as take:
            inputs = {k: v for k, v in chosen.inputs.items() if k not in self._label_names}
            self.source_model(**inputs)
            hidden = take()[module]
        mask = chosen.item_mask if batch.pooling == "tokens" else chosen.attention_mask
        mask = token_mask(hidden, mask, self.source_model) if hidden.ndim == 3 else hidden
        return pool(hidden, mask, batch.pooling)

    def close(self) -> None:
        """Let the source model be trained again."""
        for parameter in self._trained:
            parameter.requires_grad_(True)
        super().close()
