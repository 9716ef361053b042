"""What a model card says of the adaptations that a model was trained with: facts alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers

from hf_adapt.engine.adaptation import Adaptation
from hf_adapt.engine.papers import cited
from hf_adapt.engine.streams import TRAINING

if TYPE_CHECKING:
    from transformers import Trainer

    from hf_adapt.engine.stream_data import StreamData

TITLE = "## Adaptation"
ESTIMATES = "eval_target_"
"""How the metrics begin that need no label of the target."""


def card_section(
    trainer: Trainer, adaptations: Sequence[Adaptation], data: StreamData | None
) -> str:
    """The section of a run that has ended, in Markdown.

    Args:
        trainer: The Trainer, after the run.
        adaptations: What took part.
        data: The streams of the run.
    """
    lines = [
        TITLE,
        "",
        "Trained with `hf_adapt`; settings that are not named are the defaults:",
        "",
    ]
    lines += [f"- {_described(adaptation)}" for adaptation in adaptations]
    lines += ["", f"Rows: {_rows(trainer, data)}; {trainer.state.global_step} steps.", ""]
    estimates = {
        name: value
        for entry in trainer.state.log_history
        for name, value in entry.items()
        if name.startswith(ESTIMATES)
    }
    if estimates:
        shown = ", ".join(f"`{name}` {value:.4g}" for name, value in estimates.items())
        lines += [f"Of the target without its labels, at the last evaluation: {shown}.", ""]
    own = sys.modules["hf_adapt"].__version__  # an import would go upwards
    versions = {"hf_adapt": own, "Transformers": transformers.__version__}
    versions["PyTorch"] = torch.__version__
    lines += ["Versions: " + ", ".join(f"{k} {v}" for k, v in versions.items()) + ".", ""]
    entries = list(dict.fromkeys(paper.bibtex for a in adaptations for paper in cited(type(a))))
    if entries:
        lines += ["### Papers", "", "```bibtex", *entries, "```", ""]
    return "\n".join(lines)


def _described(adaptation: Adaptation) -> str:
    """The class and the settings that it was given, where they are plain values."""
    given = ", ".join(f"{name}={value}" for name, value in adaptation.given_settings.items())
    return f"`{type(adaptation).__name__}({given})`"


def _rows(trainer: Trainer, data: StreamData | None) -> str:
    """How many rows there were, of training and of each stream."""

    def size(dataset: Any) -> str:
        return f"{len(dataset):,}" if hasattr(dataset, "__len__") else "a stream of"

    found = [f"{size(trainer.train_dataset)} for training"]
    for name, stream in {} if data is None else data.streams.items():
        labels = "with their labels" if stream.labels == "keep" else "without labels"
        for dataset in stream.domains:
            if dataset is not None:
                each = f"{stream.ratio:g} beside each training row"
                found.append(f"{size(dataset)} of the stream `{name}` {labels}, {each}")
            elif name != TRAINING:
                found.append(f"those of other domains as the stream `{name}` {labels}")
    return ", ".join(found)
