"""Cross-entropy and distillation over a large vocabulary, without the logits of all tokens.

The gradients are formed in the forward, from one chunk of tokens at a time: four matrix products as
in the plain loss (two projections, two gradients), none repeated, and no tensor of N x V. On a CPU
the passes over a chunk's logits run in blocks of a few rows, which stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_adapt.distillation.divergences import (
    Divergence,
    forward_kl,
    named_divergence,
)
from hf_adapt.distillation.language_models.block_losses import SCRATCH, BlockLoss
from hf_adapt.distillation.language_models.checks import (
    check_classes,
    check_head,
    check_tokens,
    require,
)

IGNORED = -100
_MM_INTO_FLOAT32 = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)


class _Limits(NamedTuple):
    """Limits of the tensors of a chunk by V."""

    budget: int  # bytes of all of them, those of a block included
    rows: int  # of a chunk; more gain nothing
    block: int  # elements of a block by V


# Measured on two cores at V = 128,256: with chunks of 64, 128, 256 and 512 rows the matrix products
# take 1.9, 1.4, 1.06 and 1 times as long; a pass over blocks of 2 to 8 rows is 3 to 10 times as
# fast as over a chunk. On a device a chunk must outweigh the traffic of a float32 V x H: that is
# arithmetic, not a measurement.
_CPU_LIMITS = _Limits(2**28, 512, 2**19)
_DEVICE_LIMITS = _Limits(2**31, 2**13, 2**25)


class ChunkedLoss(NamedTuple):
    """The output of [`chunked_distillation_loss`]: `loss` has a gradient, the sums do not."""

    loss: Tensor
    ce_sum: Tensor
    kd_sum: Tensor


class _Head(NamedTuple):
    """A model's last hidden states and its output projection, without their graph."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype  # of the matrix products

    @classmethod
    def of(
        cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, statistics: torch.dtype
    ) -> _Head:
        """On a CPU, slow in half precision, products in the statistics' dtype; else as they come.

        A device casts the weight once, if autocast is on; a CPU by pieces (`slices`).
        """
        hidden, weight, kind = hidden.detach(), weight.detach(), hidden.device.type
        dtype = statistics if kind == "cpu" else hidden.dtype
        if kind != "cpu" and torch.is_autocast_enabled(kind) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
        weight = weight if kind == "cpu" else weight.to(dtype)
        return cls(hidden, weight, None if bias is None else bias.detach(), dtype)

    def slices(self, classes: int) -> Iterator[tuple[slice, Tensor]]:
        """The weight of the first classes in `dtype`: whole, or piece by piece if it must be cast.

        A piece is about 16 MB, so that no float32 copy of a half-precision head is kept.
        """
        whole = self.weight.dtype == self.dtype
        step = classes if whole else max(1, 2**22 // self.weight.shape[1])
        for start in range(0, classes, step):
            part = slice(start, min(start + step, classes))
            yield part, self.weight[part].to(self.dtype)

    def project(self, rows: Tensor, out: Tensor) -> None:
        """Write the logits of some rows into `out`, whose dtype is that of the statistics."""
        hidden = self.hidden[rows].to(self.dtype)
        for part, weight in self.slices(out.shape[1]):
            _matmul(hidden, weight.t(), out[:, part])
        if self.bias is not None:
            out.add_(self.bias[: out.shape[1]])


def _matmul(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out = a @ b`, where half-precision factors need not round a float32 `out`."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif _MM_INTO_FLOAT32 and out.is_cuda and out.dtype == torch.float32:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        out.copy_(a @ b)


def _add_matmul(out: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """`out += scale * a @ b`, likewise; the factors keep their range, as `scale` comes last."""
    if a.dtype == out.dtype:
        out.addmm_(a, b, alpha=scale)
    elif _MM_INTO_FLOAT32 and out.is_cuda and out.dtype == torch.float32:
        torch.addmm(out, a, b, out_dtype=torch.float32, alpha=scale, out=out)
    else:
        out.add_(a @ b, alpha=scale)


class _Group(NamedTuple):
    """Tokens that need the same: the cross-entropy, the divergence, or both."""

    rows: Tensor
    labels: Tensor | None
    kd: bool


class _Job(NamedTuple):
    """The inputs of the loss that need no gradient."""

    teacher: _Head
    groups: list[_Group]
    objective: BlockLoss
    scale: float  # of the objective's two factors
    dtype: torch.dtype  # of the statistics
    limits: _Limits

    def sizes(self, student: _Head) -> tuple[int, int]:
        """Rows of a block and of a chunk, within the budget."""
        width, element = student.weight.shape[0], self.dtype.itemsize
        scratch = SCRATCH * element * width
        row = 2 * element * width  # both models' logits
        if student.dtype != self.dtype:  # and as the matrix products give and take them
            row += 2 * student.dtype.itemsize * width
        budget, rows, elements = self.limits
        block = min(rows, max(1, elements // width))
        chunk = min(rows, (budget - block * scratch) // row)
        if chunk < block:
            block = chunk = max(1, budget // (row + scratch))
        return block, chunk


class _Gradients:
    """The gradients of the student's hidden states, weight and bias, where needed."""

    def __init__(self, student: _Head, dtype: torch.dtype, needs: tuple[bool, ...]) -> None:
        hidden, weight, bias, _ = student
        self.student = student
        self.hidden = torch.zeros_like(hidden, dtype=dtype) if needs[0] else None
        self.weight = torch.zeros_like(weight, dtype=dtype) if needs[1] else None
        needed = needs[2] and bias is not None
        self.bias = weight.new_zeros(len(weight), dtype=dtype) if needed else None

    def add(self, rows: Tensor, gradient: Tensor, scale: float) -> None:
        """Add the share of some rows, from the gradient of their logits."""
        student, width = self.student, gradient.shape[1]
        if self.bias is not None:
            self.bias[:width].add_(gradient.sum(0), alpha=scale)
        gradient = gradient.to(student.dtype)
        if self.hidden is not None:
            part = self.hidden.new_zeros(len(rows), self.hidden.shape[1])
            for columns, weight in student.slices(width):
                _add_matmul(part, gradient[:, columns], weight, scale)
            self.hidden[rows] = part
        if self.weight is not None:
            hidden = student.hidden[rows].to(student.dtype)
            _add_matmul(self.weight[:width], gradient.t(), hidden, scale)


def _run(student: _Head, job: _Job, gradients: _Gradients) -> tuple[Tensor, Tensor]:
    """Compute the sums of cross-entropy and divergence, and add up the gradients."""
    longest = max((len(group.rows) for group in job.groups), default=0)
    block, chunk = job.sizes(student)
    v = student.weight.shape[0]
    logits = student.hidden.new_empty(2, min(chunk, longest) * v, dtype=job.dtype)
    scratch = logits.new_empty(SCRATCH, min(block, longest) * v)
    ce_sum, kd_sum = logits.new_zeros(()), logits.new_zeros(())
    for rows, labels, kd in job.groups:
        width = job.objective.classes if labels is None else v
        step = -(-len(rows) // -(-len(rows) // chunk))  # chunks of equal size
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            s = logits[0, : len(part) * width].view(-1, width)
            student.project(part, s)
            t = None
            if kd:
                t = logits[1, : len(part) * job.objective.classes].view(len(part), -1)
                job.teacher.project(part, t)
            for first in range(0, len(part), block):
                here = slice(first, first + block)
                own = None if labels is None else labels[start : start + step][here]
                ce_part, kd_part = job.objective.block(
                    s[here], None if t is None else t[here], own, scratch
                )
                ce_sum.add_(ce_part)
                kd_sum.add_(kd_part)
            if job.objective.gradient:
                gradients.add(part, s, job.scale)
    return ce_sum, kd_sum


class _GradientsInForward(torch.autograd.Function):
    """The loss, whose gradients are computed in its forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        job: _Job,
        needs: tuple[bool, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Both sums and all gradients, with autocast off: the dtypes are chosen here."""
        student = _Head.of(hidden, weight, bias, job.dtype)
        gradients = _Gradients(student, job.dtype, needs)
        with torch.autocast(hidden.device.type, enabled=False):
            ce_sum, kd_sum = _run(student, job, gradients)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        formed = zip((gradients.hidden, gradients.weight, gradients.bias), ctx.dtypes, strict=True)
        # float16 has to wait for the gradient scaler's factor, which comes with `grad_loss`.
        ctx.save_for_backward(
            *(x if x is None or dtype == torch.float16 else x.to(dtype) for x, dtype in formed)
        )
        ctx.mark_non_differentiable(ce_sum, kd_sum)
        loss = job.scale * (job.objective.ce * ce_sum + job.objective.kd * kd_sum)
        return loss, ce_sum, kd_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """The saved gradients times that of the loss.

        Times 1, the usual case, they are handed on as they are, and AccumulateGrad makes them
        `.grad` without a copy. Otherwise the product is a new tensor and the saved ones stay, for
        a second backward. It is no new peak: the chunk's buffers, larger as a rule, are gone.
        """
        saved = list(ctx.saved_tensors)
        if bool(grad_loss != 1):
            saved = [None if x is None else x * grad_loss for x in saved]
        pairs = zip(saved, ctx.dtypes, strict=True)
        return (*(None if x is None else x.to(dtype) for x, dtype in pairs), None, None)


def _groups(hidden: Tensor, labels: Tensor | None, kd_mask: Tensor | None) -> list[_Group]:
    """The tokens with both terms, and with one of them only; the others are dropped."""
    everything = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
    ce = ~everything if labels is None else labels != IGNORED
    default = everything if labels is None else ce
    kd = default if kd_mask is None else kd_mask
    groups = []
    for mask, has_kd in ((ce & kd, True), (ce & ~kd, False)):
        rows = mask.nonzero().squeeze(1)
        if labels is not None and len(rows):
            groups.append(_Group(rows, labels[rows, None].long(), has_kd))
    rows = (kd & ~ce).nonzero().squeeze(1)
    return [*groups, _Group(rows, None, True)] if len(rows) else groups


def chunked_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None,
    *,
    ce_factor: float | Tensor = 1.0,
    kd_factor: float | Tensor = 1.0,
    kd_mask: Tensor | None = None,
    temperature: float = 1.0,
    divergence: str | Divergence = forward_kl,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    vocabulary: int | None = None,
    byte_budget: int | None = None,
) -> ChunkedLoss:
    r"""Cross-entropy plus divergence from a teacher, summed over tokens, without N x V logits.

    .. math::
        L = \lambda_{ce} \sum_i CE(W s_i, y_i) + \lambda_{kd} \sum_i D(W s_i, V t_i)

    with the hidden states s and t and the output projections W and V of student and teacher. For
    language models, where the logits are the largest tensors of a step; with a small vocabulary
    the plain losses are as good. Statistics and sums are in at least float32; matrix products run
    in the inputs' dtype (or autocast's) on a device, and in float32 on a CPU. No gradient is
    computed under `no_grad` and for frozen tensors. It can be differentiated once, not twice.

    Reference:
        Hsu et al. 2024, "Liger Kernel: Efficient Triton Kernels for LLM Training",
        arXiv:2410.10989, FusedLinearCrossEntropy, for forming gradients in the forward.
        Deviation: chunks from a budget of bytes; all of it torch operations.

    Args:
        student_hidden: The input of the student's output projection.
        student_weight: The weight of the student's output projection.
        teacher_hidden: The input of the teacher's output projection; gets no gradient.
        teacher_weight: The weight of the teacher's output projection; gets no gradient.
        labels: The right class of each row, already shifted; -100 for none. None: no cross-entropy.
        ce_factor: Factor of the sum of cross-entropies; for a mean, 1 / the number of labels.
        kd_factor: Factor of the sum of divergences. Neither factor gets a gradient.
        kd_mask: The rows with a divergence. By default those with a label, or all without labels.
        temperature: Temperature of the divergence; that of the cross-entropy is 1.
        divergence: A name (`"forward_kl"`, `"reverse_kl"`, `"jsd"`, `"mse"`) or its function, whose
            gradient is known and computed in place, or another function, whose gradient autograd
            computes, a block of rows at a time.
        student_bias: The bias of the student's output projection.
        teacher_bias: The bias of the teacher's output projection.
        vocabulary: The divergence compares the first so many classes of both heads, which may then
            differ in size (padding). The cross-entropy is over all of the student's.
        byte_budget: Memory of all tensors of a chunk by V together, which sets the tokens of a
            chunk. By default 256 MiB on a CPU and 2 GiB elsewhere. At most 512 tokens on a CPU,
            8,192 elsewhere: more gain nothing. The gradients (N x H, and V x H in float32) and
            what autograd keeps of a block for another function come on top.

    Shape:
        - hidden: (N, H), weight: (V, H), bias: (V,), H of each model; labels, kd_mask: (N,).
        - output: three of (); rows that neither term uses cost nothing, and without any all are 0.

    Raises:
        ValueError: If shapes do not fit, `vocabulary` exceeds a head, or `temperature` or
            `byte_budget` is not positive.

    Example:
        >>> hidden, head = torch.ones(2, 4, requires_grad=True), torch.eye(3, 4)
        >>> labels = torch.tensor([0, -100])
        >>> out = chunked_distillation_loss(hidden, head, torch.ones(2, 4), head, labels)
        >>> [round(value.item(), 4) for value in out]
        [1.0986, 1.0986, 0.0]
        >>> out.loss.backward()
        >>> hidden.grad.tolist()[1]
        [0.0, 0.0, 0.0, 0.0]
    """
    check_head("student", student_hidden, student_weight, student_bias)
    check_head("teacher", teacher_hidden, teacher_weight, teacher_bias)
    check_tokens(len(student_hidden), teacher_hidden=teacher_hidden, labels=labels, kd_mask=kd_mask)
    sizes = len(student_weight), len(teacher_weight)
    check_classes(*sizes, vocabulary)
    limits = _CPU_LIMITS if student_hidden.device.type == "cpu" else _DEVICE_LIMITS
    budget = limits.budget if byte_budget is None else byte_budget
    require(temperature > 0, "temperature above 0", temperature, "1 leaves logits as they are.")
    require(budget > 0, "byte_budget above 0", budget, "Leave it out for the default.")
    inputs = student_hidden, student_weight, student_bias
    needs = tuple(x is not None and x.requires_grad and torch.is_grad_enabled() for x in inputs)
    dtype = torch.promote_types(student_hidden.dtype, teacher_hidden.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    ce, kd = float(ce_factor), float(kd_factor)
    scale = max(abs(ce), abs(kd)) or 1.0  # half precision would lose gradients of 1 / tokens
    objective = BlockLoss(
        ce / scale,
        kd / scale,
        named_divergence(divergence),
        float(temperature),
        min(sizes) if vocabulary is None else vocabulary,
        any(needs),
    )
    with torch.no_grad():
        teacher = _Head.of(teacher_hidden, teacher_weight, teacher_bias, dtype)
        groups = _groups(student_hidden, labels, kd_mask)
    job = _Job(teacher, groups, objective, scale, dtype, limits._replace(budget=budget))
    return ChunkedLoss(*_GradientsInForward.apply(*inputs, job, needs))  # type: ignore[no-untyped-call]
