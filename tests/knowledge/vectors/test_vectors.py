"""Vectors by entity: gathered from a mapped table, read from every format, shuffled, encoded."""

import logging
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from hf_adapt.knowledge.graphs.graph import KnowledgeGraph
from hf_adapt.knowledge.vectors.table import EntityVectors
from tests.helpers.mapping import is_mapped
from tests.helpers.models import bert

KEYS = ["cat", "feline", "lion", "New York", "dodo"]


def graph() -> KnowledgeGraph:
    return KnowledgeGraph.from_triples(
        [("cat", "is_a", "feline"), ("lion", "is_a", "feline"), ("q60", "far_from", "q61")],
        names={"q60": "New York", "q61": ["dodo", "extinct bird"]},
        descriptions={"cat": "a small animal that sleeps"},
    )


def table(dtype: Any = np.float32) -> np.ndarray:
    return np.arange(15, dtype=np.float32).reshape(5, 3).astype(dtype)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 2), (0,), (2, 0)])
def test_gather(shape: tuple[int, ...]) -> None:
    vectors = EntityVectors.from_array(table(), graph())
    assert (len(vectors), vectors.dimension) == (5, 3)
    entities = np.random.default_rng(0).integers(-1, 5, shape)
    found = vectors.gather(entities)
    assert found.shape == (*shape, 3) and found.dtype == np.float32
    for place in np.ndindex(shape):
        entity = np.asarray(entities)[place]
        expected = np.zeros(3) if entity < 0 else table()[entity]
        assert np.array_equal(found[place], expected)
    found[...] = 7.0  # a copy
    assert np.array_equal(vectors.gather(np.arange(5)), table())


def test_gather_of_what_is_not_there() -> None:
    vectors = EntityVectors.from_array(table())
    for wrong in (-2, 5):
        with pytest.raises(IndexError, match=r"must be -1 \(none\) or 0 to 4; got"):
            vectors.gather(np.array([0, wrong]))
    with pytest.raises(TypeError, match="whole numbers, got float64"):
        vectors.gather(np.array([0.0]))


def test_a_table_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"has 4 rows, and the graph 5 entities: expected one"):
        EntityVectors.from_array(table()[:4], graph())
    with pytest.raises(ValueError, match=r"must have the shape .* got \(5,\)"):
        EntityVectors.from_array(table()[:, 0], graph())
    bad = table()
    bad[1, 2], bad[3, 0] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"not finite in 2 rows: 1 \(feline\), 3 \(q60\)"):
        EntityVectors.from_array(bad, graph())


def write_text(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_the_case_of_a_suffix_does_not_matter(tmp_path: Path) -> None:
    with open(tmp_path / "t.NPY", "wb") as file:
        np.save(file, table())
    vectors = EntityVectors.from_file(tmp_path / "t.NPY", graph())
    assert np.array_equal(vectors.gather(np.arange(5)), table())


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_npy_and_safetensors_stay_mapped(dtype: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", table(dtype))
    save_file(
        {"names": torch.zeros(3), "table": torch.from_numpy(table(dtype))},
        tmp_path / "t.safetensors",
    )
    for path in (tmp_path / "t.npy", tmp_path / "t.safetensors"):
        vectors = EntityVectors.from_file(path, graph())
        assert is_mapped(vectors._table, path.name) and vectors._table.dtype == dtype
        assert np.array_equal(vectors.gather(np.arange(5)), table())
        copy = pickle.loads(pickle.dumps(vectors.shuffled()))
        assert is_mapped(copy._table, path.name)
        every = np.arange(5)
        assert np.array_equal(copy.gather(every), vectors.shuffled().gather(every))


def test_bfloat16(tmp_path: Path) -> None:
    values = torch.from_numpy(table() / 7).bfloat16()
    save_file({"t": values, "other": values[:2].clone()}, tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match=r"expected one tensor .* t \[5, 3\]"):
        EntityVectors.from_file(tmp_path / "t.safetensors", graph())
    mapped = EntityVectors.from_file(tmp_path / "t.safetensors", graph(), name="t")
    for vectors in (mapped, EntityVectors.from_array(values, graph())):
        vectors.save(tmp_path / "saved")
        loaded = EntityVectors.load(tmp_path / "saved", graph())
        for each in (vectors, loaded, pickle.loads(pickle.dumps(loaded))):
            assert np.array_equal(each.gather(np.arange(5)), values.float().numpy())


def text_lines(words: list[str], separator: str = " ") -> list[str]:
    return [
        word + separator + " ".join(map(str, row))
        for word, row in zip(words, table().tolist(), strict=True)
    ]


@pytest.mark.parametrize("header", [["5 3"], []])
@pytest.mark.parametrize(
    "words",
    [KEYS, ["cat", "feline", "lion", "New_York", "q61"], ["cat", "feline", "lion", "q60", "dodo"]],
)
@pytest.mark.parametrize("separator", [" ", "\t"])
def test_word2vec_text(header: list[str], words: list[str], separator: str, tmp_path: Path) -> None:
    path = write_text(tmp_path / "t.vec", header + text_lines(words, separator)[::-1])
    vectors = EntityVectors.from_file(path, graph(), missing="error")
    assert np.array_equal(vectors.gather(np.arange(5)), table())
    assert vectors.metadata["found"] == 5


def test_word2vec_text_with_missing_and_unknown_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_text(tmp_path / "t.txt", text_lines(["a", "lion", "b", "cat", "1984"]))
    with caplog.at_level(logging.INFO, logger="hf_adapt"):
        vectors = EntityVectors.from_file(path, graph())
    assert "vectors of 2 of 5 entities" in caplog.text
    assert "3 of its 5 words are no entity's" in caplog.text
    expected = np.zeros((5, 3))
    expected[[0, 2]] = table()[[3, 1]]
    assert np.array_equal(vectors.gather(np.arange(5)), expected)
    with pytest.raises(ValueError, match=r"vectors of 2 of the graph's 5 entities; .*'feline'"):
        EntityVectors.from_file(path, graph(), missing="error")


@pytest.mark.parametrize("header", [["9 3"], []])
@pytest.mark.parametrize("separator", [" ", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_word2vec_text_as_it_comes(
    header: list[str], separator: str, end: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A byte order mark, blank words and words that are there again, as in GloVe's files."""
    good = text_lines(KEYS, separator)
    blank = [f" {separator}7 8 9".replace("  ", " "), f"\u00a0{separator}7 8 9"]
    again = [f"{KEYS[1]}{separator}7 8 9"]
    lines = [*header, *blank, *good, *again, *blank, *again]
    path = tmp_path / "t.vec"
    path.write_bytes(("\ufeff" + end.join(lines) + end).encode())
    vectors = EntityVectors.from_file(path, graph(), missing="error")
    assert np.array_equal(vectors.gather(np.arange(5)), table())
    counts = [record.getMessage() for record in caplog.records]
    assert len(counts) == 2
    assert "left out 4 vectors whose word is blank" in counts[0]
    assert f"left out 2 vectors whose word was there before, such as {KEYS[1]!r}" in counts[1]


@pytest.mark.parametrize(("count", "told"), [(400_000, True), (2, False), (1, False)])
def test_a_header_of_a_larger_count_is_told(
    count: int, told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As of a download that broke off."""
    path = tmp_path / "v.txt"
    path.write_text(f"{count} 2\n{KEYS[0]} 1 2\n{KEYS[1]} 3 4\n")
    assert len(EntityVectors.from_file(path, graph())) == 5
    warned = [r.getMessage() for r in caplog.records if "its first line" in r.getMessage()]
    assert bool(warned) == told
    assert not told or f"has 2 vectors, and its first line says {count:,}" in warned[0]


def test_entities_of_one_label_share_its_vector(tmp_path: Path) -> None:
    twins = KnowledgeGraph.from_triples(
        [("b1", "r", "b2")], names={"b1": "bank", "b2": "bank", "b3": "river"}
    )
    path = write_text(tmp_path / "t.vec", ["other 9 9", "bank 1 2", "river 3 4"])
    vectors = EntityVectors.from_file(path, twins)
    assert vectors.gather(np.arange(3)).tolist() == [[1, 2], [1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        (["cat 1 2", "lion 1"], r"line 2: expected a word and 2 numbers, got 'lion 1'"),
        (["2 2", "cat 1 2", "lion 1 x"], r"line 3: could not convert .*'x'"),
        (["cat dog"], "line 1: expected a word and its numbers"),
        (["x 1 2"], "vectors of 0 of the graph's 5 entities"),
        (["cat 1 nan"], r"not finite in 1 rows: 0 \(cat\)"),
        ([], "is empty"),
    ],
)
def test_malformed_text(lines: list[str], match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        EntityVectors.from_file(write_text(tmp_path / "t.vec", lines), graph())


def test_files_that_are_no_table(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected .npy, .safetensors"):
        EntityVectors.from_file(tmp_path / "t.npy", graph())
    for name in ("t.npy", "t.safetensors"):
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(ValueError, match="is not a whole"):
            EntityVectors.from_file(tmp_path / name, graph())
    np.save(tmp_path / "t.npy", np.zeros((5, 3), int))
    with pytest.raises(ValueError, match="expected floating numbers, got int64"):
        EntityVectors.from_file(tmp_path / "t.npy", graph())
    save_file({"t": torch.zeros(5, 3, dtype=torch.int64)}, tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match="expected floating numbers in 't', got I64"):
        EntityVectors.from_file(tmp_path / "t.safetensors", graph())
    save_file({"t": torch.zeros(5, 3)}, tmp_path / "t.safetensors")
    content = (tmp_path / "t.safetensors").read_bytes()
    (tmp_path / "t.safetensors").write_bytes(content[:-4])
    with pytest.raises(ValueError, match="is not a whole"):
        EntityVectors.from_file(tmp_path / "t.safetensors", graph())


def test_shuffled_moves_every_row() -> None:
    vectors = EntityVectors.from_array(table(), graph())
    every = np.arange(5)
    for seed in range(20):
        found = vectors.shuffled(seed).gather(every)
        assert sorted(found.tolist()) == table().tolist()
        assert not (found == table()).all(axis=1).any()
    assert np.array_equal(vectors.shuffled(3).gather(every), vectors.shuffled(3).gather(every))
    assert (
        len({vectors.shuffled(seed).fingerprint for seed in range(5)} | {vectors.fingerprint}) > 3
    )
    assert vectors.shuffled()._table is vectors._table
    twice = vectors.shuffled(0).shuffled(1).gather(every)
    assert np.array_equal(twice, vectors.shuffled(0).gather(every)[vectors.shuffled(1)._order])


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    vectors = EntityVectors.from_array(table(np.float16), graph(), note="mine")
    for each in (vectors, vectors.shuffled()):
        each.save(tmp_path)
        loaded = EntityVectors.load(tmp_path, graph())
        assert loaded.fingerprint == each.fingerprint and loaded.metadata == each.metadata
        assert is_mapped(loaded._table, "table.arrow") and loaded._table.dtype == np.float16
        assert np.array_equal(loaded.gather(np.arange(5)), each.gather(np.arange(5)))
        del loaded.__dict__["fingerprint"]
        assert loaded.fingerprint == each.fingerprint
    assert EntityVectors.from_file(tmp_path, graph()).metadata["note"] == "mine"
    assert "shuffled" in loaded.metadata
    other = KnowledgeGraph.from_triples([("a", "r", "b"), ("c", "r", "d"), ("e", "r", "e")])
    with pytest.raises(ValueError, match="holds vectors of another graph"):
        EntityVectors.load(tmp_path, other)
    with pytest.raises(ValueError, match=r"has 5 rows, and the graph 2 entities"):
        EntityVectors.load(tmp_path, graph().subgraph(["cat"]))
    with pytest.raises(FileNotFoundError, match=r"expected entity_vectors.json"):
        EntityVectors.load(tmp_path / "nothing")


def test_a_mapped_table_is_not_copied_into_a_pickle(tmp_path: Path) -> None:
    large = np.random.default_rng(0).standard_normal((20_000, 32)).astype(np.float16)
    EntityVectors.from_array(large).save(tmp_path)
    vectors = EntityVectors.load(tmp_path)
    content = pickle.dumps(vectors)
    assert len(content) < 1_000
    code = (
        "import pickle, sys; v = pickle.load(sys.stdin.buffer); import numpy as np;"
        "from tests.helpers.mapping import is_mapped;"
        "print(is_mapped(v._table, 'table.arrow'), v.gather(np.array([7])).sum())"
    )
    found = subprocess.run([sys.executable, "-c", code], input=content, capture_output=True)
    mapped, value = found.stdout.decode().split()
    assert mapped == "True" and float(value) == pytest.approx(
        float(large[7].sum(dtype=np.float32)), rel=1e-4
    )
    for file in tmp_path.glob("*/table.arrow"):
        file.unlink()
    with pytest.raises(ValueError, match="is not as it was"):
        pickle.loads(content)


def test_a_folder_with_other_vectors_is_not_taken_for_the_same(tmp_path: Path) -> None:
    EntityVectors.from_array(table()).save(tmp_path)
    content = pickle.dumps(EntityVectors.load(tmp_path))
    EntityVectors.from_array(table() + 1).save(tmp_path)
    with pytest.raises(ValueError, match=r"is not as it was: .* holds other vectors now"):
        pickle.loads(content)


class Rows(torch.utils.data.Dataset):
    def __init__(self, vectors: EntityVectors) -> None:
        self.vectors = vectors

    def __len__(self) -> int:
        return 5

    def __getitem__(self, row: int) -> np.ndarray:
        return self.vectors.gather(np.array(row))


def test_workers_of_a_data_loader_gather(tmp_path: Path) -> None:
    EntityVectors.from_array(table()).save(tmp_path)
    loader = torch.utils.data.DataLoader(
        Rows(EntityVectors.load(tmp_path)), batch_size=5, num_workers=1
    )
    (batch,) = list(loader)
    assert np.array_equal(batch.numpy(), table())


def test_gathering_from_a_large_table_takes_no_time(tmp_path: Path) -> None:
    shape = (300_000, 64)
    np.lib.format.open_memmap(tmp_path / "t.npy", "w+", np.float16, shape).flush()  # sparse
    vectors = EntityVectors(np.load(tmp_path / "t.npy", mmap_mode="r"))
    entities = np.random.default_rng(0).integers(-1, shape[0], (40, 4))
    times = []
    for _ in range(30):
        start = time.perf_counter()
        vectors.gather(entities)
        times.append(time.perf_counter() - start)
    assert np.median(times) < 5e-3  # 0.05 ms on a quiet machine; reading it all takes 40


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = "[UNK] cat feline lion new york : a small animal that sleeps dodo".split()
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")  # no padding token


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_vectors_from_descriptions(pooling: Any) -> None:
    model = bert().train()
    model.base_model.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    made = EntityVectors.from_descriptions(
        graph(), model, tokenizer(), batch_size=2, pooling=pooling, progress=False
    )
    assert torch.equal(state, torch.random.get_rng_state())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    texts = ["cat: a small animal that sleeps", "feline", "lion", "New York", "dodo"]
    for entity, text in enumerate(texts):
        ids = torch.tensor([tokenizer()(text)["input_ids"]])
        with torch.no_grad():
            hidden = model.base_model(ids).last_hidden_state[0]
        expected = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
        np.testing.assert_allclose(made.gather(np.array(entity)), expected, atol=1e-5)
    assert made.metadata["made_by"] == "descriptions" and len(made) == 5


def test_descriptions_need_one_vector_for_each() -> None:
    with pytest.raises(ValueError, match="expected one vector for each"):
        EntityVectors.from_descriptions(
            graph(), bert(), tokenizer(), pooling="tokens", progress=False
        )
