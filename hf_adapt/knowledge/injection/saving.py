"""What lies beside a model with knowledge, and how it is read back."""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from hf_adapt.engine.checkpoint import WEIGHTS_FILE
from hf_adapt.knowledge.graphs.graph import KnowledgeGraph
from hf_adapt.knowledge.injection.attachment import Attachment, known_attachment
from hf_adapt.knowledge.injection.batching import make_batcher
from hf_adapt.knowledge.injection.injector import KnowledgeInjector
from hf_adapt.knowledge.linking.linker import EntityLinker
from hf_adapt.knowledge.linking.tokens import TokenAligner
from hf_adapt.knowledge.vectors.table import EntityVectors
from hf_adapt.models.structure import unwrapped_base

logger = logging.getLogger(__name__)

FOLDER = "knowledge"
SETTINGS_FILE = "knowledge.json"
FORMAT = 1
CARD_MARK = "<!-- hf_adapt: knowledge -->"


def save_knowledge(
    folder: str | os.PathLike[str],
    injector: KnowledgeInjector,
    graph: KnowledgeGraph,
    vectors: EntityVectors | None,
    linker: Any,
    *,
    name: str = "knowledge",
    text_columns: Sequence[str] = ("text",),
    max_mentions: int | None = None,
    with_graph: bool = True,
    with_vectors: bool = True,
) -> None:
    """Write the settings of the injector and the linker; the graph and vectors where wanted.

    The injector's weights are in `adaptation.safetensors`, with the other auxiliary modules'.

    Args:
        folder: The model's folder.
        injector: With its sizes known.
        graph: Named by its fingerprint.
        vectors: Named by theirs; None for a form that reads none.
        linker: An [`EntityLinker`], or one of the user's own, which has to be given again.
        name: Prefix of the weights.
        text_columns: The columns that were linked.
        max_mentions: Mentions of a row at most.
        with_graph: Whether the graph is written too.
        with_vectors: Whether the vectors are written too.
    """
    own = Path(folder) / FOLDER
    own.mkdir(parents=True, exist_ok=True)
    settings = {
        "format": FORMAT,
        "name": name,
        "injector": injector.settings,
        "graph": {"fingerprint": graph.fingerprint, "entities": graph.num_entities},
        "vectors": None if vectors is None else {"fingerprint": vectors.fingerprint},
        "linker": linker.settings if isinstance(linker, EntityLinker) else None,
        "text_columns": list(text_columns),
        "max_mentions": max_mentions,
    }
    for part, name, is_wanted in ((graph, "graph", with_graph), (vectors, "vectors", with_vectors)):
        if is_wanted and part is not None and not _is_there(part, own / name):
            part.save(own / name)
    path = own / SETTINGS_FILE
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(settings, indent=1), encoding="utf-8")
    os.replace(temporary, path)
    _write_card(Path(folder), graph)


def _is_there(part: KnowledgeGraph | EntityVectors, where: Path) -> bool:
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


def load_knowledge_model(
    folder: str | os.PathLike[str],
    graph: KnowledgeGraph | None = None,
    vectors: EntityVectors | None = None,
    linker: Any = None,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    form: Any = None,
    **kwargs: Any,
) -> Any:
    """The model of a folder with its injector, ready for texts.

    Given tokens alone (by a `pipeline`, by `generate`), it links what they decode to by itself.
    Soft prompts and text triples change the input: make it with [`knowledge_inputs`].

    Args:
        folder: What a Trainer with a [`KnowledgeCallback`] saved.
        graph: The graph, if it was not saved with the model.
        vectors: The entity vectors, likewise.
        linker: The linker, if it was one of your own.
        model: The model without the injector, if the folder's own class is not to be used.
        tokenizer: The tokenizer, if it was not saved with the model.
        form: The class of the injector's form, if it is one of your own.
        **kwargs: For the model's `from_pretrained`.

    Returns:
        The model, of its own class, in evaluation mode.

    Raises:
        ValueError: If the folder has no injector, or graph or vectors are not those of the
            training.

    Example:
        ```python
        model = load_knowledge_model("out")
        classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
        ```
    """
    settings = read_settings(folder)
    own = Path(folder) / FOLDER
    graph = graph if graph is not None else _saved(KnowledgeGraph, own / "graph", "graph")
    check_fingerprint("graph", graph.fingerprint, settings["graph"]["fingerprint"])
    if settings["vectors"] is not None:
        if vectors is None:
            vectors = _saved(EntityVectors, own / "vectors", "vectors")
        check_fingerprint("vectors", vectors.fingerprint, settings["vectors"]["fingerprint"])
    if linker is None:
        if settings["linker"] is None:
            raise ValueError(
                "The model was trained with a linker of your own, which is not saved: pass linker=."
            )
        linker = EntityLinker.from_settings(graph, settings["linker"])
    if tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{folder} holds no tokenizer, which linking needs: pass tokenizer=."
            ) from error
    injector = KnowledgeInjector.from_settings(settings["injector"], form)
    _load_weights(injector, Path(folder), settings["name"])
    model = _load_model(folder, **kwargs) if model is None else model
    attachment = Attachment(model, injector.eval())
    batcher = make_batcher(
        model,
        injector,
        graph,
        vectors,
        TokenAligner(linker, tokenizer, tuple(settings["text_columns"])),
        settings["max_mentions"],
    )
    attachment.connect(batcher)
    return model


def resumed_vectors(
    checkpoint: Path, graph: KnowledgeGraph, given: EntityVectors | None
) -> EntityVectors | None:
    """The entity vectors that a training started with, where it made them itself.

    Args:
        checkpoint: The folder that a run resumes from.
        graph: The run's graph; another one than the training's is refused.
        given: The run's own vectors, if it was given some; likewise.

    Returns:
        The vectors, in memory: the checkpoint may be removed while the run lasts. None where the
        run has its own, or the checkpoint knows nothing of an injector.

    Raises:
        ValueError: If graph or vectors are others, or the checkpoint lacks the vectors.
    """
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
    vectors = EntityVectors(mapped.gather(np.arange(len(mapped))), mapped.metadata)
    check_fingerprint("vectors", vectors.fingerprint, expected)
    return vectors


def knowledge_inputs(model: nn.Module, texts: Sequence[str], **options: Any) -> dict[str, Any]:
    """Texts as inputs for a model with an injector, mentions and all.

    Args:
        model: A model from [`load_knowledge_model`], or one trained with a [`KnowledgeCallback`].
        texts: The texts.
        **options: For the tokenizer; by default padding, and truncation to what it allows.

    Returns:
        What `model(**inputs)` and `model.generate(**inputs)` take.

    Raises:
        ValueError: If the model has no injector.
    """
    attachment = known_attachment(model)
    inputs: dict[str, Any] = attachment.batcher.encode(texts, **options)
    taken = inspect.signature(type(unwrapped_base(attachment.model)).forward).parameters
    if "token_type_ids" not in taken:  # which `generate` of transformers 4 refuses
        inputs.pop("token_type_ids", None)
    return inputs


def read_settings(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What `save_knowledge` wrote of the settings.

    Raises:
        ValueError: If it is not there, or of a newer version.
    """
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
            f"{FORMAT}. Upgrade hf-adapt."
        )
    return settings


def check_fingerprint(what: str, found: str, expected: str, fix: str | None = None) -> None:
    """Refuse another graph, or other vectors, than those of the training.

    Args:
        what: `"graph"` or `"vectors"`.
        found: The fingerprint of what there is.
        expected: That of the training.
        fix: What to do, where it is not to pass those of the training.

    Raises:
        ValueError: If the fingerprints differ.
    """
    if found != expected:
        own = (
            f"Pass the {what} of the training (a script can keep what it made: {what}.save(folder))"
        )
        raise ValueError(
            f"The {what} {'has' if what == 'graph' else 'have'} the fingerprint {found}, and the "
            f"model was trained with {expected}: the injector would read what it was not trained "
            f"on. {fix or own}, or start a new training."
        )


def _saved(kind: Any, where: Path, what: str) -> Any:
    if not where.exists():
        raise ValueError(
            f"{where} does not exist: the {what} were not saved with the model (a checkpoint, or "
            f"save_graph=False). Pass {what}=."
        )
    return kind.load(where)


def _load_weights(injector: KnowledgeInjector, folder: Path, name: str) -> None:
    if not list(injector.parameters()):
        return
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise ValueError(f"{path} does not exist: the injector's weights are missing.")
    prefix = f"{name}."
    tensors = load_file(path)
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    injector.load_state_dict(own)


def _load_model(folder: str | os.PathLike[str], **kwargs: Any) -> Any:
    if (Path(folder) / "adapter_config.json").is_file():
        return _load_adapter(folder, **kwargs)
    config = AutoConfig.from_pretrained(folder)
    named = (getattr(config, "architectures", None) or [""])[0]
    found = getattr(transformers, named, None)
    if found is None:
        raise ValueError(
            f"{folder} names the class {named!r}, which transformers {transformers.__version__} "
            "does not have. Load the model yourself and pass model=."
        )
    return found.from_pretrained(folder, **kwargs)


def _load_adapter(folder: str | os.PathLike[str], **kwargs: Any) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            f'{folder} holds a PEFT adapter. Run pip install "hf-adapt[peft]".'
        ) from error
    task = peft.PeftConfig.from_pretrained(str(folder)).task_type
    classes = {
        "SEQ_CLS": peft.AutoPeftModelForSequenceClassification,
        "TOKEN_CLS": peft.AutoPeftModelForTokenClassification,
        "CAUSAL_LM": peft.AutoPeftModelForCausalLM,
        "SEQ_2_SEQ_LM": peft.AutoPeftModelForSeq2SeqLM,
        "QUESTION_ANS": peft.AutoPeftModelForQuestionAnswering,
    }
    if task not in classes:
        raise ValueError(
            f"{folder} holds a PEFT adapter of task_type={task!r}, which does not tell the model's "
            "class. Load the PEFT model yourself and pass model=."
        )
    return classes[task].from_pretrained(str(folder), **kwargs)
