"""What a model card says of the adaptations that a model was trained with: facts alone."""

from __future__ import annotations

import inspect
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers

from hf_adapt.engine.adaptation import Adaptation
from hf_adapt.engine.streams import TRAINING

if TYPE_CHECKING:
    from transformers import Trainer

    from hf_adapt.engine.stream_data import StreamData

TITLE = "## Adaptation"
_AUTHORS_AND_YEAR = re.compile(r"([A-Z][\w'-]+(?: et al\.| & [A-Z][\w'-]+)?),? (\d{4})\b")
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
    entries = list(dict.fromkeys(e for a in adaptations for e in papers(type(a))))
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


def papers(cls: type) -> Iterator[str]:
    """The papers that a method's docstring names, as BibTeX."""
    found = re.search(r"Reference:\n((?: {4,}.+\n?)+)", inspect.cleandoc(cls.__doc__ or "") + "\n")
    text = " ".join(found[1].split("Deviation")[0].split()) if found else ""
    text = re.sub(r"`[^`]*`", "", text)
    titles = re.findall(r"\"([^\"]+)\"", text)
    text = re.sub(r"\"[^\"]+\"", "<title>", text)  # which may hold names and years
    entries = list(_AUTHORS_AND_YEAR.finditer(text))
    for entry, after in itertools.zip_longest(entries, entries[1:]):
        own = text[entry.end() : len(text) if after is None else after.start()]
        title = titles.pop(0) if "<title>" in own else None
        number = re.search(r"arXiv:(\d+\.\d+)", own)
        names = entry[1].replace(" et al.", " and others").replace(" & ", " and ")
        fields = {"author": names, "title": title, "year": entry[2]}
        if number is not None:
            fields |= {"eprint": number[1], "archivePrefix": "arXiv"}
        body = ", ".join(f"{k} = {{{v}}}" for k, v in fields.items() if v)
        yield f"@misc{{{re.sub('[^a-z]', '', names.split()[0].lower())}{entry[2]}, {body}}}"
