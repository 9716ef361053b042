"""The chunked loss against the plain float64 loss and two peers, and what it refuses."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_adapt.distillation.divergences import (
    JensenShannon,
    forward_kl,
    logit_mse,
    named_divergence,
    reverse_kl,
)
from hf_adapt.distillation.language_models import chunked
from hf_adapt.distillation.language_models.chunked import (
    ChunkedLoss,
    chunked_distillation_loss,
)
from hf_adapt.distillation.language_models.projections import ChunkedOptions, chunked_loss

N, V, H, TEACHER_H = 7, 11, 5, 3
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def hellinger(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """A divergence that hf_adapt does not know."""
    a, b = ((x / temperature).softmax(-1).sqrt() for x in (student, teacher))
    return (a - b).square().sum(-1)


DIVERGENCES = [forward_kl, reverse_kl, JensenShannon(0.3), logit_mse, hellinger]


def inputs(
    dtype: torch.dtype = torch.float64, teacher_v: int = V, student_v: int = V, n: int = N
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, grad: bool = False) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.to(dtype).requires_grad_(grad)

    labels = torch.randint(0, student_v, (n,), generator=generator)
    labels[1::3] = -100
    return {
        "student_hidden": normal(n, H, grad=True),
        "student_weight": normal(student_v, H, grad=True),
        "teacher_hidden": normal(n, TEACHER_H),
        "teacher_weight": normal(teacher_v, TEACHER_H),
        "labels": labels,
        "student_bias": normal(student_v, grad=True),
        "teacher_bias": normal(teacher_v),
    }


def naive(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    labels: torch.Tensor | None,
    ce_factor: float = 1.0,
    kd_factor: float = 1.0,
    kd_mask: torch.Tensor | None = None,
    temperature: float = 1.0,
    divergence: Any = forward_kl,
    student_bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    vocabulary: int | None = None,
    **_: Any,
) -> ChunkedLoss:
    """All logits at once, and autograd."""
    s = F.linear(student_hidden, student_weight, student_bias)
    t = F.linear(teacher_hidden, teacher_weight, teacher_bias).detach()
    ce = s.new_zeros(()) if labels is None else F.cross_entropy(s, labels, reduction="sum")
    if kd_mask is None:
        kd_mask = torch.ones(len(s), dtype=torch.bool) if labels is None else labels != -100
    rows = divergence(s[:, :vocabulary], t[:, :vocabulary], temperature)
    kd = rows[kd_mask].sum()
    return ChunkedLoss(ce_factor * ce + kd_factor * kd, ce.detach(), kd.detach())


def gradients(loss: torch.Tensor, given: dict[str, Any]) -> list[torch.Tensor]:
    wanted = [x for x in given.values() if torch.is_tensor(x) and x.requires_grad]
    return list(torch.autograd.grad(loss, wanted))


def agree(given: dict[str, Any], **settings: Any) -> None:
    """Value, both sums and all gradients are those of the plain loss."""
    budget = settings.pop("byte_budget", None)
    expected = naive(**given, **settings)
    found = chunked_distillation_loss(**given, **settings, byte_budget=budget)
    torch.testing.assert_close(found, expected)
    assert not found.ce_sum.requires_grad and not found.kd_sum.requires_grad
    pairs = zip(gradients(found.loss, given), gradients(expected.loss, given), strict=True)
    for mine, theirs in pairs:
        assert theirs.abs().sum() > 0
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_it_is_the_plain_loss(divergence: Any, temperature: float) -> None:
    mask = torch.arange(N) % 4 != 0  # rows with both, either and neither of the terms
    row = 8 * V * (2 + chunked.SCRATCH)
    for budget, masked, bias in itertools.product((1, 3 * row, None), (False, True), (True, False)):
        given = inputs()
        if not bias:
            del given["student_bias"], given["teacher_bias"]
        settings = {"ce_factor": 0.7, "kd_factor": 0.2, "kd_mask": mask if masked else None}
        agree(given, divergence=divergence, temperature=temperature, byte_budget=budget, **settings)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_classes_that_only_one_head_has(divergence: Any, temperature: float) -> None:
    for student_v, teacher_v in ((V + 2, V), (V, V + 3), (V + 2, V + 3)):
        given = inputs(student_v=student_v, teacher_v=teacher_v)
        mask = torch.arange(N) % 4 != 0
        agree(given, divergence=divergence, temperature=temperature, vocabulary=V, kd_mask=mask)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", [forward_kl, JensenShannon(0.3)])
def test_a_class_that_is_ruled_out(divergence: Any, temperature: float, both: bool) -> None:
    given = inputs()
    given["teacher_bias"][2] = -torch.inf
    if both:
        with torch.no_grad():
            given["student_bias"][2] = -torch.inf
        given["labels"][given["labels"] == 2] = 3
    assert torch.isfinite(chunked_distillation_loss(**given, divergence=divergence).loss)
    agree(given, divergence=divergence, temperature=temperature)


def test_chunks_larger_than_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk of 5 rows in blocks of 2: neither boundary loses or repeats a row."""
    monkeypatch.setattr(chunked, "_CPU_LIMITS", chunked._Limits(1, 5, 2 * V))
    for n in (9, 10, 11):
        agree(inputs(n=n), byte_budget=8 * V * (2 * 5 + 2 * chunked.SCRATCH))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_without_labels(divergence: Any) -> None:
    given = inputs()
    given["labels"] = None
    agree(given, divergence=divergence)
    agree(given, divergence=divergence, kd_mask=torch.arange(N) > 2)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(divergence: Any) -> None:
    given = inputs()
    tensors = [given.pop(name) for name in ("student_hidden", "student_weight", "student_bias")]

    def loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return chunked_distillation_loss(
            hidden,
            weight,
            **given,
            student_bias=bias,
            divergence=divergence,
            temperature=1.5,
            ce_factor=0.3,
        ).loss

    assert torch.autograd.gradcheck(loss, tensors)


def test_only_one_of_the_terms() -> None:
    agree(inputs(), ce_factor=0.0)
    agree(inputs(), kd_factor=0.0)
    agree(inputs(), kd_mask=torch.zeros(N, dtype=torch.bool))


def test_factors_may_be_tensors() -> None:
    given = inputs()
    found = chunked_distillation_loss(**given, ce_factor=torch.tensor(0.5), kd_factor=2)
    torch.testing.assert_close(found.loss, naive(**given, ce_factor=0.5, kd_factor=2).loss)


@pytest.mark.parametrize("frozen", ["student_hidden", "student_weight", "student_bias"])
def test_nothing_is_computed_for_what_is_frozen(
    frozen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs()
    given[frozen].requires_grad_(False)
    made = []

    class Noted(chunked._Gradients):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(chunked, "_Gradients", Noted)
    agree(given)
    name = frozen.removeprefix("student_")
    assert [getattr(made[0], k) is None for k in ("hidden", "weight", "bias")] == [
        k == name for k in ("hidden", "weight", "bias")
    ]


@pytest.mark.parametrize("without", ["no_grad", "frozen"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_without_gradients(without: str, divergence: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr(chunked._Gradients, "add", refuse)
    given = inputs()
    expected = naive(**given, divergence=divergence)
    if without == "frozen":
        for value in given.values():
            value.requires_grad_(False)
    with torch.set_grad_enabled(without == "frozen"):
        found = chunked_distillation_loss(**given, divergence=divergence)
    assert not found.loss.requires_grad
    torch.testing.assert_close(found.loss, expected.loss.detach())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_token_is_used(divergence: Any) -> None:
    """A batch of prompts only: 0, and gradients of 0, where a mean would be 0 / 0."""
    for n in (0, N):
        given = inputs(n=n)
        given["labels"].fill_(-100)
        found = chunked_distillation_loss(**given, divergence=divergence)
        assert [value.item() for value in found] == [0.0, 0.0, 0.0]
        assert all(not gradient.any() for gradient in gradients(found.loss, given))


def test_unused_tokens_are_never_projected() -> None:
    given = inputs()
    expected = chunked_distillation_loss(**given)
    with torch.no_grad():
        given["student_hidden"][given["labels"] == -100] = float("nan")
        given["teacher_hidden"][given["labels"] == -100] = float("nan")
    torch.testing.assert_close(chunked_distillation_loss(**given), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_half_precision_costs_only_the_rounding_of_the_inputs(
    divergence: Any, dtype: torch.dtype
) -> None:
    given = inputs(dtype)
    same = {
        k: x.detach().float().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for k, x in given.items()
    }
    settings = {"divergence": divergence, "ce_factor": 1e-6, "kd_factor": 1e-6}
    found, expected = (chunked_distillation_loss(**g, **settings) for g in (given, same))
    assert found.loss.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    # Times 2**16, as a gradient scaler would: what is left is one rounding of each gradient.
    mine, theirs = (gradients(out.loss * 2**16, g) for out, g in ((found, given), (expected, same)))
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == dtype and b.any()
        torch.testing.assert_close(a.float(), b, rtol=0.01, atol=1e-5)


def test_heads_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A half-precision head is cast some classes at a time, and the result is that of the whole."""
    given = inputs(torch.bfloat16)
    whole = chunked_distillation_loss(**given)
    pieces = []

    def by_three(self: chunked._Head, classes: int) -> Any:
        for start in range(0, classes, 3):
            pieces.append(start)
            part = slice(start, min(start + 3, classes))
            yield part, self.weight[part].to(self.dtype)

    monkeypatch.setattr(chunked._Head, "slices", by_three)
    found = chunked_distillation_loss(**given)
    assert len(pieces) > 3
    torch.testing.assert_close(found, whole)
    pairs = zip(gradients(found.loss, given), gradients(whole.loss, given), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl, JensenShannon(), logit_mse])
def test_large_logits_stay_finite(divergence: Any, dtype: torch.dtype) -> None:
    """3e4 and -3e4: their difference is no float16 number, and their exponentials underflow."""
    hidden = torch.tensor([[3e4], [-3e4]], dtype=dtype, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], dtype=dtype, requires_grad=True)
    given = {
        "student_hidden": hidden,
        "student_weight": weight,
        "teacher_hidden": -hidden.detach(),
        "teacher_weight": weight.detach(),
        "labels": torch.tensor([1, 1]),
    }
    # The factors keep the gradients, which grow with the inputs, within float16.
    settings = {"divergence": divergence, "ce_factor": 0.1, "kd_factor": 1e-6}
    found = chunked_distillation_loss(**given, **settings)
    double = {
        k: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for k, x in given.items()
    }
    expected = naive(**double, **settings)
    torch.testing.assert_close(found.loss.double(), expected.loss)
    for mine, theirs in zip(
        gradients(found.loss, given), gradients(expected.loss, double), strict=True
    ):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_second_backward_is_the_first_again(factor: float) -> None:
    given = inputs()
    loss = chunked_distillation_loss(**given).loss * factor
    loss.backward(retain_graph=True)
    once = given["student_weight"].grad.clone()
    given["student_weight"].grad.mul_(5.0)  # as clipping does, between the two
    given["student_weight"].grad = None
    loss.backward()
    torch.testing.assert_close(given["student_weight"].grad, once, rtol=0, atol=0)
    torch.testing.assert_close(once, factor * gradients(naive(**given).loss, given)[1])


def test_the_weight_takes_its_gradient_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """At V x H of a large vocabulary, that copy is as large as the head."""
    given, made = inputs(), []

    class Noted(chunked._Gradients):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self.weight.data_ptr())

    monkeypatch.setattr(chunked, "_Gradients", Noted)
    chunked_distillation_loss(**given).loss.backward()
    assert given["student_weight"].grad.data_ptr() == made[0]


def test_the_gradient_cannot_be_differentiated() -> None:
    given = inputs()
    loss = chunked_distillation_loss(**given).loss
    (gradient,) = torch.autograd.grad(loss * 2.0, given["student_hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_agrees_with_liger(beta: float) -> None:
    """Liger: the same beta, means over labels, and no T² (so T = 1)."""
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    given = inputs(torch.float32)
    given.pop("student_bias"), given.pop("teacher_bias")
    number = int((given["labels"] != -100).sum())
    loss = liger.LigerFusedLinearJSDLoss(0.3, 0.7, beta, compiled=False, chunk_size=3)
    theirs = loss(
        given["student_hidden"],
        given["student_weight"],
        given["teacher_hidden"],
        given["teacher_weight"],
        given["labels"],
    )
    ours = chunked_distillation_loss(
        **given,
        divergence=JensenShannon(beta),
        ce_factor=0.3 / number,
        kd_factor=0.7 / number,
    ).loss
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(gradients(ours, given), gradients(theirs, given), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("beta", "divergence"), [(0, "forward_kl"), (1, "reverse_kl"), (0.3, None)]
)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_agrees_with_trl(beta: float, divergence: str | None, temperature: float) -> None:
    """TRL: the same beta, the two KL at its ends, and no T²."""
    gkd = pytest.importorskip("trl.experimental.gkd", reason="this TRL has no experimental GKD")
    given = inputs(torch.float32)
    labels = given["labels"]
    theirs = gkd.GKDTrainer.generalized_jsd_loss(
        F.linear(given["student_hidden"], given["student_weight"], given["student_bias"])[None],
        F.linear(given["teacher_hidden"], given["teacher_weight"], given["teacher_bias"])[None],
        labels=labels[None],
        beta=beta,
        temperature=temperature,
        reduction="sum",
    )
    ours = chunked_distillation_loss(
        **given,
        divergence=divergence or JensenShannon(beta),
        temperature=temperature,
        ce_factor=0.0,
        kd_factor=1 / temperature**2,
    ).loss
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(gradients(ours, given), gradients(theirs, given), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_on_a_cpu_changes_nothing() -> None:
    given = inputs(torch.float32)
    expected = chunked_distillation_loss(**given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = chunked_distillation_loss(**given)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_many_classes_are_summed_accurately() -> None:
    """Row after row of 128,256 exponentials, where torch's own log-softmax is off by 2e-5."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 1, generator=generator)
    weight = torch.randn(128_256, 1, generator=generator)
    labels = torch.arange(4)
    found = chunked_distillation_loss(hidden, weight, hidden.flip(0), weight, labels)
    double = (hidden.double(), weight.double(), hidden.flip(0).double(), weight.double())
    expected = naive(*double, labels)
    torch.testing.assert_close(found.ce_sum.double(), expected.ce_sum, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.kd_sum.double(), expected.kd_sum, rtol=1e-5, atol=0)


def test_batches_and_output_projections() -> None:
    given = inputs(torch.float32, n=6)
    student, teacher = nn.Linear(H, V + 1), nn.Linear(TEACHER_H, V, bias=False)
    mask = torch.arange(6) > 1
    found = chunked_loss(
        given["student_hidden"].view(2, 3, H),
        student,
        given["teacher_hidden"].view(2, 3, TEACHER_H),
        teacher,
        given["labels"].view(2, 3),
        ChunkedOptions(2.0, "reverse_kl", vocabulary=V, byte_budget=1000),
        ce_factor=0.5,
        kd_factor=0.25,
        kd_mask=mask,
    )
    expected = naive(
        given["student_hidden"],
        student.weight,
        given["teacher_hidden"],
        teacher.weight,
        given["labels"],
        0.5,
        0.25,
        mask,
        2.0,
        named_divergence("reverse_kl"),
        student.bias,
        vocabulary=V,
    )
    torch.testing.assert_close(found, expected)
    found.loss.backward()
    assert student.weight.grad is not None and student.weight.grad.any()
    assert teacher.weight.grad is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"student_hidden": torch.ones(1, N, H)}, r"student_hidden \(N, H\) .* Flatten batch"),
        ({"student_weight": torch.ones(V, H + 1)}, r"with the same H, got \(7, 5\) and \(11, 6\)"),
        ({"teacher_weight": torch.ones(V, H)}, r"teacher_weight \(V, H\) with the same H"),
        ({"student_bias": torch.ones(V + 1)}, r"student_bias of shape \(11,\).*got \(12,\)"),
        ({"teacher_bias": torch.ones(1)}, r"teacher_bias of shape \(11,\).*got \(1,\)"),
        ({"teacher_hidden": torch.ones(N - 1, TEACHER_H)}, "teacher_hidden of 7 rows.*same tokens"),
        ({"labels": torch.zeros(1, N)}, r"labels of 7 rows.*got \(1, 7\).*flatten"),
        ({"labels": torch.zeros(N - 1)}, r"labels of 7 rows.*got \(6,\).*shift"),
        ({"kd_mask": torch.ones(N + 1) > 0}, r"kd_mask of 7 rows.*got \(8,\)"),
        ({"kd_mask": torch.ones(N)}, "kd_mask of torch.bool, got torch.float32. Pass kd_mask != 0"),
        ({"teacher_weight": torch.ones(V + 1, TEACHER_H), "teacher_bias": None},
         "same number of classes, got 11 and 12.*pass vocabulary="),
        ({"vocabulary": V + 1}, "vocabulary between 1 and 11.*got 12"),
        ({"vocabulary": 0}, "vocabulary between 1 and 11.*got 0"),
        ({"temperature": 0.0}, "temperature above 0, got 0.0"),
        ({"byte_budget": 0}, "byte_budget above 0, got 0"),
        ({"divergence": "kl"}, "divergence='kl' is unknown"),
        ({"divergence": lambda s, t, temperature: (s - t).sum()},
         r"one value for each token, of shape \(5,\), got \(\)"),
    ],
)  # fmt: skip
def test_what_it_refuses(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chunked_distillation_loss(**{**inputs(torch.float32), **changed})


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_half_precision_on_cuda(divergence: Any, autocast: bool) -> None:
    given = {k: x.detach() for k, x in inputs(torch.float32, n=64).items()}
    on_device = {
        k: x.to("cuda", torch.bfloat16 if x.is_floating_point() and not autocast else None)
        for k, x in given.items()
    }
    for tensors in (given, on_device):
        for name in ("student_hidden", "student_weight", "student_bias"):
            tensors[name].requires_grad_()
    expected = naive(**given, divergence=divergence)
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        found = chunked_distillation_loss(
            **on_device, divergence=divergence, byte_budget=4 * V * 200
        )
    assert found.loss.dtype == torch.float32
    torch.testing.assert_close(found.loss.cpu(), expected.loss, rtol=0.02, atol=0.0)
    for mine, theirs in zip(
        gradients(found.loss, on_device), gradients(expected.loss, given), strict=True
    ):
        assert mine.dtype == (torch.float32 if autocast else torch.bfloat16)
        assert F.cosine_similarity(mine.cpu().float().flatten(), theirs.flatten(), dim=0) > 0.999
