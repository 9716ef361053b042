"""Cross-entropy and divergence of a few rows of logits, and their gradient, in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_adapt.distillation.divergences import (
    ABSENT,
    Divergence,
    JensenShannon,
    forward_kl,
    logit_mse,
    reverse_kl,
)

SCRATCH = 4  # flat buffers of block x V: q, p, a product, and the q of the cross-entropy


@dataclass(frozen=True)
class BlockLoss:
    """ce * cross-entropy + kd * divergence of a block of rows, and its gradient by the logits."""

    ce: float
    kd: float
    divergence: Divergence
    temperature: float
    classes: int  # of the divergence
    gradient: bool

    def block(
        self, s: Tensor, t: Tensor | None, labels: Tensor | None, scratch: Tensor
    ) -> tuple[Tensor | float, Tensor | float]:
        """The two sums; the gradient overwrites the student's logits `s`, and `t` is overwritten.

        Where temperature and classes are those of the cross-entropy, both share one softmax.
        """
        n = 0 if t is None else self.classes
        analytic = t is not None and _is_softmaxed(self.divergence)
        shared = analytic and self.temperature == 1.0 and n == s.shape[1]
        separate = labels is not None and not shared
        picked = s.gather(1, labels) if labels is not None else s
        q, log_z = _softmax(s, _like(s, scratch[3])) if separate else (s, s)
        kd_sum: Tensor | float = 0.0
        if t is not None and analytic:
            ce = self.ce if shared and labels is not None else 0.0
            kd_sum, shared_log_z = self._softmaxed(s[:, :n], t, ce, scratch)
            log_z = shared_log_z if shared else log_z
        elif t is not None:
            rows = self._squared if self.divergence is logit_mse else self._own
            kd_sum = rows(s[:, :n], t)
        if self.gradient and separate:
            s[:, :n].add_(q[:, :n], alpha=self.ce)
            torch.mul(q[:, n:], self.ce, out=s[:, n:])
        if labels is None:
            return 0.0, kd_sum
        if self.gradient:
            s.scatter_add_(1, labels, s.new_full((), -self.ce).expand_as(labels))
        return (log_z - picked).sum(), kd_sum

    def _softmaxed(self, s: Tensor, t: Tensor, ce: float, scratch: Tensor) -> tuple[Tensor, Tensor]:
        """The divergences of distributions. `s` becomes ce * q + d(kd * divergence) / d logits."""
        temperature = self.temperature
        if temperature != 1.0:
            s.div_(temperature)
            t.div_(temperature)
        work = _like(s, scratch[2])
        q, q_log_z = _softmax(s, _like(s, scratch[0]))
        p, p_log_z = _softmax(t, _like(s, scratch[1]))
        k = self.kd * temperature  # T² of the divergence, 1 / T of the logits
        if self.divergence is forward_kl:
            t.sub_(s).sub_(p_log_z - q_log_z)  # log p - log q
            t.nan_to_num_(0.0, torch.inf, 0.0)  # where p is 0, the logit being -inf
            rows = torch.mul(p, t, out=work).sum(-1, keepdim=True)
            if self.gradient:
                torch.mul(q, ce + k, out=s).sub_(p, alpha=k)
            return rows.sum() * temperature**2, q_log_z
        if isinstance(self.divergence, JensenShannon):
            beta = self.divergence.beta
            mixture = torch.mul(p, beta, out=work).add_(q, alpha=1.0 - beta)
            mixture.clamp_(min=torch.finfo(s.dtype).tiny).log_()
            s.sub_(mixture).sub_(q_log_z)  # log q - log m = (dL/dq) / (1 - beta)
            t.sub_(mixture).sub_(p_log_z)
            for ratio in (s, t):
                ratio.clamp_(min=ABSENT)  # times a probability of 0, -inf would be NaN
            from_teacher = p.mul_(t).sum(-1, keepdim=True)
            mean = torch.mul(q, s, out=work).sum(-1, keepdim=True)
            rows = beta * from_teacher + (1.0 - beta) * mean
            k *= 1.0 - beta
        else:
            s.sub_(t).add_(p_log_z - q_log_z)  # log q - log p = dL/dq, but for a constant
            rows = mean = torch.mul(q, s, out=work).sum(-1, keepdim=True)
        if self.gradient:  # through the softmax: q_i (dL/dq_i - sum_j q_j dL/dq_j)
            s.mul_(k).add_(ce - k * mean).mul_(q)
        return rows.sum() * temperature**2, q_log_z

    def _squared(self, s: Tensor, t: Tensor) -> Tensor:
        """`logit_mse`."""
        absent = s <= ABSENT / 2
        number = (s.shape[1] - absent.sum(-1, keepdim=True)).clamp_(min=1)
        s.sub_(t).masked_fill_(absent, 0.0)
        total = (torch.mul(s, s, out=t).sum(-1, keepdim=True) / number).sum()
        s.mul_(2.0 * self.kd / number)
        return total

    def _own(self, s: Tensor, t: Tensor) -> Tensor:
        """Another function, whose gradient autograd computes."""
        with torch.set_grad_enabled(self.gradient):
            leaf = s.detach().requires_grad_(self.gradient)
            rows = self.divergence(leaf, t, self.temperature)
            if rows.shape != s.shape[:1]:
                raise ValueError(
                    "chunked_distillation_loss expects a divergence to return one value for each "
                    f"token, of shape {tuple(s.shape[:1])}, got {tuple(rows.shape)}. Sum over the "
                    "last dimension, the classes, and over no other."
                )
            total = rows.sum()
        if self.gradient:
            s.copy_(torch.autograd.grad(total, leaf)[0]).mul_(self.kd)
        return total.detach()


def _is_softmaxed(divergence: Divergence) -> bool:
    """Whether it compares distributions, with a gradient known here."""
    return divergence in (forward_kl, reverse_kl) or type(divergence) is JensenShannon


def _like(s: Tensor, flat: Tensor) -> Tensor:
    """The front of a flat buffer as a contiguous tensor of the shape of `s`."""
    return flat[: s.numel()].view(s.shape)


def _softmax(logits: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities, in `out`, and the logarithm of their normaliser (rows, 1).

    On a CPU torch sums a row's exponentials one after the other: at 128,256 classes the sum is off
    by some 1e-5. The sum of the result, which torch takes pairwise, corrects it.
    """
    torch.softmax(logits, -1, out=out)
    out.div_(out.sum(-1, keepdim=True))
    return out, logits.amax(-1, keepdim=True) - out.amax(-1, keepdim=True).log()
