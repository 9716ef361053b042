"""Saved models with knowledge: loading them, and inputs for them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from hf_adapt.engine.checkpoint import WEIGHTS_FILE
from hf_adapt.knowledge.graphs.graph import KnowledgeGraph
from hf_adapt.knowledge.injection.attachment import known_attachment
from hf_adapt.knowledge.injection.batcher import make_batcher
from hf_adapt.knowledge.injection.injector import KnowledgeInjector
from hf_adapt.knowledge.injection.injector_attachment import InjectorAttachment
from hf_adapt.knowledge.injection.knowledge_folder import FOLDER, check_fingerprint, read_settings
from hf_adapt.knowledge.injection.text_triples import VisibilityAttachment, make_triple_batcher
from hf_adapt.knowledge.linking.entity_linker import EntityLinker
from hf_adapt.knowledge.linking.token_alignment import TokenAligner
from hf_adapt.knowledge.vectors.table import EntityVectors
from hf_adapt.models.structure import unwrapped_base

HEADS = {
    "SEQ_CLS": "SequenceClassification",
    "TOKEN_CLS": "TokenClassification",
    "CAUSAL_LM": "CausalLM",
    "SEQ_2_SEQ_LM": "Seq2SeqLM",
    "QUESTION_ANS": "QuestionAnswering",
}
"""The heads of PEFT's tasks."""


def load_knowledge_model(
    folder: str | os.PathLike[str],
    graph: KnowledgeGraph | None = None,
    vectors: EntityVectors | None = None,
    linker: Any = None,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    injection_layer: Any = None,
    **kwargs: Any,
) -> Any:
    """Load a saved model with its knowledge, ready for texts.

    Given tokens alone (by a `pipeline`, by `generate`), it links what they decode to by itself.
    Soft prompts and text triples change the input: make it with [`knowledge_inputs`].

    Args:
        folder: Saved by a Trainer with a [`KnowledgeCallback`] or with [`TextTriples`].
        graph: The graph, if it was not saved with the model.
        vectors: The entity vectors, likewise.
        linker: The linker, if it was one of your own.
        model: The model without the injector, if the folder's own class is not to be used.
        tokenizer: The tokenizer, if it was not saved with the model.
        injection_layer: The class of the injection layer, if it is one of your own.
        **kwargs: For the model's `from_pretrained`.

    Returns:
        The model, of its own class, in evaluation mode.

    Raises:
        ValueError: If nothing of the kind was saved, or graph or vectors are not those of the
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
    try:
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        fix = "pass tokenizer=."
        raise ValueError(f"{folder} has no tokenizer, which linking needs: {fix}") from error
    aligner = TokenAligner(linker, tokenizer, tuple(settings["text_columns"]))
    most, injector = settings["max_mentions"], None
    if settings["injector"] is not None:
        injector = KnowledgeInjector.from_settings(settings["injector"], injection_layer)
        _load_weights(injector, Path(folder), settings["name"])
    model = _load_model(folder, **kwargs) if model is None else model
    if injector is None:
        batcher = make_triple_batcher(model, graph, aligner, most, settings["text_triples"])
        VisibilityAttachment(model, batcher)
        return model
    assert vectors is not None
    attachment = InjectorAttachment(model, injector.eval())
    attachment.connect(make_batcher(model, injector, graph, vectors, aligner, most))
    return model


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


def _saved(kind: Any, where: Path, what: str) -> Any:
    if not where.exists():
        raise ValueError(
            f"{where} does not exist: the {what} were not saved with the model (a checkpoint, or "
            f"save_graph=False). Pass {what}=."
        )
    return kind.load(where)


def _load_weights(injector: KnowledgeInjector, folder: Path, name: str) -> None:
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
        fix = 'Run pip install "hf-adapt[peft]".'
        raise ImportError(f"{folder} holds a PEFT adapter. {fix}") from error
    task = peft.PeftConfig.from_pretrained(str(folder)).task_type
    if task not in HEADS:
        raise ValueError(
            f"{folder} has a PEFT adapter of task_type={task!r}, which does not tell the model's "
            "class. Load the PEFT model yourself and pass model=."
        )
    return getattr(peft, f"AutoPeftModelFor{HEADS[task]}").from_pretrained(str(folder), **kwargs)
