"""Perturbed embeddings, sharpness and contrast: gradients by hand, and what they leave behind."""

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer

from hf_adapt import MMD, Adaptation, Stream, adapt
from hf_adapt.alignment import (
    FGM,
    JMMD,
    SAM,
    VAT,
    DeepJDOT,
    RDrop,
    SupervisedContrastive,
    mmd_loss,
    supervised_contrastive_loss,
)
from hf_adapt.engine.collating import DOMAIN
from tests.helpers.fake_batch import FakeBatch
from tests.helpers.heads import CASES
from tests.helpers.methods import make_trainer, target
from tests.helpers.models import bert, enlarged
from tests.helpers.trainers import GradientRecorder, arguments, flat_gradient, same_bits, weights


def model() -> Any:
    """Larger weights: with the usual 0.02 a perturbation would change nothing.

    The embedding of padding is not 0, as it is in models that were trained without `padding_idx`.
    """
    made = enlarged(bert(), 5)
    made.get_input_embeddings().weight.data[0] = 0.5
    return made


def one_step(
    folder: Path, adaptations: list[Adaptation], micro: int = 4, steps: int = 1, **settings: Any
) -> tuple[dict[str, Any], torch.Tensor, list[dict[str, torch.Tensor]], Trainer]:
    """The log, the gradient and the micro-batches of an optimizer step that moves nothing."""
    recorder, kept = GradientRecorder(), []
    own = settings.pop("model", None)
    trainer = make_trainer(
        folder,
        adaptations,
        model() if own is None else own,
        callbacks=[recorder],
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=steps,
        max_steps=1,
        max_grad_norm=0,
        learning_rate=0.0,
        **settings,
    )
    step = trainer.training_step

    def keeping(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        tensors = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)}
        kept.append({key: value.clone() for key, value in tensors.items()})
        return step(model, inputs, *args, **kwargs)

    trainer.training_step = keeping
    trainer.train()
    return trainer.state.log_history[0], recorder.gradients[0], kept, trainer


class Direct:
    """The model on a micro-batch, from the embeddings of its words on."""

    def __init__(self, batch: dict[str, torch.Tensor]) -> None:
        self.model, self.domain, self.labels = model(), batch[DOMAIN], batch["labels"]
        self.mask, self.tokens = batch["attention_mask"], batch["input_ids"]

    def embeddings(self) -> torch.Tensor:
        return self.model.get_input_embeddings()(self.tokens)

    def logits(self, embeddings: torch.Tensor) -> torch.Tensor:
        return self.model(inputs_embeds=embeddings, attention_mask=self.mask).logits

    def perturbation(self, direction: torch.Tensor, epsilon: float) -> torch.Tensor:
        """Of each row's real tokens, of norm epsilon times theirs."""
        real = self.mask.unsqueeze(-1)
        own, other = (x.detach() * real for x in (self.embeddings(), direction))
        made = torch.zeros_like(own)
        for i in range(len(own)):
            made[i] = epsilon * own[i].norm() * other[i] / other[i].norm()
        return made

    def task(self) -> torch.Tensor:
        rows = self.domain == 0
        return F.cross_entropy(self.logits(self.embeddings())[rows], self.labels[rows])


def assert_close(one: torch.Tensor, other: torch.Tensor) -> None:
    assert (one - other).norm() / other.norm() < 1e-5


# ---- FGM ----


@pytest.mark.parametrize("forward", ["joint", "separate"])
def test_fgm_is_a_hand_written_loop(forward: Any, tmp_path: Path) -> None:
    stream = Stream(target(), forward=forward)
    log, gradient, (batch,), _ = one_step(
        tmp_path, [FGM(weight=0.7, epsilon=0.3)], target_dataset=stream
    )
    direct = Direct(batch)
    rows = direct.domain == 0
    embeddings = direct.embeddings()
    plain = F.cross_entropy(direct.logits(embeddings)[rows], direct.labels[rows])
    (direction,) = torch.autograd.grad(plain, embeddings, retain_graph=True)
    moved = embeddings[rows] + direct.perturbation(direction, 0.3)[rows]
    direct.mask = direct.mask[rows]
    adversarial = F.cross_entropy(direct.logits(moved), direct.labels[rows])
    (plain + 0.7 * adversarial).backward()
    assert_close(gradient, flat_gradient(direct.model))
    assert log["loss/fgm"] == pytest.approx(adversarial.item(), rel=1e-5)
    assert log["loss/fgm"] > log["loss/task"] + 0.01  # the worst change is worse than none


def frozen_embeddings() -> Any:
    torch.manual_seed(3)
    config = LoraConfig(task_type="SEQ_CLS", r=4, lora_dropout=0.0, init_lora_weights=False)
    return get_peft_model(model(), config)


@pytest.mark.parametrize(
    "settings",
    [
        {"model": frozen_embeddings},
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        },
    ],
    ids=["lora", "checkpointing"],
)
@pytest.mark.parametrize("make", [FGM, VAT])
def test_a_gradient_reaches_embeddings(make: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    """Frozen ones too, and through checkpoints; a random direction would do less harm."""
    own = settings.get("model", model)
    losses = []
    for epsilon in (1e-4, 0.3):
        adaptations = [make(epsilon=epsilon)]
        log, *_ = one_step(tmp_path, adaptations, **{**settings, "model": own()})
        losses.append(log[f"loss/{make.name}"])
    assert losses[1] > losses[0] + 0.01


def test_reentrant_checkpoints_are_refused_with_the_way_out(tmp_path: Path) -> None:
    settings = dict(
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
    )
    with pytest.raises(ValueError, match=r"kwargs=\{'use_reentrant': False\}"):
        one_step(tmp_path, [FGM()], **settings)


# ---- VAT ----


def waves(like: torch.Tensor) -> torch.Tensor:
    """A direction for each row that depends on the row alone, in place of a random one."""
    return torch.cos(100 * like.detach())


def test_vat_is_a_hand_written_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randn_like", waves)
    log, gradient, (batch,), _ = one_step(tmp_path, [VAT(weight=0.7, epsilon=0.3)])
    direct = Direct(batch)
    plain = direct.logits(direct.embeddings()).detach()

    def divergence(perturbation: torch.Tensor) -> torch.Tensor:
        logp = direct.logits(direct.embeddings() + perturbation).log_softmax(-1)
        return (plain.softmax(-1) * (plain.log_softmax(-1) - logp)).sum(-1).mean()

    first = direct.perturbation(waves(direct.embeddings()), 0.03).requires_grad_()
    (direction,) = torch.autograd.grad(divergence(first), first)
    worst = divergence(direct.perturbation(direction, 0.3))
    (direct.task() + 0.7 * worst).backward()
    assert_close(gradient, flat_gradient(direct.model))
    assert log["loss/vat"] == pytest.approx(worst.item(), rel=1e-4)
    random = divergence(direct.perturbation(waves(direct.embeddings()), 0.3))
    assert worst > 2 * random > 0


def test_vat_on_rows_with_a_forward_of_their_own_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "randn_like", waves)
    streams = [Stream(target(), forward=forward) for forward in ("joint", "separate")]
    gradients = [one_step(tmp_path, [VAT()], target_dataset=stream)[1] for stream in streams]
    assert_close(*gradients)


def test_vat_on_eight_micro_batches_of_one_row_is_that_on_one_of_eight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "randn_like", waves)
    gradients = [one_step(tmp_path, [VAT()], *sizes)[1] for sizes in ((1, 8), (8, 1))]
    assert_close(*gradients)


@pytest.mark.parametrize("make", [FGM, VAT])
def test_no_hook_stays(make: Any, tmp_path: Path) -> None:
    *_, trainer = one_step(tmp_path, [make()])
    assert not any(module._forward_hooks for module in trainer.model.modules())


def test_models_without_input_embeddings_are_refused(tmp_path: Path) -> None:
    class Bare(nn.Module):
        config = None

    with pytest.raises(ValueError, match=r"Bare.get_input_embeddings\(\) names none"):
        FGM().setup(SimpleNamespace(model=Bare()))
    for make in (FGM, VAT):
        with pytest.raises(ValueError, match=r"epsilon=0.0 must be positive"):
            make(epsilon=0.0)


# ---- other heads ----


def on_head(folder: Path, head: str, *adaptations: Adaptation) -> dict[str, Any]:
    """The log of a first step with a kind of head."""
    case = CASES[head]
    trainer = Trainer(
        case.model(0),
        arguments(folder, max_steps=1),
        train_dataset=case.data(16),
        data_collator=case.collate,
    )
    adapt(trainer, *adaptations, target_dataset=case.data(9)).train()
    return trainer.state.log_history[0]


@pytest.mark.parametrize("head", ["image", "llama", "masked_lm", "choices"])
def test_a_perturbation_of_patches_tokens_and_choices_hurts(head: str, tmp_path: Path) -> None:
    log = on_head(tmp_path, head, FGM(epsilon=0.1), VAT(epsilon=0.1))
    assert log["loss/fgm"] > log["loss/task"] + 0.01
    assert log["loss/vat"] > 1e-3


@pytest.mark.parametrize("head", ["image", "llama", "seq2seq", "choices"])
def test_sharpness_is_found_on_other_heads(head: str, tmp_path: Path) -> None:
    losses = [
        on_head(tmp_path, head, MMD(weight=1e-6), *others)["loss/task"]
        for others in ([], [SAM(rho=0.005)])
    ]
    assert losses[1] > losses[0]


@pytest.mark.parametrize(
    ("head", "make", "message"),
    [
        ("llama", DeepJDOT, "8 features and 52 predictions. Pass pooling='tokens'"),
        ("choices", JMMD, "16 features and 8 predictions"),
        ("choices", SupervisedContrastive, "items of features.. are choices: they have no labels"),
        ("spans", VAT, "outputs hold no logits"),
        ("seq2seq", RDrop, "the decoder of an encoder-decoder has none"),
    ],
)
def test_what_a_head_cannot_do_is_refused(
    head: str, make: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        on_head(tmp_path, head, make())


# ---- R-Drop ----


def test_rdrop_on_eight_micro_batches_of_one_row_is_that_on_one_of_eight(tmp_path: Path) -> None:
    """With a "dropout" that is the same for all rows: each second forward is a surer one."""

    def uneven() -> Any:
        own, calls = model(), itertools.count()
        own.classifier.register_forward_hook(
            lambda module, args, out: out * 1.5 if module.training and next(calls) % 2 else out
        )
        return own

    runs = [one_step(tmp_path, [RDrop()], *n, model=uneven()) for n in ((1, 8), (8, 1))]
    assert runs[0][0]["loss/rdrop"] == pytest.approx(runs[1][0]["loss/rdrop"], rel=1e-5)
    assert runs[0][0]["loss/rdrop"] > 1e-3
    assert_close(runs[0][1], runs[1][1])


# ---- sharpness-aware minimisation ----


@pytest.mark.parametrize("steps", [1, 2])
def test_sam_is_a_hand_written_loop(steps: int, tmp_path: Path) -> None:
    """The task's loss and MMD at w + e, with e from the task's gradient of each micro-batch."""
    log, gradient, batches, trainer = one_step(
        tmp_path, [MMD(weight=0.5), SAM(rho=0.3)], steps=steps
    )
    expected, plain_losses = [], []
    for batch in batches:
        direct = Direct(batch)
        plain = direct.task()
        plain.backward()
        plain_losses.append(plain.item())
        ascent = [p.grad.clone() for p in direct.model.parameters()]
        norm = torch.stack([g.norm() for g in ascent]).norm()
        with torch.no_grad():
            for parameter, g in zip(direct.model.parameters(), ascent, strict=True):
                parameter.add_(0.3 * g / norm)
        direct.model.zero_grad()
        hidden = direct.model.bert(direct.tokens, attention_mask=direct.mask).last_hidden_state
        real = direct.mask.unsqueeze(-1)
        features = (hidden * real).sum(1) / real.sum(1)
        aligned = mmd_loss(*(features[direct.domain == d] for d in (0, 1)), unbiased=True)
        (direct.task() + 0.5 * aligned).backward()
        expected.append(flat_gradient(direct.model))
    assert_close(gradient, torch.stack(expected).mean(0))
    assert log["loss/task"] > sum(plain_losses) / steps + 0.01
    assert same_bits(weights(trainer.model), weights(model()))
    parameters = [type(p) for p in trainer.model.parameters()]
    assert parameters and set(parameters) == {nn.Parameter}


def test_sam_restores_the_weights_after_an_error(tmp_path: Path) -> None:
    class Failing(MMD):
        def loss(self, batch: Any) -> Any:
            if torch.is_grad_enabled():
                raise RuntimeError("no term today")
            return super().loss(batch)

    own = model()
    with pytest.raises(RuntimeError, match="no term today"):
        one_step(tmp_path, [Failing(), SAM()], model=own)
    assert all(isinstance(p, nn.Parameter) for m in own.modules() for p in m._parameters.values())


def test_sam_leaves_frozen_weights_alone(tmp_path: Path) -> None:
    own = frozen_embeddings()
    before = weights(own)
    log, *_ = one_step(tmp_path, [MMD(), SAM(rho=0.5)], model=own)
    plain, *_ = one_step(tmp_path, [MMD()], model=frozen_embeddings())
    assert log["loss/task"] > plain["loss/task"] + 0.01
    assert same_bits(before, weights(own))


def test_sam_is_refused_where_it_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"rho=0 must be positive"):
        SAM(rho=0)
    sharded = SimpleNamespace(is_fsdp_enabled=False, is_deepspeed_enabled=True)
    with pytest.raises(ValueError, match="perturbs whole weights, and DeepSpeed gives"):
        SAM().setup(sharded)


# ---- supervised contrast ----

FEATURES = torch.tensor(
    [[1.0, 0.2], [0.9, -0.4], [-0.3, 1.0], [0.1, 0.7], [2.0, 2.0]], dtype=torch.float64
)


@pytest.mark.parametrize(("temperature", "expected"), [(0.1, 1.2638284423), (0.5, 0.9252944182)])
def test_contrast_is_pytorch_metric_learnings(temperature: float, expected: float) -> None:
    """pytorch-metric-learning 2.9.0, SupConLoss."""
    labels = torch.tensor([0, 0, 1, 1, 1])
    loss = supervised_contrastive_loss(FEATURES, labels, temperature)
    assert loss.item() == pytest.approx(expected, abs=1e-9)
    inputs = FEATURES.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: supervised_contrastive_loss(x, labels, temperature), (inputs,)
    )


def test_a_row_without_another_of_its_class_is_no_anchor() -> None:
    """It is still among the others; by hand for τ = 1/2."""
    z = F.normalize(FEATURES, dim=1)
    scores = torch.exp(2 * z @ z.T)
    pairs = [(0, 1), (1, 0), (2, 3), (3, 2)]
    rows = [-torch.log(scores[i, j] / (scores[i].sum() - scores[i, i])) for i, j in pairs]
    loss = supervised_contrastive_loss(FEATURES, torch.tensor([0, 0, 1, 1, 2]), 0.5)
    torch.testing.assert_close(loss, torch.stack(rows).mean())


@pytest.mark.parametrize(
    ("features", "labels"),
    [
        (torch.ones(3, 2), [0, 1, 2]),  # no positive pair
        (torch.ones(4, 2), [0, 0, 1, 1]),
        (torch.zeros(2, 2), [0, 0]),
        (torch.full((2, 2), 1e4).half(), [0, 0]),
    ],
)
def test_contrast_stays_finite(features: torch.Tensor, labels: list[int]) -> None:
    features.requires_grad_()
    loss = supervised_contrastive_loss(features, torch.tensor(labels))
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    assert torch.isfinite(features.grad).all()


def test_contrast_is_of_labelled_rows() -> None:
    labels = [0, 1, 0, -100, 1]
    found = SupervisedContrastive(temperature=0.5).loss(FakeBatch(FEATURES, [0] * 5, labels=labels))
    kept = [0, 1, 2, 4]
    expected = supervised_contrastive_loss(FEATURES[kept], torch.tensor([0, 1, 0, 1]), 0.5)
    torch.testing.assert_close(found, expected)
    none = FakeBatch(FEATURES.clone().requires_grad_(), [0] * 5, labels=[-100] * 5)
    assert SupervisedContrastive().loss(none).item() == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: supervised_contrastive_loss(torch.zeros(3, 2), torch.zeros(2)),
            r"expects features \(N, D\) and labels \(N,\), got \(3, 2\) and \(2,\)",
        ),
        (
            lambda: supervised_contrastive_loss(torch.zeros(2, 2), torch.zeros(2), 0.0),
            "temperature=0.0 must be positive",
        ),
        (lambda: SupervisedContrastive(temperature=-1.0), "temperature=-1.0 must be positive"),
        (
            lambda: SupervisedContrastive().loss(
                FakeBatch(FEATURES, [0] * 5, labels=torch.zeros(5, 2))
            ),
            r"one class for each row, and the labels have shape \(5, 2\)",
        ),
    ],
)
def test_contrast_refuses(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
