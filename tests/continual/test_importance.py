"""The importance of weights, against gradients row by row and values found by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from transformers import Trainer

from hf_adapt import adapt
from hf_adapt.continual import (
    MAS,
    SI,
    Consolidation,
    Fisher,
    fisher_diagonal,
    load_importance,
    mas_importance,
    save_importance,
)
from hf_adapt.models.state import preserved_random_state
from tests.helpers.data import collate, rows
from tests.helpers.heads import CASES
from tests.helpers.models import bert, family
from tests.helpers.points import Linear, Point, descent
from tests.helpers.trainers import arguments, same_bits, weights


def test_two_rows_with_opposite_labels_have_information() -> None:
    given = [{"x": [1.0], "labels": 0}, {"x": [1.0], "labels": 1}]
    model = Linear([[0.0], [0.0]])
    for exact in (True, False):
        found = fisher_diagonal(model, given, exact=exact, batch_size=2 if exact else 1)["weight"]
        torch.testing.assert_close(found, torch.full((2, 1), 0.25))


@pytest.mark.parametrize("size", [1, 8, 32])
def test_the_estimate_is_the_true_information_for_any_batch(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=generator)
    model = Linear(torch.randn(3, 4, generator=generator).tolist())
    p = (x @ model.weight.T).softmax(-1).detach()
    true = ((p * (1 - p))[:, :, None] * (x**2)[:, None]).mean(0)
    given = [{"x": row.tolist()} for row in x]
    torch.testing.assert_close(fisher_diagonal(model, given, exact=True)["weight"], true)
    found = [
        fisher_diagonal(model, given, batch_size=size, seed=seed)["weight"]
        for seed in range(30 + size)
    ]
    assert float((torch.stack(found).mean(0) / true).mean()) == pytest.approx(1, abs=0.05)


def test_regressions_and_several_labels() -> None:
    given = [{"x": [2.0, 1.0]}, {"x": [0.0, 3.0]}]
    squares = torch.tensor([2.0, 5.0])
    weight = [[0.5, 0.1], [-0.3, 0.2]]
    values = Linear(weight, problem_type="regression")
    exact = fisher_diagonal(values, given, exact=True)["weight"]
    torch.testing.assert_close(exact, squares.expand(2, 2))  # unit variance: E[(y - f)²] x²
    labels = Linear(weight, problem_type="multi_label_classification")
    exact = fisher_diagonal(labels, given, exact=True)["weight"]
    x = torch.tensor([row["x"] for row in given])
    p = (x @ labels.weight.T).sigmoid().detach()
    true = ((p * (1 - p))[:, :, None] * (x**2)[:, None]).mean(0)
    torch.testing.assert_close(exact, true)
    for model, expected in ((values, squares.expand(2, 2)), (labels, true)):
        found = [fisher_diagonal(model, given, seed=seed)["weight"] for seed in range(200)]
        torch.testing.assert_close(torch.stack(found).mean(0), expected, rtol=0.3, atol=0)


def test_mas_of_a_linear_map() -> None:
    model = Linear([[1.0, 1.0], [0.0, 1.0]])
    found = mas_importance(model, [{"x": [1.0, 2.0]}])["weight"]
    torch.testing.assert_close(found, torch.tensor([[6.0, 12.0], [4.0, 8.0]]))
    # Absolute values row by row: opposite rows do not cancel out.
    both = mas_importance(model, [{"x": [1.0, 2.0]}, {"x": [-1.0, -2.0]}])["weight"]
    torch.testing.assert_close(both, found)
    halved = mas_importance(model, [{"x": [1.0, 2.0]}], normalize="max")["weight"]
    torch.testing.assert_close(halved, found / 12)


def test_tokens_are_items(tmp_path: Path) -> None:
    """Every labelled token of every row, one by one, over all classes."""
    model, given = bert("token"), rows(3, 1, "token")
    found = fisher_diagonal(model, given, collate, exact=True)
    name, total, items = "classifier.weight", 0, 0
    weight = dict(model.named_parameters())[name]
    for row in given:
        inputs = {k: v for k, v in collate([row]).items() if k != "labels"}
        logits = model.eval()(**inputs).logits[0][torch.tensor(row["labels"]) != -100]
        for token in logits.log_softmax(-1):
            items += 1
            for score in token:
                (g,) = torch.autograd.grad(score, weight, retain_graph=True)
                total = total + score.exp().detach() * g**2
    torch.testing.assert_close(found[name], total / items)
    sampled = [fisher_diagonal(model, given, collate, seed=seed)[name] for seed in range(50)]
    assert float(torch.stack(sampled).mean() / found[name].mean()) == pytest.approx(1, abs=0.1)


def test_a_language_model_needs_no_labels() -> None:
    model = family("llama")
    with_labels = fisher_diagonal(model, rows(3, 1, "lm"), collate)
    without = fisher_diagonal(model, rows(3, 1, None), collate)
    assert all(torch.equal(with_labels[name], value) for name, value in without.items())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("find", [fisher_diagonal, mas_importance])
def test_every_head_and_the_model_is_left_as_it_was(case: str, find: Any) -> None:
    model, data = CASES[case].model(0), CASES[case].data(3)
    model.train()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, state = weights(model), torch.get_rng_state()
    found = find(model, data, CASES[case].collate)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert sum(float(value.sum()) for value in found.values()) > 0
    assert same_bits(before, weights(model)) and torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert all(bool((p.grad == 1).all()) for p in model.parameters())
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in found.values())


@pytest.mark.parametrize("merged", ["lora", "lora_llama"])
def test_under_lora_it_is_that_of_the_weights(merged: str) -> None:
    """As of the model with the adapters merged, which has W + ΔW as a weight of its own."""
    model = family(merged)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.5)
    given = rows(4, 1, "lm" if "llama" in merged else "row")
    found = fisher_diagonal(model, given, collate)
    adapted = {name for name in found if ".base_layer." in name}
    assert adapted and not any("lora_" in name for name in found)
    assert not any(p.requires_grad for n, p in model.named_parameters() if n in adapted)
    with preserved_random_state():
        plain = model.merge_and_unload()
    plain.requires_grad_(True)
    whole = fisher_diagonal(plain, given, collate)
    for name in adapted:
        own = name.removeprefix("base_model.model.").replace(".base_layer", "")
        torch.testing.assert_close(found[name], whole[own], rtol=1e-3, atol=1e-9)


def test_dropout_is_off() -> None:
    for find in (fisher_diagonal, mas_importance):
        found = [find(bert(dropout=own), rows(4, 1), collate) for own in (True, False)]
        assert same_bits(*found)


def test_rows_come_in_several_forms() -> None:
    model, data = bert(), rows(6, 1)
    whole = fisher_diagonal(model, data, collate, batch_size=2)
    loader = torch.utils.data.DataLoader(data, 2, collate_fn=collate)
    stream = data.to_iterable_dataset()
    for given, collator in ((list(data), collate), (loader, None), (stream, collate)):
        found = fisher_diagonal(model, given, collator, batch_size=2)
        assert all(torch.equal(found[name], value) for name, value in whole.items())
    some = fisher_diagonal(model, data, collate, max_rows=2)
    assert not torch.equal(some["classifier.bias"], whole["classifier.bias"])


def test_path_integral_of_synaptic_intelligence(tmp_path: Path) -> None:
    """L = (θ - 1)² by gradient descent at 0.01 from 0: ω = 1.0101, Ω = .9183 with ξ = .1."""
    model, consolidation = Point(0.0), Consolidation(SI(normalize=None), save_to=tmp_path / "si")
    trainer = descent(model, tmp_path, 600)
    adapt(trainer, consolidation).train()
    found = load_importance(tmp_path / "si").importance["theta"]
    assert found.item() == pytest.approx(0.9183, abs=1e-4)
    assert found.item() * (1 + 0.1) == pytest.approx(1.0101, abs=1e-4)
    assert "consolidation/penalty" not in trainer.state.log_history[0]  # nothing to keep yet
    end = model.theta.detach().clone()
    with torch.no_grad():
        model.theta.fill_(0.5)
    with pytest.raises(ValueError, match="has seen another model"):
        trainer.train()
    with torch.no_grad():
        model.theta.copy_(end)
    trainer.train()  # the next task, with what the first one has left
    twice = load_importance(tmp_path / "si").importance["theta"]
    assert "consolidation/penalty" in trainer.state.log_history[0] and twice >= found


def test_synaptic_intelligence_sees_the_task_alone(tmp_path: Path) -> None:
    """The penalty's gradient is not in the path; the moves are the actual ones, after clipping."""
    theta, path = 0.5, 0.0
    for _ in range(20):
        g = 2 * (theta - 1)
        whole = g + 3.0 * (theta - 0.5)
        step = -0.01 * whole * min(1.0, 0.1 / (abs(whole) + 1e-6))
        path, theta = path - g * step, theta + step
    model, source = Point(0.5), SI(normalize=None, previous={"theta": torch.tensor([1.0])})
    consolidation = Consolidation(source, 3.0, form="gradient", save_to=tmp_path / "si")
    adapt(descent(model, tmp_path, 20, max_grad_norm=0.1), consolidation).train()
    assert model.theta.item() == pytest.approx(theta, rel=1e-5)
    expected = 1.0 + max(0.0, path) / ((theta - 0.5) ** 2 + 0.1)
    found = load_importance(tmp_path / "si").importance["theta"]
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_a_weight_that_raised_the_loss_gets_no_negative_importance() -> None:
    source, weight = SI(normalize=None), torch.nn.Parameter(torch.zeros(2))
    source.begin({"w": weight})
    weight.grad = torch.tensor([1.0, -1.0])
    source.see_gradients()
    with torch.no_grad():
        weight.add_(0.5)
    source.see_step()
    found = source.finish({"w": torch.zeros(2)}, {})["w"]
    torch.testing.assert_close(found, torch.tensor([0.0, 0.5 / 0.35]))


def test_online_ewc_through_a_folder(tmp_path: Path) -> None:
    model, old, older = bert(), rows(4, 2), rows(4, 3)
    save_importance(tmp_path / "ewc", fisher_diagonal(model, older, collate), model)
    source = Fisher(old, previous=tmp_path / "ewc", decay=0.5, normalize=None)
    trainer = trainer_of(model, tmp_path)
    adapt(trainer, Consolidation(source, save_to=tmp_path / "next"))
    expected = {
        name: value + 0.5 * load_importance(tmp_path / "ewc").importance[name]
        for name, value in fisher_diagonal(model, old, collate).items()
    }
    trainer.train()
    saved = load_importance(tmp_path / "next")
    assert saved.importance.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(saved.importance[name], value)
    assert all(torch.equal(saved.weights[n], p) for n, p in model.named_parameters())


def trainer_of(model: Any, folder: Path, **settings: Any) -> Trainer:
    given = arguments(folder, **settings)
    return Trainer(model, given, train_dataset=rows(12, 1), data_collator=collate)


def test_bad_input(tmp_path: Path) -> None:
    model = bert()
    with pytest.raises(ValueError, match="Fisher has no rows"):
        Fisher([])
    with pytest.raises(TypeError, match=r"MAS=.*expected a dataset"):
        MAS("old.csv")
    with pytest.raises(ValueError, match=r"decay=2 must lie in \[0, 1\]"):
        Fisher(rows(2, 1), decay=2)
    with pytest.raises(ValueError, match="damping=0 must be positive"):
        SI(0)
    with pytest.raises(ValueError, match="normalize='sum' is unknown"):
        fisher_diagonal(model, rows(2, 1), collate, normalize="sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no item to compute it from"):
        fisher_diagonal(model, [], collate)
    with pytest.raises(ValueError, match="predicts tokens, and the rows have no labels"):
        fisher_diagonal(bert("token"), rows(2, 1, None), collate)
    with pytest.raises(ValueError, match=r"exact=True takes one backward.*classes"):
        fisher_diagonal(bert(num_labels=200), rows(2, 1), collate, exact=True)
    with pytest.raises(TypeError, match="rows is a int"):
        fisher_diagonal(model, 3)
    with pytest.raises(FileNotFoundError, match="Pass the folder that Consolidation"):
        load_importance(tmp_path)
    file = tmp_path / "importance.safetensors"
    for content in (b"{}", save({"bert.weight": torch.ones(2)})):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="is no importance"):
            Consolidation(tmp_path)
    for several in ({"a": rows(2, 1)}, [rows(2, 1), rows(2, 2)]):
        with pytest.raises(TypeError, match="of data sets: join them"):
            Fisher(several)
    trainer = trainer_of(bert("token"), tmp_path)
    trainer.train_dataset = rows(12, 1, "token")
    adapt(trainer, Consolidation(Fisher(rows(2, 1, None))))
    with pytest.raises(ValueError, match="predicts tokens, and the rows have no labels"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_tasks_are_added_in_the_units_in_which_they_were_found(tmp_path: Path) -> None:
    """F_1 / its median + F_2 / its median would let the one with the smaller median decide."""
    model, old, older = bert(), rows(4, 2), rows(4, 3)
    adapt(
        trainer_of(model, tmp_path, learning_rate=0.0),
        Consolidation(Fisher(older), save_to=tmp_path / "ewc"),
    ).train()
    source = Fisher(old, previous=tmp_path / "ewc", decay=0.5)
    trainer = trainer_of(model, tmp_path, learning_rate=0.0)
    adapt(trainer, Consolidation(source, save_to=tmp_path / "next")).train()
    both = [fisher_diagonal(model, each, collate) for each in (older, old)]
    found = load_importance(tmp_path / "next")
    for name, value in found.in_own_units.items():
        torch.testing.assert_close(value, 0.5 * both[0][name] + both[1][name], rtol=1e-4, atol=0)
    total = torch.cat([value.flatten() for value in found.importance.values()])
    assert float(total[total > 0].median()) == pytest.approx(1, rel=0.1)


def test_a_frozen_model_has_no_importance() -> None:
    model = bert()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no weight of the model requires a gradient"):
        fisher_diagonal(model, rows(4, 2), collate)
