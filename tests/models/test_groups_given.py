"""Layer groups of frozen, adapted and prompted models, and groups given by the user."""

import re
from typing import Any

import pytest
from torch import nn

from hf_adapt.models.groups import layer_groups, matches
from hf_adapt.models.layers import find_stacks
from tests.helpers.architectures import (
    assert_groups,
    by_name,
    case,
    held,
    in_registration_order,
    layers,
)
from tests.helpers.models import bert, llama


def test_frozen_parameters_are_in_no_group_and_levels_stay_contiguous() -> None:
    model = bert()
    names = [group.name for group in layer_groups(model)]
    assert names == ["embeddings", "layer.0", "layer.1", "head"]
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[1].requires_grad_(False)
    groups = layer_groups(model)
    assert [(group.name, group.level) for group in groups] == [
        ("layer.0", 0),
        ("layer.1", 1),
        ("head", 2),
    ]
    # The pooler still trains, and goes with the top layer.
    assert groups[1].parameters == ("bert.pooler.dense.weight", "bert.pooler.dense.bias")
    model.bert.requires_grad_(False)
    assert [(group.name, group.level) for group in layer_groups(model)] == [("head", 0)]


def test_names_do_not_depend_on_what_is_frozen() -> None:
    model = case("LlavaForConditionalGeneration")
    before = by_name(layer_groups(model))
    model.model.vision_tower.requires_grad_(False)
    after = by_name(layer_groups(model))
    kept = [name for name in before if not name.startswith("vision_tower")]
    assert list(after) == kept
    assert all(after[name].parameters == before[name].parameters for name in kept)
    assert [group.level for group in after.values()][:2] == [0, 1]


def test_nothing_trainable_is_refused() -> None:
    model = bert()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="BertForSequenceClassification has no trainable"):
        layer_groups(model)


def test_a_model_without_layers_is_refused_with_what_was_looked_for() -> None:
    model = nn.ModuleDict({"one": nn.Linear(2, 2), "two": nn.Linear(2, 2)})
    assert find_stacks(model) == []
    normed = nn.ModuleDict({"one": nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))})
    assert find_stacks(normed) == []  # its ParametrizationList is no layer
    dropouts = nn.Sequential(nn.Sequential(nn.Dropout(), nn.Dropout()), nn.Linear(2, 2))
    assert find_stacks(dropouts) == []
    with pytest.raises(ValueError, match=r"No stack of layers in ModuleDict: looked for .*groups="):
        layer_groups(model)
    groups = layer_groups(model, {"low": "one", "high": "two"})
    assert [group.level for group in groups] == [0, 1]


# ---- PEFT


def lora(modules_to_save: list[str] | None = None, **settings: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["query"], modules_to_save=modules_to_save, **settings
    )
    return peft.get_peft_model(bert(), config)


def test_adapters_are_in_the_group_of_their_layer_and_the_saved_head_is_the_head() -> None:
    model = lora(["classifier"])
    base = "base_model.model"
    assert_groups(
        model,
        {
            **layers(f"{base}.bert.encoder.layer", number=2),
            "head": f"{base}.classifier",
        },
    )
    named = by_name(layer_groups(model))
    assert set(named["head"].parameters) == {
        f"{base}.classifier.modules_to_save.default.weight",
        f"{base}.classifier.modules_to_save.default.bias",
    }
    assert all("lora_" in name for name in named["layer.0"].parameters)


def test_a_saved_layer_leaves_the_stack_a_stack() -> None:
    model = lora(["layer.1"])
    assert [len(stack.layers) for stack in find_stacks(model)] == [2]
    named = by_name(layer_groups(model))
    assert any("layer.1.modules_to_save" in name for name in named["layer.1"].parameters)


def test_a_prompt_is_an_embedding() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    named = by_name(layer_groups(peft.get_peft_model(bert(), config)))
    assert named["embeddings"].parameters == ("prompt_encoder.default.embedding.weight",)
    assert list(named) == ["embeddings", "head"]


# ---- groups given by the user

WHOLE = {
    "bottom": ["bert.embeddings", "bert.encoder.layer.0"],
    "top": r"bert\.(encoder\.layer\.1|pooler)\..*",
    "head": "classifier",
}


def test_given_groups_keep_their_order_names_and_patterns() -> None:
    model = bert()
    groups = layer_groups(model, WHOLE)
    assert [(g.name, g.kind, g.tower, g.level) for g in groups] == [
        ("bottom", "other", "", 0),
        ("top", "other", "", 1),
        ("head", "head", "", 2),
    ]
    assert sorted(held(groups)) == sorted(in_registration_order(model))
    assert groups[2].parameters == ("classifier.weight", "classifier.bias")


def test_given_groups_may_be_a_sequence() -> None:
    model = bert()
    groups = layer_groups(model, ["bert.embeddings", ["bert.encoder", "bert.pooler"], "classifier"])
    assert [group.name for group in groups] == ["bert.embeddings", "group.1", "classifier"]


def test_found_groups_may_be_given_back() -> None:
    model = llama()
    found = layer_groups(model)
    again = layer_groups(model, found)
    assert [(g.name, g.kind, g.parameters) for g in again] == [
        (g.name, g.kind, g.parameters) for g in found
    ]
    kinds = layer_groups(model, {group.name: group.parameters for group in found})
    assert [group.kind for group in kinds] == [group.kind for group in found]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({**WHOLE, "top": "bert.pooler"}, r"16 of 41 .* in no group: .* and 11 more"),
        (
            {**WHOLE, "again": "bert.pooler"},
            r"'top' and 'again' both hold 'bert.pooler.dense.weight' and 1 more",
        ),
        (
            {**WHOLE, "bottom": "bert.embedings"},
            r"group 'bottom', the pattern 'bert.embedings' .*Near names: bert.embeddings",
        ),
        (
            {**WHOLE, "head": ["classifier", "pooler"]},
            r"group 'head', the pattern 'pooler' matches no trainable.*Near names: bert.pooler",
        ),
        ({**WHOLE, "head": "classifier.["}, r"'classifier.\[' is neither .* regular expression"),
        ({}, r"expected a mapping .* with at least one group"),
        ("bert", r"expected a mapping"),
        (["classifier", "classifier"], r"Two groups have one name"),
    ],
    ids=["strays", "overlap", "typo", "one of two", "regex", "empty", "string", "same name"],
)
def test_groups_that_do_not_divide_the_parameters_are_refused(groups: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        layer_groups(bert(), groups)


def test_a_group_of_frozen_parameters_is_refused() -> None:
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    groups = {"embeddings": "bert.embeddings", "rest": r"bert\.(encoder|pooler).*|classifier.*"}
    with pytest.raises(ValueError, match=r"'embeddings'.* are frozen \(requires_grad=False\)\. U"):
        layer_groups(model, groups)


def test_base_weights_of_a_peft_model_are_refused_with_modules_to_save() -> None:
    groups = {"pooler": "base_model.model.bert.pooler", "rest": ".*lora.*|.*classifier.*"}
    with pytest.raises(ValueError, match=r"frozen \(requires_grad=False\)\. .*modules_to_save"):
        layer_groups(lora(["classifier"]), groups)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("h.1", "h.1", True),
        ("h.1", "h.1.weight", True),
        ("h.1", "h.10.weight", False),
        ("weight", "h.1.weight", False),
        (r"h\.\d+\..*", "h.10.weight", True),
        (r"h\.\d", "h.1.weight", False),
        (".*bias", "h.1.weight", False),
    ],
)
def test_matches(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


def test_an_invalid_expression_is_named() -> None:
    with pytest.raises(ValueError, match=r"'h\.\(' is neither"):
        matches("h.(", "h.1")
