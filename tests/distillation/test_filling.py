"""`hf-adapt cache-teacher`: predictions made beforehand are those that training asks for."""

from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import DataCollatorWithPadding
from typer.testing import CliRunner

from hf_adapt import CachedTeacher, DistillationTrainer
from hf_adapt.cli import app
from hf_adapt.distillation.filling import fill_cache
from tests.distillation.heads import CASES
from tests.distillation.test_tokenizers import texts, tokenizer
from tests.tiny import GradientRecorder, arguments, bert, llama, rows

RUNNER = CliRunner()


def write_csv(path: Path, number: int = 12) -> datasets.Dataset:
    data = datasets.Dataset.from_list(
        [{"text": text, "label": i % 3} for i, text in enumerate(texts(number))]
    )
    data.to_csv(str(path))
    return data


def train(folder: Path, teacher: Any, **options: Any) -> Any:
    words, recorder = tokenizer(), GradientRecorder()
    data = datasets.Dataset.from_list(
        [{**words(text), "labels": i % 3} for i, text in enumerate(texts(12))]
    )
    trainer = DistillationTrainer(
        model=bert(seed=0),
        teacher=teacher,
        args=arguments(folder),
        train_dataset=options.pop("data", data),
        data_collator=DataCollatorWithPadding(words),
        processing_class=words,
        callbacks=[recorder],
    )
    trainer.train()
    return recorder.gradients


@pytest.fixture
def teacher_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "teacher"
    bert(seed=1).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("top_k", [None, 2])
def test_a_cache_made_beforehand_serves_training(
    top_k: int | None, teacher_folder: Path, tmp_path: Path
) -> None:
    write_csv(tmp_path / "rows.csv")
    more = [] if top_k is None else ["--top-k", str(top_k), "--temperature", "2"]
    command = ["cache-teacher", str(teacher_folder), str(tmp_path / "rows.csv")]
    command += ["--output", str(tmp_path / "cache"), "--batch-size", "5", *more]
    done = RUNNER.invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "12 rows, 12 of them asked now" in done.output
    gradients = train(tmp_path, CachedTeacher(tmp_path / "cache"))
    if top_k is None:
        online = train(tmp_path, bert(seed=1))
        for one, other in zip(gradients, online, strict=True):
            assert (one - other).norm() <= 1e-6 * other.norm()
    again = RUNNER.invoke(app, command)
    assert "12 rows, 0 of them asked now" in again.output


def test_labels_that_are_texts_are_left_out(teacher_folder: Path, tmp_path: Path) -> None:
    data = datasets.Dataset.from_list([{"text": text, "label": "good"} for text in texts(12)])
    data.to_csv(str(tmp_path / "rows.csv"))
    command = ["cache-teacher", str(teacher_folder), str(tmp_path / "rows.csv")]
    done = RUNNER.invoke(app, [*command, "-o", str(tmp_path / "cache")])
    assert done.exit_code == 0, done.output
    assert len(train(tmp_path, CachedTeacher(tmp_path / "cache"))) == 3


@pytest.mark.parametrize("beforehand", [True, False])
def test_the_most_likely_classes_are_those_of_one_vocabulary(
    beforehand: bool, tmp_path: Path
) -> None:
    """Padding that is in the student's predictions must be in its teacher's too, or in neither."""
    case, words = CASES["llama"], tokenizer()  # 44 of the models' 64 classes have a token
    data = rows(8, 1, "lm", high=44)
    folder = tmp_path / "cache"

    def cache() -> CachedTeacher:
        return CachedTeacher(folder, case.model(1), top_k=44, temperature=2.0)

    def loss(teacher: Any, classes: int) -> float:
        class Trimmed(DistillationTrainer):
            def divergence(self, student: Any, teacher: Any, temperature: float) -> Any:
                return super().divergence(student[:, :classes], teacher[:, :classes], temperature)

        trainer = Trimmed(
            model=case.model(0),
            teacher=teacher,
            args=arguments(tmp_path, max_steps=1),
            train_dataset=data,
            data_collator=case.collate,
            processing_class=words,
            chunked=False,
        )
        trainer.train()
        return float(trainer.state.log_history[0]["loss/distillation"])

    if beforehand:
        list(fill_cache(cache(), data.select(range(5)), words, data_collator=case.collate))
    # The three rows that were not there are kept over the same classes.
    found = [loss(cache(), 64), loss(CachedTeacher(folder), 64)]
    if beforehand:
        exact = loss(case.model(1), 44)
        assert found == pytest.approx([exact, exact], rel=1e-4)
    else:
        assert found[0] == pytest.approx(found[1], rel=1e-6)
        assert found[0] <= loss(case.model(1), 64)
        smaller = llama(0)
        smaller.resize_token_embeddings(60, mean_resizing=False)
        with pytest.raises(ValueError, match="over 64 classes and the student has only 60"):
            DistillationTrainer(
                model=smaller,
                teacher=cache(),
                args=arguments(tmp_path),
                train_dataset=data,
                data_collator=case.collate,
                processing_class=words,
            ).train()


def test_rows_that_are_tokenised_already(teacher_folder: Path, tmp_path: Path) -> None:
    words = tokenizer()
    data = datasets.Dataset.from_list(
        [{**words(text), "labels": 0, "extra": "x"} for text in texts(12)]
    )
    data.save_to_disk(str(tmp_path / "rows"))
    done = RUNNER.invoke(
        app,
        ["cache-teacher", str(teacher_folder), str(tmp_path / "rows"), "-o", str(tmp_path / "c")],
    )
    assert done.exit_code == 0, done.output
    assert len(train(tmp_path, CachedTeacher(tmp_path / "c"))) == 3


@pytest.mark.parametrize("name", CASES)
def test_every_head(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    data = case.data(8)
    cache = CachedTeacher(tmp_path / "cache", case.model(1))
    counts = list(fill_cache(cache, data, data_collator=case.collate, batch_size=3))
    assert counts == [3, 6, 8]
    trainer = DistillationTrainer(
        model=case.model(0),
        teacher=CachedTeacher(tmp_path / "cache"),
        args=arguments(tmp_path),
        train_dataset=data,
        data_collator=case.collate,
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss/distillation"] > 0


def test_what_is_wrong_is_said(teacher_folder: Path, tmp_path: Path) -> None:
    write_csv(tmp_path / "rows.csv")

    def said(*options: str) -> str:
        command = ["cache-teacher", str(teacher_folder), str(tmp_path / "rows.csv")]
        done = RUNNER.invoke(app, [*command, "-o", str(tmp_path / "cache"), *options])
        assert done.exit_code == 1
        return " ".join(done.output.split())

    assert "no column 'review'" in said("--text-column", "review")
    assert "needs the temperature" in said("--top-k", "2")
    assert "dtype='int8' is unknown" in said("--dtype", "int8")
    with pytest.raises(ValueError, match="needs its teacher"):
        list(fill_cache(CachedTeacher(tmp_path / "cache"), []))


def test_segments_that_are_all_zero_are_as_good_as_none(tmp_path: Path) -> None:
    """A DistilBERT takes no token_type_ids; a cache made with them serves it."""
    words = tokenizer()
    data = datasets.Dataset.from_list(
        [
            {**words(text), "token_type_ids": [0] * len(words(text)["input_ids"]), "labels": 0}
            for text in texts(12)
        ]
    )
    cache = CachedTeacher(tmp_path / "cache", bert(seed=1))
    list(fill_cache(cache, data, words, data_collator=DataCollatorWithPadding(words)))
    without = data.remove_columns("token_type_ids")
    assert len(train(tmp_path, CachedTeacher(tmp_path / "cache"), data=without)) == 3
    pairs = data.map(lambda row: {"token_type_ids": [1] * len(row["input_ids"])})
    with pytest.raises(ValueError, match="are not in"):
        train(tmp_path, CachedTeacher(tmp_path / "cache"), data=pairs)
