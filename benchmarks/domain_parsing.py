"""What the files inside the fetched packages say, as rows of the domains."""

import csv
import email
import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
from datasets import Dataset, Features

Rows = list[tuple[str, str]]  # (text, name of its label)


def parquet(columns: Mapping[str, Any], features: Features | None = None) -> bytes:
    """The content of a parquet file with these columns."""
    content = io.BytesIO()
    pq.write_table(Dataset.from_dict(columns, features=features).data.table, content)
    return content.getvalue()


# ---------------------------------------------------------------- texts
def parse_valences(text: str, threshold: float = 0.5) -> Rows:
    """Rows of `id <tab> mean valence <tab> sentence`; near-neutral sentences are left out."""
    rows = []
    for line in text.splitlines():
        if line.strip():
            _, valence, sentence = line.split("\t", 2)
            if abs(float(valence)) >= threshold:
                rows.append((sentence, "positive" if float(valence) > 0 else "negative"))
    return rows


def parse_reviews(text: str) -> Rows:
    """Rows of a review and `1` or `-1`, in either order: French comes first, Dutch last."""
    names = {"1": "positive", "-1": "negative"}
    rows = []
    for first, second in csv.reader(io.StringIO(text)):
        review, sign = (first, second) if second in names else (second, first)
        rows.append((review, names[sign]))
    return rows


def email_text(raw: str) -> str:
    """Subject and first text part of a raw e-mail, without markup: about what a reader sees."""
    message = email.message_from_string(raw)
    parts = [part for part in message.walk() if part.get_content_maintype() == "text"]
    body = (parts[0].get_payload(decode=True) or b"").decode("latin-1") if parts else ""
    body = re.sub(r"(?is)<(style|script|title)\b.*?</\1>|<!--.*?-->|<[^>]*>", " ", body)
    return f"{message['subject'] or ''} {html.unescape(body)[:4000]}"


# ---------------------------------------------------------------- words
# The coarse tags of Petrov, Das & McDonald, A Universal Part-of-Speech Tagset, LREC 2012, and the
# tags of the Brown corpus (its manual, 1979) that they stand for. `nil`, a word without a tag, has
# none here.
_COARSE = {
    "NOUN": "nn nns np nps nr nrs",
    "VERB": "be bed bedz beg bem ben ber bez do dod doz hv hvd hvg hvn hvz md vb vbd vbg vbn vbz",
    "ADJ": "ap jj jjr jjs jjt od",
    "ADV": "* ql qlp rb rbr rbt rn wql wrb",
    "PRON": "pn pp$$ ppl ppls ppo pps ppss wpo wps",
    "DET": "abl abn abx at dt dti dts dtx pp$ wdt wp$",
    "ADP": "cs in",
    "CONJ": "cc",
    "NUM": "cd",
    "PRT": "ex rp to uh",
    ".": ". , : ( ) -- `` '' '",
}
_UNIVERSAL = {tag: coarse for coarse, tags in _COARSE.items() for tag in tags.split()}


def universal_tag(tag: str) -> str | None:
    """The coarse tag of a tag of the Brown corpus, None for `nil`.

    Foreign words (`fw-jj`), words of titles and headlines (`jj-tl`) and negated verbs (`bez*`) have
    that of the plain tag, and a contraction (`pps+bez`) that of its first part, where the published
    table has X for foreign words.
    """
    if tag == "nil" or tag.startswith("nil-"):
        return None
    plain = re.match(r"(?:fw-)?(--|[^-+*]+|\*)", tag)[1]
    return _UNIVERSAL.get(plain) or _UNIVERSAL[plain.removesuffix("$")]


def tagged_sentences(text: str) -> list[tuple[list[str], list[str]]]:
    """Words and coarse tags of the lines of `word/tag word/tag …`.

    A sentence with a word without a tag is left out.
    """
    sentences = []
    for line in text.splitlines():
        pairs = [item.rsplit("/", 1) for item in line.split()]
        tags = [universal_tag(tag) for _, tag in pairs]
        if pairs and None not in tags:
            sentences.append(([word for word, _ in pairs], tags))
    return sentences


# ---------------------------------------------------------------- images
def digit_png(pixels: np.ndarray | Sequence[Sequence[int]], size: int = 16) -> bytes:
    """A greyscale image of 0 (paper) to 255 (ink), scaled to a square, as a PNG file."""
    image = PIL.Image.fromarray(np.asarray(pixels, np.uint8))
    content = io.BytesIO()
    image.resize((size, size), PIL.Image.Resampling.BILINEAR).save(content, "png")
    return content.getvalue()


# ---------------------------------------------------------------- sound
def speakers_of(clips: Sequence[np.ndarray], digits: np.ndarray) -> list[np.ndarray]:
    """The clips of each speaker who can be told from the others, in the order of the first one.

    Six people spoke every digit fifty times, and the file does not say who. Each has a voice and a
    microphone of their own: clusters of how a clip's coefficients differ from those of all clips of
    its digit. A cluster is a speaker if it has exactly fifty clips of every digit.

    Args:
        clips: (frames, coefficients) of each clip.
        digits: What is said in each.
    """
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture

    levels = (0.1, 0.5, 0.9)
    described = np.stack(
        [
            np.r_[c.mean(0), c.std(0), np.quantile(c, levels, 0).ravel(), np.log(len(c))]
            for c in clips
        ]
    )
    for digit in range(10):
        described[digits == digit] -= described[digits == digit].mean(0)
    described = PCA(30, whiten=True, random_state=0).fit_transform(described / described.std(0))
    mixture = GaussianMixture(6, n_init=20, random_state=0, reg_covar=1e-3)
    cluster = mixture.fit_predict(described)
    found = [np.flatnonzero(cluster == each) for each in range(6)]
    counts = [np.bincount(digits[own], minlength=10) for own in found]
    pure = [own for own, of in zip(found, counts, strict=True) if (of == 50).all()]
    return sorted(pure, key=lambda own: own[0])
