"""Knowledge in a Trainer: one line, exact, and a plain checkpoint."""

import copy
import functools
import inspect
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import BertForSequenceClassification, Trainer, set_seed

from hf_adapt import DANN, AdaptationCallback, Distillation, adapt
from hf_adapt.engine.streams import Stream
from hf_adapt.knowledge import (
    EntityLinker,
    EntityVectors,
    KnowledgeCallback,
    KnowledgeGraph,
    KnowledgeInjection,
    KnowledgeInjector,
    KnowledgeTrainer,
)
from hf_adapt.knowledge.injection.attachment import attachment_of
from hf_adapt.unfreezing import GradualUnfreezing
from tests.helpers import toy
from tests.helpers.injectors import LABELS, injection, trainer
from tests.helpers.models import MODELS, family
from tests.helpers.trainers import (
    PLAIN_FILES,
    GradientRecorder,
    ScaledTrainer,
    StopAt,
    arguments,
    cosine_and_ratio,
    same_bits,
    weights,
)

COMPILED = ("bert", "llama", "t5", "lora")
"""An encoder, a decoder, both, and PEFT: compiling takes ten seconds."""


@pytest.mark.parametrize("name", MODELS)
def test_one_line(name: str, tmp_path: Path) -> None:
    made_one = trainer(tmp_path, name, max_steps=4)
    keys = list(made_one.model.state_dict())
    own = injection()
    made_one.add_callback(AdaptationCallback(own))
    before = made_one.evaluate()["eval_loss"]
    made_one.train()
    assert list(made_one.model.state_dict()) == keys
    moved = {n for n, p in own.module.named_parameters() if p.grad is None}
    assert moved == {n for n, _ in own.module.named_parameters()}  # the engine zeroed them
    outputs = [form.output.weight for form in own.module.forms]
    assert all(bool(weight.any()) for weight in outputs)
    logged = [log for log in made_one.state.log_history if "knowledge/mentions_per_row" in log]
    least = 0.0 if name == "bert_masked" else 0.5
    assert logged and all(log["knowledge/rows_with_mention"] > least for log in logged)
    after = made_one.evaluate()["eval_loss"]
    assert np.isfinite(after) and after != before
    if name != "bert_masked":  # whose collator masks other tokens each time
        rows = toy.rows(6, 2, LABELS.get(name, "row"))
        assert made_one.predict(rows).metrics["test_loss"] == pytest.approx(after)
    own.detach()
    assert made_one.evaluate()["eval_loss"] != pytest.approx(after)


def test_masked_tokens_are_not_told_by_their_mention(tmp_path: Path) -> None:
    one = trainer(tmp_path, "bert_masked", max_steps=3)
    own = injection()
    told, hidden = 0, 0
    original = own.around_forward

    def watched(inputs: Any) -> Any:
        nonlocal told, hidden
        for spans, labels in zip(inputs["knowledge_spans"], inputs["labels"], strict=True):
            assert all(bool((labels[start:end] == -100).all()) for start, end in spans)
            told += int((spans[:, 1] > 0).sum())
            hidden += int((labels != -100).sum())
        return original(inputs)

    own.around_forward = watched  # type: ignore[method-assign]
    adapt(one, own).train()
    assert told > 10 and hidden > 10


def test_evaluation_sees_the_mentions(tmp_path: Path) -> None:
    made_one = trainer(tmp_path)
    own = injection()
    adapt(made_one, own).train()
    with_text = made_one.evaluate()["eval_loss"]
    attachment_of(made_one.model).link = None
    assert made_one.evaluate()["eval_loss"] == pytest.approx(with_text)
    batch = next(iter(made_one.get_eval_dataloader()))
    assert {"knowledge_spans", "knowledge_vectors", "knowledge_relations"} <= set(batch)
    assert "text" not in batch


@pytest.mark.parametrize("name", [m for m in MODELS if m != "bert_masked"])  # masks by batch
def test_eight_times_one_is_one_times_eight(name: str, tmp_path: Path) -> None:
    found = []
    for rows, steps in ((8, 1), (1, 8)):
        one = trainer(
            tmp_path,
            name,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=steps,
            max_steps=3,
            max_grad_norm=0.0,
        )
        own = injection(injector=KnowledgeInjector(["embeddings", 0], "cross_attention"))
        recorder = GradientRecorder()
        one.add_callback(recorder)
        adapt(one, own).train()
        found.append((recorder.gradients[-1], toy.flat(own.module)))
    (one_gradient, one_weights), (other_gradient, other_weights) = found
    cosine, ratio = cosine_and_ratio(one_gradient, other_gradient)
    assert cosine == pytest.approx(1, abs=1e-4) and ratio == pytest.approx(1, abs=1e-3)
    assert (one_weights - other_weights).norm() < 1e-3 * one_weights.norm()


@pytest.mark.parametrize("form", ["gated", "cross_attention", "adapter"])
def test_resume_is_bit_exact_and_the_checkpoint_is_plain(form: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = dict(save_strategy="steps", save_steps=2, max_steps=5)

    def run(folder: Path, **more: Any) -> tuple[Trainer, KnowledgeInjection]:
        one = trainer(folder, **settings)
        own = injection(injector=KnowledgeInjector(0, form, num_neighbours=2, num_heads=2)
                        if form != "gated" else KnowledgeInjector(0, num_neighbours=2))  # fmt: skip
        if more.pop("stop", False):
            one.add_callback(StopAt(3))
        adapt(one, own).train(**more)
        return one, own

    whole, whole_own = run(tmp_path / "whole")
    run(tmp_path / "parts", stop=True)
    folder = tmp_path / "parts" / "checkpoint-2"
    resumed, resumed_own = run(tmp_path / "parts", resume_from_checkpoint=str(folder))
    assert same_bits(weights(whole.model), weights(resumed.model))
    assert same_bits(weights(whole_own.module), weights(resumed_own.module))
    ours = {"adaptation.safetensors", "adaptation_optimizer.pt", "knowledge", "README.md"}
    files = {path.name for path in folder.iterdir()}
    words = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert files - words == PLAIN_FILES | ours
    assert [path.name for path in (folder / "knowledge").iterdir()] == ["knowledge.json"]
    plain, info = BertForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert plain.config.to_dict().keys() == family("bert").config.to_dict().keys()


# A masked language model's collator draws ahead of the checkpoint, so that the plain Trainer, too,
# goes on with other masks.
@pytest.mark.parametrize("name", [m for m in MODELS if m not in ("bert", "bert_masked")])
def test_every_model_resumes_bit_exact(name: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = dict(save_strategy="steps", save_steps=2, max_steps=4)
    found = []
    for resumed in (None, str(tmp_path / "checkpoint-2")):
        one = trainer(tmp_path, name, **settings)
        own = injection()
        adapt(one, own).train(resume_from_checkpoint=resumed)
        found.append({**weights(one.model), **weights(own.module)})
    assert same_bits(*found)


def test_another_graph_is_refused_on_resume(tmp_path: Path) -> None:
    adapt(trainer(tmp_path, save_strategy="steps", save_steps=2), injection()).train()
    other = KnowledgeInjection(toy.shuffled(tmp_path), toy.vectors(), injector=injection().injector)
    with pytest.raises(ValueError, match="The graph has the fingerprint"):
        adapt(trainer(tmp_path), other).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_without_a_text_column_the_tokens_are_decoded(tmp_path: Path) -> None:
    def spans(keep: tuple[str, ...]) -> torch.Tensor:
        one = trainer(tmp_path, data=toy.rows(24, 1, keep=keep))
        own = injection()
        seen: list[torch.Tensor] = []
        original = own.around_forward

        def watched(inputs: Any) -> Any:
            seen.append(inputs["knowledge_spans"])
            return original(inputs)

        own.around_forward = watched  # type: ignore[method-assign]
        one.args.max_steps = 1
        adapt(one, own).train()
        return seen[-1]

    with_text = spans(("text",))
    with pytest.warns(UserWarning, match="linked in the tokenizer's own decoding"):
        without = spans(())
    assert torch.equal(with_text, without)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(side: str, tmp_path: Path) -> None:
    one = trainer(tmp_path, per_device_train_batch_size=8)
    one.data_collator = toy.collator(side=side, length=20)
    own = injection()
    checked = 0
    original = own.around_forward

    def watched(inputs: Any) -> Any:
        nonlocal checked
        for ids, spans, entities in zip(
            inputs["input_ids"].tolist(),
            inputs["knowledge_spans"].tolist(),
            inputs["knowledge_entities"].tolist(),
            strict=True,
        ):
            for (start, end), candidates in zip(spans, entities, strict=True):
                if candidates[0] >= 0:
                    surface = toy.tokenizer().decode(ids[start:end])
                    assert surface in own.graph.names(candidates[0])
                    checked += 1
        return original(inputs)

    own.around_forward = watched  # type: ignore[method-assign]
    adapt(one, own).train()
    assert checked > 20


def test_rows_linked_beforehand_are_not_linked_again(tmp_path: Path) -> None:
    own = injection()
    data = own.linker.map(toy.rows(24, 1))
    empty = data.map(lambda row: {"mentions": []})

    def mentions(dataset: Any) -> float:
        one = trainer(tmp_path, data=dataset)
        adapt(one, injection()).train()
        return one.state.log_history[0]["knowledge/mentions_per_row"]

    assert mentions(data) == mentions(toy.rows(24, 1)) > 0
    empty = empty.cast_column("mentions", data.features["mentions"])
    assert mentions(empty) == 0


def test_workers_make_the_same_batches(tmp_path: Path) -> None:
    def run(workers: int) -> dict[str, torch.Tensor]:
        one = trainer(tmp_path, dataloader_num_workers=workers)
        adapt(one, injection()).train()
        return weights(one.model)

    assert same_bits(run(0), run(2))


def test_a_stream(tmp_path: Path) -> None:
    one = trainer(tmp_path, data=toy.rows(24, 1).to_iterable_dataset())
    own = injection()
    adapt(one, own).train()
    assert one.state.log_history[0]["knowledge/mentions_per_row"] > 0


# Of compiled models whose own graph has breaks.
def run(folder: Path, name: str, cls: type[Trainer], number: int, **settings: Any) -> torch.Tensor:
    """The injector's weights after a run over a number of rows: 4 are one batch each time."""
    data = toy.rows(number, 1, LABELS.get(name, "row"))
    one = trainer(folder, name, cls, data, **settings)
    own = injection()
    adapt(one, own).train()
    assert all(p.dtype == torch.float32 for p in own.module.parameters())
    return toy.flat(own.module)


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same with the plain settings, once for each model."""
    folder = tmp_path_factory.mktemp("plain")
    return functools.cache(lambda name, number: run(folder, name, Trainer, number))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    ("name", "precision"),
    [
        (name, precision)
        for name in MODELS
        for precision in ("bf16", "scaler", "checkpointing", "compile")
        if precision != "compile" or name in COMPILED
    ],
)
def test_precisions(name: str, precision: str, plain_run: Any, tmp_path: Path) -> None:
    cls = ScaledTrainer if precision == "scaler" else Trainer
    settings: dict[str, Any] = {
        "bf16": {"bf16": True},
        "checkpointing": {"gradient_checkpointing": True},
        "compile": {"torch_compile": True, "torch_compile_backend": "eager"},
    }.get(precision, {})
    # Each further shape of a batch is compiled again, which BERT alone has to prove.
    number = 4 if precision == "compile" and name != "bert" else 24
    expected, found = plain_run(name, number), run(tmp_path, name, cls, number, **settings)
    torch._dynamo.reset()
    # By norms: Adam turns the rounding of tiny gradients into steps.
    tolerance = 0.2 if precision == "bf16" else 1e-3
    assert (found - expected).norm() < tolerance * expected.norm()


def test_beside_the_rest(tmp_path: Path) -> None:
    """DANN's two domains, gradual unfreezing, a teacher, gradient checkpointing."""
    target = toy.rows(12, 7).remove_columns("labels")
    one = trainer(tmp_path, max_steps=6, gradient_checkpointing=True)
    own = injection()
    adapt(
        one,
        own,
        DANN(hidden_sizes=(8,)),
        GradualUnfreezing(),
        Distillation(family("bert", seed=3)),
        target_dataset=target,
    ).train()
    last = one.state.log_history[-2]
    assert {"loss/dann", "loss/distillation", "knowledge/mentions_per_row"} <= set(last)
    assert all(bool(form.output.weight.any()) for form in own.module.forms)


def test_two_domains_checkpointed_are_those_without(tmp_path: Path) -> None:
    def run(**settings: Any) -> torch.Tensor:
        one = trainer(tmp_path, **settings)
        own = injection()
        adapt(
            one, own, DANN(hidden_sizes=(8,)),
            target_dataset=Stream(toy.rows(12, 7).remove_columns("labels"), forward="separate"),
        ).train()  # fmt: skip
        return torch.cat([toy.flat(own.module), toy.flat(one.model)])

    plain = run()
    torch.testing.assert_close(run(gradient_checkpointing=True), plain, rtol=1e-4, atol=1e-5)


def test_a_teacher_never_sees_the_mentions(tmp_path: Path) -> None:
    seen: list[set[str]] = []
    teacher = family("bert", seed=3)

    def ask(inputs: Any) -> Any:
        seen.append(set(inputs))
        return teacher(**inputs).logits

    adapt(trainer(tmp_path), injection(), Distillation(ask)).train()
    assert seen and not any(name.startswith("knowledge") for names in seen for name in names)


# ---- does knowledge do anything? ----


def world(folder: Path, seed: int = 0) -> tuple[Any, Any, KnowledgeGraph, EntityVectors]:
    """Sentences whose label is a fact about the entity that they name; no entity twice."""
    generator = np.random.default_rng(seed)
    kinds = generator.permutation(40) % 2
    triples = [(f"x{i}", "kind", f"kind{k}") for i, k in enumerate(kinds)]
    graph = KnowledgeGraph.from_triples(triples, names={f"x{i}": f"w{i}" for i in range(40)})
    table = generator.normal(size=(graph.num_entities, 8)).astype(np.float32)
    own = toy.tokenizer()

    def made_rows(entities: range) -> Any:
        rows = []
        for i in entities:
            for _ in range(4):
                around = [f"w{j}" for j in generator.integers(45, 59, 4)]
                text = " ".join([*around[:2], f"w{i}", *around[2:]])
                rows.append({**own(text), "labels": int(kinds[i]), "text": text})
        return datasets.Dataset.from_list(rows)

    return (
        made_rows(range(28)),
        made_rows(range(28, 40)),
        graph,
        EntityVectors.from_array(table, graph),
    )


class OtherIds:
    """A linker that names other entities than those in the text."""

    def __init__(self, linker: Any) -> None:
        self.linker = linker

    def __call__(self, text: str) -> list[tuple[int, int, int]]:
        order = np.random.default_rng(3).permutation(40)
        entities = [self.linker.graph.entity(f"x{i}") for i in order]
        return [
            (m.start, m.end, entities[int(m.surface.removeprefix("w"))])
            for m in self.linker.link(text)
        ]


@pytest.mark.parametrize(
    ("knows", "solves"), [("nothing", False), ("facts", True), ("shuffled", False)]
)
def test_a_fact_of_the_graph_solves_what_the_text_cannot(
    knows: str, solves: bool, tmp_path: Path
) -> None:
    from hf_adapt.knowledge import CallableLinker, EntityLinker

    train, test, graph, vectors = world(tmp_path)
    one = Trainer(
        family("bert"),
        arguments(tmp_path, max_steps=150, per_device_train_batch_size=16, learning_rate=3e-3),
        train_dataset=train,
        eval_dataset=test,
        data_collator=toy.collator(),
        processing_class=toy.tokenizer(),
        compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(-1) == p.label_ids).mean()},
    )
    if knows != "nothing":
        linker: Any = EntityLinker(graph)
        if knows == "shuffled":
            linker = CallableLinker(graph, OtherIds(linker))
        injector = KnowledgeInjector("embeddings", "cross_attention", num_neighbours=1, num_heads=2)
        adapt(one, KnowledgeInjection(graph, vectors, linker, injector, learning_rate=1e-2))
    one.train()
    accuracy = one.evaluate()["eval_accuracy"]
    assert (accuracy > 0.95) if solves else (accuracy < 0.75), accuracy


# ---- bad input ----


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="The table has 5 entity vectors, and the graph 6"):
        KnowledgeInjection(toy.graph(), EntityVectors.from_array(np.ones((5, 3), np.float32)))
    one = trainer(tmp_path)
    one.processing_class = None
    with pytest.raises(ValueError, match="pass processing_class=tokenizer"):
        adapt(one, injection()).train()
    with pytest.raises(ValueError, match="needs graph="):
        KnowledgeTrainer(family("bert"), arguments(tmp_path))
    one = trainer(tmp_path)
    one.data_collator = lambda rows: {"input_ids": torch.zeros(1, 40, dtype=torch.long)}
    with pytest.raises(ValueError, match="one sequence for each of the rows"):
        adapt(one, injection()).train()


def test_a_model_that_was_given_another_injector(tmp_path: Path) -> None:
    one = trainer(tmp_path)
    adapt(one, injection()).train()
    two = trainer(tmp_path)
    two.model = one.model
    with pytest.raises(ValueError, match="has an injector already"):
        adapt(two, injection()).train()


def test_a_place_without_effect_is_pointed_out(tmp_path: Path, caplog: Any) -> None:
    for layer, warns in ((1, True), (0, False)):  # of two: a classifier reads [CLS]
        caplog.clear()
        one = trainer(tmp_path, max_steps=12)
        adapt(one, injection(injector=KnowledgeInjector(layer))).train()
        assert ("nothing has been learnt at [1]" in caplog.text) == warns


def test_another_model_starts_anew(tmp_path: Path) -> None:
    one = trainer(tmp_path)
    own = injection()
    adapt(one, own)
    set_seed(0)  # the order of the rows
    one.train()
    first, result = weights(own.module), weights(one.model)
    one.model = one.model_wrapped = family("bert")
    one.optimizer = one.lr_scheduler = None
    set_seed(0)
    one.train()
    assert same_bits(first, weights(own.module)) and same_bits(result, weights(one.model))


def test_a_copy_of_the_model_shares_the_graph(tmp_path: Path) -> None:
    one = trainer(tmp_path)
    adapt(one, injection()).train()
    twin = attachment_of(copy.deepcopy(one.model))
    assert twin is not attachment_of(one.model)
    assert twin.batcher is attachment_of(one.model).batcher
    assert twin.link.__self__ is twin.batcher


def test_nothing_was_linked(tmp_path: Path, caplog: Any) -> None:
    one = trainer(tmp_path, data=toy.rows(24, 1, low=20))
    adapt(one, injection()).train()
    assert caplog.text.count("No entity was found in the last") == 1


def test_the_default_vectors_are_the_models_own(tmp_path: Path) -> None:
    one = KnowledgeTrainer(
        family("bert"),
        arguments(tmp_path),
        train_dataset=toy.rows(24, 1),
        data_collator=toy.collator(),
        processing_class=toy.tokenizer(),
        graph=toy.graph(),
    )
    one.train()
    assert one.injection.vectors.dimension == 16 and len(one.injection.vectors) == 6
    one.save_model()
    saved = json.loads((tmp_path / "knowledge" / "knowledge.json").read_text())
    assert saved["graph"]["fingerprint"] == toy.graph().fingerprint
    assert "w0" in str(one.explain("w0 w20"))


def test_the_callback_takes_its_options(tmp_path: Path) -> None:
    one = trainer(tmp_path)
    callback = KnowledgeCallback(toy.graph(), toy.vectors(), max_mentions=1)
    one.add_callback(callback)
    one.train()
    assert one.state.log_history[0]["knowledge/mentions_per_row"] <= 1
    assert callback.explain("w0 w4").mentions[0].surface == "w0"


@pytest.mark.parametrize("way_in", [KnowledgeCallback, KnowledgeTrainer])
def test_every_way_in_has_the_same_options(way_in: type) -> None:
    def options(cls: type) -> dict[str, Any]:
        own = inspect.signature(cls.__init__).parameters.values()
        left = ("self", "args", "kwargs", "graph", "name", "objectives")
        return {p.name: p.default for p in own if p.name not in left}

    assert options(way_in) == options(KnowledgeInjection)


def test_the_trainer_hands_its_options_on(tmp_path: Path) -> None:
    given: dict[str, Any] = dict(
        vectors=toy.vectors(),
        linker=EntityLinker(toy.graph()),
        injector=KnowledgeInjector(1),
        text_column="sentence",
        max_mentions=2,
        save_graph=False,
        learning_rate=0.5,
        weight_decay=0.25,
    )
    graph = toy.graph()
    one = KnowledgeTrainer(family("bert"), arguments(tmp_path), graph=graph, **given)
    for own in (one.injection, KnowledgeCallback(graph, **given).injection):
        assert own.graph is graph and own.text_columns == ("sentence",)
        kept = {name: getattr(own, name) for name in given if name != "text_column"}
        assert kept == {name: value for name, value in given.items() if name != "text_column"}
