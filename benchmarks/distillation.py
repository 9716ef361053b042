"""What distilling a language model's logits costs: memory and time of the loss and its backward.

Cross-entropy and divergence from hidden states and two output projections, with the gradients of
the student's hidden states and weight. Each call is in a fresh process, the methods take turns, and
the medians count. On a CPU it is CPU time that counts: wall time would measure what else a shared
machine is doing. Peak memory is what the call adds to what the process held before it, the
gradients it leaves included.

1. `kl`: forward KL + cross-entropy, V = 128,256.
2. `jsd`: JSD(0.5), V = 32,000.

Methods: `products`, the four matrix products alone (two projections, two gradients), in chunks;
`naive`, all logits and autograd; `ours`, `chunked_distillation_loss`; `liger`,
`LigerFusedLinearJSDLoss` as it is and with chunks of 128 tokens, uncompiled on a CPU; `trl`,
`trl.trainer.distillation_trainer._chunked_divergence_loss`, which has no cross-entropy: in `kl` it
does less than the others.

    python benchmarks/distillation.py [--rounds 3] [--cases kl jsd] [--device cuda]

About a quarter of an hour on two cores. On a GPU: V = 128,256, 8,192 tokens of width 4,096,
bfloat16 (Liger compiled, its default). Results: benchmarks/README.md.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import in_fresh_process, print_machine, print_table, progress

from hf_adapt.distillation.divergences import JensenShannon, forward_kl
from hf_adapt.distillation.language_models.chunked import chunked_distillation_loss
from hf_adapt.experiments.memory import peak, restarted_peak

METHODS = ["products", "naive", "ours", "liger", "liger-128", "trl"]
CASES = {"kl": (128_256, 0.0), "jsd": (32_000, 0.5)}  # classes, and beta as the peers have it
SHAPES = {"cpu": (2048, 512, torch.float32), "cuda": (8192, 4096, torch.bfloat16)}  # N, H
DIVERGENCES = {"kl": forward_kl, "jsd": JensenShannon(0.5)}

Tensors = list[torch.Tensor]


def make_inputs(classes: int, tokens: int, width: int, device: str) -> Tensors:
    """Hidden states and weight of the student, of the teacher, and labels."""
    torch.manual_seed(0)
    dtype = SHAPES[device][2]
    tensors = []
    for _ in range(2):
        hidden = torch.randn(tokens, width, device=device, dtype=dtype)
        weight = torch.randn(classes, width, device=device, dtype=dtype).mul_(width**-0.5)
        tensors += [hidden, weight]
    for student in tensors[:2]:
        student.requires_grad_()
    return [*tensors, torch.randint(0, classes, (tokens,), device=device)]


def products(case: str, student: torch.Tensor, weight: torch.Tensor, *others: torch.Tensor) -> None:
    """The floor: the products that every method needs, and a chunk of logits."""
    teacher, teacher_weight, _ = others
    step = min(len(student), 2048 if student.is_cuda else 512)
    student.grad, weight.grad = torch.zeros_like(student), torch.zeros_like(weight)
    logits = student.new_empty(step, len(weight))
    with torch.no_grad():
        for start in range(0, len(student), step):
            rows = slice(start, start + step)
            torch.mm(teacher[rows], teacher_weight.t(), out=logits)
            torch.mm(student[rows], weight.t(), out=logits)
            torch.mm(logits, weight, out=student.grad[rows])
            weight.grad.addmm_(logits.t(), student[rows])


def naive(case: str, *tensors: torch.Tensor) -> torch.Tensor:
    """What a training script would write."""
    student, weight, teacher, teacher_weight, labels = tensors
    logits = student @ weight.t()
    with torch.no_grad():
        teacher_logits = teacher @ teacher_weight.t()
    loss = DIVERGENCES[case](logits, teacher_logits, 1.0).mean()
    return loss + F.cross_entropy(logits.float(), labels) if case == "kl" else loss


def ours(case: str, *tensors: torch.Tensor) -> torch.Tensor:
    """`chunked_distillation_loss`, its default budget."""
    *heads, labels = tensors
    factor = 1 / len(labels)
    return chunked_distillation_loss(
        *heads,
        labels if case == "kl" else None,
        ce_factor=factor,
        kd_factor=factor,
        divergence=DIVERGENCES[case],
    ).loss


def liger(case: str, *tensors: torch.Tensor, **settings: Any) -> torch.Tensor:
    """Liger, gradients in the forward, chunk by chunk, through autograd."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    hard = 1.0 if case == "kl" else 0.0
    compiled = tensors[0].is_cuda
    return LigerFusedLinearJSDLoss(hard, 1.0, CASES[case][1], compiled=compiled, **settings)(
        *tensors
    )


def trl(case: str, *tensors: torch.Tensor) -> torch.Tensor:
    """TRL, tiles of tokens and classes, computed again in the backward."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    student, weight, teacher, teacher_weight, labels = tensors
    mask = torch.ones_like(labels)[None]
    return _chunked_divergence_loss(
        student[None], teacher[None], weight, teacher_weight, mask, beta=CASES[case][1]
    )[0]


FUNCTIONS: dict[str, Callable[..., torch.Tensor | None]] = {
    "products": products,
    "naive": naive,
    "ours": ours,
    "liger": liger,
    "liger-128": lambda *args: liger(*args, chunk_size=128),
    "trl": trl,
}


def step(method: str, case: str, tensors: Tensors) -> float | None:
    """One loss and backward."""
    for student in tensors[:2]:
        student.grad = None
    loss = FUNCTIONS[method](case, *tensors)
    if loss is None:
        return None
    loss.backward()
    return loss.item()


def measure(method: str, case: str, device: str, folder: Path) -> dict[str, Any]:
    """Time, peak memory, and the largest difference from `naive` over the largest value."""
    tokens, width, _ = SHAPES[device]
    step(method, case, make_inputs(1000, 128, 64, device))  # imports, threads, libraries
    tensors = make_inputs(CASES[case][0], tokens, width, device)
    if device == "cuda":
        for _ in range(2):
            step(method, case, tensors)
        for student in tensors[:2]:
            student.grad = None
        torch.cuda.synchronize()
    before = restarted_peak(device)
    cpu, wall = time.process_time(), time.perf_counter()
    loss = step(method, case, tensors)
    if device == "cuda":
        torch.cuda.synchronize()
    result = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    result["megabytes"] = (peak(device) - before) / 1e6
    found, file = [torch.tensor(loss or 0.0), *(x.grad for x in tensors[:2])], folder / "naive.pt"
    if method == "naive":
        torch.save(found, file)
    elif file.exists() and method != "products" and (method, case) != ("trl", "kl"):
        pairs = zip(found, torch.load(file), strict=True)
        result["differences"] = [float((a - b).abs().max() / b.abs().max()) for a, b in pairs]
    return result


def main() -> None:
    """Run all methods in turn, each in its own process, and print a table of each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)  # a child: method, case, folder
    options = parser.parse_args()
    torch.set_num_threads(2)
    if options.only:
        method, case, folder = options.only
        print(json.dumps(measure(method, case, options.device, Path(folder))))
        return
    cases = options.cases if options.device == "cpu" else ["kl"]
    print_machine(options.device, "torch", "transformers", "liger-kernel", "trl")
    environment = {"OMP_WAIT_POLICY": "PASSIVE"}  # a waiting thread costs no CPU time
    for case in cases:
        runs: dict[str, list[dict[str, Any]]] = {method: [] for method in options.methods}
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(options.rounds):
                for method in options.methods:
                    found = in_fresh_process(
                        __file__,
                        *("--device", options.device, "--only", method, case, folder),
                        environment=environment,
                    )
                    runs[method].append(found)
                    progress({"case": case, "method": method, **found})
        report(case, runs, "cpu" if options.device == "cpu" else "wall")


def report(case: str, runs: dict[str, list[dict[str, Any]]], clock: str) -> None:
    """Medians, ratios to the products by the same round's clock, and the largest differences."""
    lines = []
    for method, rounds in runs.items():
        line: dict[str, Any] = {"case": case, "method": method}
        for key in ("megabytes", "cpu", "wall"):
            line[key] = round(statistics.median(run[key] for run in rounds), 2)
        for other in ("products", "ours"):
            if other in runs:
                pairs = zip(rounds, runs[other], strict=True)
                ratios = [run[clock] / base[clock] for run, base in pairs]
                line[f"time / {other}"] = round(statistics.median(ratios), 3)
        if "ours" in runs:
            memory = statistics.median(run["megabytes"] for run in runs["ours"])
            line["memory / ours"] = round(line["megabytes"] / memory, 2)
        differences = [run["differences"] for run in rounds if "differences" in run]
        if differences:
            largest = [max(each) for each in zip(*differences, strict=True)]
            line["difference of loss, dH, dW"] = ", ".join(f"{x:.1e}" for x in largest)
        lines.append(line)
    print_table(lines)


if __name__ == "__main__":
    main()
