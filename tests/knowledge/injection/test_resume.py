"""Resume in a new process: what a run made of the starting weights is found again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, Trainer

from hf_adapt import adapt
from hf_adapt.knowledge import (
    DescriptionAlignment,
    EntityPrediction,
    EntityVectors,
    KnowledgeCallback,
    KnowledgeInjection,
    KnowledgeInjector,
    LinkPrediction,
    load_knowledge_model,
)
from tests.helpers import toy
from tests.helpers.injectors import trainer
from tests.helpers.models import family
from tests.helpers.trainers import same_bits, weights

SAVING: dict[str, Any] = dict(save_strategy="steps", save_steps=2, max_steps=4)


def run(
    folder: Path, resume: Path | None = None, model: Any = None, **options: Any
) -> tuple[Trainer, KnowledgeCallback]:
    """A script from its first line on: everything is made again, as in a new process."""
    one = trainer(folder, **SAVING)
    if model is not None:
        one.model = one.model_wrapped = model
    callback = KnowledgeCallback(toy.graph(), learning_rate=1e-2, **options)
    one.add_callback(callback)
    one.train(resume_from_checkpoint=None if resume is None else str(resume))
    return one, callback


def state(one: Trainer, callback: KnowledgeCallback) -> dict[str, torch.Tensor]:
    module = callback.injection.module
    assert module is not None
    return {**weights(one.model), **weights(module)}


@pytest.mark.parametrize("loaded_from", ["base", "checkpoint"])
@pytest.mark.parametrize("save_graph", [True, False])
def test_default_vectors_are_those_of_the_start(
    loaded_from: str, save_graph: bool, tmp_path: Path
) -> None:
    whole = run(tmp_path / "whole", save_graph=save_graph)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    moved = tmp_path / "elsewhere" / "checkpoint-2"
    shutil.copytree(checkpoint, moved)
    model = None
    if loaded_from == "checkpoint":  # run_glue --model_name_or_path out/checkpoint-2
        model = AutoModelForSequenceClassification.from_pretrained(moved)
    resumed = run(tmp_path / "resumed", moved, model, save_graph=save_graph)
    shutil.rmtree(moved)  # rotated away: nothing may be read from it any more
    assert same_bits(state(*whole), state(*resumed))
    found, expected = resumed[1].injection.vectors, whole[1].injection.vectors
    assert found.fingerprint == expected.fingerprint and found.metadata == expected.metadata
    assert resumed[0].evaluate()["eval_loss"] == whole[0].evaluate()["eval_loss"]
    own = EntityVectors.from_descriptions(toy.graph(), family("bert"), toy.tokenizer())
    assert expected.fingerprint == own.fingerprint
    load_knowledge_model(checkpoint, toy.graph())


def test_losses_on_the_graph_find_the_vectors_again(tmp_path: Path) -> None:
    def once(resume: str | None) -> dict[str, torch.Tensor]:
        one = trainer(tmp_path, **SAVING)
        own = KnowledgeInjection(toy.graph(), injector=KnowledgeInjector(0, num_neighbours=2))
        terms = [kind(own) for kind in (EntityPrediction, LinkPrediction, DescriptionAlignment)]
        adapt(one, own, *terms).train(resume_from_checkpoint=resume)
        modules = {str(i): a.module for i, a in enumerate([own, *terms])}
        assert all(module is not None for module in modules.values())
        return {**weights(one.model), **weights(torch.nn.ModuleDict(modules))}

    assert same_bits(once(None), once(str(tmp_path / "checkpoint-2")))


def test_a_checkpoint_of_another_run_brings_its_own_vectors(tmp_path: Path) -> None:
    """In one process: the callback has made vectors of another model already."""
    first = run(tmp_path / "first")
    two = trainer(tmp_path / "two", **SAVING)
    two.model = two.model_wrapped = family("bert", seed=4)
    callback = KnowledgeCallback(toy.graph(), learning_rate=1e-2)
    two.add_callback(callback)
    two.train()
    other = callback.injection.vectors.fingerprint
    two.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    assert callback.injection.vectors.fingerprint == first[1].injection.vectors.fingerprint != other


def test_given_vectors_are_not_copied_into_checkpoints(tmp_path: Path) -> None:
    run(tmp_path, vectors=toy.vectors())
    assert not (tmp_path / "checkpoint-2" / "knowledge" / "vectors").exists()


def test_a_checkpoint_without_the_vectors_names_a_way_that_works(tmp_path: Path) -> None:
    whole = run(tmp_path)
    checkpoint = tmp_path / "checkpoint-2"
    shutil.rmtree(checkpoint / "knowledge" / "vectors")
    with pytest.raises(ValueError, match=r"EntityVectors\.from_descriptions"):
        run(tmp_path / "again", checkpoint)
    vectors = EntityVectors.from_descriptions(toy.graph(), family("bert"), toy.tokenizer())
    assert same_bits(state(*whole), state(*run(tmp_path / "again", checkpoint, vectors=vectors)))


def test_other_vectors_and_other_graphs_are_refused_before_anything_is_encoded(
    tmp_path: Path, monkeypatch: Any
) -> None:
    run(tmp_path)
    checkpoint = tmp_path / "checkpoint-2"
    monkeypatch.setattr(EntityVectors, "from_descriptions", None)
    with pytest.raises(ValueError, match=r"The vectors have the .*\. Leave vectors= out"):
        run(tmp_path / "again", checkpoint, vectors=toy.vectors(16))
    one = trainer(tmp_path / "again", **SAVING)
    one.add_callback(KnowledgeCallback(toy.shuffled(tmp_path)))
    with pytest.raises(ValueError, match="The graph has the fingerprint"):
        one.train(resume_from_checkpoint=str(checkpoint))


def test_a_plain_checkpoint_makes_them_anew(tmp_path: Path, caplog: Any) -> None:
    one = trainer(tmp_path, **SAVING)
    one.train()
    _, callback = run(tmp_path / "more", tmp_path / "checkpoint-2")
    own = EntityVectors.from_descriptions(
        toy.graph(),
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-2"),
        toy.tokenizer(),
    )
    assert callback.injection.vectors.fingerprint == own.fingerprint
    assert "holds no auxiliary modules" in caplog.text


def test_settings_name_the_vectors_of_a_checkpoint(tmp_path: Path) -> None:
    _, callback = run(tmp_path)
    settings = json.loads((tmp_path / "checkpoint-2" / "knowledge" / "knowledge.json").read_text())
    assert settings["vectors"]["fingerprint"] == callback.injection.vectors.fingerprint
