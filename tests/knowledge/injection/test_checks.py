"""What is refused before anything is trained, with advice that works."""

import warnings
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import (
    BertForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from hf_adapt import DANN, Distillation, adapt
from hf_adapt.distillation import SelfTeacher
from hf_adapt.knowledge import KnowledgeCallback, KnowledgeInjection, KnowledgeTrainer
from hf_adapt.knowledge.injection.batching import KnowledgeBatcher
from tests.helpers import toy
from tests.helpers.injectors import injection, trainer
from tests.helpers.models import bert_config, family, llama
from tests.helpers.trainers import arguments, same_bits, weights


def reviews(number: int = 24, seed: int = 1, column: str = "review") -> Any:
    return toy.rows(number, seed).rename_column("text", column)


def with_review(folder: Path, **options: Any) -> Trainer:
    one = trainer(folder, data=reviews())
    one.eval_dataset = reviews(6, 2)
    one.add_callback(KnowledgeCallback(toy.graph(), toy.vectors(), **options))
    return one


# ---- names of columns ----


def test_a_column_that_was_named_and_is_not_there(tmp_path: Path) -> None:
    one = with_review(tmp_path, text_column="revew")
    before = weights(one.model)
    with pytest.raises(ValueError, match=r"text_column names 'revew'.*mean 'review'"):
        one.train()
    assert one.state.global_step == 0 and same_bits(before, weights(one.model))


def test_one_of_several_columns(tmp_path: Path) -> None:
    one = with_review(tmp_path, text_column=("review", "answer"))
    with pytest.raises(ValueError, match="'answer', which the train_dataset does not have"):
        one.train()


@pytest.mark.parametrize("several", [False, True])
def test_evaluation_data_is_checked_before_training(several: bool, tmp_path: Path) -> None:
    one = with_review(tmp_path, text_column="review")
    one.eval_dataset = {"a": reviews(), "b": toy.rows(6, 2)} if several else toy.rows(6, 2)
    name = r"eval_dataset\['b'\]" if several else "eval_dataset"
    with pytest.raises(ValueError, match=f"'review', which the {name} does not have"):
        one.train()
    assert one.state.global_step == 0


def test_target_data_is_checked_before_training(tmp_path: Path) -> None:
    one = trainer(tmp_path, data=reviews())
    one.eval_dataset = None
    own = KnowledgeInjection(toy.graph(), toy.vectors(), text_column="review")
    with pytest.raises(ValueError, match=r"target_dataset lacks the column\(s\) 'review'"):
        adapt(one, own, DANN(hidden_sizes=(8,)), target_dataset=[toy.rows(12, 7)]).train()


class Listed(torch.utils.data.Dataset):
    def __init__(self, rows: Any) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Any:
        return self.rows[number]


KINDS: dict[str, Any] = {
    "list": list,
    "torch": Listed,
    "stream": lambda rows: rows.to_iterable_dataset(),
    "nameless stream": lambda rows: datasets.IterableDataset.from_generator(lambda: iter(rows)),
    "transform": lambda rows: rows.with_transform(lambda batch: batch),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("column", ["revew", "review"])
def test_every_kind_of_dataset(column: str, kind: str, tmp_path: Path) -> None:
    one = trainer(tmp_path, data=KINDS[kind](reviews()), remove_unused_columns=kind != "transform")
    one.eval_dataset = None
    one.add_callback(KnowledgeCallback(toy.graph(), toy.vectors(), text_column=column))
    if column == "review":
        one.train()
        assert one.state.log_history[0]["knowledge/mentions_per_row"] > 0
        return
    near = "" if kind == "nameless stream" else ".*'review'"
    with pytest.raises(ValueError, match=f"text_column names 'revew'{near}"):
        one.train()
    assert one.state.global_step == 0


CELLS: dict[str, tuple[Any, str]] = {
    "numbers": ([*range(24)], "row 0 of the train_dataset has int 0"),
    "no text at all": ([None] * 24, "row 0 of the train_dataset has no text"),
    "one without": (["w1"] * 2 + [None] * 22, "row 2 of the train_dataset has no text"),
    "words": ([["w1"]] + [["w1", None]] * 23, r"row 1 of the train_dataset has list \['w1', N"),
}


@pytest.mark.parametrize("cells", CELLS)
@pytest.mark.parametrize("kind", ["dataset", "stream"])
def test_a_column_that_was_named_without_text(cells: str, kind: str, tmp_path: Path) -> None:
    values, match = CELLS[cells]
    data = reviews().add_column("said", values)
    one = trainer(tmp_path, data=data.to_iterable_dataset() if kind == "stream" else data)
    one.eval_dataset = None
    one.add_callback(KnowledgeCallback(toy.graph(), toy.vectors(), text_column="said"))
    if kind == "stream":
        match = "a row of the batch has"
    with pytest.raises(ValueError, match=f"text_column names 'said', which must .*{match}"):
        one.train()


def test_one_text_of_a_pair_may_be_missing(tmp_path: Path) -> None:
    data = reviews().add_column("answer", ["w1", None] * 12)
    one = trainer(tmp_path, data=data)
    one.eval_dataset = None
    own = KnowledgeCallback(toy.graph(), toy.vectors(), text_column=("review", "answer"))
    one.add_callback(own)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        one.train()
    assert one.state.log_history[0]["knowledge/mentions_per_row"] > 0


def test_a_transform_may_make_the_text(tmp_path: Path) -> None:
    own = toy.rows(24, 1)
    texts = list(own["text"])
    data = own.remove_columns("text").add_column("text", [*range(24)])
    said = data.with_transform(lambda batch: {**batch, "text": [texts[i] for i in batch["text"]]})
    one = trainer(tmp_path, data=said, remove_unused_columns=False)
    one.eval_dataset = None
    one.add_callback(KnowledgeCallback(toy.graph(), toy.vectors(), text_column="text"))
    one.train()
    assert one.state.log_history[0]["knowledge/mentions_per_row"] > 0


@pytest.mark.parametrize("knowledge_first", [True, False])
def test_a_copy_of_the_student_links_nothing(
    knowledge_first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its injector has no weights: there is nothing that mentions could add."""

    def linked(*_: Any) -> None:
        raise AssertionError("decoded tokens are linked")

    monkeypatch.setattr(KnowledgeBatcher, "of_tokens", linked)
    one = trainer(tmp_path, data=reviews())
    one.eval_dataset = None
    both = [injection(text_column="review"), Distillation(SelfTeacher())]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapt(one, *(both if knowledge_first else both[::-1])).train()
    assert one.state.log_history[0]["knowledge/mentions_per_row"] > 0


def test_rows_of_a_later_evaluation(tmp_path: Path) -> None:
    one = with_review(tmp_path, text_column="review")
    one.train()
    with pytest.raises(ValueError, match="text_column names 'review'"):
        one.evaluate(toy.rows(6, 2))


def test_the_default_column_may_be_missing(tmp_path: Path) -> None:
    one = with_review(tmp_path)
    with pytest.warns(UserWarning, match="linked in the tokenizer's own decoding"):
        one.train()


@pytest.mark.parametrize("way_in", [KnowledgeInjection, KnowledgeCallback])
def test_text_that_is_named_must_be_there(way_in: Any) -> None:
    one = way_in(toy.graph(), text_column="text")
    own = getattr(one, "injection", one)
    assert own.text_columns == ("text",) and own.names_columns
    default = way_in(toy.graph())
    own = getattr(default, "injection", default)
    assert own.text_columns == ("text",) and not own.names_columns


def test_rows_linked_by_token_need_no_text(tmp_path: Path) -> None:
    own = injection(text_column="review")
    mentions = [{"start": 1, "end": 2, "entities": [0], "priors": [1.0]}]
    data = toy.rows(24, 1, keep=()).map(lambda row: {"token_mentions": mentions})
    one = trainer(tmp_path, data=data)
    one.eval_dataset = None
    adapt(one, own).train()
    assert one.state.log_history[0]["knowledge/mentions_per_row"] == 1


# ---- trainers ----


def pairs() -> datasets.Dataset:
    texts = toy.sentences(12, 3)
    return datasets.Dataset.from_list(
        [{"prompt": "w0 w20", "chosen": f" {t}", "rejected": " w9 w10"} for t in texts]
    )


def settings(folder: Path, cls: Any) -> Any:
    # TRL turns bf16 and gradient checkpointing on; tiny models on a CPU need neither.
    return arguments(folder, cls, bf16=False, gradient_checkpointing=False, max_length=32)


def words(special: bool = True) -> Any:
    own = toy.tokenizer(special)
    own.eos_token = "[SEP]"
    return own


def dpo(folder: Path) -> Trainer:
    return DPOTrainer(
        llama(),
        llama(),
        args=settings(folder, DPOConfig),
        train_dataset=pairs(),
        processing_class=words(),
    )


def reward(folder: Path) -> Trainer:
    torch.manual_seed(0)
    return RewardTrainer(
        BertForSequenceClassification(bert_config(num_labels=1)),
        args=settings(folder, RewardConfig),
        train_dataset=pairs().map(lambda row: {k: row[k] for k in ("chosen", "rejected")}),
        processing_class=words(),
    )


@pytest.mark.parametrize("make", [dpo, reward])
def test_preference_data_is_refused_by_name(make: Any, tmp_path: Path) -> None:
    one = make(tmp_path)
    one.add_callback(KnowledgeCallback(toy.graph()))
    name = type(one).__name__
    with pytest.raises(
        ValueError, match=f"{name} compares answers.*preference data.*SFTTrainer"
    ) as error:
        one.train()
    assert "packing" not in str(error.value) and one.state.global_step == 0


def test_what_the_refusal_of_preference_data_advises_works(tmp_path: Path) -> None:
    chosen = pairs().rename_column("chosen", "completion").remove_columns("rejected")
    one = SFTTrainer(
        llama(),
        args=settings(tmp_path, SFTConfig),
        train_dataset=chosen,
        processing_class=words(special=False),
    )
    one.add_callback(KnowledgeCallback(toy.graph(), text_column=("prompt", "completion")))
    one.train()
    assert one.state.log_history[0]["knowledge/mentions_per_row"] > 1


def test_a_batch_without_tokens_says_what_it_has(tmp_path: Path) -> None:
    one = trainer(tmp_path)
    inner = one.data_collator
    one.data_collator = lambda rows: {
        f"prompt_{name}": value for name, value in inner(rows).items()
    }
    with pytest.raises(ValueError, match=r"made none.*prompt_input_ids") as error:
        adapt(one, injection()).train()
    assert "packing" not in str(error.value)


def test_sentence_transformers_are_refused_by_name(tmp_path: Path) -> None:
    one = trainer(tmp_path)
    one.collect_features = lambda inputs: ([inputs], None)  # what marks its Trainers
    with pytest.raises(ValueError, match="Knowledge injection is not supported with Trainer"):
        adapt(one, injection()).train()


# ---- warnings outside of training ----


def test_a_pipeline_is_not_told_of_datasets(tmp_path: Path) -> None:
    from hf_adapt.knowledge import knowledge_inputs

    one = KnowledgeTrainer(
        family("bert"),
        arguments(tmp_path, max_steps=1),
        train_dataset=toy.rows(8, 1),
        data_collator=DataCollatorWithPadding(toy.tokenizer()),
        processing_class=toy.tokenizer(),
        graph=toy.graph(),
        vectors=toy.vectors(),
    )
    one.train()
    tokens = toy.tokenizer()(["w0 w20"], return_tensors="pt")
    tokens.pop("token_type_ids", None)
    with pytest.warns(UserWarning, match=r"knowledge_inputs\(model, texts\)") as caught:
        one.model(**tokens)
    assert not any("dataset" in str(warning.message) for warning in caught)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one.model(**knowledge_inputs(one.model, ["w0 w20"]))
