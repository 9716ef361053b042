"""Saved and loaded: the same predictions with the injector, a plain model without it."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, Trainer, pipeline

from hf_adapt.knowledge import (
    EntityLinker,
    InjectionLayer,
    KnowledgeInjection,
    KnowledgeInjector,
    LayerSizes,
    explain,
    knowledge_inputs,
    load_knowledge_model,
)
from hf_adapt.knowledge.injection.attachment import attachment_of
from tests.helpers import toy
from tests.helpers.injectors import trained, trainer
from tests.helpers.models import family

TEXTS = ["w0 w20 w1 w2", "w21 w22", "w4 w9"]
DECODED = "ignore:Entities are linked in the tokenizer's own decoding:UserWarning"


@pytest.mark.filterwarnings(DECODED)
@pytest.mark.parametrize("form", ["gated", "cross_attention", "adapter"])
def test_loaded_it_predicts_the_same(form: str, tmp_path: Path) -> None:
    one = trained(tmp_path, injector=KnowledgeInjector([0, "head"], form))
    inputs = knowledge_inputs(one.model, TEXTS)
    expected = one.model(**inputs).logits
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final")
    tokens = {k: v for k, v in inputs.items() if not k.startswith("knowledge")}
    assert not torch.allclose(plain(**tokens).logits, expected, atol=1e-4)
    model = load_knowledge_model(tmp_path / "final")
    assert not model.training and type(model) is type(plain)
    torch.testing.assert_close(model(**inputs).logits, expected)
    torch.testing.assert_close(model(**tokens).logits, expected)  # it links by itself
    assert set(model.state_dict()) == set(plain.state_dict())


@pytest.mark.filterwarnings(DECODED)
def test_a_pipeline_on_raw_text(tmp_path: Path) -> None:
    one = trained(tmp_path)
    classify = pipeline(
        "text-classification",
        model=load_knowledge_model(tmp_path / "final"),
        tokenizer=toy.tokenizer(),
        top_k=None,
    )
    with torch.no_grad():
        expected = one.model(**knowledge_inputs(one.model, TEXTS)).logits.softmax(-1)
    for scores, row in zip(classify(TEXTS), expected, strict=True):
        found = {score["label"]: score["score"] for score in scores}
        assert found["LABEL_1"] == pytest.approx(float(row[1]), abs=1e-5)


@pytest.mark.filterwarnings(DECODED)
def test_generating_from_raw_text(tmp_path: Path) -> None:
    one = trained(tmp_path, "llama")
    model = load_knowledge_model(tmp_path / "final", tokenizer=toy.tokenizer())
    inputs = knowledge_inputs(one.model, ["w0 w20 w1 w2"])
    settings: dict[str, Any] = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    expected = one.model.generate(**inputs, **settings)
    tokens = {k: v for k, v in inputs.items() if not k.startswith("knowledge")}
    assert torch.equal(model.generate(**tokens, **settings), expected)


def test_the_card_says_what_is_missing(tmp_path: Path) -> None:
    trained(tmp_path)
    card = (tmp_path / "final" / "README.md").read_text()
    assert "load_knowledge_model" in card and toy.graph().fingerprint in card
    one = trained(tmp_path)  # written once, whatever else stands there
    (tmp_path / "final" / "README.md").write_text("# Mine\n")
    one.save_model(str(tmp_path / "final"))
    one.save_model(str(tmp_path / "final"))
    card = (tmp_path / "final" / "README.md").read_text()
    assert card.startswith("# Mine") and card.count("load_knowledge_model") == 2


def test_lora(tmp_path: Path) -> None:
    one = trained(tmp_path, "lora")
    inputs = knowledge_inputs(one.model, TEXTS)
    base = family("bert")
    from peft import PeftModel

    model = load_knowledge_model(
        tmp_path / "final", model=PeftModel.from_pretrained(base, tmp_path / "final").eval()
    )
    torch.testing.assert_close(model(**inputs).logits, one.model(**inputs).logits)


def test_what_a_folder_may_lack(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no knowledge/knowledge\.json"):
        load_knowledge_model(tmp_path)
    one = trained(tmp_path, save_graph=False)
    folder = tmp_path / "final"
    with pytest.raises(ValueError, match=r"Pass graph="):
        load_knowledge_model(folder)
    with pytest.raises(ValueError, match="Pass vectors="):
        load_knowledge_model(folder, toy.graph())
    with pytest.raises(ValueError, match="The graph has the fingerprint"):
        load_knowledge_model(folder, toy.shuffled(tmp_path), toy.vectors())
    with pytest.raises(ValueError, match="The vectors have the fingerprint"):
        load_knowledge_model(folder, toy.graph(), toy.vectors(seed=9))
    model = load_knowledge_model(folder, toy.graph(), toy.vectors())
    inputs = knowledge_inputs(one.model, TEXTS)
    torch.testing.assert_close(model(**inputs).logits, one.model(**inputs).logits)
    (folder / "adaptation.safetensors").unlink()
    with pytest.raises(ValueError, match="the injector's weights are missing"):
        load_knowledge_model(folder, toy.graph(), toy.vectors())


def test_linker_settings_come_back(tmp_path: Path) -> None:
    linker = EntityLinker(toy.graph(), overlapping=True, max_candidates=1)
    trained(tmp_path, linker=linker)
    model = load_knowledge_model(tmp_path / "final")
    found = attachment_of(model).batcher.aligner.linker
    assert found.settings == linker.settings
    assert found.link("w1 w2") == linker.link("w1 w2")


def test_a_linker_of_ones_own_has_to_be_given_again(tmp_path: Path) -> None:
    from hf_adapt.knowledge import CallableLinker

    linker = CallableLinker(toy.graph(), lambda text: [(0, 2, 0)])
    trained(tmp_path, linker=linker)
    with pytest.raises(ValueError, match="pass linker="):
        load_knowledge_model(tmp_path / "final")
    load_knowledge_model(tmp_path / "final", linker=linker)


def test_training_goes_on_with_a_loaded_model(tmp_path: Path) -> None:
    from hf_adapt import adapt

    trained(tmp_path)
    model = load_knowledge_model(tmp_path / "final")
    injector = attachment_of(model).injector
    before = toy.flat(injector).clone()
    own = KnowledgeInjection(toy.graph(), toy.vectors(), injector=injector, learning_rate=1e-2)
    one = trainer(tmp_path / "more")
    again = Trainer(
        model, one.args, train_dataset=one.train_dataset, data_collator=one.data_collator,
        processing_class=one.processing_class,
    )  # fmt: skip
    adapt(again, own).train()
    assert own.module is injector and not torch.equal(toy.flat(injector), before)


class Doubled(InjectionLayer):
    """An injection layer of the user's own."""

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__(sizes)
        self.value = torch.nn.Linear(sizes.entity_size, sizes.inner_size)

    def mention_values(self, query: Any, knowledge: Any, record: Any) -> torch.Tensor:
        return 2 * self.value(self.candidates(knowledge)).sum(2)


def test_an_injection_layer_of_ones_own(tmp_path: Path) -> None:
    one = trained(tmp_path, injector=KnowledgeInjector(0, Doubled))
    with pytest.raises(ValueError, match="pass the class as injection_layer="):
        load_knowledge_model(tmp_path / "final")
    model = load_knowledge_model(tmp_path / "final", injection_layer=Doubled)
    inputs = knowledge_inputs(one.model, TEXTS)
    torch.testing.assert_close(model(**inputs).logits, one.model(**inputs).logits)


def test_explanations(tmp_path: Path) -> None:
    trained(
        tmp_path,
        injector=KnowledgeInjector(["embeddings", 0], "cross_attention", num_neighbours=2),
    )
    model = load_knowledge_model(tmp_path / "final")
    found = explain(model, "w4 <b> w0")
    first, second = found.mentions
    assert (first.surface, first.start, first.end, first.tokens) == ("w4", 0, 2, (1, 2))
    assert [candidate.key for candidate in first.candidates] == ["e3", "e4"]
    assert second.candidates[0].description == "w8 w9"
    for mention in found.mentions:
        assert len(mention.gate) == 2
        for place in range(2):
            shares = [candidate.attention[place] for candidate in mention.candidates]
            assert 0 < sum(shares) <= mention.gate[place] + 1e-5 <= 1
    assert "'w4' [0:2]" in str(found) and "prior 0.50" in str(found)
    assert asdict(found)["mentions"][0]["candidates"][0]["key"] == "e3"
    assert "no entity was linked" in str(explain(model, "w30"))
    with pytest.raises(ValueError, match="has no knowledge injector"):
        explain(family("bert"), "w0")


def test_a_folder_is_never_half_written(tmp_path: Path) -> None:
    one = trained(tmp_path)
    one.save_model(str(tmp_path / "final"))  # once more over what is there
    load_knowledge_model(tmp_path / "final")
    assert not list((tmp_path / "final").rglob("*.tmp"))
