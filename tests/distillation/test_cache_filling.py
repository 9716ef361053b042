"""`hf-adapt cache-teacher`: predictions made beforehand are those that training asks for."""

import gzip
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import DataCollatorWithPadding
from typer.testing import CliRunner

from hf_adapt import DistillationTrainer
from hf_adapt.cli import app
from hf_adapt.distillation import CachedTeacher
from hf_adapt.distillation.cache_filling import fill_cache
from tests.helpers.data import rows
from tests.helpers.distillation import texts, tokenizer
from tests.helpers.heads import CASES
from tests.helpers.models import bert, llama
from tests.helpers.trainers import GradientRecorder, arguments

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
    assert "12 rows, 12 of them computed now" in done.output
    gradients = train(tmp_path, CachedTeacher(tmp_path / "cache"))
    if top_k is None:
        online = train(tmp_path, bert(seed=1))
        for one, other in zip(gradients, online, strict=True):
            assert (one - other).norm() <= 1e-6 * other.norm()
    again = RUNNER.invoke(app, command)
    assert "12 rows, 0 of them computed now" in again.output


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


# ---- texts that are missing, or look as if they were ----


def fill(teacher: Path, file: Path, *options: str) -> Any:
    command = ["cache-teacher", str(teacher), str(file), "-o", str(file.parent / "cache")]
    return RUNNER.invoke(app, [*command, *options])


def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The tokenised rows that the teacher is asked for."""
    seen: list[dict[str, Any]] = []

    def fake(cache: Any, rows: Any, *args: Any, **kwargs: Any) -> Any:
        seen.extend(rows)
        yield len(rows)

    monkeypatch.setattr("hf_adapt.distillation.cache_filling.fill_cache", fake)
    return seen


ODD = ["w1", "NA", "null", "None", "nan", "007", "", "w2"]


def written(file: Path) -> Path:
    if file.suffix == ".csv":
        file.write_text("text,label\n" + "".join(f"{text},0\n" for text in ODD))
    elif file.suffix == ".tsv":
        file.write_text("text\tlabel\n" + "".join(f"{text}\t0\n" for text in ODD))
    else:
        rows = datasets.Dataset.from_list([{"text": text or None, "label": 0} for text in ODD])
        rows.to_json(str(file)) if file.suffix == ".jsonl" else rows.to_parquet(str(file))
    return file


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_text_that_looks_missing_stays_text(
    suffix: str, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = tokenizer()
    words.add_tokens(["NA", "null", "None", "nan", "007"])
    words.save_pretrained(teacher_folder)
    seen = asked(monkeypatch)
    done = fill(teacher_folder, written(tmp_path / f"rows.{suffix}"))
    assert done.exit_code == 0, done.output
    assert [row["input_ids"] for row in seen] == words([text for text in ODD if text])["input_ids"]
    assert "1 row without text was left out (row 6, counted from 0)" in " ".join(
        done.output.split()
    )


def test_rows_without_any_text_or_with_something_else(teacher_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "none.csv").write_text("text,label\n,0\n,1\n")
    assert "no row with a text" in fill(teacher_folder, tmp_path / "none.csv").output
    (tmp_path / "rows.jsonl").write_text('{"text": 1}\n{"text": 2}\n')
    output = " ".join(fill(teacher_folder, tmp_path / "rows.jsonl").output.split())
    assert "Column 'text' holds int64" in output


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_file_that_cannot_be_read(suffix: str, teacher_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / f"rows.{suffix}"
    file.write_text(
        'text,label\nw1,0\nw2,1\n"w3,0\nw4,1\n' if suffix == "csv" else '{"text": "w1"}\n{"text": '
    )
    done = fill(teacher_folder, file)
    assert done.exit_code == 1 and done.exception.__class__ is SystemExit
    output = " ".join(done.output.split())
    assert f"rows.{suffix} cannot be read as {'csv' if suffix == 'csv' else 'json'}" in output
    if suffix == "csv":
        assert "starting at row 3" in output


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_byte_order_mark(
    suffix: str, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, file = asked(monkeypatch), tmp_path / f"rows.{suffix}"
    file.write_text("\ufefftext\nw1\n" if suffix == "csv" else '\ufeff{"text": "w1"}\n')
    done = fill(teacher_folder, file)
    assert done.exit_code == 0, done.output
    assert len(seen) == 1


def test_lists_of_words_are_tokenised_as_words(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, words = asked(monkeypatch), tokenizer()
    columns = {"a": [["w1", "w2"], ["w3"]], "b": [["w4"], ["w5", "w6"]]}
    datasets.Dataset.from_dict(columns).to_parquet(str(tmp_path / "rows.parquet"))
    for names, texts_of in [(["a"], ["w1 w2", "w3"]), (["a", "b"], None)]:
        seen.clear()
        options = [option for name in names for option in ("--text-column", name)]
        done = fill(teacher_folder, tmp_path / "rows.parquet", *options)
        assert done.exit_code == 0, done.output
        expected = (
            words(texts_of)
            if texts_of
            else words(columns["a"], columns["b"], is_split_into_words=True)
        )
        assert [row["input_ids"] for row in seen] == expected["input_ids"]


@pytest.mark.parametrize("tokenised", [False, True])
def test_rows_longer_than_the_teachers_positions(
    tokenised: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Saved tokenizers often have no limit of their own."""
    bert(seed=1, max_position_embeddings=8).save_pretrained(tmp_path / "teacher")
    words = tokenizer()
    words.save_pretrained(tmp_path / "teacher")
    text = " ".join(f"w{i}" for i in range(20))
    rows = datasets.Dataset.from_list([{"text": text}, {"text": "w1"}])
    if tokenised:
        rows = rows.map(lambda row: words(row["text"]), remove_columns="text")
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    done = fill(tmp_path / "teacher", tmp_path / "rows.parquet")
    output = " ".join(done.output.split())
    if tokenised:
        assert done.exit_code == 1
        assert "row 0 has 22 tokens, and the teacher takes 8" in output
        return
    assert done.exit_code == 0, output
    assert "1 row is truncated to the 8 tokens that the teacher takes" in output
    student = words([text, "w1"], truncation=True, max_length=8)
    data = datasets.Dataset.from_dict({**student, "labels": [0, 1]})
    assert len(train(tmp_path, CachedTeacher(tmp_path / "cache"), data=data)) == 3


@pytest.mark.parametrize(
    ("name", "content", "options", "expected"),
    [
        ("rows.jsonl", "", [], "has no rows"),
        ("rows.csv", "", [], "has no rows"),
        ("rows.csv", "text\n", [], "has no rows"),
        ("rows.csv", "text\nw1\n", ["--device", "foo"], "--device foo"),
        ("rows.csv", "text\nw1\n", ["--device", "cuda:77"], "--device cuda:77"),
        ("rows.csv", "text\nw1\n", ["--top-k", "2", "--temperature", "0"], "must be positive"),
        ("rows.csv", "a,b,c\nw1,w2,w3\n", [f"--text-column={c}" for c in "abc"], "names 3 columns"),
        ("rows.csv", b"text\ncaf\xe9\n", [], "cannot be read as csv"),
        ("rows.csv", "text,label\nw1,0\nw2,1,2\n", [], "cannot be read as csv"),
        ("rows.jsonl", '{"text": "w1"}\n{"text":\n', [], "cannot be read as json"),
        ("rows.parquet", "abc", [], "rows.parquet cannot be read"),
        ("rows.jsonl", '{"text": 5}\n', [], "holds int64"),
    ],
)
def test_what_is_wrong_with_a_file_or_an_option(
    name: str,
    content: str | bytes,
    options: list[str],
    expected: str,
    teacher_folder: Path,
    tmp_path: Path,
) -> None:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    done = fill(teacher_folder, file, *options)
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit), done.exception
    output = " ".join(done.output.split())
    assert expected in output and "quotation mark" not in output


@pytest.mark.parametrize("name", ["rows.CSV", "rows.csv.gz"])
def test_names_of_files_and_blank_lines(
    name: str, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, content = asked(monkeypatch), b"text\nw1\n\nw2\n"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    done = fill(teacher_folder, tmp_path / name)
    assert done.exit_code == 0, done.output
    assert len(seen) == 2
    assert "row 1, counted from 0" in " ".join(done.output.split())
