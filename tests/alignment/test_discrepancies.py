"""Distances between the domains' features: values, gradients, precision, and what is refused."""

import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_adapt.alignment import (
    AFN,
    CMD,
    CORAL,
    JMMD,
    DeepJDOT,
    cmd_loss,
    coral_loss,
    hard_norm_loss,
    jdot_loss,
    jmmd_loss,
    mmd_loss,
    sinkhorn_plan,
    stepwise_norm_loss,
)
from tests.helpers.fake_batch import FakeBatch

X = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]], dtype=torch.float64)
Y = torch.tensor([[1.0, 1.0], [3.0, 5.0], [5.0, 3.0], [0.0, 0.0]], dtype=torch.float64)
COST = (X[:, None] - Y[None]).square().sum(-1)


def samples(n: int, m: int, d: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return source, torch.randn(m, d, generator=generator, dtype=torch.float64) * 1.5 + 0.5


def joint(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """JMMD with a second view made of the first."""
    return jmmd_loss([source, source[:, :2] / 2], [target, target[:, :2] / 2])


def transport(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """DeepJDOT with labels and predictions made of the features."""
    return jdot_loss(source, torch.arange(len(source)) % 2, target, target[:, :2])


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "coral": coral_loss,
    "cmd": cmd_loss,
    "jmmd": joint,
    "jdot": transport,
}
DISTANCES = ["coral", "cmd", "jmmd"]

# ---- what all of them hold ----


@pytest.mark.parametrize("name", ["coral", "cmd"])
def test_gradcheck(name: str) -> None:
    """jmmd and jdot have constants that depend on the rows: their gradients are compared below."""
    inputs = [x.requires_grad_() for x in samples(4, 5)]
    assert torch.autograd.gradcheck(LOSSES[name], inputs)


@pytest.mark.parametrize("name", DISTANCES)
def test_a_sample_has_no_distance_to_itself(name: str) -> None:
    source, target = samples(5, 5)
    source, own = source.requires_grad_(), source.detach().clone().requires_grad_()
    value = LOSSES[name](source, own)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert torch.isfinite(source.grad).all() and torch.isfinite(own.grad).all()
    assert LOSSES[name](source, target) > 0.01


@pytest.mark.parametrize("name", LOSSES)
def test_equal_rows_have_a_finite_gradient(name: str) -> None:
    source, target = torch.ones(3, 2, requires_grad=True), torch.ones(4, 2, requires_grad=True)
    LOSSES[name](source, target).backward()
    assert torch.isfinite(source.grad).all() and torch.isfinite(target.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    source, target = (x.to(dtype) for x in samples(6, 7))
    source.requires_grad_()
    loss = LOSSES[name](source, target)
    loss.backward()
    assert loss.dtype == torch.float32 and source.grad.dtype == dtype
    assert torch.isfinite(source.grad).all()
    exact = LOSSES[name](source.detach().double(), target.double()).item()
    assert loss.item() == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_float16_features_do_not_overflow(name: str) -> None:
    """The square of 1000 is infinite in float16."""
    source, target = (1000 * x.half() for x in samples(4, 4))
    assert torch.isfinite(LOSSES[name](source, target))


@pytest.mark.parametrize("shapes", [((4, 2), (4, 3)), ((4,), (4,)), ((2, 4, 2), (4, 2))])
@pytest.mark.parametrize("name", ["coral_loss", "cmd_loss", "jmmd_loss", "jdot_loss"])
def test_shapes_that_do_not_fit_are_refused(name: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    source, target = map(torch.zeros, shapes)
    call = {
        "coral_loss": lambda: coral_loss(source, target),
        "cmd_loss": lambda: cmd_loss(source, target),
        "jmmd_loss": lambda: jmmd_loss([source], [target]),
        "jdot_loss": lambda: jdot_loss(source, torch.zeros(4), target, torch.zeros(4, 2)),
    }[name]
    with pytest.raises(ValueError, match=rf"{name}.* expects source \(N, D\) and target \(M, D\)"):
        call()


# ---- CORAL ----


def test_coral_is_that_of_others() -> None:
    """3.2100694: numpy, pytorch-adapt 0.0.83 and skada 0.6."""
    assert coral_loss(X, Y).item() == pytest.approx(3.2100694, abs=1e-7)


def test_coral_of_unequal_samples_is_numpys() -> None:
    source, target = samples(5, 9)
    difference = np.cov(source.T) - np.cov(target.T)
    expected = (difference**2).sum() / (4 * 3**2)
    assert coral_loss(source, target).item() == pytest.approx(expected, rel=1e-12)


def test_coral_does_not_see_the_mean_and_is_refused_one_row() -> None:
    assert coral_loss(X, X + 7).item() == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match=r"coral_loss needs at least 2 row\(s\)"):
        coral_loss(X[:1], Y)


# ---- CMD ----


@pytest.mark.parametrize("num_moments", [1, 2, 5])
def test_cmd_is_its_formula(num_moments: int) -> None:
    source, target = (x.numpy() for x in samples(5, 9))
    expected = np.linalg.norm(source.mean(0) - target.mean(0)) / 2
    for k in range(2, num_moments + 1):
        moments = [((x - x.mean(0)) ** k).mean(0) for x in (source, target)]
        expected += np.linalg.norm(moments[0] - moments[1]) / 2**k
    value = cmd_loss(*samples(5, 9), num_moments=num_moments, span=2.0)
    assert value.item() == pytest.approx(expected, rel=1e-12)


def test_cmd_compares_the_tanh_of_features() -> None:
    source, target = samples(4, 3)
    loss = CMD(num_moments=3).loss(FakeBatch(torch.cat([source, target]), [0] * 4 + [1] * 3))
    torch.testing.assert_close(loss, cmd_loss(source.tanh(), target.tanh(), 3, span=2.0))


# ---- JMMD ----


@pytest.mark.parametrize("unbiased", [False, True])
def test_jmmd_is_a_double_loop_over_products_of_kernels(unbiased: bool) -> None:
    source, target = samples(3, 4)
    views = [torch.cat([source, target]), torch.cat([source, target])[:, :2].softmax(-1)]

    def kernel(i: int, j: int) -> float:
        product = 1.0
        median = float(torch.pdist(views[0]).square().median()) / 2
        widths = [median * scale for scale in (0.25, 0.5, 1.0, 2.0, 4.0)]
        for view, own in zip(views, (widths, [0.84]), strict=True):
            square = float((view[i] - view[j]).square().sum())
            product *= float(np.mean([math.exp(-square / (2 * w)) for w in own]))
        return product

    def mean(one: range, other: range) -> float:
        skip = unbiased and one == other
        return float(np.mean([kernel(i, j) for i in one for j in other if not (skip and i == j)]))

    first, second = range(3), range(3, 7)
    expected = mean(first, first) + mean(second, second) - 2 * mean(first, second)
    found = jmmd_loss([v[:3] for v in views], [v[3:] for v in views], [None, 0.84], unbiased)
    assert found.item() == pytest.approx(expected, abs=1e-12)


def test_jmmd_sees_classes_that_changed_places() -> None:
    """Features alike, predictions alike, but each feature with the other's prediction."""
    features = torch.tensor([[1.0], [-1.0]]).repeat(4, 1)
    classes = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(4, 1)
    assert mmd_loss(features, features.flip(0)).item() == pytest.approx(0, abs=1e-6)
    assert jmmd_loss([features, classes], [features, classes]).item() == pytest.approx(0, abs=1e-6)
    assert jmmd_loss([features, classes], [features, classes.flip(0)]) > 0.3


def test_jmmd_with_a_constant_view_is_mmd_and_views_must_agree() -> None:
    source, target = samples(4, 5)
    constant = [torch.ones(4, 2).double(), torch.ones(5, 2).double()]
    found = jmmd_loss([source, constant[0]], [target, constant[1]])
    torch.testing.assert_close(found, mmd_loss(source, target))
    with pytest.raises(ValueError, match="same views of both domains, got 2 of the source and 1"):
        jmmd_loss([source, source], [target])


def test_jmmd_compares_features_and_predictions_of_each_target() -> None:
    source, target = samples(4, 5)
    features, logits = torch.cat([source, target]), torch.cat([source, target])[:, :2]
    domain = torch.tensor([0] * 4 + [1] * 2 + [2] * 3)
    loss = JMMD().loss(FakeBatch(features, domain, logits))

    def views(number: int) -> list[torch.Tensor]:
        return [features[domain == number], logits[domain == number].softmax(-1)]

    pairs = [jmmd_loss(views(0), views(n), [None, 0.84], unbiased=True) for n in (1, 2)]
    torch.testing.assert_close(loss, torch.stack(pairs).mean())


# ---- optimal transport ----


def test_plans_are_those_of_pot() -> None:
    """POT 0.9.7: ot.sinkhorn (ε 2) and ot.unbalanced.sinkhorn_unbalanced (ε 2, ρ 3, "kl")."""
    balanced = [
        [0.1165758, 0.0001438, 0.0001438, 0.2164699],
        [0.0667121, 0.004494, 0.2453622, 0.0167651],
        [0.0667121, 0.2453622, 0.004494, 0.0167651],
    ]
    unbalanced = [
        [0.0555375, 1.3e-06, 1.3e-06, 0.1633015],
        [0.1003515, 0.00013, 0.0071003, 0.0399337],
        [0.1003515, 0.0071003, 0.00013, 0.0399337],
    ]
    for expected, options in ((balanced, {}), (unbalanced, {"unbalanced": 3.0})):
        plan = sinkhorn_plan(COST[:3], 2.0, num_iterations=2000, **options)
        torch.testing.assert_close(plan, torch.tensor(expected).double(), rtol=0, atol=1e-7)


def test_a_sharp_plan_has_the_cost_of_exact_transport() -> None:
    """W₂² is 7.5 (POT's ot.emd2); a plan of ε = 0.01 underflows unless computed in logarithms."""
    plan = sinkhorn_plan(COST, 0.01, num_iterations=3000)
    assert (plan * COST).sum().item() == pytest.approx(7.5, abs=0.02)
    torch.testing.assert_close(plan.sum(0), torch.full((4,), 0.25).double())


@pytest.mark.parametrize("unbalanced", [None, 1.0])
def test_jdot_is_its_formula(unbalanced: float | None) -> None:
    """With Sinkhorn's own iteration on kernels, in float64; the gradient leaves the plan alone."""
    source, target = samples(4, 5)
    labels, logits = torch.tensor([0, 1, 2, 1]), torch.randn(5, 3).double()
    for tensor in (source, target, logits):
        tensor.requires_grad_()
    squared = (source[:, None] - target[None]).square().sum(-1)
    cross_entropy = -logits.log_softmax(-1)[:, labels].T
    fixed = (0.5 * squared / squared.median() + 2.0 * cross_entropy).detach().numpy()
    scale = float(torch.tensor(fixed).median())
    kernel, u, v = np.exp(-fixed / (0.3 * scale)), np.ones(4), np.ones(5)
    power = 1.0 if unbalanced is None else unbalanced / (unbalanced + 0.3)
    for _ in range(50):
        u = (1 / (kernel @ (v / 5))) ** power
        v = (1 / (kernel.T @ (u / 4))) ** power
    plan = torch.tensor(u[:, None] * kernel * v[None] / 20)
    norm = ((source**2).sum() / 4 + (target**2).sum() / 5).detach() / 2
    expected = (plan * (0.5 * squared / norm + 2.0 * cross_entropy)).sum()
    found = jdot_loss(source, labels, target, logits, 0.5, 2.0, 0.3, unbalanced)
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    inputs = [source, target, logits]
    gradients = [torch.autograd.grad(value, inputs) for value in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_unbalanced_transport_leaves_a_class_where_it_is_missing() -> None:
    """A target without class 1: exact marginals move all its rows to class 0's place."""
    source = torch.tensor([[0.0], [0.1], [5.0], [5.1]])
    target = torch.tensor([[0.0], [0.1], [0.05], [0.2]])
    cost = torch.cdist(source, target).square()
    moved = [sinkhorn_plan(cost, 1.0, rho)[2:].sum().item() for rho in (None, 2.0)]
    assert moved[0] == pytest.approx(0.5, abs=1e-4)
    assert moved[1] < 0.1


def test_jdot_uses_labelled_source_rows_alone() -> None:
    source, target = samples(4, 3)
    logits = torch.randn(7, 2).double()
    features, domain = torch.cat([source, target]), [0] * 4 + [1] * 3
    labels = torch.tensor([0, -100, 1, 0, -100, -100, -100])
    loss = DeepJDOT().loss(FakeBatch(features, domain, logits, labels))
    kept = [0, 2, 3]
    expected = jdot_loss(source[kept], labels[kept], target, logits[4:])
    torch.testing.assert_close(loss, expected)
    none = FakeBatch(features.requires_grad_(), domain, logits, [-100] * 7)
    DeepJDOT().loss(none).backward()
    assert torch.equal(features.grad, torch.zeros_like(features))


# ---- feature norms ----


def test_norms_by_hand() -> None:
    """pytorch-adapt 0.0.83: Δr² = 0.25 for a step of 0.5; the gradient is -2 Δr f / (N ‖f‖)."""
    rows = torch.tensor([[3.0, 4.0], [0.0, 2.0]], requires_grad=True)
    value = stepwise_norm_loss(rows, 0.5)
    assert value.item() == pytest.approx(0.25)
    value.backward()
    torch.testing.assert_close(rows.grad, torch.tensor([[-0.3, -0.4], [0.0, -0.5]]))
    assert hard_norm_loss(rows, 5.0).item() == pytest.approx((3.5 - 5) ** 2)
    zero = torch.zeros(2, 3, requires_grad=True)
    (stepwise_norm_loss(zero) + hard_norm_loss(zero)).backward()
    assert torch.isfinite(zero.grad).all()
    for loss in (stepwise_norm_loss, hard_norm_loss):
        assert loss(torch.full((2, 4), 1e4).half()).dtype == torch.float32
        with pytest.raises(ValueError, match=rf"{loss.__name__} expects features \(N, D\)"):
            loss(torch.zeros(3))


def test_afn_in_both_forms() -> None:
    source, target = samples(4, 3)
    batch = FakeBatch(torch.cat([source, target]), [0] * 4 + [1] * 3)
    total, count = AFN(delta=0.5).loss(batch)
    assert (float(total), int(count)) == pytest.approx((7 * 0.25, 7))
    expected = float(target.norm(dim=1).mean())
    assert batch.logged["target_norm"] == pytest.approx((expected, 3))
    hard = AFN(radius=2.0).loss(batch)
    expected = hard_norm_loss(source, 2.0) + hard_norm_loss(target, 2.0)
    torch.testing.assert_close(hard, expected)
    assert int(AFN().num_items(SimpleNamespace(num_features=lambda: torch.tensor(9)))) == 9


# ---- the objectives ----


@pytest.mark.parametrize("make", [CORAL, CMD, JMMD, DeepJDOT])
def test_a_missing_domain_is_0_with_a_gradient(make: Callable[[], CORAL]) -> None:
    features = torch.randn(3, 2, requires_grad=True)
    loss = make().loss(FakeBatch(features, [0, 0, 0], torch.zeros(3, 2), [0, 1, 0]))
    loss.backward()
    assert loss.item() == 0 and torch.equal(features.grad, torch.zeros(3, 2))


def test_features_and_predictions_of_other_items_are_refused() -> None:
    batch = FakeBatch(torch.randn(6, 2), [0, 0, 0, 1, 1, 1], torch.zeros(4, 2), [0] * 6)
    for objective in (JMMD(), DeepJDOT()):
        with pytest.raises(ValueError, match="there are 6 features and 4 predictions"):
            objective.loss(batch)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CMD(num_moments=0), "num_moments=0 and span=2.0: at least one moment"),
        (lambda: AFN(delta=0.0), "delta=0.0 and radius=None must be positive"),
        (lambda: AFN(radius=-1.0), "delta=1.0 and radius=-1.0 must be positive"),
        (lambda: DeepJDOT(label_weight=-1.0), "label_weight=-1.0 must not be negative"),
        (lambda: DeepJDOT(regularization=0.0), "regularization=0.0 and unbalanced=None must be"),
        (lambda: DeepJDOT(unbalanced=0.0), "unbalanced=0.0 must be positive"),
    ],
)
def test_bad_options_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make", [JMMD, DeepJDOT])
def test_heads_without_exclusive_classes_are_refused(make: Callable[[], JMMD]) -> None:
    model = SimpleNamespace(config=SimpleNamespace(problem_type="regression"))
    with pytest.raises(ValueError, match=f"{make.__name__} needs predictions over exclusive"):
        make().setup(SimpleNamespace(model=model))
