"""The folder `knowledge/` beside a saved model: settings, fingerprints, graph and vectors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hf_adapt.knowledge.graphs.graph import KnowledgeGraph
from hf_adapt.knowledge.vectors.table import EntityVectors
from hf_adapt.storage.text_file import write_text

FOLDER = "knowledge"
SETTINGS_FILE = "knowledge.json"
FORMAT = 2
CARD_MARK = "<!-- hf_adapt: knowledge -->"


def save_knowledge(
    folder: str | os.PathLike[str],
    settings: Mapping[str, Any],
    graph: KnowledgeGraph,
    vectors: EntityVectors | None,
    with_graph: bool,
    with_vectors: bool,
) -> None:
    """Write the settings of an adaptation, and the graph and the vectors where wanted.

    The weights are in `adaptation.safetensors`, with the other auxiliary modules'.
    """
    own = Path(folder) / FOLDER
    own.mkdir(parents=True, exist_ok=True)
    written = {
        "format": FORMAT,
        **settings,
        "graph": {"fingerprint": graph.fingerprint},
        "vectors": None if vectors is None else {"fingerprint": vectors.fingerprint},
    }
    wanted = {"graph": graph if with_graph else None, "vectors": vectors if with_vectors else None}
    for name, part in wanted.items():
        if part is not None and not _is_saved(part, own / name):
            part.save(own / name)
    write_text(own / SETTINGS_FILE, json.dumps(written, indent=1))
    _write_card(Path(folder), graph)


def _is_saved(part: KnowledgeGraph | EntityVectors, where: Path) -> bool:
    try:
        return type(part).load(where).fingerprint == part.fingerprint
    except (ValueError, OSError):
        return False


def _write_card(folder: Path, graph: KnowledgeGraph) -> None:
    """Say in the model's card what a plain `from_pretrained` leaves out."""
    path = folder / "README.md"
    card = path.read_text(encoding="utf-8") if path.exists() else ""
    if CARD_MARK in card:
        return
    note = f"""{CARD_MARK}
## Knowledge injection

This model was trained with a knowledge injector (hf_adapt), which adds to its hidden states what a
graph of {graph.num_entities:,} entities says of those in the text (fingerprint
`{graph.fingerprint}`). `from_pretrained` loads the model without it: its predictions are then not
those that were evaluated. With it:

```python
from hf_adapt.knowledge import load_knowledge_model

model = load_knowledge_model("path/of/this/folder")
```
"""
    path.write_text(f"{card.rstrip()}\n\n{note}" if card else note, encoding="utf-8")


def read_settings(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in a folder that `save_knowledge` wrote."""
    path = Path(folder) / FOLDER / SETTINGS_FILE
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {FOLDER}/{SETTINGS_FILE}: expected a folder saved by a Trainer with "
            "a KnowledgeCallback. Load a plain model with from_pretrained."
        )
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {settings.get('format')!r}, and this version of hf_adapt reads "
            f"{FORMAT}. Load it with the version of hf_adapt that saved it."
        )
    return settings


def resumed_vectors(
    checkpoint: Path, graph: KnowledgeGraph, given: EntityVectors | None
) -> EntityVectors | None:
    """The entity vectors that a training started with, where it made them itself."""
    own = checkpoint / FOLDER
    if not (own / SETTINGS_FILE).is_file():
        return None
    settings = read_settings(checkpoint)
    check_fingerprint("graph", graph.fingerprint, settings["graph"]["fingerprint"])
    if settings["vectors"] is None:
        return None
    expected = settings["vectors"]["fingerprint"]
    if given is not None:
        made = (own / "vectors").exists()  # by the run itself, so they travel with it
        fix = "Leave vectors= out: the checkpoint holds those that its run made" if made else None
        check_fingerprint("vectors", given.fingerprint, expected, fix)
        return None
    if not (own / "vectors").exists():
        raise ValueError(
            f"{checkpoint} does not hold the entity vectors of its training (fingerprint "
            f"{expected}), and encoding the descriptions with the trained weights would give "
            "others. Pass vectors=: those that the training was given, or, if it was given none, "
            "EntityVectors.from_descriptions(graph, model, tokenizer) with the model that the "
            "training started from."
        )
    mapped = EntityVectors.load(own / "vectors", graph)
    # In memory: the checkpoint may be removed while the run lasts.
    vectors = EntityVectors(mapped.gather(np.arange(len(mapped))), mapped.metadata)
    check_fingerprint("vectors", vectors.fingerprint, expected)
    return vectors


def check_fingerprint(what: str, found: str, expected: str, fix: str | None = None) -> None:
    """Refuse another graph, or other vectors, than those of the training."""
    if found != expected:
        kept = f"a script can keep what it made: {what}.save(folder)"
        fix = fix or f"Pass the {what} of the training ({kept})"
        raise ValueError(
            f"The {what} {'has' if what == 'graph' else 'have'} the fingerprint {found}, and the "
            f"model was trained with {expected}: the injector would read what it was not trained "
            f"on. {fix}, or start a new training."
        )
