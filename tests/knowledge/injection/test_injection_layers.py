"""The forms against formulas written out for one mention at a time."""

import math
from typing import Any

import pytest
import torch

from hf_adapt.knowledge.injection.injection_layers import (
    CrossAttention,
    GatedAddition,
    InjectionLayer,
    KnowledgeAdapter,
    LayerSizes,
    RelationalAggregation,
    size_of,
)
from hf_adapt.knowledge.injection.inputs import Knowledge, knowledge_of
from tests.helpers.injectors import DIMENSION, RELATIONS, built, disturb, knowledge

HIDDEN, INNER, LENGTH, ROWS = 16, 8, 10, 3


def world() -> tuple[torch.Tensor, Knowledge]:
    """Hidden states and mentions; the second row has none."""
    torch.manual_seed(0)
    found = knowledge_of(knowledge(ROWS))
    assert found is not None and found.neighbours is not None
    return torch.randn(ROWS, LENGTH, HIDDEN), found


def made(kind: type[InjectionLayer], neighbours: bool = True, **options: Any) -> Any:
    """A form whose weights are all random."""
    torch.manual_seed(1)
    form = kind(LayerSizes(HIDDEN, DIMENSION, INNER, 2 * RELATIONS * neighbours), **options)
    with torch.no_grad():
        for parameter in form.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return form


def normed(form: Any, vector: torch.Tensor) -> torch.Tensor:
    centred = vector - vector.mean()
    spread = (centred.square().mean() + form.norm.eps).sqrt()
    return form.norm.weight * centred / spread + form.norm.bias


def neighbours_of(known: Knowledge, place: tuple[int, int, int]) -> list[tuple[int, torch.Tensor]]:
    """Relation and vector of each neighbour that there is."""
    assert known.relations is not None and known.neighbours is not None
    pairs = zip(known.relations[place].tolist(), known.neighbours[place], strict=True)
    return [(relation, vector) for relation, vector in pairs if relation >= 0]


def entity(form: Any, known: Knowledge, row: int, mention: int) -> torch.Tensor:
    """The candidates' mean by their priors, with their neighbours' message."""
    total = torch.zeros(DIMENSION)
    for k, candidate in enumerate(known.entities[row, mention].tolist()):
        if candidate < 0:
            continue
        vector = known.vectors[row, mention, k]
        near = neighbours_of(known, (row, mention, k))
        if form.aggregation is not None and near:
            said = sum(form.aggregation.relation.weight[r] * v for r, v in near) / len(near)
            vector = vector + form.aggregation.output.weight @ said
        total = total + known.priors[row, mention, k] * normed(form, vector)
    return total


def each_mention(known: Knowledge) -> list[tuple[int, int, int, int]]:
    spans = known.spans.tolist()
    return [
        (row, number, start, end)
        for row, own in enumerate(spans)
        for number, (start, end) in enumerate(own)
        if end > start
    ]


def gated(form: Any, query: torch.Tensor, known: Knowledge, row: int, n: int) -> torch.Tensor:
    value = form.value.weight @ entity(form, known, row, n) + form.value.bias
    score = form.gate.weight @ torch.cat([query, value]) + form.gate.bias
    return value / (1 + (-score).exp())


def attended(form: Any, query: torch.Tensor, known: Knowledge, row: int, n: int) -> torch.Tensor:
    slots: list[tuple[torch.Tensor, float]] = []
    for k, candidate in enumerate(known.entities[row, n].tolist()):
        if candidate < 0:
            continue
        prior = float(known.priors[row, n, k])
        slots.append((normed(form, known.vectors[row, n, k]), prior))
        near = neighbours_of(known, (row, n, k)) if form.aggregation is not None else []
        for relation, vector in near:
            said = form.aggregation.relation.weight[relation] * vector
            slots.append((normed(form, said), prior / len(near)))
    asked = form.query.weight @ query + form.query.bias
    size = INNER // form.num_heads
    heads = []
    for head in range(form.num_heads):
        own = slice(head * size, (head + 1) * size)
        weights = [math.exp(float(asked[own] @ form.sentinel[own]) / math.sqrt(size))]
        values = [torch.zeros(size)]
        for vector, prior in slots:
            key = (form.key.weight @ vector + form.key.bias)[own]
            weights.append(prior * math.exp(float(asked[own] @ key) / math.sqrt(size)))
            values.append((form.value.weight @ vector + form.value.bias)[own])
        heads.append(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))
    return torch.cat(heads)


@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize(
    ("kind", "formula", "options"),
    [(GatedAddition, gated, {}), (CrossAttention, attended, {"num_heads": 2})],
)
def test_what_is_added_at_a_mention(
    kind: type[InjectionLayer], formula: Any, options: dict[str, Any], neighbours: bool
) -> None:
    hidden, known = world()
    form = made(kind, neighbours, **options)
    expected = torch.zeros_like(hidden)
    with torch.no_grad():
        for row, number, start, end in each_mention(known):
            query = hidden[row, start:end].mean(0)
            value = form.output.weight @ formula(form, query, known, row, number)
            expected[row, start:end] += value
        torch.testing.assert_close(form(hidden, known), expected)
        assert expected.abs().sum() > 0 and not expected[1].any()

        # Where a point has one vector a row, its mentions' mean is added.
        rows = torch.zeros(ROWS, HIDDEN)
        for row, number, _, _ in each_mention(known):
            own = formula(form, hidden[row, 0], known, row, number)
            rows[row] += form.output.weight @ own / 2
        torch.testing.assert_close(form.row_values(hidden[:, 0], known), rows)


def test_an_adapter_reads_the_row() -> None:
    hidden, known = world()
    form = made(KnowledgeAdapter)
    expected = torch.zeros_like(hidden)
    with torch.no_grad():
        for row in range(ROWS):
            inner = hidden[row] @ form.down.weight.T + form.down.bias
            for own, number, start, end in each_mention(known):
                if own == row:
                    value = form.value.weight @ entity(form, known, row, number) + form.value.bias
                    inner[start:end] += value
            if row != 1:  # which has no mention
                read = form.layers[0](inner.unsqueeze(0)).squeeze(0)
                expected[row] = read @ form.output.weight.T
        torch.testing.assert_close(form(hidden, known), expected)


def test_messages_of_neighbours_start_without_effect() -> None:
    _, known = world()
    aggregation = RelationalAggregation(DIMENSION, 2 * RELATIONS)
    assert torch.equal(aggregation(known), known.vectors)


@pytest.mark.parametrize("form", ["gated", "cross_attention", "adapter"])
@pytest.mark.parametrize("kind", ["output", "row_head"])
def test_it_works_in_units_of_the_hidden_states(form: str, kind: Any) -> None:
    hidden, known = world()
    injector = built("bert", ["embeddings"], form, num_neighbours=2)
    disturb(injector)
    hidden = hidden.float() if kind == "output" else hidden[:, 0].float()
    hidden[0, ..., 0] = 3.0
    with torch.no_grad():
        added = injector.inject(0, kind, hidden, known) - hidden
        thousandth = injector.inject(0, kind, hidden / 1000, known) - hidden / 1000
    torch.testing.assert_close(1000 * thousandth, added, rtol=1e-3, atol=1e-3)
    assert added.norm() > 1


def test_a_hidden_state_of_zeros_has_gradients() -> None:
    _, known = world()
    injector = built("bert", ["embeddings"], "gated")
    disturb(injector)
    hidden = torch.zeros(ROWS, LENGTH, HIDDEN, requires_grad=True)
    injector.inject(0, "output", hidden, known).sum().backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all()
    assert size_of(torch.zeros(2, 4)).tolist() == [[0.0], [0.0]]
