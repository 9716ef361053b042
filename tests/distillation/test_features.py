"""Feature losses against formulas written out in float64, and in training."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import BertForSequenceClassification

from hf_adapt import DistillationTrainer
from hf_adapt.distillation import AttentionMaps, Contrastive, HiddenStates, SelfAttentionRelations
from hf_adapt.distillation.attention import attention_distance, relation_divergence
from hf_adapt.distillation.contrastive import contrastive_loss
from hf_adapt.distillation.features import layer_pairs
from hf_adapt.distillation.hidden_states import hidden_distance
from hf_adapt.models.attention import attention_projections
from hf_adapt.models.layers import find_stacks
from tests.helpers.data import collate, rows
from tests.helpers.heads import CASES
from tests.helpers.models import bert
from tests.helpers.trainers import (
    GradientRecorder,
    arguments,
    cosine_and_ratio,
    flat_gradient,
    same_bits,
    weights,
)


def vectors(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MASK = torch.tensor([[True, True, True, False], [True, True, False, False]])


@pytest.mark.parametrize("distance", ["mse", "cosine", "pkd"])
def test_hidden_distance(distance: Any) -> None:
    student, teacher = vectors(0, 5, 6).requires_grad_(), vectors(1, 5, 6)
    values = hidden_distance(student, teacher, distance)
    s, t = student, teacher
    cosine = (s * t).sum(-1) / (s.square().sum(-1).sqrt() * t.square().sum(-1).sqrt())
    expected = {
        "mse": ((s - t) ** 2).sum(-1) / 6,
        "cosine": 1 - cosine,
        "pkd": 2 - 2 * cosine,  # of two unit vectors
    }[distance]
    torch.testing.assert_close(values, expected)
    ours = torch.autograd.grad(values.sum(), student, retain_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(expected.sum(), student))
    assert hidden_distance(teacher, teacher, distance).abs().max() < 1e-12


def test_relation_divergence() -> None:
    """MiniLMv2 written out: per row, relation head and query token."""
    student, teacher = vectors(0, 2, 4, 6).requires_grad_(), vectors(1, 2, 4, 9)
    values = relation_divergence(student, teacher, MASK, 3)
    expected = torch.zeros(2, 4, dtype=torch.float64)
    for row in range(2):
        real = int(MASK[row].sum())
        for head in range(3):
            s = student[row, :real, 2 * head : 2 * head + 2]
            t = teacher[row, :real, 3 * head : 3 * head + 3]
            q = (s @ s.T / 2**0.5).softmax(-1)
            p = (t @ t.T / 3**0.5).softmax(-1)
            kl = (p * (p / q).log()).sum(-1) / 3
            expected[row] = expected[row] + F.pad(kl, (0, 4 - real))
    torch.testing.assert_close(values[MASK], expected[MASK])
    ours = torch.autograd.grad(values[MASK].sum(), student, retain_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(expected[MASK].sum(), student))
    with pytest.raises(ValueError, match="4 relation heads do not divide"):
        relation_divergence(student, teacher, MASK, 4)


@pytest.mark.parametrize("distance", ["kl", "mse"])
def test_attention_distance(distance: Any) -> None:
    def maps(seed: int) -> torch.Tensor:
        scores = vectors(seed, 2, 3, 4, 4).masked_fill(~MASK[:, None, None, :], -torch.inf)
        return scores.softmax(-1)

    student, teacher = maps(0), maps(1)
    values = attention_distance(student, teacher, MASK, distance)
    for row in range(2):
        real = int(MASK[row].sum())
        s, t = student[row, :, :real, :real], teacher[row, :, :real, :real]
        expected = (t * (t / s).log()).sum(-1) if distance == "kl" else ((s - t) ** 2).mean(-1)
        torch.testing.assert_close(
            values[row, :real], expected.mean(0), check_dtype=False, rtol=1e-5, atol=1e-6
        )
    with pytest.raises(ValueError, match="needs as many heads"):
        attention_distance(student, teacher[:, :2], MASK, distance)


def test_contrastive_loss() -> None:
    student, teacher = vectors(0, 4, 5), vectors(1, 4, 5)
    values = contrastive_loss(student, teacher, 0.2)
    for i in range(4):
        similarity = [
            float(student[i] @ teacher[j] / (student[i].norm() * teacher[j].norm())) / 0.2
            for j in range(4)
        ]
        expected = -similarity[i] + torch.tensor(similarity, dtype=torch.float64).logsumexp(0)
        assert values[i].item() == pytest.approx(expected.item())


def test_layer_maps() -> None:
    assert layer_pairs("uniform", 6, 12) == [(i, 2 * i + 1) for i in range(6)]
    assert layer_pairs("last", 3, 12) == [(0, 9), (1, 10), (2, 11)]
    assert layer_pairs([(0, 3), (-1, -1)], 2, 6) == [(0, 3), (1, 5)]
    with pytest.raises(ValueError, match=r"layer 6 of the teacher, which has layers 0 to 5"):
        layer_pairs({0: 6}, 2, 6)
    with pytest.raises(ValueError, match=r"layer 2 of the student"):
        layer_pairs({2: 1}, 2, 6)
    with pytest.raises(ValueError, match="the student has 6 layers and the teacher only 2"):
        layer_pairs("last", 6, 2)
    with pytest.raises(ValueError, match="'skip' is unknown"):
        layer_pairs("skip", 2, 6)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="empty"):
        layer_pairs({}, 2, 6)


def small_and_large(eager: bool = False) -> tuple[Any, Any]:
    """A student of two layers of 16 and a teacher of four layers of 24."""
    kind = {"attn_implementation": "eager"} if eager else {}
    heads = dict(num_attention_heads=2)
    return (
        bert(seed=0, **heads, **kind),
        bert(seed=1, hidden_size=24, num_hidden_layers=4, **heads, **kind),
    )


def features() -> list[Any]:
    return [
        HiddenStates(weight=0.3, layers="uniform"),
        HiddenStates(weight=0.5, distance="cosine", layers="last", project=True, name="cosine"),
        SelfAttentionRelations(num_heads=4),
        AttentionMaps(),
    ]


def run(folder: Path, size: int, steps: int, given: list[Any], **options: Any) -> Any:
    student, teacher = small_and_large(eager=True)
    recorder = GradientRecorder()
    trainer = DistillationTrainer(
        model=student,
        teacher=teacher,
        args=arguments(
            folder,
            **{
                "per_device_train_batch_size": size,
                "gradient_accumulation_steps": steps,
                "max_grad_norm": 0.0,
                **options,
            },
        ),
        train_dataset=rows(8, 1),
        data_collator=collate,
        features=given,
        callbacks=[recorder],
    )
    trainer.train()
    trainer.gradients = recorder.gradients
    return trainer


def test_features_are_exact_under_accumulation_and_logged(tmp_path: Path) -> None:
    whole, cut = run(tmp_path, 8, 1, features()), run(tmp_path, 1, 8, features())
    for one, other in zip(whole.gradients, cut.gradients, strict=True):
        assert cosine_and_ratio(one, other) == pytest.approx((1.0, 1.0), abs=1e-4)
    for a, b in zip(whole.state.log_history[:3], cut.state.log_history[:3], strict=True):
        for name in ("logits", "hidden_states", "cosine", "relations", "attention_maps"):
            assert a[f"distillation/{name}"] == pytest.approx(b[f"distillation/{name}"], rel=1e-3)
            assert a[f"distillation/{name}"] > 0
        total = sum(a[f"distillation/{n}"] for n in ("logits", *[f.name for f in features()]))
        assert a["loss/distillation"] == pytest.approx(total, rel=1e-4)


def test_hidden_states_are_those_of_a_loop_written_by_hand(tmp_path: Path) -> None:
    loss = HiddenStates(layers=[(0, 1), (1, 3)], layer_weights=[1.0, 3.0])
    trainer = run(tmp_path, 8, 1, [loss], max_steps=1)
    projections = trainer.distillation.module["hidden_states"]
    student, teacher = small_and_large(eager=True)
    batch = collate(list(rows(8, 1)))
    torch.manual_seed(3)
    # The projections were built before the step; one step of AdamW has moved them.
    from hf_adapt.engine.auxiliary import seed_for
    from hf_adapt.models.state import preserved_random_state

    with preserved_random_state(seed_for("distillation", 42)):
        start = [torch.nn.Linear(16, 24, bias=False) for _ in range(2)]
    assert [p.weight.shape for p in projections] == [p.weight.shape for p in start]
    own = student(**batch, output_hidden_states=True)
    with torch.no_grad():
        theirs = teacher.eval()(**batch, output_hidden_states=True)
    mask = batch["attention_mask"].bool()
    term = F.kl_div(
        (own.logits / 2).log_softmax(-1), (theirs.logits / 2).softmax(-1), reduction="batchmean"
    )
    total = 0.5 * own.loss + 0.5 * 4 * term
    for index, (s, t, weight) in enumerate([(1, 2, 1.0), (2, 4, 3.0)]):
        difference = start[index](own.hidden_states[s][mask]) - theirs.hidden_states[t][mask]
        total = total + 0.5 * weight * difference.square().mean() / 2
    total.backward()
    assert cosine_and_ratio(trainer.gradients[0], flat_gradient(student)) == pytest.approx(
        (1.0, 1.0), abs=1e-5
    )


def test_sdpa_stays_on_for_relations(tmp_path: Path) -> None:
    student, teacher = small_and_large()
    assert student.config._attn_implementation == "sdpa"
    trainer = DistillationTrainer(
        model=student,
        teacher=teacher,
        args=arguments(tmp_path),
        train_dataset=rows(8, 1),
        data_collator=collate,
        features=[SelfAttentionRelations(num_heads=2)],
        logits_weight=0.0,
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["distillation/relations"] > 0
    assert "distillation/logits" not in log
    with pytest.raises(ValueError, match="attn_implementation='sdpa' of the student"):
        DistillationTrainer(
            model=small_and_large()[0],
            teacher=teacher,
            args=arguments(tmp_path),
            train_dataset=rows(8, 1),
            data_collator=collate,
            features=[AttentionMaps()],
        ).train()


def test_checkpointed_layers_are_seen(tmp_path: Path) -> None:
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    plain = run(tmp_path, 8, 1, features())
    saving = run(tmp_path, 8, 1, features(), gradient_checkpointing=True, **options)
    for one, other in zip(plain.gradients, saving.gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_features_beside_losses_without_whole_logits(tmp_path: Path) -> None:
    case, found = CASES["llama"], []
    for chunked in (True, False):
        recorder = GradientRecorder()
        trainer = DistillationTrainer(
            model=case.model(0),
            teacher=case.model(1),
            args=arguments(tmp_path, max_grad_norm=0.0, gradient_accumulation_steps=2),
            train_dataset=case.data(24),
            data_collator=case.collate,
            features=[HiddenStates(), SelfAttentionRelations(num_heads=2)],
            logits_weight=0.7,
            chunked=chunked,
            callbacks=[recorder],
        )
        trainer.train()
        log = trainer.state.log_history[0]
        parts = [f"distillation/{name}" for name in ("logits", "hidden_states", "relations")]
        assert log["loss/distillation"] == pytest.approx(sum(log[p] for p in parts), rel=1e-3)
        found.append((recorder.gradients[0], log["loss/distillation"]))
    (one, a), (other, b) = found
    assert cosine_and_ratio(one, other) == pytest.approx((1.0, 1.0), abs=1e-4)
    assert a == pytest.approx(b, rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "seq2seq", "image"])
def test_features_on_other_architectures(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    given: list[Any] = [HiddenStates(), Contrastive(dimension=4)]
    given.append(SelfAttentionRelations(num_heads=2))
    trainer = DistillationTrainer(
        model=case.model(0),
        teacher=case.model(1),
        args=arguments(tmp_path),
        train_dataset=case.data(12),
        data_collator=case.collate,
        features=given,
    )
    trainer.train()
    log = trainer.state.log_history[0]
    for feature in given:
        assert 0 < log[f"distillation/{feature.name}"] < float("inf")


def test_a_decoder_may_be_named(tmp_path: Path) -> None:
    case = CASES["seq2seq"]

    def make(feature: HiddenStates) -> DistillationTrainer:
        return DistillationTrainer(
            model=case.model(0),
            teacher=case.model(1),
            args=arguments(tmp_path),
            train_dataset=case.data(12),
            data_collator=case.collate,
            features=[feature],
        )

    trainer = make(HiddenStates(tower="decoder"))
    trainer.train()
    assert trainer.state.log_history[0]["distillation/hidden_states"] > 0
    with pytest.raises(ValueError, match=r"tower='middle' is not in T5.*'encoder', 'decoder'"):
        make(HiddenStates(tower="middle")).train()


def test_projections_are_stored_beside_the_model_and_resume(tmp_path: Path) -> None:
    def make(folder: Path) -> DistillationTrainer:
        student, teacher = small_and_large()
        return DistillationTrainer(
            model=student,
            teacher=teacher,
            args=arguments(folder, max_steps=4, save_strategy="steps", save_steps=2),
            train_dataset=rows(40, 1),
            data_collator=collate,
            features=[HiddenStates(), Contrastive()],
        )

    whole = make(tmp_path / "whole")
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / "adaptation.safetensors").exists()
    resumed = make(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert same_bits(weights(whole.model), weights(resumed.model))
    assert same_bits(
        weights(whole.distillation.module),  # type: ignore[arg-type]
        weights(resumed.distillation.module),  # type: ignore[arg-type]
    )
    _, info = BertForSequenceClassification.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_a_student_learns_its_teachers_hidden_states(tmp_path: Path) -> None:
    student, teacher = small_and_large()
    trainer = DistillationTrainer(
        model=student,
        teacher=teacher,
        args=arguments(tmp_path, max_steps=60, learning_rate=5e-3, logging_steps=20),
        train_dataset=rows(8, 1),
        data_collator=collate,
        features=[HiddenStates(layers="last")],
    )
    trainer.distillation.learning_rate = 1e-2
    trainer.train()
    values = [entry["distillation/hidden_states"] for entry in trainer.state.log_history[:3]]
    assert values[-1] < 0.7 * values[0]


def test_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    student, teacher = small_and_large()

    def make(**options: Any) -> DistillationTrainer:
        return DistillationTrainer(
            model=student,
            args=arguments(tmp_path),
            train_dataset=rows(8, 1),
            data_collator=collate,
            **{"teacher": teacher, **options},
        )

    with pytest.raises(ValueError, match="2 layer_weights for 1 pairs"):
        make(features=[HiddenStates(layers={0: 0}, layer_weights=[1.0, 1.0])]).train()
    with pytest.raises(ValueError, match="give each a name="):
        make(features=[HiddenStates(), HiddenStates()])
    with pytest.raises(ValueError, match="need one teacher, not a list of 2"):
        make(teacher=[teacher, teacher], features=[HiddenStates()])
    with pytest.raises(ValueError, match="needs a teacher with layers; CallableTeacher"):
        make(teacher=lambda inputs: inputs, features=[HiddenStates()]).train()
    with pytest.raises(ValueError, match="weights must be finite numbers"):
        HiddenStates(weight=-1.0)
    with pytest.raises(ValueError, match="'l1' is unknown"):
        HiddenStates(distance="l1")  # type: ignore[arg-type]


def test_one_relation_of_a_joint_projection_is_that_part_alone() -> None:
    layer = CASES["gpt2"].model(0).transformer.h[0]
    output = vectors(0, 1, 3, 48)
    for index, name in enumerate(("query", "key", "value")):
        ((_, extract),) = SelfAttentionRelations(relations=[name]).captures(layer).items()
        assert extract is not None
        assert torch.equal(extract(output)[0], output[..., 16 * index : 16 * index + 16])


@pytest.mark.parametrize("name", ["sequence", "llama", "gpt2", "seq2seq", "image"])
def test_projections_are_found(name: str) -> None:
    model = CASES[name].model(0)
    stack = find_stacks(model)[0]
    layer = dict(model.named_modules())[stack.layers[0]]
    found = attention_projections(layer, ("query", "key", "value"))
    assert len(found) == (1 if name == "gpt2" else 3)
    with pytest.raises(ValueError, match="cannot be derived from"):
        attention_projections(torch.nn.Linear(2, 2), ("query",))
