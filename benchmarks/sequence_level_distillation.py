"""What does a small language model learn from text that its teacher wrote, and not people?

A language model continues the openings of sentences; half of its layers are then trained on what
it wrote, on what people wrote after the same openings, and on what it wrote with its logits beside
(one `DistillationTrainer` on the same rows). Training on the teacher's text needs nothing but a
plain Trainer, and no common vocabulary. The test is how well each student predicts the teacher's
and people's continuations of openings that it has not seen.

Reference: Kim & Rush 2016, "Sequence-Level Knowledge Distillation", arXiv:1606.07947.
Deviation: greedy decoding with a repetition penalty instead of a beam search.

    python benchmarks/sequence_level_distillation.py

About four minutes on two cores. Writes results.json and table.md to --output_dir; the results are
in docs/distillation.md. Every option of TrainingArguments can be given as well.
"""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from domain_data import LICENCES
from experiment import DOMAINS, option, parse, run
from language_models import load_model, texts_of
from model_weights import SMOLLM2_LICENCE, smollm2_path
from results import report
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    default_data_collator,
    set_seed,
)

from hf_adapt import DistillationTrainer
from hf_adapt.distillation import student_from_teacher

MODELS = {
    "before": "not trained",
    "people": "people's text",
    "teacher": "teacher's text",
    "both": "teacher's text and logits",
}

TRAINING_DEFAULTS = {
    "output_dir": "runs/sequence_level_distillation",
    "max_steps": 30,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "warmup_steps": 5,
}


@dataclass
class ExampleArguments:
    domain: str = option("movies", f"Where prompts are from. {LICENCES['vader4']}", choices=DOMAINS)
    model_name_or_path: str | None = option(None, f"Of the teacher. Default: {SMOLLM2_LICENCE}")
    student_layers: int = option(15, "Layers of the teacher that the student keeps")
    num_prompts: int = option(96, "Openings that the teacher continues, for training")
    num_test: int = option(32, "Openings that it continues for the test")
    prompt_tokens: int = option(8, "Tokens of an opening")
    new_tokens: int = option(24, "Tokens of a continuation")


def prompts_of(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, script: ExampleArguments, number: int
) -> list[list[int]]:
    """The first texts that are long enough: as many tokens as opening and continuation have."""
    size = script.prompt_tokens + script.new_tokens
    found = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) >= size:
            found.append(ids[:size])
        if len(found) == number:
            break
    return found


@torch.no_grad()
def continued(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    script: ExampleArguments,
    tokenizer: PreTrainedTokenizerBase,
    size: int = 32,
) -> list[list[int]]:
    """The openings of some rows, with the most likely continuation of each (greedily)."""
    found: list[list[int]] = []
    for start in range(0, len(rows), size):
        ids = torch.tensor([row[: script.prompt_tokens] for row in rows[start : start + size]])
        found += model.generate(
            input_ids=ids.to(model.device),
            attention_mask=torch.ones_like(ids).to(model.device),
            do_sample=False,
            min_new_tokens=script.new_tokens,  # all rows stay of one length
            max_new_tokens=script.new_tokens,
            repetition_penalty=1.2,
            pad_token_id=tokenizer.eos_token_id,
        ).tolist()
    return found


def dataset_of(rows: Sequence[Sequence[int]], prompt_tokens: int) -> Dataset:
    """The continuation alone is learnt, and tested."""
    labels = [[-100] * prompt_tokens + list(row[prompt_tokens:]) for row in rows]
    return Dataset.from_dict({"input_ids": [list(row) for row in rows], "labels": labels})


@torch.no_grad()
def agreement(model: PreTrainedModel, teacher: PreTrainedModel, rows: Dataset) -> float:
    """Share of tokens for which both models, given what is before, would choose the same."""
    same = total = 0
    for start in range(0, len(rows), 16):
        batch = rows[start : start + 16]
        ids = torch.tensor(batch["input_ids"]).to(model.device)
        learnt = torch.tensor(batch["labels"])[:, 1:] != -100
        own, theirs = (
            m(input_ids=ids).logits[:, :-1].argmax(-1).cpu() for m in (model.eval(), teacher)
        )
        same += ((own == theirs) & learnt).sum().item()
        total += learnt.sum().item()
    return same / total


def main(argv: list[str] | None = None) -> None:
    script, args, console = parse(ExampleArguments, __doc__, argv, **TRAINING_DEFAULTS)
    console.print(f"[dim]{LICENCES['vader4']}[/dim]")
    if script.model_name_or_path is None:
        console.print(f"[dim]{SMOLLM2_LICENCE}[/dim]")
        script.model_name_or_path = str(smollm2_path())
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    teacher = load_model(script.model_name_or_path)

    console.print("The teacher writes")
    start = time.perf_counter()
    train, tests = {}, {}
    for split, number in (("train", script.num_prompts), ("test", script.num_test)):
        people = prompts_of(texts_of(script.domain, split), tokenizer, script, number)
        written = continued(teacher, people, script, tokenizer)
        found = train if split == "train" else tests
        found["people"] = dataset_of(people, script.prompt_tokens)
        found["teacher"] = found["both"] = dataset_of(written, script.prompt_tokens)
    writing = time.perf_counter() - start
    example = tokenizer.decode(written[0][: script.prompt_tokens])
    rest = tokenizer.decode(written[0][script.prompt_tokens :])
    console.print(f"  {example} [italic]{rest!r}[/italic]", highlight=False)

    results: dict[str, dict[str, Any]] = {}
    for name in MODELS:
        set_seed(args.seed)  # the same order of the rows for all
        model = student_from_teacher(teacher, script.student_layers)
        options: dict[str, Any] = {
            "train_dataset": train.get(name),
            "data_collator": default_data_collator,
        }
        if name == "both":  # with the logits it is word-level distillation too, on the same text
            trainer = DistillationTrainer(model, args, teacher=teacher, temperature=1.0, **options)
        else:
            trainer = Trainer(model, args, **options)
        start = time.perf_counter()
        if name != "before":
            trainer.train()
        results[name] = {
            "seconds": time.perf_counter() - start,
            "teacher's text": math.exp(trainer.evaluate(tests["teacher"])["eval_loss"]),
            "people's text": math.exp(trainer.evaluate(tests["people"])["eval_loss"]),
            "agreement": agreement(model, teacher, tests["teacher"]),
        }
        console.print(f"[bold]{MODELS[name]}[/bold] {results[name]}", highlight=False)
        del trainer, model
    if args.process_index != 0:
        return

    rows = [["trained on", "teacher's text", "people's text", "agreement", "seconds"]]
    for name, found in results.items():
        rows.append(
            [
                MODELS[name],
                f"{found[rows[0][1]]:.1f}",
                f"{found[rows[0][2]]:.1f}",
                f"{100 * found['agreement']:.1f}%",
                "–" if name == "before" else f"{found['seconds']:.0f}",
            ]
        )
    legend = (
        f"A student of {script.student_layers} layers: perplexity of {script.new_tokens} tokens "
        f"after {script.num_test} openings, as the teacher and as people continue them; share of "
        f"tokens that it would choose as the teacher. {script.num_prompts} openings to train on, "
        f"{args.max_steps} steps. The teacher wrote for {writing:.0f} seconds."
    )
    document = {"models": results, "writing_seconds": writing}
    report(rows, legend, document, {}, Path(args.output_dir), console)


if __name__ == "__main__":
    run(main)
