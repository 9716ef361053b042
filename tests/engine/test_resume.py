"""Interrupted and resumed is uninterrupted, bit for bit; checkpoints stay plain."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    BertForSequenceClassification,
    Trainer,
)

from hf_adapt import DANN, MMD, AdaptationCallback, DomainAdversarialCallback, adapt
from tests.helpers.data import collate, rows
from tests.helpers.models import FIVE, bert
from tests.helpers.trainers import PLAIN_FILES, StopAt, arguments, same_bits, weights


def lora() -> Any:
    torch.manual_seed(3)
    return get_peft_model(
        bert(dropout=True),
        LoraConfig(task_type="SEQ_CLS", r=4, lora_dropout=0.1, init_lora_weights=False),
    )


def full() -> Any:
    return bert(dropout=True)


def make(folder: Path, model: Any, adapted: bool = True, **settings: Any) -> tuple[Trainer, DANN]:
    seen: list[list[int]] = []

    def collator(features: Any) -> Any:
        seen.append([row["input_ids"][0] for row in features])
        return collate(features)

    trainer = Trainer(
        model,
        eval_dataset=rows(6, 9),
        args=arguments(
            folder,
            max_steps=-1,
            num_train_epochs=2,
            save_strategy="steps",
            save_steps=3,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
            seed=11,
            **settings,
        ),
        train_dataset=rows(20, 1),
        data_collator=collator,
    )
    trainer.seen = seen  # type: ignore[attr-defined]
    dann = DANN(hidden_sizes=(8,), dropout=0.2)
    if adapted:
        adapt(trainer, dann, MMD(weight=0.1), target_dataset=rows(13, 2, None, low=20))
    return trainer, dann


@pytest.mark.parametrize("step", [3, 6])
@pytest.mark.parametrize("build", [full, lora])
def test_resume_is_bit_exact(build: Any, step: int, tmp_path: Path) -> None:
    """20 rows, 4 a step: 5 steps an epoch, so both checkpoints lie inside an epoch."""
    if step > 5 and not FIVE:
        pytest.skip("the plain Trainer of 4.57 is not bit-exact in a second epoch either")
    whole, whole_dann = make(tmp_path / "whole", build())
    whole.train()

    first, _ = make(tmp_path / "part", build())
    first.add_callback(StopAt(step))
    first.train()
    second, second_dann = make(tmp_path / "part", build())
    second.train(resume_from_checkpoint=str(tmp_path / "part" / f"checkpoint-{step}"))

    assert second.state.global_step == whole.state.global_step == 10
    assert same_bits(weights(whole.model), weights(second.model))
    assert same_bits(weights(whole_dann.module), weights(second_dann.module))
    for one, other in (
        (whole.optimizer, second.optimizer),
        (
            whole._adaptation_auxiliary.optimizer.optimizer,
            second._adaptation_auxiliary.optimizer.optimizer,
        ),
    ):
        states = [opt.state_dict()["state"] for opt in (one, other)]
        assert states[0].keys() == states[1].keys() and states[0]
        for key in states[0]:
            assert same_bits(states[0][key], states[1][key])
    assert whole.seen[-4:] == second.seen[-4:]  # the same rows, in the same order
    last = whole.state.log_history[-2], second.state.log_history[-2]
    assert last[0] == last[1]


def test_the_discriminator_is_really_restored(tmp_path: Path) -> None:
    """Without the auxiliary files the resumed run differs: the test above can fail."""
    first, _ = make(tmp_path / "part", full())
    first.add_callback(StopAt(3))
    first.train()
    checkpoint = tmp_path / "part" / "checkpoint-3"
    results = []
    for remove in (False, True):
        if remove:
            (checkpoint / "adaptation_optimizer.pt").unlink()
        second, dann = make(tmp_path / "part", full(), save_only_model=True)
        second.train(resume_from_checkpoint=str(checkpoint))
        results.append(weights(dann.module))
    assert not same_bits(*results)


def test_a_checkpoint_has_the_plain_files_and_ours_beside(tmp_path: Path) -> None:
    plain, _ = make(tmp_path / "plain", full(), adapted=False)
    ours, _ = make(tmp_path / "ours", full())
    plain.train()
    ours.train()
    names = [{p.name for p in (tmp_path / w / "checkpoint-3").iterdir()} for w in ("plain", "ours")]
    assert names[0] == PLAIN_FILES
    assert names[1] == PLAIN_FILES | {"adaptation.safetensors", "adaptation_optimizer.pt"}
    tensors = [
        load_file(tmp_path / way / "checkpoint-3" / "model.safetensors")
        for way in ("plain", "ours")
    ]
    assert tensors[0].keys() == tensors[1].keys()
    ours.save_model(str(tmp_path / "final"))
    assert (tmp_path / "final" / "adaptation.safetensors").exists()


def test_the_saved_model_loads_plainly(tmp_path: Path, caplog: Any) -> None:
    trainer, _ = make(tmp_path, full())
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    model, info = BertForSequenceClassification.from_pretrained(
        tmp_path / "final", output_loading_info=True
    )
    assert not any(info.values()), info
    assert not [r for r in caplog.records if r.name.startswith("transformers")]
    assert same_bits(weights(model), weights(trainer.model))


def test_a_saved_adapter_loads_plainly(tmp_path: Path) -> None:
    trainer, _ = make(tmp_path, lora())
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    loaded = PeftModel.from_pretrained(bert(dropout=True), tmp_path / "final")
    trained = {k: v for k, v in weights(trainer.model).items() if "lora_" in k}
    assert trained
    assert same_bits(trained, {k: v for k, v in weights(loaded).items() if "lora_" in k})


def test_a_plain_trainer_resumes_an_adapted_run(tmp_path: Path) -> None:
    first, _ = make(tmp_path, full())
    first.add_callback(StopAt(6))
    first.train()
    plain, _ = make(tmp_path, full(), adapted=False)
    plain.train(resume_from_checkpoint=True)
    assert plain.state.global_step == 10
    assert all("loss/dann" not in entry for entry in plain.state.log_history[6:])


def test_an_adapted_run_resumes_a_plain_one_and_says_so(tmp_path: Path, caplog: Any) -> None:
    plain, _ = make(tmp_path, full(), adapted=False)
    plain.add_callback(StopAt(6))
    plain.train()
    ours, _ = make(tmp_path, full())
    ours.train(resume_from_checkpoint=True)
    assert "holds no auxiliary modules" in caplog.text
    assert ours.state.global_step == 10


def test_another_discriminator_is_refused_on_resume(tmp_path: Path) -> None:
    first, _ = make(tmp_path, full())
    first.add_callback(StopAt(3))
    first.train()
    other = Trainer(
        full(),
        arguments(tmp_path, max_steps=8, save_strategy="steps", save_steps=3),
        train_dataset=rows(20, 1),
        data_collator=collate,
    )
    adapt(other, DANN(hidden_sizes=(9,)), target_dataset=rows(13, 2, None))
    before = sorted(p.name for p in (tmp_path / "checkpoint-3").iterdir())
    with pytest.raises(ValueError, match="does not fit the modules of 'dann'"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert sorted(p.name for p in (tmp_path / "checkpoint-3").iterdir()) == before


def test_best_model_brings_its_discriminator(tmp_path: Path) -> None:
    trainer, dann = make(
        tmp_path,
        full(),
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="score",
    )
    scores = iter([0.9, 0.5, 0.1, 0.2])
    trainer.compute_metrics = lambda prediction: {"score": next(scores)}
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-3"
    stored = load_file(best / "adaptation.safetensors")
    held = {f"dann.{key}": value for key, value in weights(dann.module).items()}
    assert same_bits(stored, held)
    assert same_bits(load_file(best / "model.safetensors"), weights(trainer.model))


@pytest.mark.filterwarnings("ignore:mtime may not be reliable")
def test_save_total_limit_removes_whole_checkpoints(tmp_path: Path) -> None:
    trainer, _ = make(tmp_path, full(), save_total_limit=1)
    trainer.train()
    left = [p.name for p in tmp_path.iterdir() if p.name.startswith("checkpoint")]
    assert left == ["checkpoint-10"]
    assert (tmp_path / "checkpoint-10" / "adaptation_optimizer.pt").exists()


def test_a_second_train_goes_on_with_the_same_discriminator(tmp_path: Path) -> None:
    trainer, dann = make(tmp_path, full())
    trainer.train()
    module, before = dann.module, weights(dann.module)
    trainer.train()
    assert dann.module is module
    assert not same_bits(before, weights(module))
    assert len([c for c in trainer.callback_handler.callbacks if "Run" in type(c).__name__]) == 0


def test_model_init_starts_everything_anew(tmp_path: Path) -> None:
    finals = []
    trainer = Trainer(
        model_init=full,
        args=arguments(tmp_path, max_steps=4),
        train_dataset=rows(20, 1),
        data_collator=collate,
        callbacks=[DomainAdversarialCallback(target_dataset=rows(9, 2, None))],
    )
    for _ in range(2):
        trainer.train()
        finals.append((weights(trainer.model), trainer._adaptation_auxiliary.adaptations[0].module))
    assert same_bits(finals[0][0], finals[1][0])
    assert finals[0][1] is not finals[1][1]
    assert same_bits(weights(finals[0][1]), weights(finals[1][1]))


def test_hyperparameter_search(tmp_path: Path) -> None:
    trainer = Trainer(
        model_init=full,
        args=arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2),
        train_dataset=rows(12, 1),
        eval_dataset=rows(6, 3),
        data_collator=collate,
        callbacks=[AdaptationCallback(DANN(), MMD(), target_dataset=rows(9, 2, None))],
    )
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-3)},
        n_trials=2,
        backend="optuna",
    )
    assert best.objective > 0
    assert "loss/dann" in json.dumps(trainer.state.log_history)


@pytest.mark.parametrize("step", [3, 6])
def test_resume_at_the_end_of_an_epoch_that_ends_with_an_evaluation(
    step: int, tmp_path: Path
) -> None:
    """The evaluation comes after the checkpoint and is not repeated: it must draw nothing."""
    if not FIVE:
        pytest.skip("the plain Trainer of 4.57 is not bit-exact in a second epoch either")

    def trained(folder: Path, resume: str | None = None) -> dict[str, torch.Tensor]:
        trainer = Trainer(
            bert(dropout=True),
            arguments(
                folder,
                max_steps=-1,
                num_train_epochs=3,
                save_strategy="steps",
                save_steps=3,
                eval_strategy="epoch",
            ),
            train_dataset=rows(12, 1),
            eval_dataset=rows(6, 3),
            data_collator=collate,
            callbacks=[AdaptationCallback(MMD(), target_dataset=rows(9, 2, None))],
        )
        trainer.train(resume_from_checkpoint=resume)
        return weights(trainer.model)

    whole = trained(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
    assert same_bits(whole, trained(tmp_path / "rest", str(checkpoint)))
