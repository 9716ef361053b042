"""The cached prefix: the same gradients, and never a row that is not the one asked for."""

import errno
import resource
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.models.bert.modeling_bert import BertAttention

from hf_adapt import DANN, MMD, Adaptation, GradualUnfreezingCallback, Objective, Stream, adapt
from hf_adapt.alignment import FGM, VAT, SelfTraining
from hf_adapt.models.groups import layer_groups
from hf_adapt.storage.row_store import RECORD, RowStore, row_keys
from hf_adapt.unfreezing import FreezeOnly, GradualUnfreezing, Phase
from hf_adapt.unfreezing.prefix.cache import FrozenPrefix
from hf_adapt.unfreezing.prefix.checks import cacheable_stack
from tests.helpers.data import collate, rows
from tests.helpers.models import FIVE, bert, gpt2_config, llama, t5_config
from tests.helpers.trainers import GradientRecorder, arguments, weights

LOWER_3 = FreezeOnly("embeddings", r"layer\.[012]")
ROWS = 14  # four batches, the last of them short


def run(
    folder: Path,
    cached: bool,
    model: Any = None,
    schedule: Any = LOWER_3,
    before: Any = None,
    after: Any = None,
    data: Any = None,
    cache_dir: Path | None = None,
    callbacks: Any = (),
    **settings: Any,
) -> tuple[Trainer, GradientRecorder, list[float]]:
    recorder = GradientRecorder()
    trainer = Trainer(
        model if model is not None else bert(num_hidden_layers=4, dropout=True),
        arguments(folder, **{"max_steps": -1, "num_train_epochs": 3, **settings}),
        train_dataset=rows(ROWS, 1) if data is None else data,
        data_collator=collate,
        callbacks=[recorder, *callbacks],
    )
    if before is not None:
        before(trainer)
    adapt(
        trainer,
        GradualUnfreezing(
            schedule,
            cache_frozen_prefix=cached,
            frozen_dropout=False,
            cache_dir=cache_dir if cached else None,
        ),
    )
    if after is not None:
        after(trainer)
    trainer.train()
    shares = [
        entry["unfreezing/cached_share"]
        for entry in trainer.state.log_history
        if "unfreezing/cached_share" in entry
    ]
    return trainer, recorder, shares


def assert_same_gradients(
    one: GradientRecorder, other: GradientRecorder, tolerance: float = 1e-6
) -> None:
    assert len(one.gradients) == len(other.gradients) > 0
    for a, b in zip(one.gradients, other.gradients, strict=True):
        assert float((a - b).norm() / a.norm()) < tolerance


KINDS: dict[str, dict[str, Any]] = {
    "text": {},
    "accumulated": dict(per_device_train_batch_size=2, gradient_accumulation_steps=2),
    "checkpointed": dict(gradient_checkpointing=True),
    "tokens": dict(model=lambda: bert("token", num_hidden_layers=4), data=rows(ROWS, 1, "token")),
    "two layers": dict(
        model=lambda: bert(num_hidden_layers=4), schedule=FreezeOnly("embeddings", "layer.[01]")
    ),
    "one layer of llama": dict(
        model=llama, data=rows(ROWS, 1, "lm"), schedule=FreezeOnly("embeddings", "layer.0")
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_uncached_run(kind: str, tmp_path: Path) -> None:
    """Dropout above the prefix included: the cache draws no random number."""
    settings = dict(KINDS[kind])
    build = settings.pop("model", None)
    found = []
    for cached in (False, True):
        model = build() if build is not None else None
        found.append(run(tmp_path, cached, model, **settings))
    assert_same_gradients(found[0][1], found[1][1])
    steps = len(found[1][2])
    assert found[1][2][-steps // 3 :] == [1.0] * len(found[1][2][-steps // 3 :])
    assert found[1][2][0] == 0.0 and found[0][2] == []
    differences = [
        float((a - b).abs().max())
        for a, b in zip(*(weights(f[0].model).values() for f in found), strict=True)
    ]
    assert max(differences) < 1e-5


def test_target_rows_are_cached_too(tmp_path: Path) -> None:
    def add_dann(trainer: Trainer) -> None:
        adapt(
            trainer,
            DANN(hidden_sizes=(4,)),
            MMD(weight=0.1),
            target_dataset=rows(9, 2, None, low=20),
        )

    found = [run(tmp_path, cached, before=add_dann) for cached in (False, True)]
    assert_same_gradients(found[0][1], found[1][1])
    assert found[1][2][-1] == 1.0


def test_passes_over_a_stream_use_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same labels; after the first of six passes over the target, one layer of four is run."""
    calls: list[bool] = []

    def add_self_training(trainer: Trainer) -> None:
        method = SelfTraining(refreshes=(0.25, 0.4, 0.5, 0.6, 0.75, 0.9))
        adapt(trainer, method, target_dataset=rows(9, 2, None, low=20))

    def counted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(torch.is_grad_enabled())
        return forward(module, *args, **kwargs)

    forward = BertAttention.forward
    monkeypatch.setattr(BertAttention, "forward", counted)
    found = []
    for cached in (False, True):
        calls.clear()
        recorder = run(tmp_path, cached, before=add_self_training)[1]
        found.append((recorder, calls.count(False)))
    assert_same_gradients(found[0][0], found[1][0])
    assert found[1][1] < 0.7 * found[0][1]


class Noise(Objective):
    """Agreement with a further forward whose embeddings somebody changes, without a gradient."""

    def loss(self, batch: Any) -> torch.Tensor:
        logits, _ = batch.logits()
        hook = batch.model.get_input_embeddings().register_forward_hook(lambda m, a, out: 1.5 * out)
        other, _ = batch.forward().logits()
        hook.remove()
        return (logits - other).square().mean()


@pytest.mark.parametrize("method", [FGM, VAT, Noise])
def test_a_perturbed_forward_is_computed_after_a_pass_too(
    method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The passes before the first step have opened the store; they still use it at the end."""

    def add(trainer: Trainer) -> None:
        passes = SelfTraining(refreshes=(0, 0.5, 0.9))
        adapt(trainer, passes, method(), target_dataset=rows(9, 2, None, low=20))

    skipped = []
    original = FrozenPrefix._skip_layers

    def skip(self: Any, hidden: torch.Tensor) -> None:
        skipped.append(torch.is_grad_enabled())
        original(self, hidden)

    monkeypatch.setattr(FrozenPrefix, "_skip_layers", skip)
    found = [run(tmp_path, cached, after=add) for cached in (False, True)]
    assert_same_gradients(found[0][1], found[1][1])
    assert False in skipped and (True in skipped) == (method is Noise)


class Shifted(Objective):
    """The predictions of a view that is another one in each step."""

    def loss(self, batch: Any) -> torch.Tensor:
        step = 1 + round(batch.progress * 12)

        def view(inputs: dict[str, Any]) -> dict[str, Any]:
            return {**inputs, "input_ids": (inputs["input_ids"] + step) % 40}

        return batch.forward(view).logits()[0].square().mean()


def test_views_are_not_kept(tmp_path: Path) -> None:
    def add(trainer: Trainer) -> None:
        adapt(trainer, Shifted())

    kept = tmp_path / "kept"
    found = [run(tmp_path, cached, before=add, cache_dir=kept) for cached in (False, True)]
    assert_same_gradients(found[0][1], found[1][1])
    assert found[1][2][-1] == 1.0
    index = next(kept.glob("*/index-*"))
    assert index.stat().st_size == ROWS * RECORD.size


def test_lora_on_the_upper_layers(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    def build() -> Any:
        torch.manual_seed(0)
        config = LoraConfig(task_type="SEQ_CLS", r=2, layers_to_transform=[3])
        return get_peft_model(bert(num_hidden_layers=4), config)

    found = [run(tmp_path, cached, build(), schedule=[Phase(0, ".*")]) for cached in (False, True)]
    assert_same_gradients(found[0][1], found[1][1])
    assert found[1][2][-1] == 1.0


def test_each_phase_has_its_own_rows(tmp_path: Path) -> None:
    schedule = [Phase(0, ["head", "layer.3"]), Phase("50%", ["head", r"layer\.[23]"])]
    found = [
        run(tmp_path, cached, schedule=schedule, num_train_epochs=4) for cached in (False, True)
    ]
    assert_same_gradients(found[0][1], found[1][1])
    shares = found[1][2]
    half = len(shares) // 2
    assert shares[0] == shares[half] == 0.0 and shares[half - 1] == shares[-1] == 1.0


def test_a_phase_of_less_than_an_epoch_is_not_cached(tmp_path: Path, caplog: Any) -> None:
    _, _, shares = run(tmp_path, True, num_train_epochs=1)
    assert shares == [] and "caching the output" not in caplog.text


def test_the_disk_it_needs_is_logged_before_it_starts(tmp_path: Path, caplog: Any) -> None:
    data = rows(ROWS, 1)
    kept = tmp_path / "kept"
    run(tmp_path, True, data=data, cache_dir=kept)
    text = caplog.text
    assert "caching the output of the lower 3 of 4 layers" in text
    assert f"{ROWS} rows will take" in text
    folder = next(kept.iterdir())
    tokens = sum(len(row["input_ids"]) for row in data)
    sizes = [sum(f.stat().st_size for f in folder.glob(f"{k}-*")) for k in ("rows", "index")]
    assert sizes == [tokens * 16 * 4, ROWS * RECORD.size], "float32, without padding"


@pytest.mark.parametrize(
    ("method", "forward", "expected"),
    [
        (SelfTraining(refreshes=(0, 0.5)), "joint", ROWS + 9),
        (MMD(), "joint", 2 * ROWS),
        (MMD(), "separate", 2 * ROWS),
    ],
)
def test_the_rows_of_the_streams_count(
    method: Any, forward: Any, expected: int, tmp_path: Path, caplog: Any
) -> None:
    """Whatever the size of the batch that comes first; a pass reads each row, and no more."""
    target = Stream(rows(9, 2, None, low=20), forward=forward)

    def add(trainer: Trainer) -> None:
        adapt(trainer, method, target_dataset=target)

    run(tmp_path, True, after=add, per_device_eval_batch_size=64)
    assert f"{expected} rows will take" in caplog.text


def test_rows_that_are_scored_have_no_known_number(tmp_path: Path, caplog: Any) -> None:
    model = bert()
    trainer = Trainer(model, arguments(tmp_path), train_dataset=rows(4, 1), data_collator=collate)
    groups = layer_groups(model)
    prefix = FrozenPrefix(trainer, model, groups, tmp_path / "kept")
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[0].requires_grad_(False)
    prefix.start_phase(frozenset({"layer.1", "head"}))
    with prefix.serving("all"):
        trainer.predict(rows(30, 2))
    prefix.close()
    assert "each row takes" in caplog.text


def test_the_rows_of_a_complete_run_are_removed_but_not_those_in_a_chosen_folder(
    tmp_path: Path,
) -> None:
    run(tmp_path, True)
    assert not (tmp_path / "_frozen_prefix_cache").exists()
    run(tmp_path, True, cache_dir=tmp_path / "kept")
    _, _, shares = run(tmp_path, True, cache_dir=tmp_path / "kept")
    assert shares[1:] == [1.0] * (len(shares) - 1), "a second run reads from its second batch on"


class Kill(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 6:
            raise KeyboardInterrupt


class StopEarly(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= 6


def test_the_rows_of_a_run_that_stops_early_are_removed(tmp_path: Path) -> None:
    run(tmp_path, True, callbacks=[StopEarly()])
    assert not (tmp_path / "_frozen_prefix_cache").exists()


def test_an_interrupted_run_goes_on_from_its_rows(tmp_path: Path) -> None:
    whole, _recorder, _ = run(tmp_path / "whole", False)
    saving = dict(save_strategy="steps", save_steps=6)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "part", True, callbacks=[Kill()], **saving)
    folder = next((tmp_path / "part" / "_frozen_prefix_cache").iterdir())
    with open(next(folder.glob("index-*")), "ab") as file:
        file.write(b"torn")  # killed while it wrote
    trainer = Trainer(
        bert(num_hidden_layers=4, dropout=True),
        arguments(tmp_path / "part", max_steps=-1, num_train_epochs=3),
        train_dataset=rows(ROWS, 1),
        data_collator=collate,
    )
    trainer.add_callback(GradualUnfreezingCallback(LOWER_3, cache_frozen_prefix=True))
    trainer.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-6"))
    shares = [e.get("unfreezing/cached_share") for e in trainer.state.log_history]
    assert shares[7] == 1.0 and shares[-2] == 1.0
    if not FIVE:
        return  # the plain Trainer of 4.57 does not resume exactly in a second epoch either
    for name, value in weights(whole.model).items():
        torch.testing.assert_close(weights(trainer.model)[name], value, rtol=1e-5, atol=1e-6)


# ---- never silently wrong ----


def test_a_changed_data_set_is_computed_anew(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    run(tmp_path, True, cache_dir=kept)
    other = rows(ROWS, 5)
    plain = run(tmp_path, False, data=other)
    cached = run(tmp_path, True, data=other, cache_dir=kept)
    assert cached[2][0] == 0.0 and cached[2][-1] == 1.0
    assert_same_gradients(plain[1], cached[1])


def test_another_prefix_does_not_read_these_rows(tmp_path: Path, caplog: Any) -> None:
    kept = tmp_path / "kept"
    run(tmp_path, True, cache_dir=kept)

    def other() -> Any:
        return bert(num_hidden_layers=4, dropout=True, seed=1)

    plain = run(tmp_path, False, other())
    cached = run(tmp_path, True, other(), cache_dir=kept)
    assert cached[2][0] == 0.0
    assert "holds rows of other prefixes" in caplog.text
    assert_same_gradients(plain[1], cached[1])


def test_a_head_that_is_held_fixed_is_no_part_of_the_prefix(tmp_path: Path, caplog: Any) -> None:
    """A second run with another head reads the rows of the first, whose head trained."""

    class Held(Adaptation):
        def setup(self, trainer: Trainer) -> None:
            self.fixed = [*trainer.model.classifier.parameters()]

    def other_head() -> Any:
        model = bert(num_hidden_layers=4, dropout=True)
        torch.manual_seed(7)
        model.classifier = Noted()
        return model

    kept = tmp_path / "kept"
    schedule = [Phase(0, ["layer.3", "head"])]
    run(tmp_path, True, schedule=schedule, cache_dir=kept)
    found = [
        run(
            tmp_path,
            cached,
            other_head(),
            schedule=schedule,
            before=lambda trainer: adapt(trainer, Held()),
            cache_dir=kept,
        )
        for cached in (False, True)
    ]
    assert len(list(kept.iterdir())) == 1 and found[1][2][1] == 1.0
    assert_same_gradients(found[0][1], found[1][1], 1e-5)


class Change(TrainerCallback):
    """Somebody else writes a frozen weight, behind autograd's back."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 8:
            kwargs["model"].bert.encoder.layer[1].output.dense.weight.data.mul_(1.5)


def test_a_prefix_that_is_changed_in_the_run_is_noticed(tmp_path: Path, caplog: Any) -> None:
    found = [run(tmp_path, cached, callbacks=[Change()]) for cached in (False, True)]
    assert "A frozen weight has changed" in caplog.text
    assert_same_gradients(found[0][1], found[1][1])


class ChangeInPlace(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 7:
            with torch.no_grad():
                kwargs["model"].bert.encoder.layer[1].output.dense.weight.mul_(1.5)


def test_a_change_in_place_is_noticed_at_once(tmp_path: Path, caplog: Any) -> None:
    found = [run(tmp_path, cached, callbacks=[ChangeInPlace()]) for cached in (False, True)]
    assert "A frozen weight has changed" in caplog.text
    assert_same_gradients(found[0][1], found[1][1])


def test_a_full_disk_while_writing_leaves_a_right_run(
    tmp_path: Path, caplog: Any, monkeypatch: Any
) -> None:
    original = RowStore.add

    def add(self: RowStore, *args: Any) -> None:
        if len(self) >= 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, *args)

    plain = run(tmp_path, False)
    monkeypatch.setattr(RowStore, "add", add)
    cached = run(tmp_path, True)
    assert "No space left on device" in caplog.text and "after 10 rows" in caplog.text
    assert_same_gradients(plain[1], cached[1])


def test_too_small_a_disk_is_seen_before_anything_is_written(
    tmp_path: Path, caplog: Any, monkeypatch: Any
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 99, 1))
    _, _, shares = run(tmp_path, True)
    assert "and 1 B are free" in caplog.text
    assert set(shares) == {0.0}
    assert not list((tmp_path / "_frozen_prefix_cache").glob("*/rows-*"))


class MeanOfAll(nn.Module):
    """A head that sees padded positions."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = bert(num_hidden_layers=4).bert
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any = None) -> Any:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.head(hidden.mean(1) * 10)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_padding_that_comes_late_is_checked_too(tmp_path: Path, caplog: Any) -> None:
    """The first batches that are read have none."""
    even = [row for row in rows(200, 1) if len(row["input_ids"]) == 6][:8]
    ragged = [row for row in rows(40, 2) if len(row["input_ids"]) != 6][:8]
    data = datasets.Dataset.from_list([*even, *ragged])

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(data)

    def losses(cached: bool) -> list[float]:
        torch.manual_seed(0)
        trainer = InOrder(
            MeanOfAll(),
            arguments(tmp_path, max_steps=12, remove_unused_columns=False),
            train_dataset=data,
            data_collator=collate,
        )
        trainer.add_callback(
            GradualUnfreezingCallback(LOWER_3, cache_frozen_prefix=cached, frozen_dropout=False)
        )
        trainer.train()
        return [e["loss"] for e in trainer.state.log_history if "loss" in e]

    assert losses(False) == pytest.approx(losses(True), rel=1e-3)
    assert "depend on the padding" in caplog.text


class Noted(nn.Module):
    """A head with batch norm, whose statistics move in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(16), nn.Linear(16, 3)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(hidden))


def test_batch_norm_above_the_prefix_is_as_in_the_uncached_run(tmp_path: Path) -> None:
    def build() -> Any:
        model = bert(num_hidden_layers=4)
        torch.manual_seed(5)
        model.classifier = Noted()
        return model

    found = [run(tmp_path, cached, build(), cache_dir=tmp_path / "c") for cached in (False, True)]
    assert found[1][2][-1] == 1.0 and len(list((tmp_path / "c").iterdir())) == 1
    # Batch norm over four rows makes the last bits of the weights larger from step to step.
    assert_same_gradients(found[0][1], found[1][1], 1e-5)
    counts = [f[0].model.classifier.norm.num_batches_tracked for f in found]
    assert counts[0] == counts[1]


class Prepended(nn.Module):
    """Adds positions that the attention mask does not have."""

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        hidden = self.embeddings(*args, **kwargs)
        return torch.cat([hidden, hidden[:, :2]], 1)


class Longer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bert = bert(num_hidden_layers=4).bert
        self.bert.embeddings = Prepended(self.bert.embeddings)
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any = None) -> Any:
        hidden = self.bert.embeddings(input_ids=input_ids)
        for layer in self.bert.encoder.layer:
            hidden = layer(hidden)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        logits = self.head(hidden[:, 0])
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_hidden_states_of_another_length_are_not_cached(tmp_path: Path, caplog: Any) -> None:
    def build() -> Any:
        torch.manual_seed(0)
        return Longer()

    settings: dict[str, Any] = dict(remove_unused_columns=False)
    plain = run(tmp_path, False, build(), **settings)
    cached = run(tmp_path, True, build(), **settings)
    assert "has another length than the attention mask" in caplog.text
    assert_same_gradients(plain[1], cached[1])


def test_gpt2_is_cached_with_its_dropout(tmp_path: Path) -> None:
    from transformers import GPT2ForSequenceClassification

    def build() -> Any:
        torch.manual_seed(0)
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.1)
        return GPT2ForSequenceClassification(gpt2_config(n_layer=3, num_labels=3, **dropout))

    schedule = FreezeOnly("embeddings", r"layer\.[01]")
    found = [run(tmp_path, cached, build(), schedule=schedule) for cached in (False, True)]
    assert found[1][2][-1] == 1.0
    assert_same_gradients(found[0][1], found[1][1])


class Random(nn.Module):
    """Noise that evaluation mode does not turn off."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + 0.0 * torch.rand_like(hidden)


class Neighbour(nn.Module):
    """Lets the rows of a batch see one another."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + 0.3 * hidden.mean(0, keepdim=True)


@pytest.mark.parametrize(
    ("module", "message"),
    [(Random(), "draws random numbers"), (Neighbour(), "depend on the padding, on other rows")],
)
def test_a_prefix_that_cannot_be_kept_is_noticed(
    module: nn.Module, message: str, tmp_path: Path, caplog: Any
) -> None:
    def build() -> Any:
        model = bert(num_hidden_layers=4)
        layer = model.bert.encoder.layer[1].output.dense
        model.bert.encoder.layer[1].output.dense = nn.Sequential(layer, module)
        return model

    plain = run(tmp_path, False, build())
    cached = run(tmp_path, True, build())
    assert message in caplog.text
    assert_same_gradients(plain[1], cached[1])


def test_layers_that_hand_on_more_than_a_hidden_state_are_not_cached(
    tmp_path: Path, caplog: Any
) -> None:
    from transformers import T5ForSequenceClassification

    def build() -> Any:
        torch.manual_seed(0)
        return T5ForSequenceClassification(t5_config(num_layers=3, num_labels=3))

    data = rows(ROWS, 1).map(
        lambda row: {
            "input_ids": [*row["input_ids"], 2],
            "attention_mask": [*row["attention_mask"], 1],
        }
    )
    schedule = FreezeOnly("embeddings", "encoder.layer.0")
    plain = run(tmp_path, False, build(), schedule=schedule, data=data)
    cached = run(tmp_path, True, build(), schedule=schedule, data=data)
    assert "hand on more than a hidden state" in caplog.text
    assert_same_gradients(plain[1], cached[1])


def test_a_feature_layer_in_the_prefix_is_not_skipped(tmp_path: Path, caplog: Any) -> None:
    def add(trainer: Trainer) -> None:
        adapt(
            trainer,
            DANN(hidden_sizes=(4,), feature_layer="bert.encoder.layer.1"),
            target_dataset=rows(9, 2, None, low=20),
        )

    found = [run(tmp_path, cached, before=add) for cached in (False, True)]
    assert "a forward hook on its layer 1 reads it" in caplog.text
    assert_same_gradients(found[0][1], found[1][1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(torch_compile=True), "torch_compile=True cannot follow"),
    ],
)
def test_what_cannot_be_cached_is_refused(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, True, **settings)


def test_several_towers_are_refused() -> None:
    from transformers import CLIPConfig, CLIPModel

    size = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(text_config=size, vision_config=size))
    with pytest.raises(ValueError, match="needs a model with one stack"):
        cacheable_stack(None, model)


# ---- what a row is found by ----


def test_a_row_is_found_by_its_content_whatever_its_padding() -> None:
    def keys(*batch: list[int], length: int) -> list[bytes]:
        made = collate([{"input_ids": r, "attention_mask": [1] * len(r)} for r in batch], length)
        return row_keys(made)[0]

    a, b = keys([5, 6, 7], [5, 6], length=4)
    assert keys([5, 6], [5, 6, 7], length=9) == [b, a] and a != b
    assert keys([5, 6, 8], length=4) != [a]
    found, spans = row_keys(
        {"input_ids": torch.tensor([[0, 5, 6, 7]]), "attention_mask": torch.tensor([[0, 1, 1, 1]])}
    )
    assert found != [a], "padding on the left moves the positions"
    assert spans == [(1, 4)]


def test_every_input_counts() -> None:
    base = {
        "input_ids": torch.tensor([[5, 6], [7, 8]]),
        "attention_mask": torch.ones(2, 2, dtype=torch.long),
        "token_type_ids": torch.zeros(2, 2, dtype=torch.long),
        "shared": torch.zeros(3),
    }
    keys, _ = row_keys(base)
    for name in ("token_type_ids", "shared"):
        changed = {**base, name: base[name] + 1}
        assert not set(row_keys(changed)[0]) & set(keys)
    pixels, spans = row_keys({"pixel_values": torch.arange(24.0).view(2, 3, 2, 2)})
    assert len(set(pixels)) == 2 and spans is None


# ---- rows on disk ----


def test_rows_are_read_back_padded(tmp_path: Path) -> None:
    one, two = torch.randn(2, 3).bfloat16(), torch.randn(4, 3).bfloat16()
    with RowStore(tmp_path, 0, torch.bfloat16, (3,)) as store:
        store.add(b"a" * 16, one, 0)
        store.add(b"b" * 16, two, 1)
        batch = store.batch([b"b" * 16, b"a" * 16], 5)
        whole = store.batch([b"b" * 16, b"a" * 16], None)
    assert batch.shape == (2, 5, 3) and batch.dtype == torch.bfloat16
    assert torch.equal(batch[0, 1:], two) and torch.equal(batch[1, :2], one)
    assert not batch[0, 0].any() and not batch[1, 2:].any()
    assert whole is None, "whole rows are of one length"


def test_processes_read_each_other_s_rows(tmp_path: Path) -> None:
    row = torch.randn(3, 2)
    with (
        RowStore(tmp_path, 0, torch.float32, (2,)) as one,
        RowStore(tmp_path, 1, torch.float32, (2,)) as two,
    ):
        one.add(b"a" * 16, row, 0)
        assert b"a" * 16 not in two
        two.refresh()
        assert torch.equal(two.batch([b"a" * 16], 3)[0], row)


def test_two_runs_in_one_folder_do_not_mix_their_rows(tmp_path: Path) -> None:
    with (
        RowStore(tmp_path, 0, torch.float32, (4,)) as one,
        RowStore(tmp_path, 0, torch.float32, (4,)) as other,
    ):
        for i in range(3):
            one.add(bytes([i]) * 16, torch.full((2, 4), float(i)), 0)
            other.add(bytes([100 + i]) * 16, torch.full((2, 4), 100.0 + i), 0)
        read = [float(one.batch([bytes([i]) * 16], 2)[0, 0, 0]) for i in range(3)]
        assert read == [0.0, 1.0, 2.0]
        one.refresh()
        assert float(one.batch([bytes([101]) * 16], 2)[0, 0, 0]) == 101.0


def test_a_write_that_the_system_refuses_is_an_error_and_closing_is_none(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with RowStore(tmp_path, 0, torch.float32, (4,)) as store:
        store.add(b"a" * 16, torch.ones(20, 4), 0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
        try:
            with pytest.raises(OSError):
                store.add(b"b" * 16, torch.ones(20, 4), 0)
            assert torch.equal(store.batch([b"a" * 16], 20)[0], torch.ones(20, 4))
        finally:
            store.close()
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_damaged_and_torn_rows_are_not_read(tmp_path: Path) -> None:
    kept = {bytes([i]) * 16: torch.randn(3, 2) for i in range(3)}
    with RowStore(tmp_path, 0, torch.float32, (2,)) as store:
        for key, row in kept.items():
            store.add(key, row, 0)
    path = next(tmp_path.glob("rows-*"))
    data = bytearray(path.read_bytes())
    data[30] ^= 1  # a bit of the second row
    path.write_bytes(data[:-4])  # and the end of the third
    keys = list(kept)
    with RowStore(tmp_path, 0, torch.float32, (2,)) as again:
        assert keys[2] not in again and len(again) == 2
        assert torch.equal(again.batch(keys[:1], 3)[0], kept[keys[0]])
        assert again.batch(keys[:2], 3) is None and keys[1] not in again
        again.add(keys[2], kept[keys[2]], 0)
        assert torch.equal(again.batch([keys[2]], 3)[0], kept[keys[2]])


class Counted(nn.Linear):
    """A head that counts its forwards, in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__(16, 3)
        self.register_buffer("in_place", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()), persistent=False)
        self.calls = 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.in_place += 1
        self.replaced = self.replaced + 1
        self.calls += 1
        return super().forward(hidden)


def test_comparing_the_kept_rows_is_not_counted(tmp_path: Path) -> None:
    model = bert()
    model.classifier = Counted()
    trainer = Trainer(
        model,
        arguments(tmp_path, max_steps=6),
        train_dataset=rows(8, 1),
        data_collator=collate,
    )
    trainer.add_callback(
        GradualUnfreezingCallback(FreezeOnly("embeddings", r"layer\.0"), cache_frozen_prefix=True)
    )
    compared = 0
    original = FrozenPrefix._same

    def same(self: Any, *args: Any) -> bool:
        nonlocal compared
        before = (float(head.in_place), float(head.replaced), head.calls)
        found = original(self, *args)
        compared += 1
        assert (float(head.in_place), float(head.replaced), head.calls) == before
        return found

    head = model.classifier
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FrozenPrefix, "_same", same)
        trainer.train()
    assert compared > 0
