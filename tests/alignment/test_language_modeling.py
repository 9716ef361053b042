"""Language modelling on the target: masks, the loss against Hugging Face's own, heads, stages."""

from __future__ import annotations

import copy
import logging
import math
import shutil
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForMaskedLM,
    BartForConditionalGeneration,
    BertForMaskedLM,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
    Trainer,
    ViTForImageClassification,
)
from trl import SFTConfig, SFTTrainer

from hf_adapt import MMD, Stream, adapt
from hf_adapt.alignment import TargetLanguageModeling, adapt_pretrain, mask_tokens
from hf_adapt.alignment.pretraining import _longest
from hf_adapt.models.language_model import LanguageModelHead, language_model_of
from tests.helpers.data import collate, rows, words
from tests.helpers.models import (
    MODELS,
    VOCABULARY,
    bart_config,
    bert,
    bert_config,
    enlarged,
    gpt2_config,
    vit_config,
)
from tests.helpers.toy import tokenizer
from tests.helpers.trainers import (
    GradientRecorder,
    StopAt,
    arguments,
    cosine_and_ratio,
    same_bits,
    weights,
)
from tests.scripts.trl_scripts import llama
from tests.scripts.world import quiet
from tests.scripts.world import tokenizer as script_tokenizer

TOKENIZER = tokenizer()
SPECIAL = TOKENIZER.all_special_ids
MASK = TOKENIZER.mask_token_id


def batch_of(number: int, seed: int = 2) -> dict[str, torch.Tensor]:
    return collate(list(rows(number, seed, labels=None, low=1)))


def trainer_of(folder: Any, model: Any, processing_class: Any = TOKENIZER, **settings: Any) -> Any:
    """A Trainer on rows of the source."""
    source = rows(16, 1, labels=settings.pop("labels", "row"))
    given = arguments(folder, seed=5, **settings)
    return Trainer(
        model, given, train_dataset=source, data_collator=collate, processing_class=processing_class
    )


def adapted(folder: Any, model: Any, objective: Any, ratio: float = 1.0, **settings: Any) -> Any:
    """The same with the objective on rows of a target, special tokens among them."""
    trainer = trainer_of(folder, model, **settings)
    target = rows(24, 2, labels=None, low=1)
    return adapt(trainer, objective, target_dataset=Stream(target, ratio=ratio))


# ---- masks ----


def test_a_share_is_chosen_and_of_it_80_percent_masked_10_replaced_10_kept():
    ids = torch.randint(0, VOCABULARY, (400, 50), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(50) < torch.arange(400).unsqueeze(1) % 50 + 1
    inputs, labels = mask_tokens(ids, mask, TOKENIZER, 0.15, seed=3)
    chosen = labels != -100
    able = mask & ~torch.isin(ids, torch.tensor(SPECIAL))
    assert not bool((chosen & ~able).any())
    assert torch.equal(inputs[~chosen], ids[~chosen]) and torch.equal(labels[chosen], ids[chosen])
    number = int(chosen.sum())
    assert number / int(able.sum()) == pytest.approx(0.15, abs=0.01)
    masked, kept = inputs[chosen] == MASK, inputs[chosen] == ids[chosen]
    assert float(masked.sum()) / number == pytest.approx(0.8 + 0.1 / 64, abs=0.03)
    assert float(kept.sum()) / number == pytest.approx(0.1 + 0.1 / 64, abs=0.03)
    replaced = inputs[chosen & (inputs != MASK) & (inputs != ids)]
    assert len(replaced.unique()) > 40 and int(replaced.max()) < len(TOKENIZER)


def test_masks_depend_on_seed_row_and_position_alone():
    batch = batch_of(6)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    whole = mask_tokens(ids, mask, TOKENIZER, 0.4, seed=1)
    alone = mask_tokens(ids[2:4], mask[2:4], TOKENIZER, 0.4, seed=1)
    assert torch.equal(whole.input_ids[2:4], alone.input_ids)
    left = mask_tokens(  # padding on the left
        F.pad(ids[:1], (3, 0)), F.pad(mask[:1], (3, 0)), TOKENIZER, 0.4, seed=1
    )
    assert torch.equal(left.labels[0, 3:], whole.labels[0])
    other = mask_tokens(ids, mask, TOKENIZER, 0.4, seed=2)
    assert not torch.equal(other.labels, whole.labels)
    assert int(mask_tokens(ids * 0 + 1, mask, TOKENIZER, 0.9).labels.max()) == -100  # [UNK] alone


# ---- heads ----

CHECKPOINTS = {
    "bert": lambda: BertForMaskedLM(bert_config()),
    "roberta": lambda: RobertaForMaskedLM(MODELS["roberta"]().config),
    "distilbert": lambda: DistilBertForMaskedLM(
        DistilBertConfig(vocab_size=VOCABULARY, dim=16, n_layers=2, n_heads=2, hidden_dim=32)
    ),
    "modernbert": lambda: ModernBertForMaskedLM(MODELS["modernbert"]().config),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_head_of_a_checkpoint_gives_what_its_language_model_gives(name):
    torch.manual_seed(0)
    model = enlarged(CHECKPOINTS[name](), 5).eval()
    head = LanguageModelHead.of(model)
    assert head is not None
    ids = torch.tensor([[5, 9, 12, 7]])
    hidden, expected = model.base_model(ids)[0], model(ids).logits
    got = head(hidden[0], model.get_input_embeddings().weight)
    torch.testing.assert_close(got, expected[0], rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1


def test_a_language_model_shares_the_encoder_and_knows_whether_its_head_is_new(tmp_path):
    torch.manual_seed(0)
    BertForMaskedLM(bert_config()).save_pretrained(tmp_path / "lm")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "lm")
    shared, is_new = language_model_of(model)
    assert isinstance(shared, BertForMaskedLM) and not is_new
    assert shared.bert is model.bert
    assert shared.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path / "classifier")
    again = BertForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert language_model_of(again)[1]
    decoder = GPT2ForSequenceClassification(gpt2_config())
    shared, is_new = language_model_of(decoder)
    assert isinstance(shared, GPT2LMHeadModel) and not is_new  # tied: there is nothing to train


# ---- the loss ----


class Recorder(TargetLanguageModeling):
    """Keeps the batches that it sees, and its terms."""

    name = "target_language_modeling"

    def loss(self, batch):
        total, count = super().loss(batch)
        if torch.is_grad_enabled():
            self.seen = [(part.inputs, batch.is_in(part.domain)) for part in batch.parts]
            self.mean, self.count = float(total.detach()) / int(count), int(count)
        return total, count

    def rows(self, target: bool) -> dict[str, torch.Tensor]:
        """The rows of the target, or those of the source."""
        (found,) = [
            {name: value[kept == target] for name, value in inputs.items()}
            for inputs, kept in self.seen
            if bool((kept == target).any())
        ]
        return found


def test_an_encoder_gives_the_loss_and_gradient_of_hugging_faces_masked_language_model(tmp_path):
    """BertForMaskedLM of the same checkpoint on the same masked rows, and the shares by hand."""
    torch.manual_seed(0)
    enlarged(BertForMaskedLM(bert_config()), 5).save_pretrained(tmp_path / "lm")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "lm", num_labels=3)
    peer = BertForMaskedLM.from_pretrained(tmp_path / "lm")
    task = copy.deepcopy(model)
    objective, recorder = Recorder(mask_probability=0.4), GradientRecorder(model)
    trainer = adapted(tmp_path, model, objective, ratio=2.0, max_steps=1, max_grad_norm=0.0)
    trainer.add_callback(recorder)
    trainer.train()

    source, target = objective.rows(False), objective.rows(True)
    ids, mask = target["input_ids"], target["attention_mask"]
    assert len(ids) == 2 * len(source["input_ids"]) == 8
    masked, labels = mask_tokens(ids, mask, TOKENIZER, 0.4, seed=1_000_003 * 5)
    expected = peer(masked, mask, labels=labels).loss
    assert objective.count == int((labels != -100).sum()) > 8
    assert objective.mean == pytest.approx(expected.item(), rel=1e-4)

    own = task(source["input_ids"], source["attention_mask"]).logits
    task_loss = F.cross_entropy(own, source["labels"])
    (task_loss / 3).backward()  # the paper's shares: 1 source row for 2 of the target
    (expected * 2 / 3).backward()
    gradients = dict(task.named_parameters())
    by_hand = []
    for name, _ in model.named_parameters():
        gradient = gradients[name].grad.clone()
        lm = dict(peer.named_parameters()).get(name)
        if lm is not None and lm.grad is not None:
            gradient += lm.grad
        by_hand.append(gradient.flatten())
    cosine, ratio = cosine_and_ratio(recorder.gradients[0], torch.cat(by_hand).double())
    assert (cosine, ratio) == pytest.approx((1.0, 1.0), abs=1e-4)


@pytest.mark.parametrize("own", [False, True])
def test_a_decoder_gives_the_loss_of_hugging_faces_causal_language_model(own, tmp_path):
    torch.manual_seed(0)
    peer = enlarged(GPT2LMHeadModel(gpt2_config(num_labels=3)), 5)
    model = peer if own else GPT2ForSequenceClassification(gpt2_config(num_labels=3))
    if not own:
        model.transformer.load_state_dict(peer.transformer.state_dict())
    objective = Recorder()
    labels = "lm" if own else "row"
    trainer = adapted(tmp_path, model, objective, max_steps=1, labels=labels, processing_class=None)
    peer = copy.deepcopy(peer)
    trainer.train()
    assert objective.module is None
    ids, mask = objective.rows(True)["input_ids"], objective.rows(True)["attention_mask"]
    expected = peer(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    assert objective.count == int(mask.sum()) - len(ids)
    assert objective.mean == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("has_lora", [False, True])
def test_trl_runs_a_decoder_without_logits(has_lora, tmp_path):
    """SFTTrainer computes its loss in tiles; the target's is that of the whole logits."""
    model = llama()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    texts = [words(i, 0, 3 + i) for i in range(4)]
    causal = script_tokenizer(causal=True)
    rows = causal(texts, padding=True, return_tensors="pt")
    labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    expected = model(**rows, labels=labels).loss.item()
    settings = quiet(tmp_path, max_steps=1, bf16=False, gradient_checkpointing=False)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**settings),
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=causal,
        peft_config=LoraConfig(target_modules=["q_proj"]) if has_lora else None,
    )
    target = datasets.Dataset.from_dict(dict(causal(texts)))
    adapt(trainer, TargetLanguageModeling(), target_dataset=target).train()
    found = trainer.state.log_history[0]["loss/target_language_modeling"]
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_masked_language_model_uses_its_own_head(tmp_path):
    torch.manual_seed(0)
    model = enlarged(BertForMaskedLM(bert_config()), 5)
    peer, objective = copy.deepcopy(model), Recorder(mask_probability=0.5)
    adapted(tmp_path, model, objective, max_steps=1, labels="lm").train()
    ids, mask = objective.rows(True)["input_ids"], objective.rows(True)["attention_mask"]
    masked, labels = mask_tokens(ids, mask, TOKENIZER, 0.5, seed=1_000_003 * 5)
    assert objective.mean == pytest.approx(peer(masked, mask, labels=labels).loss.item(), rel=1e-4)
    assert objective.module is None


@pytest.mark.parametrize("weight", [None, 0.3])
def test_accumulation_changes_nothing_although_rows_have_unequal_numbers_of_masks(weight, tmp_path):
    found = []
    for size, steps in ((8, 1), (1, 8)):
        model = bert()
        objective = TargetLanguageModeling(weight, mask_probability=0.3, warmup=0)
        trainer = adapted(
            tmp_path,
            model,
            objective,
            ratio=1.5,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_grad_norm=0.0,
        )
        recorder = GradientRecorder(model)
        trainer.add_callback(recorder)
        trainer.train()
        found.append((recorder.gradients[0], trainer.state.log_history[0]))
    assert cosine_and_ratio(found[0][0], found[1][0]) == pytest.approx((1.0, 1.0), abs=1e-4)
    key = "loss/target_language_modeling"
    assert found[0][1][key] == pytest.approx(found[1][1][key], rel=1e-4)


def test_without_a_token_to_predict_the_term_is_0(tmp_path):
    """Rows of special tokens alone; a micro-batch without target rows (ratio 0.5) too."""
    model = bert()
    trainer = trainer_of(tmp_path, model, per_device_train_batch_size=1, max_steps=2)
    nothing = rows(8, 2, labels=None, low=1, high=2)
    adapt(trainer, TargetLanguageModeling(warmup=0), target_dataset=Stream(nothing, ratio=0.5))
    before = weights(model)
    trainer.train()
    assert [log["loss/target_language_modeling"] for log in trainer.state.log_history[:2]] == [0, 0]
    assert not same_bits(before, weights(model))
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())


class Forwards(torch.nn.Module):
    """Counts the rows that a model is run on in training."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.rows: list[int] = []
        model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module: Any, args: Any, kwargs: Any) -> None:
        if module.training:
            self.rows.append(len(kwargs["input_ids"]))


@pytest.mark.parametrize(("with_others", "expected"), [(False, [4, 4]), (True, [8, 4])])
def test_unmasked_rows_are_run_only_where_another_objective_reads_them(
    with_others, expected, tmp_path
):
    model = bert()
    forwards = Forwards(model)
    trainer = trainer_of(tmp_path, model, max_steps=1)
    others = [MMD()] if with_others else []
    target = rows(24, 2, labels=None, low=1)
    adapt(trainer, TargetLanguageModeling(warmup=0), *others, target_dataset=target).train()
    assert forwards.rows == expected
    assert trainer.state.log_history[0]["loss/target_language_modeling"] > 1


# ---- the warm-up ----


def test_a_new_head_warms_up_before_its_gradient_reaches_the_model(tmp_path):
    """While it warms up the model's weights are those of a run with the task alone."""
    runs = {}
    for weight in (0.0, 1.0):
        model = bert()
        objective = TargetLanguageModeling(weight, warmup=0.5)
        trainer = adapted(tmp_path, model, objective, max_steps=4, lr_scheduler_type="constant")
        history = []
        trainer.add_callback(Snapshot(history))
        trainer.train()
        runs[weight] = history
    for plain, with_term in zip(runs[0.0][:2], runs[1.0][:2], strict=True):
        assert (plain - with_term).abs().max() < 1e-6
    assert (runs[0.0][3] - runs[1.0][3]).abs().max() > 1e-4


class Snapshot(StopAt):
    """The encoder's weights after each step."""

    def __init__(self, history: list[torch.Tensor]) -> None:
        self.history = history

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        self.history.append(torch.cat([p.detach().flatten().clone() for p in model.parameters()]))


def test_a_head_of_the_checkpoint_needs_no_warm_up(tmp_path, caplog):
    torch.manual_seed(0)
    BertForMaskedLM(bert_config()).save_pretrained(tmp_path / "lm")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "lm", num_labels=3)
    objective = TargetLanguageModeling(warmup=0.9)
    trainer = adapted(tmp_path, model, objective, max_steps=1)
    before = weights(model)["bert.embeddings.word_embeddings.weight"]
    with caplog.at_level(logging.INFO, logger="hf_adapt"):
        trainer.train()
    assert "the head is that of" in caplog.text
    assert objective.learning_rate == trainer.args.learning_rate
    moved = (model.get_input_embeddings().weight - before).abs().sum(1) > 0
    assert int(moved.sum()) == VOCABULARY  # by the tied head: few of them are in the batch


# ---- with what runs have ----


def test_the_saved_model_is_plain_and_the_head_lies_beside_it(tmp_path, recwarn):
    model = bert()
    trainer = adapted(tmp_path / "run", model, TargetLanguageModeling(), max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again, found = BertForSequenceClassification.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert same_bits(weights(again), weights(model))
    head = load_file(tmp_path / "saved" / "adaptation.safetensors")
    assert sum(value.numel() for value in head.values()) == 16 * 16 + 3 * 16 + VOCABULARY


@pytest.mark.parametrize("workers", [0, 1])
def test_resumed_is_uninterrupted(workers, tmp_path):
    settings = dict(
        max_steps=6, save_strategy="steps", save_steps=3, dataloader_num_workers=workers
    )

    def start(folder: str) -> tuple[Any, Any]:
        model = bert(dropout=True)
        objective = TargetLanguageModeling(warmup=0.3, mask_probability=0.3)
        return adapted(tmp_path / folder, model, objective, **settings), objective

    whole, head = start("whole")
    whole.train()
    stopped, _ = start("parts")
    stopped.add_callback(StopAt(3))
    stopped.train()
    resumed, again = start("parts")
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert same_bits(weights(resumed.model), weights(whole.model))
    assert same_bits(weights(again.module), weights(head.module))


def lora(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))


def frozen_embeddings(model: Any) -> Any:
    model.get_input_embeddings().requires_grad_(False)
    return model


def of_three_classes(name: str) -> Any:
    config = MODELS[name]().config
    config.num_labels = 3
    return type(MODELS[name]())(config)


CHECKPOINTED = dict(
    gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}
)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (lambda: lora(bert()), {}),
        (lambda: frozen_embeddings(bert()), {}),
        (bert, CHECKPOINTED),
        (bert, {"bf16": True}),
        (lambda: bert("token"), {"labels": "token"}),
        (lambda: of_three_classes("roberta"), {}),
        (
            lambda: of_three_classes("llama_rows"),
            {"processing_class": None},
        ),  # ties nothing: it gets a new head
    ],
)
def test_it_trains_with(make, settings, tmp_path):
    model = make()
    objective = TargetLanguageModeling(1.0, warmup=0)
    trainer = adapted(tmp_path, model, objective, max_steps=2, **settings)
    before = weights(model)
    trainer.train()
    after = weights(model)
    queries = [name for name in before if "query" in name or "q_proj" in name]
    assert queries and any(not torch.equal(before[name], after[name]) for name in queries)
    assert isinstance(objective.module, LanguageModelHead)
    assert 2 < trainer.state.log_history[0]["loss/target_language_modeling"] < 10


# ---- what is refused ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "finite number >= 0"),
        ({"mask_probability": 0.0}, "mask_probability=0.0 must lie between 0 and 1"),
        ({"warmup": 1.0}, "warmup=1.0 must be a share of the run"),
    ],
)
def test_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TargetLanguageModeling(**options)


def without_mask() -> Any:
    own = tokenizer()
    own.mask_token = None
    return own


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        (bert, None, "needs the tokenizer of the rows, found NoneType"),
        (
            bert,
            without_mask(),
            "has no mask token, and BertForSequenceClassification is an encoder",
        ),
        (lambda: BartForConditionalGeneration(bart_config()), TOKENIZER, "is an encoder-decoder"),
        (
            lambda: ViTForImageClassification(vit_config()),
            TOKENIZER,
            "ViTForImageClassification .*'vit'.* has no language model",
        ),
    ],
)
def test_models_without_tokens_to_predict_are_refused(model, given, message, tmp_path):
    trainer = adapted(
        tmp_path,
        model(),
        TargetLanguageModeling(),
        processing_class=given,
        remove_unused_columns=False,
    )
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_rows_without_input_ids_are_refused(tmp_path):
    table = torch.nn.Embedding(VOCABULARY, 16)

    def embedded(features: Any) -> Any:
        batch = collate(features)
        batch["inputs_embeds"] = table(batch.pop("input_ids")).detach()
        return batch

    trainer = adapted(tmp_path, bert(), TargetLanguageModeling())
    trainer.data_collator = embedded
    with pytest.raises(ValueError, match=r"needs input_ids of shape \(B, T\); the batch has"):
        trainer.train()


# ---- what it is for ----


def pairs(number: int, seed: int) -> datasets.Dataset:
    """Two of six words, each followed by the one that always follows it."""
    first = torch.randint(5, 11, (number, 2), generator=torch.Generator().manual_seed(seed))
    ids = torch.stack([first, first + 30], dim=2).flatten(1).tolist()
    return datasets.Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 4] * number})


def test_the_targets_words_are_learnt_together(tmp_path):
    """Twelve words are equally frequent: below ln 12 only the word beside a mask can help."""
    trainer = trainer_of(
        tmp_path,
        bert(seed=1),
        max_steps=100,
        per_device_train_batch_size=16,
        logging_steps=25,
        learning_rate=1e-2,
    )
    objective = TargetLanguageModeling(mask_probability=0.3)
    adapt(trainer, objective, target_dataset=pairs(64, 3)).train()
    logs = trainer.state.log_history
    losses = [log[key] for log in logs if (key := "loss/target_language_modeling") in log]
    assert losses[0] > math.log(12)
    assert losses[-1] < math.log(12) - 0.3


# ---- the stage before ----


def texts(number: int) -> list[str]:
    return [f"w{i % 20} w{20 + i % 20} w{(i + 3) % 20} w{20 + (i + 3) % 20}" for i in range(number)]


def test_pretraining_changes_the_encoder_alone_and_its_head_is_found_afterwards(tmp_path, caplog):
    model = bert(seed=2).eval()
    before = weights(model)
    settings = dict(max_steps=20, learning_rate=3e-3, save_strategy="steps", save_steps=10)
    args = arguments(tmp_path / "tapt", **settings)
    assert adapt_pretrain(model, TOKENIZER, texts(64), args) is model
    after = weights(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "bert.embeddings.word_embeddings.weight" in changed
    assert not any(name.startswith("classifier") for name in changed) and not model.training

    language_model = AutoModelForMaskedLM.from_pretrained(tmp_path / "tapt")
    assert torch.equal(language_model.bert.embeddings.word_embeddings.weight,
                       model.get_input_embeddings().weight)  # fmt: skip
    objective = TargetLanguageModeling(warmup=0.5)
    with caplog.at_level(logging.INFO, logger="hf_adapt"):
        adapted(tmp_path / "task", model, objective, max_steps=1).train()
    assert f"the head is that of {tmp_path / 'tapt'}" in caplog.text
    dense = language_model.cls.predictions.transform.dense.weight
    assert (objective.module.transform[0].weight - dense).abs().max() < 2e-3


def test_pretraining_resumes_bit_for_bit(tmp_path):
    settings = dict(max_steps=6, save_strategy="steps", save_steps=3, seed=4)

    def model() -> Any:
        return bert(dropout=True)

    whole = adapt_pretrain(model(), TOKENIZER, texts(32), arguments(tmp_path / "a", **settings))
    args = arguments(tmp_path / "b", **settings)
    shutil.copytree(tmp_path / "a" / "checkpoint-3", tmp_path / "b" / "checkpoint-3")
    resumed = adapt_pretrain(model(), TOKENIZER, texts(32), args)
    body = {k: v for k, v in weights(whole).items() if k.startswith("bert")}
    assert same_bits(body, {k: v for k, v in weights(resumed).items() if k.startswith("bert")})


def test_texts_are_cut_at_what_the_model_takes():
    endless = SimpleNamespace(model_max_length=int(1e30))
    config = RobertaConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8, max_position_embeddings=34,
    )  # fmt: skip
    assert _longest(RobertaForMaskedLM(config), endless) == 32  # positions 0 and 1 are not used
    bloom = BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=1)
    assert _longest(BloomForCausalLM(bloom), endless) is None
    assert _longest(bert(), SimpleNamespace(model_max_length=7)) == 7


def test_a_new_head_is_trained_first_and_faster(tmp_path):
    model = bert(seed=2)
    before = weights(model)
    args = arguments(tmp_path, max_steps=2, learning_rate=1e-5)
    adapt_pretrain(model, TOKENIZER, texts(16), args, warmup=0.9)
    assert same_bits(before, weights(model))
    dense = AutoModelForMaskedLM.from_pretrained(tmp_path).cls.predictions.bias
    assert dense.abs().max() > 1e-3


def test_a_decoder_is_pretrained_on_rows_of_tokens(tmp_path):
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(GPT2Config(**gpt2_config().to_diff_dict()))
    before = weights(model)
    tokens = rows(16, 3, labels="row")
    adapt_pretrain(model, TOKENIZER, tokens, arguments(tmp_path, max_steps=2))
    after = weights(model)
    assert not torch.equal(before["transformer.wte.weight"], after["transformer.wte.weight"])
    assert torch.equal(before["score.weight"], after["score.weight"])


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ([], {}, "has no rows"),
        (["w1", "", " "], {}, r"2 of the target's 3 texts are empty \(row 1 is the first\)"),
        ("w1 w2", {}, "must be a list of texts or a datasets.Dataset, got str"),
        (datasets.Dataset.from_dict({"body": ["w1"]}), {}, "neither input_ids nor .*'text'.* body"),
        (["w1"], {"mask_probability": 1.0}, "mask_probability=1.0 must lie between"),
        (["w1"], {"warmup": 1.0}, "warmup=1.0 be at least 0 and below 1"),
        (["w1"], {"tokenizer": without_mask()}, "has no mask_token"),
    ],
)
def test_pretraining_refuses(target, options, message, tmp_path):
    own = options.pop("tokenizer", TOKENIZER)
    with pytest.raises(ValueError, match=message):
        adapt_pretrain(bert(), own, target, arguments(tmp_path), **options)


def test_pretraining_refuses_adapters(tmp_path):
    with pytest.raises(ValueError, match="call it before get_peft_model"):
        adapt_pretrain(lora(bert()), TOKENIZER, ["w1"], arguments(tmp_path))
