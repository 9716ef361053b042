"""Every kind of teacher: models, names, several, functions, the student's own past, caches."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertForSequenceClassification, TrainerCallback

from hf_adapt import DistillationTrainer
from hf_adapt.distillation import CachedTeacher, HiddenStates, ModelTeacher, SelfTeacher
from hf_adapt.distillation.cache_filling import fill_cache
from hf_adapt.distillation.divergences import forward_kl
from hf_adapt.distillation.fingerprints import teacher_fingerprint
from hf_adapt.distillation.signals import TopK, bucket_logits
from tests.helpers.data import collate, rows
from tests.helpers.heads import CASES
from tests.helpers.models import FIVE, bert
from tests.helpers.trainers import (
    GradientRecorder,
    StopAt,
    arguments,
    cosine_and_ratio,
    same_bits,
    weights,
)


def run(folder: Path, teacher: Any, name: str = "sequence", **options: Any) -> Any:
    """Train three steps; the trainer, with the gradient of each step."""
    case = CASES[name]
    recorder = GradientRecorder()
    settings = options.pop("settings", {})
    trainer = options.pop("cls", DistillationTrainer)(
        model=options.pop("model", None) or case.model(0),
        teacher=teacher,
        args=arguments(folder, **{"max_grad_norm": 0.0, **settings}),
        train_dataset=options.pop("data", None) or case.data(12),
        data_collator=case.collate,
        callbacks=[recorder, *options.pop("callbacks", [])],
        **options,
    )
    trainer.train(resume_from_checkpoint=options.pop("resume", None))
    trainer.gradients = recorder.gradients
    return trainer


def test_a_teacher_may_be_named_by_its_folder(tmp_path: Path) -> None:
    bert(seed=1).save_pretrained(tmp_path / "teacher")
    named = run(tmp_path, str(tmp_path / "teacher"))
    given = run(tmp_path, ModelTeacher(bert(seed=1)))
    assert same_bits(weights(named.model), weights(given.model))


def test_the_teacher_is_frozen_stays_in_eval_mode_and_is_not_saved(tmp_path: Path) -> None:
    teacher = bert(seed=1, dropout=True)
    before = weights(teacher)
    trainer = run(tmp_path, teacher, settings={"save_strategy": "steps", "save_steps": 3})
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert same_bits(before, weights(teacher))
    trainer.save_model(str(tmp_path / "final"))
    saved = {p.name for p in (tmp_path / "checkpoint-3").iterdir()}
    assert "adaptation.safetensors" not in saved  # there is no projection
    state = torch.load(tmp_path / "checkpoint-3" / "adaptation_optimizer.pt", weights_only=True)
    assert set(state["adaptations"]["distillation"]["0"]) == {"fingerprint"}
    assert {p.name for p in (tmp_path / "final").iterdir()} <= {
        "config.json",
        "model.safetensors",
        "training_args.bin",
    }


def test_a_function_is_a_teacher(tmp_path: Path) -> None:
    teacher = bert(seed=1).eval()

    def ask(inputs: dict[str, Any]) -> torch.Tensor:
        assert "labels" not in inputs
        return teacher(**inputs).logits

    assert same_bits(weights(run(tmp_path, ask).model), weights(run(tmp_path, teacher).model))


def test_a_function_whose_predictions_require_a_gradient_is_refused(tmp_path: Path) -> None:
    teacher = bert(seed=1)

    def ask(inputs: dict[str, Any]) -> torch.Tensor:
        with torch.enable_grad():
            return teacher(**inputs).logits

    with pytest.raises(ValueError, match=r"require a gradient(.|\n)*torch.no_grad"):
        run(tmp_path, ask)


def test_a_teacher_that_shares_the_students_weights_is_refused(tmp_path: Path) -> None:
    student = bert(seed=0)
    with pytest.raises(ValueError, match=r"shares .* parameters with the student"):
        run(tmp_path, student, model=student)
    teacher = bert(seed=1)
    teacher.bert.embeddings = student.bert.embeddings
    with pytest.raises(ValueError, match=r"shares .* parameters"):
        run(tmp_path, teacher, model=student)


def test_several_teachers_are_weighted(tmp_path: Path) -> None:
    one, other = bert(seed=1), bert(seed=2)
    alone = [run(tmp_path, t, ce_weight=0.0).gradients[0] for t in (one, other)]
    even = run(tmp_path, [one, other], ce_weight=0.0).gradients[0]
    torch.testing.assert_close(even, (alone[0] + alone[1]) / 2)
    uneven = run(tmp_path, [one, other], ce_weight=0.0, teacher_weights=[0.9, 0.1]).gradients[0]
    torch.testing.assert_close(uneven, 0.9 * alone[0] + 0.1 * alone[1])


def test_a_function_may_weigh_teachers_item_by_item(tmp_path: Path) -> None:
    one, other = bert(seed=1), bert(seed=2)
    seen: list[torch.Size] = []

    def first(inputs: Any, logits: list[torch.Tensor]) -> torch.Tensor:
        seen.append(logits[0].shape)
        return torch.stack([torch.ones(len(logits[0])), torch.zeros(len(logits[0]))])

    chosen = run(tmp_path, [one, other], teacher_weights=first).gradients[0]
    torch.testing.assert_close(chosen, run(tmp_path, one).gradients[0])
    assert seen[-1] == (4, 3)
    with pytest.raises(ValueError, match=r"teacher_weights returned shape \(3,\)"):
        run(tmp_path, [one, other], teacher_weights=lambda i, logits: torch.ones(3))
    with pytest.raises(ValueError, match="1 teacher_weights for 2 teachers"):
        run(tmp_path, [one, other], teacher_weights=[1.0])


# ---- the student's own past ----


class Averager(TrainerCallback):
    """An exponential moving average, kept by hand."""

    def __init__(self, model: Any, decay: float) -> None:
        self.model, self.decay = model, decay
        self.average = copy.deepcopy(model)
        self.history: list[dict[str, torch.Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.history.append(weights(self.average))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for mean, value in zip(self.average.parameters(), self.model.parameters(), strict=True):
            mean.data.mul_(self.decay).add_(value.data, alpha=1 - self.decay)


def test_the_average_follows_the_student(tmp_path: Path) -> None:
    student, teacher = bert(seed=0), SelfTeacher(decay=0.5)
    by_hand = Averager(student, 0.5)
    seen: list[dict[str, torch.Tensor]] = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            seen.append(weights(teacher.module))

    trainer = run(tmp_path, teacher, model=student, callbacks=[by_hand, Watch()])
    for ours, theirs in zip(seen, by_hand.history, strict=True):
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name])
    assert trainer.state.log_history[2]["loss/distillation"] > 0


def test_earlier_weights_are_taken_over_now_and_then(tmp_path: Path) -> None:
    student, teacher = bert(seed=0), SelfTeacher(every_steps=2)
    states: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            states.append((weights(student), weights(teacher.module)))

    run(tmp_path, teacher, model=student, callbacks=[Watch()], settings={"max_steps": 4})
    start = states[0][0]
    assert same_bits(states[1][1], start)
    assert same_bits(states[2][1], states[2][0])
    assert same_bits(states[3][1], states[2][0])


# ---- resume ----


@pytest.mark.parametrize("kind", ["online", "average", "cached", "lora"])
def test_resume_is_bit_exact(kind: str, tmp_path: Path) -> None:
    def make(folder: Path) -> DistillationTrainer:
        teacher: Any = bert(seed=1)
        if kind == "average":
            teacher = SelfTeacher(decay=0.7)
        elif kind == "cached":
            teacher = CachedTeacher(folder / "cache", teacher)
        student = bert(seed=0, dropout=True)
        if kind == "lora":
            torch.manual_seed(3)
            config = LoraConfig(task_type="SEQ_CLS", r=4, lora_dropout=0.1, init_lora_weights=False)
            student = get_peft_model(student, config)
        return DistillationTrainer(
            model=student,
            teacher=teacher,
            args=arguments(
                folder,
                max_steps=4,
                save_strategy="steps",
                save_steps=2,
                gradient_accumulation_steps=2,
                per_device_train_batch_size=2,
            ),
            train_dataset=rows(20, 1),
            data_collator=collate,
        )

    whole = make(tmp_path / "whole")
    whole.train()
    stopped = make(tmp_path / "cut")
    stopped.add_callback(StopAt(2))
    stopped.train()
    resumed = make(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert same_bits(weights(whole.model), weights(resumed.model))
    if kind == "average":
        assert same_bits(
            weights(whole.distillation.teachers[0].module),
            weights(resumed.distillation.teachers[0].module),
        )
        resumed.save_model(str(tmp_path / "final"))
        assert not (tmp_path / "final" / "adaptation_optimizer.pt").exists()


@pytest.mark.parametrize("features", [False, True])
def test_a_language_model_without_whole_logits_resumes_bit_exact(
    features: bool, tmp_path: Path
) -> None:
    def make(folder: Path) -> DistillationTrainer:
        config = copy.deepcopy(CASES["gpt2"].model(0).config)
        config.update({"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1})
        student, teacher = (type(CASES["gpt2"].model(0))(config) for _ in range(2))
        student.load_state_dict(CASES["gpt2"].model(0).state_dict())
        teacher.load_state_dict(CASES["gpt2"].model(1).state_dict())
        return DistillationTrainer(
            model=student,
            teacher=teacher,
            features=[HiddenStates(project=True)] if features else [],
            args=arguments(
                folder,
                max_steps=4,
                save_strategy="steps",
                save_steps=2,
                gradient_accumulation_steps=2,
                per_device_train_batch_size=2,
            ),
            train_dataset=rows(20, 1, "lm"),
            data_collator=collate,
            chunked=True,
        )

    whole = make(tmp_path / "whole")
    whole.train()
    stopped = make(tmp_path / "cut")
    stopped.add_callback(StopAt(2))
    stopped.train()
    assert not same_bits(weights(whole.model), weights(stopped.model))
    resumed = make(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert same_bits(weights(whole.model), weights(resumed.model))
    if features:
        modules = [trainer.distillation.module for trainer in (whole, resumed)]
        assert same_bits(*map(weights, modules))  # type: ignore[arg-type]


# ---- the cache ----


@pytest.mark.parametrize("name", CASES)
def test_cached_is_online(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    online = run(tmp_path, case.model(1), name, chunked=False)
    asked = []

    def make(teacher: Any) -> CachedTeacher:
        return CachedTeacher(tmp_path / "cache", teacher)

    class Counting(ModelTeacher):
        def __call__(self, **inputs: Any) -> Any:
            asked.append(len(next(iter(inputs.values()))))
            return super().__call__(**inputs)

    first = run(tmp_path, make(Counting(case.model(1))), name)
    assert sum(asked) >= 12
    asked.clear()
    second = run(tmp_path, make(Counting(case.model(1))), name)
    assert asked == []  # not even once
    alone = run(tmp_path, CachedTeacher(tmp_path / "cache"), name)
    for trainer in (first, second, alone):
        for ours, theirs in zip(trainer.gradients, online.gradients, strict=True):
            assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def test_rows_found_in_another_order_or_padding_are_the_same(tmp_path: Path) -> None:
    data = CASES["token"].data(12)
    cache = CachedTeacher(tmp_path / "cache", bert("token", seed=1))
    run(tmp_path, cache, "token", data=data)
    before = cache.computed
    settings = {"per_device_train_batch_size": 3, "seed": 7}
    again = CachedTeacher(tmp_path / "cache", bert("token", seed=1))
    run(tmp_path, again, "token", data=data, settings=settings)
    assert before == 12
    assert again.computed == 0


@pytest.mark.parametrize("name", ["sequence", "llama"])
def test_top_k_is_within_its_bound(name: str, tmp_path: Path) -> None:
    case = CASES[name]

    def loss(teacher: Any) -> float:
        trainer = run(tmp_path, teacher, name, settings={"max_steps": 1}, chunked=False)
        logs.append(trainer.state.log_history[0])
        return float(logs[-1]["loss/distillation"])

    logs: list[dict[str, float]] = []
    full = loss(case.model(1))
    classes = 3 if name == "sequence" else 64
    losses = []
    for k in (1, 2, classes):
        cache = CachedTeacher(tmp_path / f"cache{k}", case.model(1), top_k=k, temperature=2.0)
        losses.append(loss(cache))
        read = CachedTeacher(tmp_path / f"cache{k}")
        assert loss(read) == pytest.approx(losses[-1], rel=1e-4)
    assert "distillation/agreement" not in logs[1]  # the last of its classes is all others
    assert losses[0] <= losses[1] * (1 + 1e-5) <= full * (1 + 1e-4)
    assert losses[-1] == pytest.approx(full, rel=1e-4)


def test_what_top_k_leaves_out_is_the_tail_times_the_divergence_within() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 20, generator=generator).double() for _ in range(2))
    stored = TopK.of(teacher, 4, 2.0)
    given = forward_kl(*bucket_logits(student, stored, 2.0), 2.0)
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    tail = torch.ones_like(p, dtype=torch.bool).scatter(-1, stored.indices, False)
    p_tail, q_tail = p[tail].view(6, -1), q[tail].view(6, -1)
    within = (p_tail / p_tail.sum(-1, True)) * (
        (p_tail / p_tail.sum(-1, True)) / (q_tail / q_tail.sum(-1, True))
    ).log()
    left_out = 4 * p_tail.sum(-1) * within.sum(-1)
    torch.testing.assert_close(
        forward_kl(student, teacher, 2.0) - given, left_out, rtol=1e-4, atol=1e-5, check_dtype=False
    )


def test_half_precision_caches_are_close(tmp_path: Path) -> None:
    online = run(tmp_path, bert(seed=1))
    for dtype in ("float16", "bfloat16"):
        folder = tmp_path / dtype
        cached = run(tmp_path, CachedTeacher(folder, bert(seed=1), dtype=dtype))
        cosine, ratio = cosine_and_ratio(online.gradients[0], cached.gradients[0])
        assert (cosine, ratio) == pytest.approx((1.0, 1.0), abs=1e-2)


def test_a_cache_of_something_else_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    run(tmp_path, CachedTeacher(folder, bert(seed=1)))
    with pytest.raises(ValueError, match=r"was made with another teacher: .*Bert"):
        run(tmp_path, CachedTeacher(folder, bert(seed=2)))
    with pytest.raises(ValueError, match="another top_k: None"):
        run(tmp_path, CachedTeacher(folder, bert(seed=1), top_k=2, temperature=2.0))
    with pytest.raises(ValueError, match=r"not in .*made from\s+other data"):
        run(tmp_path, CachedTeacher(folder), data=rows(12, 99))
    with pytest.raises(ValueError, match="holds no teacher's predictions"):
        run(tmp_path, CachedTeacher(tmp_path / "empty"))
    other_heads = bert(seed=1, num_attention_heads=4)
    other_heads.load_state_dict(bert(seed=1).state_dict())
    with pytest.raises(ValueError, match="another teacher"):
        run(tmp_path, CachedTeacher(folder, other_heads))

    class Flipped(DistillationTrainer):
        def select_logits(self, outputs: Any, inputs: Any, mask: Any) -> torch.Tensor:
            return super().select_logits(outputs, inputs, mask).flip(-1)

    for teacher in (None, bert(seed=1)):
        with pytest.raises(ValueError, match=r"another set of hooks: \[\].*select_logits"):
            run(tmp_path, CachedTeacher(folder, teacher), cls=Flipped)
    description = json.loads((folder / "description.json").read_text())
    description["tokenizer_fingerprint"] = "0" * 24
    (folder / "description.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="another tokenizer"):
        run(tmp_path, CachedTeacher(folder), processing_class=Tokenizer())


@pytest.mark.parametrize("name", CASES)
def test_a_teacher_that_was_saved_used_and_loaded_is_the_same(name: str, tmp_path: Path) -> None:
    teacher = CASES[name].model(1)
    before = teacher_fingerprint(teacher)
    teacher.save_pretrained(tmp_path)
    teacher(**CASES[name].collate(list(CASES[name].data(2))))  # with labels
    loaded = type(teacher).from_pretrained(tmp_path)
    for one in (teacher, loaded):
        assert teacher_fingerprint(one) == before


class Tokenizer:
    """As much of a tokenizer as its fingerprint needs."""

    name_or_path = "mine"

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def save_pretrained(self, folder: str) -> None:
        pass


def test_top_k_needs_its_own_temperature(tmp_path: Path) -> None:
    cache = CachedTeacher(tmp_path / "cache", bert(seed=1), top_k=2, temperature=2.0)
    with pytest.raises(ValueError, match="at temperature 2, but the distillation's is 3"):
        run(tmp_path, cache, temperature=3.0)
    schedule = CachedTeacher(tmp_path / "cache", bert(seed=1), top_k=2, temperature=2.0)
    with pytest.raises(ValueError, match=r"top 2 at temperature 2.0, .* is a schedule"):
        run(tmp_path, schedule, temperature=lambda progress: 2.0 if progress < 0.5 else 1.5)
    with pytest.raises(ValueError, match="top-k store keeps probabilities"):
        run(tmp_path, cache, divergence="mse")
    with pytest.raises(ValueError, match="needs the temperature"):
        CachedTeacher(tmp_path, bert(seed=1), top_k=2)


def test_a_cut_off_cache_is_filled_again(tmp_path: Path) -> None:
    """A record that was being written when the machine died is not taken for one."""
    folder = tmp_path / "cache"
    reference = run(tmp_path, CachedTeacher(folder, bert(seed=1)))
    (data,) = folder.glob("rows-*.bin")
    data.write_bytes(data.read_bytes()[:-7])
    again = CachedTeacher(folder, bert(seed=1))
    trainer = run(tmp_path, again)
    assert again.computed == 1
    assert same_bits(weights(reference.model), weights(trainer.model))


def test_a_full_disk_stops_the_storing_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("hf_adapt.storage.row_store.RowStore.add", full)
    trainer = run(tmp_path, CachedTeacher(tmp_path / "cache", bert(seed=1)))
    monkeypatch.undo()
    assert caplog.text.count("can no longer be kept") == 1
    assert same_bits(weights(trainer.model), weights(run(tmp_path, bert(seed=1)).model))


@pytest.mark.skipif(not FIVE, reason="4.57 names the argument torch_dtype")
def test_a_half_precision_teacher(tmp_path: Path) -> None:
    bert(seed=1).save_pretrained(tmp_path / "teacher")
    teacher = ModelTeacher(str(tmp_path / "teacher"), dtype="bfloat16")
    half = run(tmp_path, teacher)
    assert next(teacher.module.parameters()).dtype == torch.bfloat16
    whole = run(tmp_path, str(tmp_path / "teacher"))
    cosine, ratio = cosine_and_ratio(half.gradients[0], whole.gradients[0])
    assert (cosine, ratio) == pytest.approx((1.0, 1.0), abs=2e-2)


# ---- what a new process must find again ----


@pytest.mark.parametrize("of", ["start", "checkpoint"])
def test_a_teacher_made_of_the_starting_weights(
    of: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Scripts load the last checkpoint and copy the model; the copy is then another teacher."""

    def make(model: Any, max_steps: int) -> DistillationTrainer:
        return DistillationTrainer(
            model=model,
            teacher=copy.deepcopy(model),
            args=arguments(tmp_path, max_steps=max_steps, save_strategy="steps", save_steps=2),
            train_dataset=rows(20, 1),
            data_collator=collate,
        )

    make(bert(seed=0), 2).train()
    checkpoint = tmp_path / "checkpoint-2"
    started = (
        bert(seed=0) if of == "start" else BertForSequenceClassification.from_pretrained(checkpoint)
    )
    caplog.clear()
    make(started, 4).train(resume_from_checkpoint=str(checkpoint))
    assert ("other weights than in the run that is resumed" in caplog.text) == (of != "start")


def test_an_average_that_is_not_in_the_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def make(teacher: Any, max_steps: int) -> Any:
        return run(
            tmp_path,
            teacher,
            model=bert(seed=0),
            settings={"max_steps": max_steps, "save_strategy": "steps", "save_steps": 2},
        )

    make(SelfTeacher(), 2)
    assert "holds no average" not in caplog.text
    checkpoint = tmp_path / "checkpoint-2"
    (checkpoint / "adaptation_optimizer.pt").unlink()
    trainer = DistillationTrainer(
        model=bert(seed=0),
        teacher=SelfTeacher(),
        args=arguments(tmp_path, max_steps=4),
        train_dataset=rows(20, 1),
        data_collator=collate,
    )
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert "holds no average" in caplog.text


def test_a_loss_that_is_0_throughout_is_pointed_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student = bert(seed=0)

    def itself(inputs: dict[str, Any]) -> torch.Tensor:
        return student(**inputs).logits

    run(tmp_path, itself, model=student, settings={"max_steps": 4})
    assert caplog.text.count("exactly 0 in the first 3 logs") == 1
    caplog.clear()
    run(tmp_path, SelfTeacher(), model=bert(seed=0), settings={"max_steps": 4, "warmup_steps": 2})
    assert "exactly 0" not in caplog.text


def test_a_wrong_path_of_a_teacher(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"There is no folder .*no/such/teacher"):
        run(tmp_path, str(tmp_path / "no/such/teacher"), model=bert(seed=0))


@pytest.mark.parametrize("way", ["online", "compiled", "cached"])
def test_a_teacher_whose_forward_was_wrapped_gets_its_inputs(way: str, tmp_path: Path) -> None:
    teacher, plain = bert(seed=1), bert(seed=1)
    forward = teacher.forward
    teacher.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    if way == "compiled":
        teacher = torch.compile(bert(seed=1), backend="eager")
    given: Any = teacher
    if way == "cached":
        data = CASES["sequence"].data(8)
        given = CachedTeacher(tmp_path / "cache", teacher)
        assert list(fill_cache(given, data, data_collator=CASES["sequence"].collate)) == [8]
    else:
        assert ModelTeacher(given).inputs == ModelTeacher(plain).inputs
        assert not {"args", "kwargs", "self"} & ModelTeacher(given).inputs
    found, expected = run(tmp_path, given), run(tmp_path, plain)
    assert found.state.log_history[0]["loss/distillation"] == pytest.approx(
        expected.state.log_history[0]["loss/distillation"], rel=1e-5
    )
