"""What a distillation step costs, and who is exact under gradient accumulation.

1. `cost`: a step of `DistillationTrainer` against a step of the plain `Trainer` on the same student
   plus a forward of the teacher, in turns, by the CPU time of one thread.
2. `accumulation`: the norm of the first gradient with 8 micro-batches of one row over that with one
   micro-batch of 8, and the cosine between them; exact is 1 and 1. Without dropout or clipping, on
   rows of unequal length, for ours and for two public ways:
   - `guide`: a Trainer subclass as transformers' guide "Knowledge Distillation for Computer Vision"
     writes it: `compute_loss` returns (1 - λ) task loss + λ T² KL, means over the micro-batch;
   - `trl`: `trl.experimental.gkd.GKDTrainer` off-policy (lmbda=0), JSD alone, for the language
     model.
3. `memory`: what a step on 8 rows of 64 tokens adds at its peak to the memory held before it, with
   whole logits and without. The teacher is SmolLM2-135M-Instruct, the student half its layers.

    python benchmarks/distillation_steps.py [--rounds 9] [--steps 4] [--parts memory]

Four minutes on two cores. Results: benchmarks/README.md; of `memory`: docs/results.md.
"""

import argparse
import gc
import os
import tempfile
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import datasets
import torch
import torch.nn.functional as F
from language_models import load_model
from measure import Clock, in_turns, print_machine, print_table, ratio
from model_weights import smollm2_path
from transformers import (
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from workload import WITHOUT_DROPOUT, bert, quiet_arguments, step_seconds

from hf_adapt import DistillationTrainer
from hf_adapt.distillation import student_from_teacher
from hf_adapt.experiments.memory import peak, restarted_peak

ROWS, TOKENS, WARM_UP = 16, 64, 2
BERT = {"num_labels": 3, **WITHOUT_DROPOUT}


def llama(seed: int) -> LlamaForCausalLM:
    """A small LLaMA with random weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=200,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=128,
            pad_token_id=0,
        )
    )


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad to the longest row."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(values: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([[*v, *[value] * (longest - len(v))] for v in values])

    batch = {
        "input_ids": padded([r["input_ids"] for r in rows], 0),
        "attention_mask": padded([[1] * len(r["input_ids"]) for r in rows], 0),
    }
    labels = [row["labels"] for row in rows]
    ragged = isinstance(labels[0], list)
    batch["labels"] = padded(labels, -100) if ragged else torch.tensor(labels)
    return batch


# ---------------------------------------------------------------- what a step costs
def cost(rounds: int, steps: int) -> None:
    """Print the ratio of a step with a teacher to a plain step and a teacher's forward."""
    teacher = bert(BertForSequenceClassification, 12, seed=1, **BERT).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 30000, (ROWS * (steps + WARM_UP), TOKENS), generator=generator)
    rows = [{"input_ids": row.tolist(), "labels": i % 3} for i, row in enumerate(ids)]
    data = datasets.Dataset.from_list(rows)

    def train(**options: Any) -> float:
        student = bert(BertForSequenceClassification, 6, **BERT)
        settings = {"remove_unused_columns": False}
        options |= {"settings": settings, "data_collator": collate}
        return step_seconds(student, data, ROWS, steps, WARM_UP, **options)

    def forward() -> float:
        clock = Clock()
        clock.tick()
        with torch.no_grad():
            for _ in range(steps + WARM_UP):
                teacher(input_ids=ids[:ROWS], attention_mask=torch.ones_like(ids[:ROWS]))
                clock.tick()
        return clock.median(WARM_UP)

    sides = {
        "distillation": lambda: train(kind=DistillationTrainer, teacher=teacher),
        "forward": forward,
        "plain": train,
    }
    seconds = in_turns(sides, rounds)
    both = [a + b for a, b in zip(seconds["plain"], seconds["forward"], strict=True)]
    comparison = "distillation step / (plain step + teacher forward)"
    print_table([ratio(comparison, seconds["distillation"], both)])


# ---------------------------------------------------------------- who is exact
class Guide(Trainer):
    """The usual subclass: both terms are means over the micro-batch."""

    def __init__(self, *args: Any, teacher: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher.eval()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        outputs = model(**inputs)
        with torch.no_grad():
            target = self.teacher(**inputs).logits
        student, target = outputs.logits / 2, target / 2
        term = F.kl_div(student.log_softmax(-1), target.softmax(-1), reduction="batchmean") * 4
        loss = 0.5 * outputs.loss + 0.5 * term
        return (loss, outputs) if return_outputs else loss


class Gradient(TrainerCallback):
    """The gradient of the first step."""

    def __init__(self) -> None:
        self.value = torch.zeros(0)

    def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        self.value = torch.cat([p.grad.flatten().double() for p in model.parameters()])


def rows_of(kind: str) -> datasets.Dataset:
    """Eight rows of unequal length."""
    generator, made = torch.Generator().manual_seed(0), []
    for index in range(8):
        ids = torch.randint(5, 200, (5 + 3 * index,), generator=generator).tolist()
        labels: Any = index % 3
        if kind == "tokens":
            labels = [i % 3 for i in ids]
        elif kind == "language model":
            labels = list(ids)
        made.append({"input_ids": ids, "labels": labels})
    return datasets.Dataset.from_list(made)


def first_gradient(way: str, kind: str, size: int, steps: int, folder: str) -> torch.Tensor:
    """The gradient of one optimizer step over the eight rows."""
    recorder, small = Gradient(), {"vocab_size": 200, **BERT}
    makers = {
        "rows": lambda seed: bert(BertForSequenceClassification, 2, 64, seed, **small),
        "tokens": lambda seed: bert(BertForTokenClassification, 2, 64, seed, **small),
        "language model": llama,
    }
    settings = quiet_arguments(
        folder,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=steps,
        max_steps=1,
        max_grad_norm=0.0,
        remove_unused_columns=False,
    )
    given: dict[str, Any] = dict(
        model=makers[kind](0), train_dataset=rows_of(kind), callbacks=[recorder]
    )
    if way == "trl":
        trainer = _trl(makers[kind](1), settings, given)
    else:
        cls = DistillationTrainer if way == "ours" else Guide
        trainer = cls(
            **given,
            args=TrainingArguments(**settings),
            data_collator=collate,
            teacher=makers[kind](1),
        )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return recorder.value


def _trl(teacher: Any, settings: dict[str, Any], given: dict[str, Any]) -> Trainer:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    class Collate:
        """Rows as GKD wants them: a prompt beside the whole."""

        def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            batch = collate(rows)
            batch["labels"][:, 0] = -100  # the first token is the prompt
            batch["prompts"] = batch["input_ids"][:, :1]
            batch["prompt_attention_mask"] = batch["attention_mask"][:, :1]
            return batch

    words = Tokenizer(models.WordLevel({str(i): i for i in range(200)}, "1"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="2")
    args = GKDConfig(
        **settings,
        lmbda=0.0,
        bf16=False,
        gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    return GKDTrainer(
        teacher_model=teacher,
        args=args,
        data_collator=Collate(),
        processing_class=tokenizer,
        **given,
    )


def accumulation() -> None:
    """Print the ratio of norms and the cosine for each way."""
    ways = [
        (way, kind) for kind in ("rows", "tokens", "language model") for way in ("ours", "guide")
    ]
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for way, kind in [*ways, ("trl", "language model")]:
            line: dict[str, Any] = {"way": way, "head": kind}
            try:
                whole = first_gradient(way, kind, 8, 1, folder)
                cut = first_gradient(way, kind, 1, 8, folder)
            except Exception as error:  # another version of a peer: its line says why
                lines.append({**line, "failed": repr(error)[:200]})
                continue
            line["norm of 8 × 1 / norm of 1 × 8"] = f"{float(cut.norm() / whole.norm()):.3f}"
            line["cosine"] = f"{float(F.cosine_similarity(whole, cut, dim=0)):.3f}"
            lines.append(line)
    print_table(lines)


# ---------------------------------------------------------------- what logits take
class StepMemory(TrainerCallback):
    """How much more memory the last step held at its peak than at its start, in bytes."""

    added: int | None = None  # unknown where there is no /proc

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        gc.collect()
        self.start = restarted_peak("cpu")

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.added = None if self.start is None else peak("cpu") - self.start


def memory() -> None:
    """Print the memory of a step of a language model, with whole logits and without."""
    teacher, lines = load_model(str(smollm2_path())), []
    ids = torch.randint(teacher.config.vocab_size, (16, 64)).tolist()
    rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})
    for name, chunked in (("whole logits", False), ("in pieces", True)):
        student, measured = student_from_teacher(teacher, 15), StepMemory()
        options = {"kind": DistillationTrainer, "teacher": teacher, "chunked": chunked}
        # The second step counts: the first one also makes the optimizer's moments.
        step_seconds(student, rows, 8, 1, 1, callbacks=[measured], **options)
        found = None if measured.added is None else f"{measured.added / 2**20:.0f} MiB"
        lines.append({"a step of 512 tokens": name, "adds": found})
    print_table(lines)


def main() -> None:
    """Print a table for each comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4)
    parts = ["accumulation", "cost", "memory"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print_machine("cpu", "torch", "transformers", "accelerate", "trl")
    if "accumulation" in options.parts:
        accumulation()
    if "cost" in options.parts:
        cost(options.rounds, options.steps)
    if "memory" in options.parts:
        memory()


if __name__ == "__main__":
    main()
