"""DANN: the loss against an independent formula, the reversal's sign, and what λ does."""

import logging
import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.gradcheck import GradcheckError

from hf_adapt import DANN, DomainAdversarialCallback
from hf_adapt.alignment import CDAN, DomainDiscriminator, dann_loss, reverse_gradient
from hf_adapt.alignment import dann as dann_module
from hf_adapt.engine.progress import linear_ramp
from tests.helpers.fake_batch import FakeBatch
from tests.helpers.methods import make_trainer, target
from tests.helpers.models import bert

# ---- dann_loss ----


def test_loss_of_a_constant_discriminator_is_ln_2():
    loss = dann_loss(torch.full((5, 2), 3.7), torch.tensor([0, 1, 1, 0, 1]))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)


def test_two_domains_equal_the_logistic_loss_of_the_paper():
    """Eq. 9 of Ganin et al. in numpy, on the difference of the scores; value and gradient."""
    torch.manual_seed(0)
    logits = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)
    domain = torch.tensor([0, 1, 1, 0, 1, 0, 0])
    loss = dann_loss(logits, domain)
    loss.backward()

    score = (logits[:, 1] - logits[:, 0]).detach().numpy()
    probability, d = 1 / (1 + np.exp(-score)), domain.numpy()
    expected = -(d * np.log(probability) + (1 - d) * np.log(1 - probability)).mean()
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    slope = (probability - d) / len(d)
    np.testing.assert_allclose(logits.grad.numpy(), np.stack([-slope, slope], 1), atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_several_domains(reduction):
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 0.0], [3.0, -1.0, 1.0]])
    domain = torch.tensor([2, 1, 0])
    scores = logits.double().numpy()
    rows = np.log(np.exp(scores).sum(1)) - scores[np.arange(3), domain.numpy()]
    expected = {"mean": rows.mean(), "sum": rows.sum(), "none": rows}[reduction]
    np.testing.assert_allclose(dann_loss(logits, domain, reduction).numpy(), expected, rtol=1e-6)


def test_loss_is_computed_in_float32_at_least():
    domain = torch.tensor([0, 1])
    assert dann_loss(torch.zeros(2, 2, dtype=torch.bfloat16), domain).dtype == torch.float32
    assert dann_loss(torch.zeros(2, 2, dtype=torch.float64), domain).dtype == torch.float64
    # exp(3e4) has no float16; the loss of a sure and right discriminator is 0, not NaN.
    sure = torch.tensor([[3e4, -3e4]], dtype=torch.float16)
    assert dann_loss(sure, torch.tensor([0])).item() == 0


@pytest.mark.parametrize(
    ("logits", "domain"), [((4,), (4,)), ((4, 2), (3,)), ((4, 2), (4, 1)), ((2, 4, 2), (2,))]
)
def test_loss_refuses_shapes_that_do_not_fit(logits, domain):
    with pytest.raises(ValueError, match=r"expects logits \(N, K\) and domain \(N,\), got"):
        dann_loss(torch.zeros(logits), torch.zeros(domain, dtype=torch.long))


def test_loss_refuses_one_domain():
    """A softmax over one logit is the constant 1: no gradient would ever flow (skada 0.6)."""
    with pytest.raises(ValueError, match="at least two domains"):
        dann_loss(torch.zeros(4, 1), torch.zeros(4, dtype=torch.long))


# ---- reverse_gradient ----


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_reversal_is_the_identity_with_the_gradient_times_minus_scale(scale):
    torch.manual_seed(0)
    x, upstream = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    out = reverse_gradient(x, scale)
    assert torch.equal(out, x)
    out.backward(upstream)
    assert torch.equal(x.grad, -scale * upstream)


def test_reversal_passes_a_gradcheck_with_the_flipped_sign():
    torch.manual_seed(0)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def model(x):
        return (torch.sin(x) * x**2).sum(0)

    assert torch.autograd.gradcheck(model, (x,))
    with pytest.raises(GradcheckError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(lambda x: model(reverse_gradient(x, 1.0)), (x,))
    plain = torch.autograd.functional.jacobian(model, x)
    flipped = torch.autograd.functional.jacobian(lambda x: model(reverse_gradient(x, 0.7)), x)
    torch.testing.assert_close(flipped, -0.7 * plain)


def test_scale_0_cuts_the_graph_for_the_model_but_not_for_the_discriminator():
    features = torch.randn(4, 3, requires_grad=True)
    discriminator = DomainDiscriminator(3, 2, (5,))
    reversed_ = reverse_gradient(features, 0)
    assert torch.equal(reversed_, features) and not reversed_.requires_grad
    dann_loss(discriminator(reversed_), torch.tensor([0, 0, 1, 1])).backward()
    assert features.grad is None
    assert all(p.grad is not None for p in discriminator.parameters())


# ---- DomainDiscriminator ----


@pytest.mark.parametrize("hidden_sizes", [(), (16,), (16, 7)])
def test_discriminator_has_the_sizes_it_was_given(hidden_sizes):
    discriminator = DomainDiscriminator(8, 3, hidden_sizes, dropout=0.25)
    linear = [module for module in discriminator if isinstance(module, nn.Linear)]
    sizes = [8, *hidden_sizes, 3]
    assert [(m.in_features, m.out_features) for m in linear] == list(pairwise(sizes))
    dropout = [module.p for module in discriminator if isinstance(module, nn.Dropout)]
    assert dropout == [0.25] * len(hidden_sizes)
    assert discriminator(torch.zeros(5, 8)).shape == (5, 3)


def test_discriminator_can_learn():
    """Its output depends on the input, and every parameter gets a gradient that is not 0."""
    torch.manual_seed(0)
    discriminator, features = DomainDiscriminator(8, 2, (32,)), torch.randn(16, 8)
    logits = discriminator(features)
    assert (logits.std(0) > 1e-3).all()
    assert isinstance(discriminator[-1], nn.Linear)  # logits, not probabilities
    dann_loss(logits, torch.arange(16) % 2).backward()
    for name, parameter in discriminator.named_parameters():
        assert parameter.grad.abs().max() > 0, name


# ---- DANN ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": -1.0}, r"DANN\(weight=-1.0\).*finite number >= 0"),
        ({"weight": float("nan")}, "finite number >= 0"),
        ({"weight": float("inf")}, "finite number >= 0"),
        ({"hidden_sizes": (8, 0)}, r"hidden_sizes=\(8, 0\): every size must be positive"),
        ({"dropout": 1.0}, r"dropout=1.0 must lie in \[0, 1\)"),
        ({"dropout": -0.1}, "dropout=-0.1 must lie in"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be positive"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be positive"),
    ],
)
def test_dann_refuses_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DANN(**arguments)
    with pytest.raises(ValueError, match=message):
        DomainAdversarialCallback(**arguments)


@pytest.mark.parametrize(
    ("progress", "value"),
    [(0.0, 0.0), (0.1, 0.462117), (0.25, 0.848284), (0.5, 0.986614), (1.0, 0.999909)],
)
def test_lambda_follows_the_paper(progress, value):
    assert DANN(weight=1.0).lambda_at(progress) == pytest.approx(value, abs=1e-6)
    assert DANN().lambda_at(progress) == pytest.approx(value / 10, abs=1e-6)
    assert DANN(weight=0.5).lambda_at(progress) == pytest.approx(value / 2, abs=1e-6)


def test_lambda_is_weight_times_ramp():
    assert DANN(weight=0.3, ramp=None).lambda_at(0.0) == 0.3
    both = DANN(weight=lambda p: 1 - p, ramp=linear_ramp(end_progress=0.5))
    assert both.lambda_at(0.25) == pytest.approx(0.75 * 0.5)
    # λ acts in the reversal; the discriminator's own loss is never scaled.
    assert DANN(weight=0.3).term_weight(0.0) == DANN(weight=0.3).term_weight(1.0) == 1.0


def test_weight_0_is_inactive_and_a_schedule_is_active():
    assert not DANN(weight=0).is_active
    assert DANN(weight=lambda p: 0.0).is_active and DANN().is_active


def test_loss_is_a_sum_over_the_features_and_reverses_by_lambda():
    torch.manual_seed(0)
    features = torch.randn(5, 4, requires_grad=True)
    domain = torch.tensor([0, 0, 0, 1, 2])
    batch, dann = FakeBatch(features, domain), DANN(weight=0.5, hidden_sizes=(6,), bounded=False)
    dann.module = dann.build_modules(batch)
    assert dann.module[0].in_features == 4 and dann.module[-1].out_features == 3
    total, count = dann.loss(batch)
    total.backward()

    own = features.detach().requires_grad_()
    logits = dann.module(own)
    expected = F.cross_entropy(logits, domain, reduction="sum")
    expected.backward()
    assert int(count) == 5
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(features.grad, -0.5 * 0.848284 * own.grad, rtol=1e-4, atol=1e-7)
    hits = (logits.argmax(1) == domain).float().mean().item()
    assert batch.logged["domain_accuracy"] == pytest.approx((hits, 5))
    assert batch.logged["source_share"] == pytest.approx((0.6, 5))
    assert batch.logged["lambda"][0] == pytest.approx(0.5 * 0.848284, abs=1e-6)


def test_no_gradient_is_reversed_for_rows_that_the_discriminator_gets_wrong():
    """It would drive the discriminator's loss up without limit; the discriminator learns of all."""
    torch.manual_seed(0)
    features, domain = torch.randn(9, 4), torch.arange(9) % 3
    gradients = {}
    for bounded in (True, False):
        own = features.clone().requires_grad_()
        dann = DANN(weight=0.5, hidden_sizes=(6,), bounded=bounded)
        torch.manual_seed(1)
        dann.module = dann.build_modules(FakeBatch(own, domain))
        dann.loss(FakeBatch(own, domain))[0].backward()
        gradients[bounded] = own.grad, dann.module[0].weight.grad
    losses = F.cross_entropy(dann.module(features), domain, reduction="none")
    wrong = losses > math.log(3)
    assert wrong.any() and not wrong.all()
    assert (gradients[True][0][wrong] == 0).all()
    assert torch.equal(gradients[True][0][~wrong], gradients[False][0][~wrong])
    assert torch.equal(gradients[True][1], gradients[False][1])


def test_domain_column_is_driven_out():
    """One input column IS the domain: without the reversal its weight stays, with it, it goes."""

    def domain_weight(scale):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.ones(2))  # of the columns: the class, the domain
        head, discriminator = nn.Linear(2, 2), DomainDiscriminator(2, 2, ())
        model = torch.optim.SGD([weight, *head.parameters()], lr=0.05)
        adversary = torch.optim.SGD(discriminator.parameters(), lr=0.5)
        seen = []
        for _ in range(200):
            label, domain = torch.randint(0, 2, (64,)), torch.arange(64) % 2
            columns = torch.stack([label * 2.0 - 1, domain * 2.0 - 1], 1)
            features = weight * columns + torch.randn(64, 2)
            loss = F.cross_entropy(head(features)[domain == 0], label[domain == 0])
            loss = loss + dann_loss(discriminator(reverse_gradient(features, scale)), domain)
            model.zero_grad()
            adversary.zero_grad()
            loss.backward()
            model.step()
            adversary.step()
            seen.append(weight.detach().abs().clone())
        return torch.stack(seen[-50:]).mean(0).tolist()

    kept_class, kept_domain = domain_weight(0.0)
    assert kept_class > 1 and kept_domain > 0.7
    adapted_class, adapted_domain = domain_weight(1.0)
    assert adapted_class > 1 and adapted_domain < 0.1


# ---- warnings ----


def log(dann, caplog, progress, accuracy, norm=1.0, source_share=0.5):
    """Let `dann` see a logging step; the warnings it gave."""
    caplog.clear()
    dann.watch.since_log = 1000  # as many as `loss` has seen
    with caplog.at_level(logging.WARNING, logger="hf_adapt"):
        dann.on_log(
            {
                f"{dann.name}/domain_accuracy": accuracy,
                f"{dann.name}/source_share": source_share,
                f"{dann.name}/module_gradient_norm": norm,
            },
            progress,
        )
    return [record.getMessage() for record in caplog.records]


def test_warns_once_of_a_discriminator_at_chance(caplog):
    dann = DANN(name="adversary")
    assert log(dann, caplog, 0.1, 0.5) == []  # too early to tell
    (message,) = log(dann, caplog, 0.4, 0.52)
    assert message.startswith("adversary: its discriminator was at chance")
    assert "accuracy 0.52, majority 0.50" in message
    assert log(dann, caplog, 0.5, 0.5) == []


def test_a_few_rows_say_nothing_of_a_discriminator(caplog):
    dann = DANN()
    for progress in (0.5, 0.6, 0.7):
        dann.watch.since_log = 16
        with caplog.at_level(logging.WARNING, logger="hf_adapt"):
            dann.on_log({"dann/domain_accuracy": 0.5, "dann/source_share": 0.5}, progress)
    assert not caplog.records


def test_chance_after_a_success_is_what_dann_wants(caplog):
    dann = DANN()
    assert log(dann, caplog, 0.1, 0.9) == []
    assert log(dann, caplog, 0.9, 0.5) == []


def test_a_resumed_run_knows_how_good_the_discriminator_was(caplog):
    before, after, other = DANN(), DANN(), DANN()
    assert log(before, caplog, 0.1, 0.9) == []
    before.watch.since_log = 300  # of a logging step under way, and of a few small ones
    before.watch.unjudged = [200.0, 20.0, 100.0]
    after.load_state_dict(before.state_dict())
    assert log(after, caplog, 0.9, 0.5) == []
    assert log(before, caplog, 0.9, 0.5) == [] and after.state_dict() == before.state_dict()
    other.load_state_dict({"best_margin": 0.4})  # a checkpoint of 0.1
    assert log(other, caplog, 0.9, 0.5) == []


def test_a_resumed_run_does_not_warn_again(caplog):
    before, after = DANN(), DANN()
    assert log(before, caplog, 0.4, 0.5)
    after.load_state_dict(before.state_dict())
    assert log(after, caplog, 0.5, 0.5) == []


@pytest.mark.parametrize(
    ("num_domains", "source_share", "chance"), [(2, 0.75, 0.75), (2, 0.2, 0.8), (4, 0.25, 0.25)]
)
def test_chance_is_the_largest_domains_share(caplog, num_domains, source_share, chance):
    """Of a constant discriminator; several targets have equal shares."""

    def dann():
        dann = DANN()
        dann.build_modules(FakeBatch(torch.zeros(2, 3), torch.tensor([0, num_domains - 1])))
        return dann

    (message,) = log(dann(), caplog, 0.4, chance + 0.01, source_share=source_share)
    assert "at chance" in message and f"majority {chance:.2f}" in message
    assert log(dann(), caplog, 0.4, chance + 0.1, source_share=source_share) == []


def test_warns_once_of_a_discriminator_that_the_model_outruns(caplog):
    """On real text a high weight drove the accuracy to 0.04, and the task was never learnt."""
    dann = DANN()
    assert log(dann, caplog, 0.1, 0.7) == []
    (message,) = log(dann, caplog, 0.4, 0.04)
    assert "worse than chance (accuracy 0.04, majority 0.50)" in message
    assert "lower weight or a higher learning_rate" in message
    assert log(dann, caplog, 0.5, 0.04) == []


def test_warns_once_of_a_saturated_discriminator(caplog):
    dann = DANN()
    assert log(dann, caplog, 0.4, 1.0) == []
    (message,) = log(dann, caplog, 0.6, 0.995)
    assert "saturated (accuracy 0.995" in message
    assert log(dann, caplog, 0.7, 1.0) == []
    assert log(DANN(), caplog, 0.7, 0.95) == []


def test_warns_once_of_a_discriminator_without_a_gradient(caplog):
    dann = DANN()
    (message,) = log(dann, caplog, 0.01, 0.6, norm=0.0)
    assert "no gradient" in message
    assert log(dann, caplog, 0.02, 0.6, norm=0.0) == []


def test_warns_anew_for_a_new_model(caplog):
    dann = DANN()
    assert log(dann, caplog, 0.4, 0.5)
    dann.build_modules(FakeBatch(torch.zeros(3, 2), torch.tensor([0, 1, 2])))
    assert log(dann, caplog, 0.4, 0.5)


def test_says_nothing_of_steps_without_its_metrics(caplog):
    dann = DANN()
    with caplog.at_level(logging.WARNING, logger="hf_adapt"):
        dann.on_log({"loss": 1.0, "other/domain_accuracy": 0.5}, 0.9)
    assert not caplog.records


def test_num_items_counts_every_feature():
    rows = SimpleNamespace(num_features=lambda: torch.tensor(11))
    assert int(DANN().num_items(rows)) == 11


# ---- in the engine ----


def test_several_sources_are_told_apart(tmp_path):
    """With a column of sources the discriminator has a class for each, and for each target."""
    model, dann = bert(), DANN(ramp=None, hidden_sizes=(8,), several_sources=True)
    trainer = make_trainer(tmp_path, [dann], model, [target(), target()])
    sources = ["news" if number % 3 else "blogs" for number in range(40)]
    trainer.train_dataset = trainer.train_dataset.add_column("domain", sources)
    given, dann_losses = [], dann_module.dann_loss

    def keep(logits, domain, reduction="mean"):
        given.append((logits.shape[1], domain.tolist()))
        return dann_losses(logits, domain, reduction)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dann_module, "dann_loss", keep)
        trainer.train()
    counts = np.bincount([number for classes, numbers in given[1:] for number in numbers])
    assert all(classes == 4 for classes, _ in given) and len(counts) == 4
    assert counts[0] + counts[3] == counts[1] + counts[2] == 12 and counts.all()
    assert counts[3] > counts[0]  # "blogs" is first in the alphabet


@pytest.mark.parametrize("values", [[], ["one"]])
def test_several_sources_need_a_column(values, tmp_path):
    trainer = make_trainer(tmp_path, [DANN(several_sources=True)])
    for value in values:
        trainer.train_dataset = trainer.train_dataset.add_column("domain", [value] * 40)
    found = r"\['one'\]" if values else "none"
    with pytest.raises(ValueError, match=f"'domain' of train_dataset has the values {found}"):
        trainer.train()


@pytest.mark.parametrize("method", [DANN, CDAN])
def test_tokens_are_aligned(method, tmp_path):
    """Of a tagger by default, and of a classifier of rows by pooling='tokens'."""
    losses = {}
    for head, pooling in (("token", "auto"), ("sequence", "tokens"), ("sequence", "auto")):
        objective = method(ramp=None, hidden_sizes=(8,), pooling=pooling)
        labels = "token" if head == "token" else "row"
        trainer = make_trainer(tmp_path, [objective], bert(head), labels=labels, max_steps=1)
        if method is CDAN and (head, pooling) == ("sequence", "tokens"):
            with pytest.raises(ValueError, match="CDAN needs a prediction for each feature"):
                trainer.train()
            continue
        trainer.train()
        losses[head, pooling] = objective.watch.unjudged[0]
    assert losses["sequence", "auto"] == 8
    assert all(count > 30 for key, count in losses.items() if key != ("sequence", "auto"))
