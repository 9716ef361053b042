"""Rows of domains: splits, labels and what is refused."""

import datasets
import pytest
from datasets import Dataset, DatasetDict

from hf_adapt.experiments import data
from hf_adapt.experiments.config import DomainFiles, Experiment
from hf_adapt.experiments.data import DataError, Pair, load_domain, load_pair, paired, split_rows
from hf_adapt.experiments.methods import Method
from hf_adapt.experiments.tasks import SequenceClassification
from hf_adapt.experiments.training import resolved_priors
from tests.experiments.conftest import write_csv

TASK = SequenceClassification()
ROWS = [(f"Sentence number {i}", "even" if i % 2 == 0 else "odd") for i in range(200)]


def test_split_sizes_and_order():
    split = split_rows(ROWS, TASK)
    sizes = {name: len(rows) for name, rows in split.items()}
    assert sizes == {"train": 130, "dev": 20, "test": 50}
    assert sorted(row for rows in split.values() for row in rows) == sorted(ROWS)
    assert split == split_rows(reversed(ROWS), TASK)  # not the order of the file
    assert split["train"] != sorted(split["train"], key=ROWS.index)


def test_repeats_of_a_text_do_not_straddle_splits():
    variants = [(text.upper().replace(" ", "  ") + "!", label) for text, label in ROWS]
    split = split_rows([*ROWS, *variants, ("  ", "even")], TASK)
    seen = [text.lower() for rows in split.values() for text, _ in rows]
    assert len(seen) == len(set(seen)) == 200


def test_rows_without_a_label_are_training_rows():
    split = split_rows([*ROWS[:20], *((text, None) for text, _ in ROWS[20:])], TASK)
    assert {name: len(rows) for name, rows in split.items()} == {
        "train": 193,
        "dev": 2,
        "test": 5,
    }
    assert all(label is not None for name in ("dev", "test") for _, label in split[name])


def test_a_repeated_text_keeps_its_label():
    once = [(text, None) for text, _ in ROWS[:40]]
    for rows in ([*once, *ROWS[:40]], [*ROWS[:40], *once]):
        assert split_rows(rows, TASK) == split_rows(ROWS[:40], TASK)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("label", [0, 0.0, "0"])
@pytest.mark.parametrize("missing", [None, float("nan"), " "])
def test_missing_labels_and_whole_numbers_in_every_format(tmp_path, kind, label, missing):
    if kind != "csv" and isinstance(missing, str) != isinstance(label, str) and missing is not None:
        label = str(label) if isinstance(missing, str) else float(label)
    path, found = str(tmp_path / f"a.{kind}"), [label, missing, label]
    if kind == "csv":
        write_csv(tmp_path / "a.csv", [(f"text {i}", each) for i, each in enumerate(found)])
    else:
        rows = Dataset.from_dict({"text": ["text 0", "text 1", "text 2"], "label": found})
        (rows.to_parquet if kind == "parquet" else rows.to_json)(path)
    split = load_domain(DomainFiles(path), TASK)
    rows = sorted(row for rows in split.values() for row in rows)
    assert rows == [("text 0", "0"), ("text 1", None), ("text 2", "0")]


def pair(target_rows, **options) -> Pair:
    domains = {"here": split_rows(ROWS, TASK), "there": split_rows(target_rows, TASK)}
    return paired(domains, TASK, **options)


def test_limits_and_what_adaptation_may_see():
    found = pair([(f"Other {text}", label) for text, label in ROWS], num_train=50, num_test=10)
    assert found.labels == ["even", "odd"]
    assert found.source.num_rows == found.target.num_rows == {"train": 50, "dev": 10, "test": 10}
    assert found.target_unlabelled.column_names == ["text"]
    assert found.target_unlabelled["text"][:] == found.target["train"]["text"][:]
    row = found.source["train"][0]
    assert found.labels[row["label"]] == dict(ROWS)[row["text"]]


def test_balanced_pair_has_as_many_rows_of_each_label():
    rows = [(text, "odd" if i % 5 == 0 else "even") for i, (text, _) in enumerate(ROWS)]
    for split in pair(rows, balanced=True).target.values():
        labels = split["label"][:]
        assert labels.count(0) == labels.count(1) > 0
    with pytest.raises(DataError, match="balanced needs one label for each row"):
        pair([(text, None) for text, _ in ROWS], balanced=True)


def test_classes_that_differ_are_refused():
    with pytest.raises(DataError, match=r"\['even', 'odd'\].*\['is even', 'is odd'\]"):
        pair([(text, f"is {label}") for text, label in ROWS])
    with pytest.raises(DataError, match="at least two are needed"):
        paired({name: split_rows(ROWS[::2], TASK) for name in ("here", "there")}, TASK)


def test_whole_numbers_are_in_order():
    rows = [(f"Sentence number {i}", str(i % 12)) for i in range(240)]
    splits = {name: split_rows(rows, TASK) for name in ("here", "there")}
    assert paired(splits, TASK).labels == [str(i) for i in range(12)]


def test_test_rows_of_the_target_are_not_trained_on():
    source = {"train": ROWS[:20], "dev": ROWS[20:30], "test": ROWS[30:40]}
    target = {"train": [], "dev": [], "test": [(t.upper(), n) for t, n in ROWS[10:35]]}
    found = paired({"here": source, "there": target}, TASK)
    assert found.source["train"]["text"][:] == [text for text, _ in ROWS[:10]]
    assert found.source.num_rows == {"train": 10, "dev": 0, "test": 10}
    with pytest.raises(DataError, match=r"'here' has no labelled training rows.*'there'"):
        paired({"here": source, "there": {**target, "test": ROWS}}, TASK)


@pytest.mark.parametrize("split", ["dev", "test"])
def test_a_class_that_is_in_held_out_rows_alone(split):
    source = {"train": ROWS[:20], "dev": ROWS[20:30], "test": ROWS[30:40]}
    odd = ("a text", "rare")
    target = {"train": [(f"{text}!?", None) for text, _ in ROWS], "dev": [], "test": []}
    rare = {**source, split: [*source[split], odd]}
    assert paired({"here": rare, "there": target}, TASK).labels == ["even", "odd", "rare"]
    with pytest.raises(DataError, match=r"the target 'there' also has \['rare'\]"):
        paired({"here": source, "there": {**target, split: [odd]}}, TASK)


def test_missing_column_names_the_columns_and_the_option(tmp_path):
    path = str(write_csv(tmp_path / "a.csv", ROWS, header="review,label"))
    with pytest.raises(DataError, match=r"\['review', 'label'\].*text_column"):
        load_domain(DomainFiles(path), TASK)
    assert len(load_domain(DomainFiles(path, text_column="review"), TASK)["train"]) == 130


def test_a_file_of_other_cells_or_without_the_label_column(tmp_path):
    path = str(tmp_path / "a.csv")
    lines = "\n".join(";".join(row) for row in [("text", "label"), *ROWS])
    (tmp_path / "a.csv").write_text(lines)
    with pytest.raises(DataError, match=r"\['text;label'\].*separated by ';': save it with commas"):
        load_domain(DomainFiles(path), TASK)
    write_csv(tmp_path / "b.csv", ROWS)
    files = DomainFiles(str(tmp_path / "b.csv"), label_column="lable")
    assert not load_domain(files, TASK)["test"]
    with pytest.raises(DataError, match=r"\['text', 'label'\], and not 'lable'.*label_column"):
        load_domain(files, TASK, needs_labels=True)


def test_numbers_and_missing_words_in_a_csv_file_stay_as_they_are(tmp_path):
    rows = [("NA", "007"), ("null", "1"), ("3", "1"), ("4", "")]
    split = load_domain(DomainFiles(str(write_csv(tmp_path / "a.csv", rows))), TASK)
    found = sorted(row for rows in split.values() for row in rows if row[1] is not None)
    assert found == [("3", "1"), ("NA", "007"), ("null", "1")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "text\nHello, world\nfine\n", "more cells than its first line names"),
        ("a.csv", "text,label\ngood,1,\n", "no comma at the end of a line"),
        ("a.tsv", 'text\tlabel\na\t1\n"b\t1\nc\t0\n"d\t1\n', "row 2 holds several lines"),
    ],
)
def test_files_that_pandas_reads_wrong_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        load_domain(DomainFiles(str(tmp_path / name)), TASK)


def test_a_file_name_is_no_pattern(tmp_path):
    (tmp_path / "tweets 2.csv").write_text("text,label\nwrong,odd\n")
    path = tmp_path / "tweets [2].csv"
    path.write_text("text,label\nright,even\n")
    assert load_domain(DomainFiles(str(path)), TASK)["train"] == [("right", "even")]


def test_words_keep_their_vowel_signs():
    words = "की का के को कु कै กา กี".split()
    assert len({TASK.key(word) for word in words}) == len(words)
    assert TASK.key("Good, good!") == "good good"


def test_named_splits_of_a_folder_are_those(tmp_path):
    def part(word, count):
        rows = [(f"{word} {i}", str(i % 2)) for i in range(count)]
        return Dataset.from_dict(dict(zip(("text", "label"), zip(*rows, strict=True), strict=True)))

    parts = {"train": part("a", 30), "validation": part("b", 8), "test": part("c", 6)}
    DatasetDict(parts).save_to_disk(str(tmp_path))
    folder = str(tmp_path)
    split = load_domain(DomainFiles(folder, dev=folder, test=folder), TASK)
    assert [len(split[name]) for name in ("train", "dev", "test")] == [30, 8, 6]


def test_a_target_without_rows_to_adapt_to_is_refused(tmp_path):
    file = str(write_csv(tmp_path / "a.csv", ROWS))
    domains = {"a": DomainFiles(file), "b": DomainFiles(file, test=file)}
    with pytest.raises(DataError, match="'b' has no training rows: all of them are test rows"):
        load_pair(Experiment(domains, "-", {}, [("a", "b")]), "a", "b")


def test_named_test_file_is_kept_and_not_trained_on(tmp_path):
    train = str(write_csv(tmp_path / "a.csv", ROWS))
    test = str(write_csv(tmp_path / "b.csv", [(t.upper(), label) for t, label in ROWS[:40]]))
    split = load_domain(DomainFiles(train, test=test), TASK)
    assert sorted(split["test"]) == sorted((text.upper(), label) for text, label in ROWS[:40])
    assert sorted(split["train"] + split["dev"]) == sorted(ROWS[40:])
    assert len(split["dev"]) == 16
    split = load_domain(DomainFiles(train, dev=test), TASK)
    assert len(split["dev"]) == 40 and len(split["test"]) == 40


def test_test_split_of_a_hub_data_set_is_kept_and_not_trained_on(monkeypatch):
    labels = datasets.ClassLabel(names=["even", "odd"])

    def dataset(rows, hidden=False):
        columns = {"text": [r[0] for r in rows], "label": [-1 if hidden else r[1] for r in rows]}
        features = datasets.Features({"text": datasets.Value("string"), "label": labels})
        return Dataset.from_dict(columns, features=features)

    hub = DatasetDict(
        train=dataset(ROWS),
        validation=dataset([(text.upper(), label) for text, label in ROWS[:40]]),
        test=dataset([("without label", "odd")], hidden=True),
    )
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *words: asked.append(words) or hub)
    split = load_domain(DomainFiles("someone/data:config"), TASK)
    assert asked == [("someone/data", "config")]
    assert sorted(split["test"]) == sorted((text.upper(), label) for text, label in ROWS[:40])
    assert sorted(split["train"] + split["dev"]) == sorted(ROWS[40:])


# ---------------------------------------------------------------- class frequencies
def test_given_frequencies_are_counted_on_training_rows():
    rows = [(text, "odd" if i % 5 == 0 else "even") for i, (text, _) in enumerate(ROWS)]
    found = pair(rows)
    true = found.target["train"]["label"][:].count(0) / 130
    assert resolved_priors(Method(["MMD"], target_priors="given"), found, TASK) == pytest.approx(
        {"even": true, "odd": 1 - true}
    )
    for points in (0.1, -0.1):
        method = Method(["MMD"], target_priors={"given": points})
        wrong = resolved_priors(method, found, TASK)
        assert wrong == pytest.approx({"even": true + points, "odd": 1 - true - points})
    for wrong in ({"even": 0.3, "add": 0.7}, {"even": 1.0}):
        with pytest.raises(DataError, match="the model has 'even', 'odd'"):
            resolved_priors(Method(["MMD"], target_priors=wrong), found, TASK)
    for other in ("uniform", "estimate", {"even": 0.3, "odd": 0.7}, None):
        assert resolved_priors(Method(["MMD"], target_priors=other), found, TASK) == other


def test_frequencies_of_classes_that_are_numbers_go_by_name():
    rows = [(text, "1" if label == "odd" else "2") for text, label in ROWS]
    found = paired({name: split_rows(rows, TASK) for name in ("here", "there")}, TASK)
    method = Method(["InformationMaximization"], target_priors={"1": 0.9, 2.0: 0.1})
    assert resolved_priors(method, found, TASK) == {"1": 0.9, "2": 0.1}


def test_frequencies_of_a_target_without_labels_cannot_be_counted():
    found = pair([(text, None) for text, _ in ROWS])
    assert found.target_unlabelled.num_rows == 200 and found.target["test"].num_rows == 0
    with pytest.raises(DataError, match="Give the class frequencies"):
        resolved_priors(Method(["MMD"], target_priors="given"), found, TASK)
    assert data.TEST_SHARE == 0.25
