"""A copy of a model must follow its own weights, also where the model's `forward` was replaced."""

import copy
import functools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import nn
from transformers import Trainer

from hf_adapt import AdaptationCallback, Distillation
from hf_adapt.distillation import ModelTeacher, SelfTeacher
from tests.helpers.data import collate, rows
from tests.helpers.libraries import SFT_DATA, sft
from tests.helpers.models import bert
from tests.helpers.trainers import arguments

IDS = torch.arange(5, 13).view(2, 4)


def by_method(model: Any) -> None:
    """As TRL does it."""
    original = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    model.forward = types.MethodType(forward, model)


def by_function(model: Any) -> None:
    """As accelerate does it under mixed precision."""
    model.forward = convert_outputs_to_fp32(model.forward)


def by_partial(model: Any) -> None:
    """As accelerate's hooks do it."""

    def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        return type(module).forward(module, *args, **kwargs)

    model.forward = functools.partial(forward, model)


def by_default(model: Any) -> None:
    model.forward = lambda *args, _run=model.forward, **kwargs: _run(*args, **kwargs)


def twice(model: Any) -> None:
    by_method(model)
    by_function(model)


def by_part(model: Any) -> None:
    """The closure holds a part of the original, and the original itself."""
    head, body = model.classifier, model

    def forward(input_ids: Any, **kwargs: Any) -> Any:
        hidden = body.bert(input_ids=input_ids).pooler_output
        return types.SimpleNamespace(logits=head(hidden))

    model.forward = forward


class Holder:
    """As a Trainer holds its model: it cannot be called."""

    def __init__(self, model: Any) -> None:
        self.model, self.run = model, type(model).forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self.model, *args, **kwargs)


def by_global(model: Any) -> None:
    """As at the top level of a script."""
    names = {"old": model.forward}
    exec("def forward(*args, **kwargs):\n    return old(*args, **kwargs)", names)
    model.forward = names["forward"]


def by_holder(model: Any) -> None:
    holder = Holder(model)
    model.forward = lambda *args, **kwargs: holder.run(holder.model, *args, **kwargs)


def by_method_of_a_holder(model: Any) -> None:
    run = Holder(model).forward
    model.forward = lambda *args, **kwargs: run(*args, **kwargs)


def by_parameter(model: Any) -> None:
    weight, run = model.classifier.weight, model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        outputs = run(*args, **kwargs)
        outputs.logits = outputs.logits + weight.sum()
        return outputs

    model.forward = forward


def by_hook(model: Any) -> None:
    def add(module: Any, args: Any, outputs: Any) -> Any:
        outputs.logits = outputs.logits + model.classifier.bias
        return outputs

    model.register_forward_hook(add)


BEYOND_CURE = [by_global, by_holder, by_method_of_a_holder, by_parameter, by_hook]
PATCHES = [by_method, by_function, by_partial, by_default, twice, by_part]


def output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.__name__)
@pytest.mark.parametrize("of_the_user", [False, True])
def test_a_teacher_follows_its_own_weights(
    patch: Callable[[Any], None], of_the_user: bool, tmp_path: Path
) -> None:
    student, other = bert(seed=0), bert(seed=1)
    expected, before = output(other), output(student)
    patch(student)
    teacher = copy.deepcopy(student)
    ModelTeacher(teacher)
    teacher.load_state_dict(other.state_dict())
    assert torch.equal(output(teacher), expected)
    assert torch.equal(output(student), before)


def test_a_forward_that_runs_another_model_is_refused() -> None:
    one, other = bert(seed=0), bert(seed=1)
    run = one.forward
    one.forward = lambda **inputs: run(**inputs).logits + other(**inputs).logits
    with pytest.raises(ValueError, match="would not follow its own weights"):
        ModelTeacher(one)
    part = bert(seed=0)
    head: nn.Module = other.classifier
    part.forward = lambda **inputs: head(part.bert(**inputs).pooler_output)
    with pytest.raises(ValueError, match="runs a Linear outside of it"):
        ModelTeacher(part)


@pytest.mark.parametrize(("kind", "lora"), [("self", False), ("copy", False), ("self", True)])
def test_distillation_on_sft_trainer_is_not_zero(kind: str, lora: bool, tmp_path: Path) -> None:
    source, _, settings = SFT_DATA["text"]
    trainer = sft(tmp_path, source, lora, **settings)
    trainer.args.max_steps, trainer.args.learning_rate = 3, 1.0 if lora else 1e-2
    teacher: Any = SelfTeacher(decay=0.9) if kind == "self" else copy.deepcopy(trainer.model)
    trainer.add_callback(AdaptationCallback(Distillation(teacher)))
    trainer.train()
    values = [log["loss/distillation"] for log in trainer.state.log_history if "loss" in log]
    assert values[0] == pytest.approx(0.0, abs=1e-6)
    assert values[-1] > 1e-5, values


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", ["self", "copy"])
@pytest.mark.parametrize("patch", BEYOND_CURE, ids=lambda patch: patch.__name__)
def test_a_copy_that_runs_on_the_students_weights_is_refused(
    patch: Callable[[Any], None], kind: str, frozen: bool, tmp_path: Path
) -> None:
    """Its predictions would be the student's own, whatever the student learns."""
    student = bert(seed=0)
    student.bert.requires_grad_(not frozen)
    patch(student)
    teacher: Any = SelfTeacher(decay=0.9) if kind == "self" else copy.deepcopy(student)
    trainer = Trainer(
        student,
        arguments(tmp_path, remove_unused_columns=False),
        train_dataset=rows(8, 1),
        data_collator=collate,
        callbacks=[AdaptationCallback(Distillation(teacher))],
    )
    trainer.model_accepts_loss_kwargs = False  # transformers 4 is misled by the patch's **kwargs
    with pytest.raises(ValueError, match=r"runs on \d+ of the student's own weights \(\w+\."):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_compiled_copy_is_looked_at_too(tmp_path: Path) -> None:
    student = bert(seed=0)
    weight = student.classifier.weight

    class Leaking(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden @ weight.T

    teacher = copy.deepcopy(bert(seed=1))
    teacher.classifier = Leaking()
    compiled: Any = torch.compile(teacher, backend="eager")
    for used, is_refused in (
        (compiled, True),
        (torch.compile(bert(seed=1), backend="eager"), False),
    ):
        trainer = Trainer(
            student,
            arguments(tmp_path, max_steps=1),
            train_dataset=rows(8, 1),
            data_collator=collate,
            callbacks=[AdaptationCallback(Distillation(used))],
        )
        if is_refused:
            with pytest.raises(ValueError, match="1 of the student's own weights"):
                trainer.train()
        else:
            trainer.train()
