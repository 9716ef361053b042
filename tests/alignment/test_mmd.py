"""MMD: the oracles of Gretton et al.'s equations, and the places where float32 lies."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import rbf_kernel

from hf_adapt import MMD
from hf_adapt.alignment import mmd_loss
from hf_adapt.alignment.mmd import SCALES

X = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
Y = torch.tensor([[1.0, 1.0], [3.0, 5.0], [5.0, 3.0], [0.0, 0.0]])


def naive(source, target, bandwidths, unbiased):
    """Eq. 3 and 5 of Gretton et al. as two loops in float64, the mean over the kernels."""

    def kernel(a, b):
        square = sum((float(p) - float(q)) ** 2 for p, q in zip(a, b, strict=True))
        return np.mean([math.exp(-square / (2 * s)) for s in bandwidths])

    def within(rows):
        values = [
            kernel(a, b)
            for i, a in enumerate(rows)
            for j, b in enumerate(rows)
            if not (unbiased and i == j)
        ]
        return sum(values) / len(values)

    between = np.mean([kernel(a, b) for a in source for b in target])
    return within(source) + within(target) - 2 * between


def samples(n, m, d=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(n, d, generator=generator, dtype=dtype)
    return source, torch.randn(m, d, generator=generator, dtype=dtype) * 1.5 + 0.5


def test_biased_estimate_is_scikit_learns():
    """One kernel exp(-d²/2): 0.2737534 (scikit-learn)."""
    loss = mmd_loss(X, Y, bandwidths=[1.0])
    assert loss.item() == pytest.approx(0.2737534, abs=1e-6)
    xx, yy, xy = (rbf_kernel(a, b, gamma=0.5).mean() for a, b in ((X, X), (Y, Y), (X, Y)))
    assert loss.item() == pytest.approx(float(xx + yy - 2 * xy), abs=1e-6)


def test_unbiased_estimate_is_pytorch_adapts():
    assert mmd_loss(X, Y, [1.0], unbiased=True).item() == pytest.approx(-0.1860692, abs=1e-6)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("sizes", [(4, 4), (2, 7), (6, 3)])
def test_several_kernels_and_unequal_sizes_equal_a_double_loop(sizes, unbiased):
    source, target = samples(*sizes)
    bandwidths = [0.3, 1.0, 7.0]
    expected = naive(source, target, bandwidths, unbiased)
    assert mmd_loss(source, target, bandwidths, unbiased=unbiased).item() == pytest.approx(
        expected, abs=1e-12
    )
    as_tensor = torch.tensor(bandwidths, dtype=torch.float64)
    assert mmd_loss(source, target, as_tensor, unbiased=unbiased).item() == pytest.approx(
        expected, abs=1e-12
    )


@pytest.mark.parametrize("bandwidths", [None, [1.0]])
def test_identical_samples_have_distance_0(bandwidths):
    """tllib's multi-kernel MMD of a sample with itself is not 0."""
    source, _ = samples(6, 1, dtype=torch.float32)
    assert mmd_loss(source, source.clone(), bandwidths).item() == pytest.approx(0, abs=1e-6)
    shuffled = source[torch.randperm(6, generator=torch.Generator().manual_seed(0))]
    assert mmd_loss(source, shuffled, bandwidths).item() == pytest.approx(0, abs=1e-6)


def test_other_samples_have_a_distance():
    source, target = samples(6, 6)
    assert mmd_loss(source, target) > 0.01
    assert mmd_loss(source, target + 3) > mmd_loss(source, target)


@pytest.mark.parametrize("unbiased", [False, True])
def test_symmetry(unbiased):
    source, target = samples(5, 7)
    one = mmd_loss(source, target, unbiased=unbiased)
    torch.testing.assert_close(one, mmd_loss(target, source, unbiased=unbiased))


@pytest.mark.parametrize("unbiased", [False, True])
def test_gradcheck(unbiased):
    source, target = samples(3, 4)
    source.requires_grad_()
    target.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s, t: mmd_loss(s, t, [0.5, 2.0], unbiased=unbiased), (source, target)
    )


# ---- the median bandwidth ----


def test_default_bandwidth_is_the_halved_median_of_squared_distances_times_the_scales():
    """Rows 0, 1 | 3: squared distances 1, 9, 4, so the median is 4 and σ² = 2."""
    source, target = torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0]])
    expected = naive(source, target, [2.0 * scale for scale in SCALES], unbiased=False)
    assert mmd_loss(source, target).item() == pytest.approx(expected, abs=1e-6)
    one = mmd_loss(source, target, scales=[1.0]).item()
    assert one == pytest.approx(naive(source, target, [2.0], unbiased=False), abs=1e-6)
    # By hand: (1 + e^{-1/4}) / 2 + 1 - (e^{-9/4} + e^{-1}).
    by_hand = (1 + math.exp(-0.25)) / 2 + 1 - (math.exp(-2.25) + math.exp(-1))
    assert one == pytest.approx(by_hand, abs=1e-6)


def test_no_gradient_flows_through_the_bandwidth():
    source, target = samples(4, 5)
    source.requires_grad_()
    own = torch.autograd.grad(mmd_loss(source, target), source)[0]
    rows = torch.cat([source, target]).detach()
    sigma2 = torch.pdist(rows).square().median() / 2
    fixed = mmd_loss(source, target, [float(sigma2 * scale) for scale in SCALES])
    torch.testing.assert_close(own, torch.autograd.grad(fixed, source)[0])


def test_default_bandwidth_makes_it_free_of_the_features_scale():
    source, target = samples(6, 5)
    torch.testing.assert_close(
        mmd_loss(source, target), mmd_loss(source * 1e3, target * 1e3), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.ones(3, 2), torch.ones(4, 2)),  # all alike
        (torch.ones(6, 2), torch.cat([torch.ones(5, 2), torch.zeros(1, 2)])),  # the median is 0
        (torch.ones(1, 2), torch.ones(1, 2)),
    ],
)
def test_identical_rows_give_neither_nan_nor_infinity(source, target):
    source, target = source.clone().requires_grad_(), target.clone().requires_grad_()
    loss = mmd_loss(source, target)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(source.grad).all() and torch.isfinite(target.grad).all()
    if torch.equal(source[:1].expand_as(target), target):
        assert loss.item() == pytest.approx(0, abs=1e-6)


def test_one_row_of_each_has_a_gradient():
    source, target = torch.zeros(1, 2, requires_grad=True), torch.ones(1, 2)
    mmd_loss(source, target).backward()
    assert (source.grad < 0).all()  # descending moves the source towards the target


# ---- precision ----


def test_features_far_from_0_stay_accurate_in_float32():
    """The Gram expansion |a|² + |b|² - 2ab loses all digits at an offset of 1e4."""
    source, target = samples(16, 16, d=8, dtype=torch.float32)
    offset = 2.0**14  # exact to add to multiples of 2**-9
    source, target = (torch.round(x * 512) / 512 for x in (source, target))
    exact = mmd_loss(source.double(), target.double()).item()
    assert mmd_loss(source + offset, target + offset).item() == pytest.approx(exact, abs=1e-5)


def test_many_rows_stay_accurate_in_float32():
    """`cdist` switches to the Gram expansion above 25 rows, unless told not to."""
    source, target = samples(40, 40, d=8, dtype=torch.float32)
    source, target = source + 1e3, target + 1e3
    exact = mmd_loss(source.double(), target.double()).item()
    assert mmd_loss(source, target).item() == pytest.approx(exact, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    source, target = (x.to(dtype) for x in samples(6, 6))
    source.requires_grad_()
    loss = mmd_loss(source, target)
    loss.backward()
    assert loss.dtype == torch.float32 and source.grad.dtype == dtype
    exact = mmd_loss(source.detach().double(), target.double()).item()
    assert loss.item() == pytest.approx(exact, abs=1e-6)


def test_float16_features_do_not_overflow():
    """A squared distance of 1e6 is infinite in float16."""
    source, target = torch.zeros(2, 2).half(), torch.full((2, 2), 1000.0).half()
    assert mmd_loss(source, target, [1e6]).item() == pytest.approx(2 - 2 * math.exp(-1), abs=1e-5)


# ---- errors ----


@pytest.mark.parametrize(
    ("source", "target"), [((4, 2), (4, 3)), ((4,), (4,)), ((2, 4, 2), (4, 2)), ((4, 2), (4,))]
)
def test_refuses_shapes_that_do_not_fit(source, target):
    with pytest.raises(ValueError, match=r"source \(N, D\) and target \(M, D\) with the same D"):
        mmd_loss(torch.zeros(source), torch.zeros(target))


def test_refuses_too_few_rows():
    one, two, none = torch.zeros(1, 2), torch.zeros(2, 2), torch.zeros(0, 2)
    for source, target in ((none, two), (two, none)):
        with pytest.raises(ValueError, match=r"at least 1 row\(s\) of each domain, got"):
            mmd_loss(source, target)
    for source, target in ((one, two), (two, one)):
        with pytest.raises(ValueError, match=r"at least 2 row\(s\).*or unbiased=False"):
            mmd_loss(source, target, unbiased=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": -0.5}, r"MMD\(weight=-0.5\).*finite number >= 0"),
        ({"scales": ()}, r"scales=\(\): at least one value"),
        ({"scales": (1.0, 0.0)}, r"scales=\(1.0, 0.0\): at least one value, each positive"),
        ({"bandwidths": []}, r"bandwidths=\[\]: at least one value"),
        ({"bandwidths": [-1.0]}, r"bandwidths=\[-1.0\]: at least one value, each positive"),
        ({"bandwidths": [float("nan")]}, "each positive"),
    ],
)
def test_objective_refuses_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MMD(**arguments)


# ---- the objective ----


class FakeBatch:
    """Features as an engine's batch gives them."""

    def __init__(self, features, domain, num_domains):
        self.given, self.num_domains = (features, domain), num_domains

    def features(self):
        return self.given


def test_objective_brings_the_source_together_with_each_target():
    source, first = samples(4, 3)
    second = first[:2] - 2
    features = torch.cat([source, first, second])
    domain = torch.tensor([0] * 4 + [1] * 3 + [2] * 2)
    mixed = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    batch = FakeBatch(features[mixed], domain[mixed], 3)
    for options in (
        {"bandwidths": [0.5, 2.0], "unbiased": False},
        {"scales": [1.0, 3.0], "unbiased": False},
        {"unbiased": True},
    ):
        expected = (mmd_loss(source, first, **options) + mmd_loss(source, second, **options)) / 2
        torch.testing.assert_close(MMD(**options).loss(batch), expected)


def test_objective_is_0_with_a_gradient_where_a_target_has_no_rows():
    """A micro-batch without target rows (a fractional ratio) must still backpropagate."""
    features = torch.randn(3, 2, requires_grad=True)
    loss = MMD().loss(FakeBatch(features, torch.zeros(3, dtype=torch.long), 2))
    loss.backward()
    assert loss.item() == 0 and torch.equal(features.grad, torch.zeros(3, 2))
    present = FakeBatch(features.detach(), torch.tensor([0, 0, 2]), 3)
    expected = mmd_loss(features[:2].detach(), features[2:].detach())
    torch.testing.assert_close(MMD(unbiased=False).loss(present), expected)  # domain 1 is absent
