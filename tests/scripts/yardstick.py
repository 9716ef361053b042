"""Script × capability: what one added line does to an official script.

It works, and then saves a plain model and resumes bit for bit; or it refuses before anything is
trained, by name, with advice that works.
"""

from __future__ import annotations

import functools
import math
import os
import re
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

import hf_adapt
from hf_adapt import (
    DANN,
    MMD,
    AdaptationCallback,
    Distillation,
    GradualUnfreezingCallback,
    InformationMaximization,
    KnowledgeCallback,
)
from hf_adapt.engine.streams import Stream
from tests.scripts import sentence_scripts, transformers_scripts, trl_scripts
from tests.scripts.world import STEPS, Script, graph

Build = Callable[[Path], Script]
Line = Callable[..., TrainerCallback]


def _domain(*objectives: Any) -> Line:
    def line(script: Script, **options: Any) -> TrainerCallback:
        made = [objective() for objective in objectives]
        target = Stream(script.target, **options) if options else script.target
        return AdaptationCallback(*made, target_dataset=target)

    return line


def _distillation(script: Script, **options: Any) -> TrainerCallback:
    settings = {**script.teacher_settings, **options}
    return AdaptationCallback(Distillation(script.teacher, **settings))


def _knowledge(script: Script, **options: Any) -> TrainerCallback:
    if script.text_column is not None:
        options["text_column"] = script.text_column
    return KnowledgeCallback(graph(), **options)


def _nothing(script: Script, **options: Any) -> TrainerCallback:
    return TrainerCallback()


def _unfreezing(script: Script, **options: Any) -> TrainerCallback:
    return GradualUnfreezingCallback(**options)


CAPABILITIES: dict[str, tuple[Line, tuple[str, ...]]] = {
    "MMD and DANN": (_domain(MMD, DANN), ("loss/mmd", "loss/dann")),
    "InformationMaximization": (
        _domain(InformationMaximization),
        ("loss/information_maximization",),
    ),
    "Distillation": (_distillation, ("loss/distillation",)),
    "Knowledge": (_knowledge, ("knowledge/mentions_per_row",)),
    "Gradual unfreezing": (_unfreezing, ("unfreezing/phase",)),
}
"""The added line, and what must be in the log, finite and not 0 throughout."""

SCRIPTS: dict[str, Build] = {
    name: build
    for module in (transformers_scripts, trl_scripts, sentence_scripts)
    for name, build in vars(module).items()
    if callable(build)
    and getattr(build, "__module__", "") == module.__name__
    and not name.startswith("_")
    and getattr(build, "__annotations__", {}).get("return") == "Script"
}

ADVICE: dict[str, dict[str, Any]] = {
    "forward='separate'": {"forward": "separate"},
    "divergence='mse'": {"divergence": "mse"},
}
"""Options that a refusal may name; what it names is tried, and must work."""


def outcome(name: str, capability: str, folder: Path) -> str:
    """What this capability does on this script, in the table's words.

    Returns:
        "works", "works with `option`", each with a ¹ where the plain Trainer does not resume the
        script bit for bit, or "refuses: " and the words of the refusal.

    Raises:
        AssertionError: If it neither works nor refuses as it should.
    """
    build, (line, logged) = SCRIPTS[name], CAPABILITIES[capability]
    options: dict[str, Any] = {}
    whole, refusal = train(build, line, options, folder)
    said = "works"
    if refusal is not None:
        advice = next((option for option in ADVICE if option in refusal), None)
        if advice is None:
            return f"refuses: {in_one_line(refusal)}"
        folder, options, said = folder / "advised", ADVICE[advice], f"works with `{advice}`"
        whole, refusal = train(build, line, options, folder)
        assert refusal is None, f"{advice} was advised, and is refused: {refusal}"
    _check(whole, logged, folder)
    resumed = resume(build, line, options, folder)
    scores = whole.trainer.evaluate()
    # A tiny model may give all pairs the same similarity, which correlates with nothing.
    undefined = ("pearson_cosine", "spearman_cosine")
    assert all(math.isfinite(v) for k, v in scores.items() if not k.endswith(undefined))
    if not same(resumed.model.state_dict(), whole.trainer.model.state_dict()):
        assert not plain_is_exact(name), "the resumed run differs"
        said += " ¹"
    return said


@functools.cache
def plain_is_exact(name: str) -> bool:
    """Whether the plain Trainer resumes this script bit for bit."""
    build = SCRIPTS[name]
    with tempfile.TemporaryDirectory() as folder:
        whole, _ = train(build, _nothing, {}, Path(folder))
        resumed = resume(build, _nothing, {}, Path(folder))
        return same(resumed.model.state_dict(), whole.trainer.model.state_dict())


def train(
    build: Build, line: Line, options: dict[str, Any], folder: Path
) -> tuple[Script, str | None]:
    """A whole run, or the words with which it was refused before its first step."""
    script = build(folder / "whole")
    model, trainer = script.trainer.model, script.trainer
    before = {key: value.detach().clone() for key, value in model.state_dict().items()}
    try:
        trainer.add_callback(line(script, **options))
        trainer.train()
    except Exception as error:
        frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        ours = os.path.dirname(hf_adapt.__file__)
        if not isinstance(error, ValueError) or not frames[-1].startswith(ours):
            raise AssertionError(f"a raw {type(error).__name__}, {frames[-1]}: {error}") from error
        assert trainer.state.global_step == 0 and same(model.state_dict(), before)
        return script, str(error)
    assert trainer.state.global_step == STEPS
    return script, None


def _check(script: Script, logged: tuple[str, ...], folder: Path) -> None:
    """The capability did something, and the saved model is a plain one."""
    for name in logged:
        history = script.trainer.state.log_history
        values = [entry[name] for entry in history if name in entry]
        assert values and all(map(math.isfinite, values)) and any(values), (name, values)
    script.trainer.save_model(str(folder / "saved"))
    loaded = script.load(str(folder / "saved")).state_dict()
    assert same(loaded, script.trainer.model.state_dict()), "the saved model differs"


def resume(build: Build, line: Line, options: dict[str, Any], folder: Path) -> Trainer:
    """The second half of the run in `folder`, with everything made anew."""
    half = build(folder / "resumed")
    half.trainer.add_callback(line(half, **options))
    checkpoint = folder / "whole" / f"checkpoint-{STEPS // 2}"
    half.trainer.train(resume_from_checkpoint=str(checkpoint))
    assert half.trainer.state.global_step == STEPS
    return half.trainer


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two states are equal to the last bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def in_one_line(text: str) -> str:
    """The words of a refusal; what was found in a model's outputs is another library's to say."""
    return re.sub(r" \(found \[.*?\]\)", "", " ".join(text.split()))
