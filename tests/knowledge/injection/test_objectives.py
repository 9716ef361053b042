"""The auxiliary losses: their value, exactness, and that they learn."""

import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_adapt import adapt
from hf_adapt.engine.collating import AdaptationCollator
from hf_adapt.knowledge import (
    DescriptionAlignment,
    EntityPrediction,
    KnowledgeGraph,
    KnowledgeInjection,
    KnowledgeInjector,
    LinkPrediction,
    TextTriples,
)
from hf_adapt.knowledge.injection.objectives import entity_scores_loss
from hf_adapt.models.hashing import row_hash
from tests.helpers import toy
from tests.helpers.injectors import injection, trainer
from tests.helpers.trainers import GradientRecorder, StopAt, cosine_and_ratio, same_bits, weights

KINDS = (EntityPrediction, LinkPrediction, DescriptionAlignment)


def objective(kind: Any, own: KnowledgeInjection, **options: Any) -> Any:
    if kind is EntityPrediction:
        options["mask_rate"] = 0.5
    return kind(own, weight=0.5, num_negatives=4, **options)


def test_the_loss_is_a_cross_entropy() -> None:
    torch.manual_seed(0)
    predicted, positive, negatives = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 2, 4)
    expected = []
    for n in range(3):
        vectors = [positive[n], *negatives[n]]
        scores = [float(predicted[n] @ v) / math.sqrt(4) for v in vectors]
        expected.append(math.log(sum(math.exp(s) for s in scores)) - scores[0])
    found = entity_scores_loss(predicted, positive, negatives)
    torch.testing.assert_close(found, torch.tensor(expected))
    double = [t.double().requires_grad_() for t in (predicted, positive, negatives)]
    assert torch.autograd.gradcheck(entity_scores_loss, double)


@pytest.mark.parametrize("kind", KINDS)
def test_exact_under_accumulation(kind: Any, tmp_path: Path) -> None:
    found, terms = [], []
    for rows, steps in ((8, 1), (1, 8)):
        one = trainer(
            tmp_path,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=steps,
            max_grad_norm=0.0,
        )
        own = injection()
        recorder = GradientRecorder()
        one.add_callback(recorder)
        added = objective(kind, own)
        adapt(one, own, added).train()
        found.append(recorder.gradients[-1])
        terms.append([log[f"loss/{added.name}"] for log in one.state.log_history[:3]])
    cosine, ratio = cosine_and_ratio(*found)
    assert cosine == pytest.approx(1, abs=1e-4) and ratio == pytest.approx(1, abs=1e-3)
    assert terms[0] == pytest.approx(terms[1], rel=1e-3) and terms[0][0] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_bit_exact(kind: Any, tmp_path: Path) -> None:
    def run(folder: Path, stop: bool = False, **more: Any) -> Any:
        one = trainer(folder, save_strategy="steps", save_steps=2, max_steps=4)
        own = injection()
        added = objective(kind, own)
        if stop:
            one.add_callback(StopAt(3))
        adapt(one, own, added).train(**more)
        return weights(one.model), weights(own.module), weights(added.module)

    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", stop=True)
    resumed = run(
        tmp_path / "parts", resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2")
    )
    assert all(same_bits(a, b) for a, b in zip(whole, resumed, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_what_it_should(kind: Any, tmp_path: Path) -> None:
    one = trainer(tmp_path, max_steps=60, learning_rate=3e-3, per_device_train_batch_size=8)
    own = injection(learning_rate=3e-3)
    added = objective(kind, own)
    added.learning_rate = 3e-2
    adapt(one, own, added).train()
    values = [log[f"loss/{added.name}"] for log in one.state.log_history[:-1]]
    assert sum(values[-5:]) < 0.75 * sum(values[:5])


def test_masked_mentions_are_a_function_of_the_row(tmp_path: Path) -> None:
    one = trainer(tmp_path)
    own = injection()
    adapt(one, own, objective(EntityPrediction, own)).train()
    attachment = own.attachment
    assert attachment is not None and attachment.mask_rate == 0.5
    from hf_adapt.knowledge.injection.inputs import knowledge_of

    batch = own._batcher.encode([" ".join(t.split()) for t in toy.sentences(200, 3)])
    known = knowledge_of(batch)
    assert known is not None
    chosen = attachment.masked_mentions(known, batch["input_ids"], batch["attention_mask"])
    there = known.entities[..., 0] >= 0
    assert 0.4 < float(chosen.sum() / there.sum()) < 0.6 and not bool((chosen & ~there).any())
    attachment.mask_seed = attachment.mask_seed + 1
    other = attachment.masked_mentions(known, batch["input_ids"], batch["attention_mask"])
    assert not torch.equal(chosen, other)
    attachment.mask_seed = attachment.mask_seed - 1
    ids = torch.nn.functional.pad(batch["input_ids"], (3, 0))
    mask = torch.nn.functional.pad(batch["attention_mask"], (3, 0))
    assert torch.equal(row_hash(ids, mask), row_hash(batch["input_ids"], batch["attention_mask"]))
    left = known.without(chosen)
    assert not bool((left.entities[chosen] >= 0).any()) and not left.priors[chosen].any()


def test_a_collator_travels_to_workers(tmp_path: Path) -> None:
    one = trainer(tmp_path)
    own = injection()
    added = [objective(kind, own) for kind in KINDS]
    adapt(one, own, *added).train()
    rows = [dict(row) for row in toy.rows(3, 1)]
    collator = AdaptationCollator(toy.collator(), (), (own, *added))
    there = pickle.loads(pickle.dumps(collator))
    here = collator([dict(row) for row in rows])
    for name, value in there([dict(row) for row in rows]).items():
        assert torch.equal(value, here[name]), name
    assert len(pickle.dumps(collator)) < 200_000


def test_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_neighbours=1"):
        LinkPrediction(injection(injector=KnowledgeInjector()))
    with pytest.raises(ValueError, match="mask_rate=0"):
        EntityPrediction(injection(), mask_rate=0)
    with pytest.raises(ValueError, match="num_negatives=0"):
        EntityPrediction(injection(), num_negatives=0)
    own = injection()
    EntityPrediction(own, mask_rate=0.2)
    with pytest.raises(ValueError, match="is masked already"):
        EntityPrediction(own, mask_rate=0.3)
    with pytest.raises(ValueError, match="has none"):
        EntityPrediction(TextTriples(toy.graph()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="No entity of the graph has a description"):
        DescriptionAlignment(KnowledgeInjection(KnowledgeGraph.from_triples([("aa", "b", "cc")])))
    own = injection()
    with pytest.raises(ValueError, match="in the same run, before it"):
        adapt(trainer(tmp_path), EntityPrediction(own)).train()
