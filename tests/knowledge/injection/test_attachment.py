"""The injector on models of many families: exact, and without a trace."""

import copy
import inspect
from typing import Any

import pytest
import torch

from hf_adapt.knowledge.injection.attachment import attachment_of
from hf_adapt.knowledge.injection.injector import InjectorSizes, KnowledgeInjector
from hf_adapt.knowledge.injection.injector_attachment import InjectorAttachment
from hf_adapt.knowledge.injection.inputs import NAMES
from tests.helpers.injectors import built, disturb, inputs, knowledge
from tests.helpers.models import CAUSAL, GENERATING, MODELS, family

FORMS = ("gated", "cross_attention", "adapter")


def logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    outputs = model(**batch)
    if "logits" in outputs:
        return outputs.logits
    return torch.stack([outputs.start_logits, outputs.end_logits], -1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_at_first_nothing_is_changed(name: str, form: str) -> None:
    model, batch = family(name), inputs(name)
    plain = logits(model, batch)
    keys = list(model.state_dict())
    InjectorAttachment(model, built(name, injection_layer=form, num_neighbours=2))
    assert torch.equal(logits(model, {**batch, **knowledge()}), plain)
    assert list(model.state_dict()) == keys
    assert not {id(p) for p in model.parameters()} & {
        id(p) for p in attachment_of(model).injector.parameters()
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_a_row_without_a_mention_is_never_changed(name: str, form: str) -> None:
    model, batch = family(name), inputs(name)
    plain = logits(model, batch)
    injector = built(name, injection_layer=form, num_neighbours=2)
    disturb(injector)
    InjectorAttachment(model, injector)
    changed = logits(model, {**batch, **knowledge()})
    assert torch.equal(changed[1], plain[1])
    assert not torch.allclose(changed[0], plain[0], atol=1e-4)
    assert torch.equal(logits(model, {**batch, **knowledge(mentions=False)}), plain)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_the_output_first_and_then_everything(name: str) -> None:
    model, batch = family(name), {**inputs(name), **knowledge()}
    injector = built(name, injection_layer="cross_attention", num_neighbours=2)
    InjectorAttachment(model, injector)
    model(**batch).loss.backward()
    moved = {n for n, p in injector.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"injection_layers.0.output.weight", "injection_layers.1.output.weight"}
    disturb(injector)
    injector.zero_grad()
    model(**batch).loss.backward()
    for parameter_name, parameter in injector.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), parameter_name


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_checkpointing_and_two_forwards_before_one_backward(name: str, reentrant: bool) -> None:
    def gradient(checkpointed: bool) -> torch.Tensor:
        model = family(name).train()
        injector = built(name, num_neighbours=2)
        disturb(injector)
        InjectorAttachment(model, injector)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        first = model(**inputs(name), **knowledge()).loss
        second = model(**inputs(name, seed=7), **knowledge(seed=8)).loss
        (first + 0.5 * second).backward()
        parameters = [*model.parameters(), *injector.parameters()]
        return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])

    expected = gradient(False)
    assert (gradient(True) - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("name", GENERATING)
@pytest.mark.parametrize("form", FORMS)
def test_generation_is_the_same_with_and_without_a_cache(name: str, form: str) -> None:
    model = family(name)
    injector = built(name, injection_layer=form, num_neighbours=2)
    batch = inputs(name, length=6)
    del batch["labels"]
    batch["attention_mask"][:] = 1
    batch["input_ids"][:] = batch["input_ids"].clamp(min=5)
    settings: dict[str, Any] = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    scored: dict[str, Any] = dict(**settings, output_logits=True, return_dict_in_generate=True)
    plain = model.generate(**batch, **scored)
    disturb(injector, scale=3.0)
    InjectorAttachment(model, injector)
    mentions = knowledge()
    mentions["knowledge_spans"][0, 1] = torch.tensor([6, 7])  # the first token that is generated
    cached = model.generate(**batch, **mentions, **scored, use_cache=True)
    anew = model.generate(**batch, **mentions, **scored, use_cache=False)
    assert torch.equal(cached.sequences, anew.sequences)
    for with_cache, without, untold in zip(cached.logits, anew.logits, plain.logits, strict=True):
        torch.testing.assert_close(with_cache, without, atol=1e-3, rtol=1e-3)
        assert not torch.allclose(with_cache, untold, atol=1e-2)
    beams = model.generate(**batch, **mentions, **settings, num_beams=2)
    assert beams.shape == cached.sequences.shape


@pytest.mark.parametrize("name", ["bert", "bert_tokens", "gpt2", "llama", "t5", "lora"])
def test_compiled_without_a_graph_break(name: str) -> None:
    model, batch = family(name), inputs(name)
    if name != "t5":
        del batch["labels"]  # GPT-2's loss warns, which breaks the plain model's graph too
    injector = built(name, injection_layer="cross_attention", num_neighbours=2)
    disturb(injector)
    InjectorAttachment(model, injector)
    expected = logits(model, {**batch, **knowledge()})
    torch._dynamo.reset()
    try:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(logits(compiled, {**batch, **knowledge()}), expected)
        other = knowledge(seed=9)
        found = logits(compiled, {**batch, **other})
    finally:
        torch._dynamo.reset()
    torch.testing.assert_close(found, logits(model, {**batch, **other}))


def test_a_copy_has_an_injector_of_its_own() -> None:
    model, batch = family("bert"), {**inputs("bert"), **knowledge()}
    injector = built("bert")
    disturb(injector)
    InjectorAttachment(model, injector)
    expected = logits(model, batch)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, batch), expected)
    disturb(attachment_of(twin).injector, seed=11)
    assert torch.equal(logits(model, batch), expected)
    assert not torch.equal(logits(twin, batch), expected)


def test_detached_it_is_the_plain_model_again() -> None:
    model, batch = family("bert"), inputs("bert")
    plain = logits(model, batch)
    injector = built("bert")
    disturb(injector)
    attachment = InjectorAttachment(model, injector)
    with pytest.raises(ValueError, match="has an injector already"):
        InjectorAttachment(model, built("bert"))
    attachment.detach()
    assert attachment_of(model) is None and "forward" not in vars(model)
    assert torch.equal(logits(model, batch), plain)
    assert not set(NAMES) & set(inspect.signature(model.forward).parameters)


def test_the_signature_tells_of_the_mentions() -> None:
    model = family("t5")
    InjectorAttachment(model, built("t5"))
    for forward in (model.forward, model.get_encoder().forward):
        assert set(NAMES) <= set(inspect.signature(forward).parameters)
        assert "input_ids" in inspect.signature(forward).parameters


def test_inputs_without_mentions_are_warned_of_once(caplog: Any) -> None:
    model, batch = family("bert"), inputs("bert")
    InjectorAttachment(model, built("bert"))
    model(**batch)
    model(**batch)
    assert caplog.text.count("got inputs without mentions") == 1


def test_incomplete_mentions_are_refused() -> None:
    model, mentions = family("bert"), knowledge()
    InjectorAttachment(model, built("bert"))
    del mentions["knowledge_vectors"]
    with pytest.raises(ValueError, match="without knowledge_vectors"):
        model(**inputs("bert"), **mentions)


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta", "llama_rows", "t5", "bert_tokens"])
def test_the_head_is_an_injection_point(name: str) -> None:
    model, batch = family(name), inputs(name)
    plain = logits(model, batch)
    injector = built(name, layers=["head"])
    InjectorAttachment(model, injector)
    assert torch.equal(logits(model, {**batch, **knowledge()}), plain)
    disturb(injector)
    changed = logits(model, {**batch, **knowledge()})
    assert torch.equal(changed[1], plain[1])
    assert not torch.allclose(changed[0], plain[0], atol=1e-4)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_language_model_does_not_look_ahead(name: str) -> None:
    model = family(name)
    batch = inputs(name, rows=1)
    injector = built(name, injection_layer="adapter")
    disturb(injector, scale=2.0)
    InjectorAttachment(model, injector)
    mentions = {key: value[:1].clone() for key, value in knowledge().items()}
    mentions["knowledge_spans"][0] = torch.tensor([[3, 4], [7, 8]])
    whole = logits(model, {**batch, **mentions})
    mentions["knowledge_spans"][0, 1] = 0  # without the later mention
    assert torch.equal(logits(model, {**batch, **mentions})[:, :7], whole[:, :7])
    assert not torch.allclose(logits(model, {**batch, **mentions})[:, 7:], whole[:, 7:])


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "layers is empty"),
        ([7], "layer 7, but bert.encoder.layer has 2 layers"),
        (["bert.encoder.layr.1"], "Near names: bert.encoder.layer.1"),
        (["embeddings", "bert.embeddings.word_embeddings"], "more than once"),
    ],
)
def test_injection_points_that_are_not_there(layers: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InjectorAttachment(family("bert"), KnowledgeInjector(layers))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"injection_layer": "concat"}, "injection_layer='concat' is unknown"),
        ({"num_neighbours": -1}, "num_neighbours=-1"),
        ({"tokens": "first"}, "tokens='first' is unknown"),
    ],
)
def test_options_that_are_unknown(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KnowledgeInjector(**options)
    with pytest.raises(ValueError, match="does not take"):
        KnowledgeInjector(heads=3).build(InjectorSizes([8], 4, 2, False))
