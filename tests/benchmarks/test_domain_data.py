"""The demo's data: parsing, splitting and fetching, on tiny archives and without a network."""

import dataclasses
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import datasets
import domain_data
import pytest
from domain_data import DataError, Dataset, DatasetDict, fetch, load_pair, split_rows


@pytest.fixture(autouse=True)
def private_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ADAPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def client(monkeypatch):
    """Stands in for pip and npm: 'downloads' the bytes it is given and counts the calls."""

    class Client:
        content = b""
        file_name = "package-1.0.zip"
        returncode = 0
        stderr = ""
        during_download = staticmethod(lambda: None)

        def run(self, command, cwd, **_):
            pinned = Path(cwd, "pinned.txt")
            self.calls.append((command, pinned.read_text() if pinned.exists() else None))
            self.during_download()
            if not self.returncode:
                Path(cwd, self.file_name).write_bytes(self.content)
            return subprocess.CompletedProcess(command, self.returncode, stderr=self.stderr)

    client = Client()
    client.calls = []
    monkeypatch.setattr(subprocess, "run", client.run)
    return client


def zip_of(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tgz_of(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def vader_archive(stems):
    inner = tgz_of(
        {
            f"hutto_ICWSM_2014/{stem}_GroundTruth.txt": f"1\t2.0\tgood {stem}\r\n".encode()
            for stem in stems
        }
        | {"hutto_ICWSM_2014/paper.pdf": b"not needed"}
    )
    return zip_of({"vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz": inner})


@pytest.fixture
def vader(client):
    """The archive of vader4, pinned to a tiny stand-in."""
    client.content = vader_archive(domain_data.VADER_STEMS.values())
    digest = hashlib.sha256(client.content).hexdigest()
    return dataclasses.replace(domain_data.VADER, sha256=digest)


# ---------------------------------------------------------------- fetching
def test_second_call_downloads_nothing(vader, client, tmp_path):
    folder = fetch(vader)
    assert fetch(vader) == folder
    assert len(client.calls) == 1
    assert folder.parent == tmp_path / "cache"
    assert sorted(path.name for path in folder.iterdir()) == [
        "amazonReviewSnippets.tsv",
        "movieReviewSnippets.tsv",
        "nytEditorialSnippets.tsv",
        "tweets.tsv",
    ]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]


def test_pip_is_told_the_hash_and_installs_nothing(vader, client):
    fetch(vader)
    command, requirement = client.calls[0]
    assert command[:3] == [sys.executable, "-m", "pip"]
    assert "download" in command and "--no-deps" in command and "install" not in command
    assert requirement == f"vaderSentiment==0.5 --hash=sha256:{vader.sha256}\n"


def test_wrong_checksum_is_refused_and_leaves_nothing_behind(vader, client, tmp_path):
    good, client.content = client.content, client.content + b"tampered"
    with pytest.raises(DataError, match=r"vaderSentiment 0\.5 .*sha256 is [0-9a-f]{64}"):
        fetch(vader)
    assert list((tmp_path / "cache").iterdir()) == []
    client.content = good
    assert fetch(vader).is_dir()


def test_interrupted_unpacking_leaves_nothing_behind(vader, client, tmp_path):
    client.content = vader_archive(["tweets"])  # the other three are missing
    half = dataclasses.replace(vader, sha256=hashlib.sha256(client.content).hexdigest())
    with pytest.raises(KeyError):
        fetch(half)
    assert list((tmp_path / "cache").iterdir()) == []


def test_process_that_is_faster_wins(vader, client, tmp_path):
    folder = tmp_path / "cache" / "vaderSentiment-0.5"

    def other_process():
        folder.mkdir(parents=True)
        (folder / "tweets.tsv").write_text("theirs")

    client.during_download = other_process
    assert (fetch(vader) / "tweets.tsv").read_text() == "theirs"


def test_failure_names_what_why_and_the_way_out(vader, client):
    client.returncode, client.stderr = 1, "a warning\nERROR: no route to host"
    with pytest.raises(DataError, match="no route to host") as caught:
        fetch(vader)
    for part in ("vaderSentiment 0.5", "pip ended with 1", "--source", "--target"):
        assert part in str(caught.value)
    with pytest.raises(DataError, match="--model_name_or_path"):
        domain_data.minilm_path()


def test_missing_npm_is_named(client, monkeypatch):
    monkeypatch.setattr(domain_data.shutil, "which", lambda name: None)
    with pytest.raises(DataError, match="npm was not found") as caught:
        domain_data.load_domain("spam2", "email")
    assert "spam2 needs npm; vader4 does not" in str(caught.value)
    assert client.calls == []


def test_email_archive_becomes_one_file(client, monkeypatch):
    monkeypatch.setattr(domain_data.shutil, "which", lambda name: f"/bin/{name}")
    ham = {"group": "hard-ham-1", "text": "From: a@b.c\nSubject: Lunch\n\nAt noon?"}
    spam = {"group": "spam-2", "text": "Subject: Win\n\n<b>Free</b> money"}
    client.file_name = "stdlib.tgz"
    client.content = tgz_of(
        {
            "package/data/hard-ham-1/1.json": json.dumps(ham).encode(),
            "package/data/spam-2/1.json": json.dumps(spam).encode(),
            "package/package.json": b"{}",
        }
    )
    digest = hashlib.sha256(client.content).hexdigest()
    folder = fetch(dataclasses.replace(domain_data.EMAIL, sha256=digest))
    lines = [json.loads(line) for line in (folder / "email.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == ["ham", "spam"]
    assert lines[0]["text"].split() == ["Lunch", "At", "noon?"]
    assert lines[1]["text"].split() == ["Win", "Free", "money"]


# ---------------------------------------------------------------- parsing
def test_valences_near_zero_are_left_out():
    text = "1\t0.5\tfine\r\n2\t-0.49\tmeh\r\n\r\n3\t-3.1\tawful\twith a tab\r\n"
    assert domain_data.parse_valences(text) == [
        ("fine", "positive"),
        ("awful\twith a tab", "negative"),
    ]


def test_email_has_neither_headers_nor_markup():
    raw = (
        "From: spammer@example.com\nSubject: Offer\nDate: Mon, 1 Jan 2001\n"
        'Content-Type: multipart/alternative; boundary="x"\n\n'
        "--x\nContent-Type: text/html\nContent-Transfer-Encoding: quoted-printable\n\n"
        "<html><style>p {color: red}</style><p>Caf=E9 &amp; <!-- hidden -->cake</p>\n--x--\n"
    )
    assert domain_data.email_text(raw).split() == ["Offer", "Café", "&", "cake"]


# ---------------------------------------------------------------- splitting
ROWS = [(f"Sentence number {i}", "even" if i % 2 == 0 else "odd") for i in range(200)]


def test_split_sizes_and_order():
    split = split_rows(ROWS)
    assert {name: len(rows) for name, rows in split.items()} == {
        "train": 130,
        "dev": 20,
        "test": 50,
    }
    assert sorted(row for rows in split.values() for row in rows) == sorted(ROWS)
    assert split == split_rows(reversed(ROWS))  # not the order of the file
    assert split["train"] != sorted(split["train"], key=ROWS.index)


def test_repeats_of_a_text_do_not_straddle_splits():
    variants = [(text.upper().replace(" ", "  ") + "!", label) for text, label in ROWS]
    split = split_rows([*ROWS, *variants, ("  ", "even")])
    seen = [text.lower() for rows in split.values() for text, _ in rows]
    assert len(seen) == len(set(seen)) == 200


# ---------------------------------------------------------------- pairs
def write_csv(path, rows, header="text,label"):
    path.write_text("\n".join([header, *(f"{text},{label}" for text, label in rows)]))
    return str(path)


def test_pair_of_local_files(tmp_path):
    source = write_csv(tmp_path / "a.csv", ROWS)
    target = write_csv(tmp_path / "b.csv", [(f"Other {text}", label) for text, label in ROWS])
    pair = load_pair("vader4", source, target, num_train=50, num_test=10)
    assert pair.labels == ["even", "odd"]
    assert pair.source.num_rows == pair.target.num_rows == {"train": 50, "dev": 10, "test": 10}
    assert pair.target_unlabelled.column_names == ["text"]
    assert pair.target_unlabelled["text"][:] == pair.target["train"]["text"][:]
    assert set(pair.source["train"]["text"]).isdisjoint(pair.source["test"]["text"])
    row = pair.source["train"][0]
    assert pair.labels[row["label"]] == dict(ROWS)[row["text"]]


def test_balanced_pair_has_as_many_rows_of_each_label(tmp_path):
    rows = [(text, "rare" if i % 5 == 0 else "common") for i, (text, _) in enumerate(ROWS)]
    path = write_csv(tmp_path / "a.csv", rows)
    for split in load_pair("vader4", path, path, balanced=True).target.values():
        labels = split["label"][:]
        assert labels.count(0) == labels.count(1) > 0


def test_labels_that_differ_are_refused(tmp_path):
    source = write_csv(tmp_path / "a.csv", ROWS)
    target = write_csv(tmp_path / "b.csv", [(text, f"is {label}") for text, label in ROWS])
    with pytest.raises(DataError, match=r"\['even', 'odd'\].*\['is even', 'is odd'\]"):
        load_pair("vader4", source, target)


def test_missing_column_names_the_columns_and_the_option(tmp_path):
    path = write_csv(tmp_path / "a.csv", ROWS, header="review,label")
    with pytest.raises(DataError, match=r"\['review', 'label'\].*--text_column"):
        load_pair("vader4", path, path)
    assert load_pair("vader4", path, path, text_column="review").source["train"].num_rows == 130


def test_unknown_name_lists_the_domains(monkeypatch):
    def no_hub(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(domain_data, "load_dataset", no_hub)
    with pytest.raises(DataError, match="'tweet': offline") as caught:
        load_pair("vader4", "tweet", "movies")
    assert "movies, products, tweets, nyt" in str(caught.value)


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
    monkeypatch.setattr(domain_data, "load_dataset", lambda name, config: hub)
    split = domain_data.load_own("someone/data:config")
    assert sorted(split["test"]) == sorted((text.upper(), label) for text, label in ROWS[:40])
    assert sorted(split["train"] + split["dev"]) == sorted(ROWS[40:])
