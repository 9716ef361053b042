"""Pairing and collating: which target row comes when, and that no target label gets through."""

from collections import Counter
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithFlattening,
    default_data_collator,
)

from hf_adapt.engine.collating import (
    DOMAIN,
    STREAM_BATCHES,
    AdaptationCollator,
    label_columns,
    missing_columns_message,
)
from hf_adapt.engine.pairing import (
    PairedDataset,
    PairedIterableDataset,
    PairedRow,
    StreamRows,
    is_map_style,
    pair,
    stream_order,
)
from hf_adapt.engine.streams import TARGET, TRAINING, StreamTable
from tests.helpers.tokenizers import word_tokenizer

SENTINEL = 77
"""A target label that must appear nowhere."""

# ---- stream_order ----

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=3)
PURE = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@PURE
@given(sizes=SIZES, cycles=st.integers(1, 3), seed=st.integers(0, 99))
def test_every_target_row_is_used_equally_often(sizes, cycles, seed):
    for index, size in enumerate(sizes):
        positions = cycles * size * len(sizes)
        which, row = stream_order(sizes, 0, positions, seed)
        counts = Counter(row[which == index].tolist())
        assert counts == dict.fromkeys(range(size), cycles)
        assert sorted(row[which == index][:size].tolist()) == list(range(size))


@PURE
@given(
    sizes=SIZES,
    cuts=st.lists(st.integers(0, 60), min_size=2, max_size=2).map(sorted),
    seed=st.integers(0, 99),
)
def test_any_stretch_is_a_part_of_the_whole_stream(sizes, cuts, seed):
    start, stop = cuts
    whole = stream_order(sizes, 0, 60, seed)
    part = stream_order(sizes, start, stop, seed)
    again = stream_order(sizes, start, stop, seed)
    for one, other, all_of_it in zip(part, again, whole, strict=True):
        assert one.tolist() == other.tolist() == all_of_it[start:stop].tolist()


def test_targets_take_turns_whatever_their_sizes():
    which, row = stream_order([100, 1, 3], 4, 13, seed=0)
    assert which.tolist() == [1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert (row[which == 1] == 0).all() and (row[which == 2] < 3).all()


def test_seed_target_and_cycle_have_permutations_of_their_own():
    def rows(seed, start, stop):
        which, row = stream_order([50, 50], start, stop, seed)
        return row[which == 0].tolist(), row[which == 1].tolist()

    first, second = rows(0, 0, 100)
    assert first != second
    assert rows(1, 0, 100)[0] != first and rows(1, 0, 100)[1] != second
    assert rows(0, 100, 200)[0] != first
    assert first != list(range(50))


def test_random_state_is_left_alone():
    np.random.seed(0)
    torch.manual_seed(0)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    stream_order([5, 3], 0, 20, seed=1)
    assert before == (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


# ---- PairedDataset ----


def source_rows(number):
    return [{"x": i} for i in range(number)]


def target_rows(number, start=1000):
    return [{"x": start + i} for i in range(number)]


def targets_of(dataset, order=None):
    """The target rows that each source row brings, as (domain, x)."""
    order = range(len(dataset)) if order is None else order
    return {i: [(domain, row["x"]) for domain, row in dataset[i].companions] for i in order}


def drawn(dataset):
    return [pair for pairs in targets_of(dataset).values() for pair in pairs]


@pytest.mark.parametrize(
    ("ratio", "per_row"),
    [
        (1, [1] * 10),
        (2, [2] * 10),
        (0.5, [0, 1] * 5),
        (0.3, [0, 0, 0, 1, 0, 0, 1, 0, 0, 1]),
        (1.5, [1, 2] * 5),
    ],
)
def test_ratio_is_the_number_of_target_rows_per_source_row(ratio, per_row):
    dataset = PairedDataset(source_rows(10), [StreamRows([target_rows(10)], ratio)], seed=0)
    assert len(dataset) == 10
    assert [dataset[i].source for i in range(10)] == source_rows(10)
    counts = [len(pairs) for pairs in targets_of(dataset).values()]
    assert counts == per_row and sum(counts) == int(10 * ratio)


@pytest.mark.parametrize("ratio", [1, 0.7])
def test_every_target_row_is_used_equally_often_over_the_epochs(ratio):
    """A short target comes round many times in an epoch, a long one is gone through in several."""
    for sources, targets, epochs in ((300, 3, 1), (3, 300, 100), (10, 7, 7)):
        dataset = PairedDataset(
            source_rows(sources), [StreamRows([target_rows(targets)], ratio)], seed=0
        )
        counts = Counter()
        for epoch in range(epochs):
            dataset.set_epoch(epoch)
            counts.update(drawn(dataset))
        assert sum(counts.values()) == epochs * int(sources * ratio)
        seen = [counts[(1, 1000 + i)] for i in range(targets)]
        assert max(seen) - min(seen) <= 1


def test_epoch_changes_the_draw_and_the_same_epoch_repeats_it():
    def make():
        return PairedDataset(source_rows(20), [StreamRows([target_rows(20)], 1)], seed=0)

    dataset = make()
    first = targets_of(dataset)
    dataset.set_epoch(1)
    second = targets_of(dataset)
    assert first != second
    dataset.set_epoch(0)
    assert targets_of(dataset) == first
    resumed = make()
    resumed.set_epoch(1)
    assert targets_of(resumed) == second
    assert (
        targets_of(PairedDataset(source_rows(20), [StreamRows([target_rows(20)], 1)], seed=1))
        != first
    )


def test_order_of_access_is_irrelevant():
    first = PairedDataset(
        source_rows(12), [StreamRows([target_rows(5), target_rows(9, 2000)], 1.5)], seed=3
    )
    second = PairedDataset(
        source_rows(12), [StreamRows([target_rows(5), target_rows(9, 2000)], 1.5)], seed=3
    )
    assert targets_of(first) == targets_of(second, [7, 0, 11, 7, *reversed(range(12))])


class Counting(list):
    """A dataset with batched access, which counts its reads."""

    reads = 0

    def __getitems__(self, indices):
        self.reads += 1
        return [self[i] for i in indices]


@pytest.mark.parametrize("ratio", [1, 2, 0.5])
def test_batched_access_is_access_row_by_row_in_one_read(ratio):
    source, targets = Counting(source_rows(9)), [Counting(target_rows(4)), Counting(target_rows(5))]
    dataset = PairedDataset(source, [StreamRows(targets, ratio)], seed=0)
    indices = [8, 3, 3, 0, 5]
    batch = dataset.__getitems__(indices)
    assert source.reads == 1 and all(target.reads <= 1 for target in targets)
    assert batch == [dataset[i] for i in indices]
    assert dataset.__getitems__(torch.tensor(indices)) == batch


def test_several_targets_take_turns_and_are_numbered_from_1():
    dataset = PairedDataset(
        source_rows(6), [StreamRows([target_rows(3), target_rows(3, 2000)], 1)], seed=0
    )
    pairs = drawn(dataset)
    assert [domain for domain, _ in pairs] == [1, 2, 1, 2, 1, 2]
    assert {x for domain, x in pairs if domain == 1} == {1000, 1001, 1002}
    assert {x for domain, x in pairs if domain == 2} == {2000, 2001, 2002}


@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list])
def test_persistent_workers_hear_of_the_epoch(kind):
    """Workers hold copies of the dataset: a plain attribute would repeat epoch 1 for ever."""
    dataset = pair(kind(source_rows(12)), [StreamRows([kind(target_rows(12))], 1)], seed=0)
    loader = DataLoader(
        dataset, batch_size=3, num_workers=2, persistent_workers=True, collate_fn=list
    )

    def epoch(number):
        dataset.set_epoch(number)
        return {
            row.source["x"]: [(d, t["x"]) for d, t in row.companions] for b in loader for row in b
        }

    first, second = epoch(0), epoch(1)
    assert first != second
    assert first == epoch(0)
    assert second == targets_of_epoch(1)


def targets_of_epoch(number):
    dataset = PairedDataset(source_rows(12), [StreamRows([target_rows(12)], 1)], seed=0)
    dataset.set_epoch(number)
    return targets_of(dataset)


def test_attributes_are_the_sources():
    """An author's own loader may ask the dataset for its labels or lengths."""
    source = Counting(source_rows(3))
    source.lengths = [3, 1, 2]
    dataset = PairedDataset(source, [StreamRows([target_rows(3)], 1)], seed=0)
    assert dataset.lengths == [3, 1, 2]
    with pytest.raises(AttributeError):
        dataset.weights  # noqa: B018


# ---- a `datasets.Dataset` as the source ----


def hf_pair(number=8, ratio=1.5, **columns):
    rows = [{**row, **columns} for row in source_rows(number)]
    targets = [datasets.Dataset.from_list(target_rows(5)), target_rows(4, 2000)]
    return pair(datasets.Dataset.from_list(rows), [StreamRows(targets, ratio)], seed=0)


def pairs_of(dataset, indices):
    rows = dataset.__getitems__(indices)
    assert all(isinstance(row, PairedRow) for row in rows)
    return [(row.source["x"], [(d, t["x"]) for d, t in row.companions]) for row in rows]


def test_a_datasets_dataset_stays_one_and_reads_as_the_source():
    dataset = hf_pair()
    assert isinstance(dataset, datasets.Dataset) and isinstance(dataset, PairedDataset)
    assert len(dataset) == 8 and dataset.column_names == ["x"]
    assert dataset[3] == {"x": 3} and list(dataset["x"]) == list(range(8))


def test_a_datasets_dataset_is_paired_as_a_list_is():
    dataset = hf_pair()
    targets = [target_rows(5), target_rows(4, 2000)]
    plain = PairedDataset(source_rows(8), [StreamRows(targets, 1.5)], seed=0)
    for epoch in range(2):
        for one in (dataset, plain):
            one.set_epoch(epoch)
        expected = [(i, pairs) for i, pairs in targets_of(plain).items()]
        assert pairs_of(dataset, list(range(8))) == expected
        assert pairs_of(dataset, [7, 0, 7]) == [expected[i] for i in (7, 0, 7)]


def test_a_copy_without_a_column_keeps_the_pairs_and_hears_of_the_epoch():
    """`remove_columns` and `with_format` copy the dataset first."""
    dataset = hf_pair(text="a")
    smaller = dataset.remove_columns("text")
    assert smaller.column_names == ["x"] and dataset.column_names == ["x", "text"]
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        assert pairs_of(smaller, [5, 1]) == pairs_of(dataset, [5, 1])
    assert all(set(row.source) == {"x"} for row in smaller.__getitems__([0, 1]))
    assert isinstance(dataset.with_format("torch").__getitems__([1])[0].source["x"], torch.Tensor)


# ---- PairedIterableDataset ----


class RowStream(IterableDataset):
    """A stream of rows, each time from the start, that remembers its epochs."""

    def __init__(self, rows):
        self.rows, self.epochs = rows, []

    def __iter__(self):
        return iter(self.rows)

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


def zipped(dataset):
    return [(row.source["x"], [(d, t["x"]) for d, t in row.companions]) for row in dataset]


def test_streams_are_zipped_and_a_short_target_starts_again():
    dataset = PairedIterableDataset(
        RowStream(source_rows(5)), [StreamRows([RowStream(target_rows(2))], 1)], seed=0
    )
    expected = [(i, [(1, 1000 + i % 2)]) for i in range(5)]
    assert zipped(dataset) == expected == zipped(dataset)


def test_restarted_stream_is_shuffled_anew():
    source, target = RowStream(source_rows(5)), RowStream(target_rows(2))
    dataset = PairedIterableDataset(source, [StreamRows([target], 1)], seed=0)
    for epoch in range(2):
        dataset.set_epoch(epoch)
        zipped(dataset)
    assert source.epochs == [0, 1]
    assert len(target.epochs) == len(set(target.epochs)) == 6  # three passes in each epoch


def test_streams_with_a_fractional_ratio():
    def pairs(ratio):
        dataset = PairedIterableDataset(
            RowStream(source_rows(6)), [StreamRows([RowStream(target_rows(9))], ratio)], seed=0
        )
        return [[x - 1000 for _, x in targets] for _, targets in zipped(dataset)]

    assert pairs(0.5) == [[], [0], [], [1], [], [2]]
    assert pairs(1.5) == [[0], [1, 2], [3], [4, 5], [6], [7, 8]]


@pytest.mark.parametrize("ratio", [0.5, 1, 2])
def test_several_target_streams_take_turns(ratio):
    targets = [RowStream(target_rows(9)), RowStream(target_rows(9, 2000))]
    dataset = PairedIterableDataset(RowStream(source_rows(8)), [StreamRows(targets, ratio)], seed=0)
    pairs = [pair for _, pairs in zipped(dataset) for pair in pairs]
    assert pairs == [(1 + i % 2, 1000 * (1 + i % 2) + i // 2) for i in range(int(8 * ratio))]


def test_map_style_target_of_a_stream_is_permuted():
    def draw(epoch, seed=0):
        dataset = PairedIterableDataset(
            RowStream(source_rows(20)), [StreamRows([target_rows(10)], 1)], seed
        )
        dataset.set_epoch(epoch)
        return [pairs[0][1] for _, pairs in zipped(dataset)]

    first = draw(0)
    assert sorted(first[:10]) == sorted(first[10:]) == list(range(1000, 1010))
    assert first[:10] != first[10:]
    assert draw(0) == first and draw(1) != first and draw(0, seed=1) != first


@pytest.mark.timeout(20)  # starting an empty stream again would never end
@pytest.mark.parametrize("source", [3, 0])
def test_empty_target_stream_is_refused(source):
    dataset = PairedIterableDataset(
        RowStream(source_rows(source)), [StreamRows([RowStream([])], 1)], seed=0
    )
    if source == 0:
        assert list(dataset) == []
    else:
        with pytest.raises(ValueError, match="target stream 0 gave no row: it is empty"):
            list(dataset)


def test_length_of_a_stream_is_its_sources():
    assert len(PairedIterableDataset(source_rows(4), [], seed=0)) == 4
    with pytest.raises(TypeError):
        len(PairedIterableDataset(RowStream([]), [], seed=0))


# ---- pair ----


def test_pair_is_map_style_or_streaming_as_the_source_is():
    assert is_map_style(source_rows(2)) and not is_map_style(RowStream([]))
    assert type(pair(source_rows(2), [StreamRows([target_rows(2)], 1)], 0)) is PairedDataset
    for target in (target_rows(2), RowStream(target_rows(2))):
        assert isinstance(pair(RowStream([]), [StreamRows([target], 1)], 0), PairedIterableDataset)


def test_pair_refuses_a_streaming_target_of_a_map_style_source():
    with pytest.raises(ValueError, match=r"map-style.*to_iterable_dataset\(\)"):
        pair(source_rows(2), [StreamRows([target_rows(2), RowStream(target_rows(2))], 1)], 0)


# ---- AdaptationCollator ----


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer([f"w{i}" for i in range(2, 200)], ["[PAD]", "[MASK]"], single=None)


def tokens(length, start=2, **columns):
    ids = list(range(start, start + length))
    return {"input_ids": ids, "attention_mask": [1] * length, **columns}


def values_in(batch):
    """Every number in a batch, nested batches included."""
    found = set()
    for value in batch.values():
        if isinstance(value, torch.Tensor):
            found |= set(value.flatten().tolist())
        elif hasattr(value, "values"):
            found |= values_in(value)
    return found


def collate(
    rows, collator=default_data_collator, names=("labels",), separate=False, keeps_labels=False
):
    highest = max(
        (domain for row in rows for domain, _ in getattr(row, "companions", [])), default=0
    )
    target = frozenset({TARGET})
    table = StreamTable(
        (TRAINING, *[TARGET] * highest),
        separate=target if separate or keeps_labels else frozenset(),
        labelled=target if keeps_labels else frozenset(),
    )
    return AdaptationCollator(collator, table=table, label_names=names)(rows)


def test_joint_layout_has_source_rows_first_and_the_domain_column():
    rows = [
        PairedRow({"x": 1}, [(1, {"x": 10}), (2, {"x": 20})]),
        PairedRow({"x": 2}, []),
        PairedRow({"x": 3}, [(1, {"x": 11})]),
    ]
    batch = collate(rows)
    assert batch["x"].tolist() == [1, 2, 3, 10, 20, 11]
    assert batch[DOMAIN].tolist() == [0, 0, 0, 1, 2, 1]
    assert batch[DOMAIN].dtype == torch.long and STREAM_BATCHES not in batch


def test_separate_layout_has_a_batch_of_target_rows():
    rows = [PairedRow({"x": 1}, [(1, {"x": 10}), (2, {"x": 20})]), PairedRow({"x": 2}, [])]
    batch = collate(rows, separate=True)
    assert batch["x"].tolist() == [1, 2] and batch[DOMAIN].tolist() == [0, 0]
    target = batch[STREAM_BATCHES]["target"]
    assert target["x"].tolist() == [10, 20] and target[DOMAIN].tolist() == [1, 2]
    assert STREAM_BATCHES not in collate([PairedRow({"x": 1}, [])], separate=True)


def test_rows_are_padded_alike_and_reach_the_authors_collator_together(tokenizer):
    rows = [PairedRow(tokens(2, labels=[0, 1]), [(1, tokens(5, 50))])]
    batch = collate(rows, DataCollatorForTokenClassification(tokenizer))
    assert batch["input_ids"].tolist() == [[2, 3, 0, 0, 0], [50, 51, 52, 53, 54]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0, 0], [1] * 5]


def test_own_domain_column_and_other_columns_of_the_target_are_dropped():
    source, target = {"x": 1, DOMAIN: "news"}, {"x": 10, DOMAIN: "mail", "extra": SENTINEL}
    batch = collate([PairedRow(source, [(1, target)])])
    assert set(batch) == {"x", DOMAIN} and batch[DOMAIN].tolist() == [0, 1]
    assert source == {"x": 1, DOMAIN: "news"} and "extra" in target  # the rows are left alone


# The label of a source row, the form of a target's own label, and what its place must show.
FORMS = {
    "int": (2, SENTINEL, -100),
    "float": (0.5, float(SENTINEL), -100.0),
    "numpy int": (np.int64(2), np.int64(SENTINEL), -100),
    "scalar tensor": (torch.tensor(2), torch.tensor(SENTINEL), -100),
    "vector of floats": ([0.0, 1.0, 1.0], [float(SENTINEL)] * 3, [-100.0] * 3),
    "vector of ints": ([0, 1, 1], [SENTINEL] * 3, [-100] * 3),
    "vector tensor": (torch.tensor([0.0, 1.0]), torch.full((2,), 77.0), [-100.0] * 2),
    "numpy vector": (np.array([0.0, 1.0]), np.full(2, 77.0), [-100.0] * 2),
    "one per token": ([1, 0, 2, 1], [SENTINEL] * 4, [-100] * 4),
    "tensor per token": (torch.tensor([1, 0, 2, 1]), torch.full((4,), 77), [-100] * 4),
}


@pytest.mark.parametrize("separate", [False, True], ids=["joint", "separate"])
@pytest.mark.parametrize("labelled", [False, True], ids=["unlabelled", "labelled"])
@pytest.mark.parametrize("form", FORMS)
def test_labels_of_target_rows_are_hidden(form, labelled, separate):
    label, own, hidden = FORMS[form]
    target = tokens(4, 50, **({"labels": own} if labelled else {}))
    rows = [PairedRow(tokens(4, labels=label), [(1, dict(target))]) for _ in range(2)]
    batch = collate(rows, separate=separate)
    labels = batch["labels"][:2]
    there = batch[STREAM_BATCHES]["target"]["labels"] if separate else batch["labels"][2:]
    assert there.tolist() == [hidden] * 2
    assert labels.dtype == there.dtype and labels.tolist() == [torch.as_tensor(label).tolist()] * 2
    assert SENTINEL not in values_in(batch)


@pytest.mark.parametrize("name", ["label", "label_ids", "start_positions"])
def test_every_label_column_is_hidden(name):
    """`default_data_collator` takes `label_ids` as one list per row, and renames the first two."""
    label, own, hidden = (2, SENTINEL, -100)
    if name == "label_ids":
        label, own, hidden = [label] * 4, [own] * 4, [hidden] * 4
    rows = [PairedRow(tokens(4, **{name: label}), [(1, tokens(4, 50, **{name: own}))])]
    batch = collate(rows, names=("labels", "start_positions"))
    assert SENTINEL not in values_in(batch)
    key = "start_positions" if name == "start_positions" else "labels"
    assert batch[key].tolist() == [label, hidden]


@pytest.mark.parametrize("length", [1, 5], ids=["shorter", "longer"])
@pytest.mark.parametrize("kind", [list, torch.tensor, np.array], ids=["list", "tensor", "array"])
@pytest.mark.parametrize("separate", [False, True], ids=["joint", "separate"])
@pytest.mark.parametrize("labelled", [False, True], ids=["unlabelled", "labelled"])
def test_token_labels_have_the_target_rows_length(tokenizer, labelled, separate, kind, length):
    own = {"labels": kind([SENTINEL] * length)} if labelled else {}
    rows = [
        PairedRow(tokens(3, labels=kind([1, 0, 2])), [(1, tokens(length, 100, **own))]),
        PairedRow(tokens(2, labels=kind([1, 1])), [(1, tokens(length, 120, **own))]),
    ]
    batch = collate(rows, DataCollatorForTokenClassification(tokenizer), separate=separate)
    assert SENTINEL not in values_in(batch)
    assert [row[:3] for row in batch["labels"][:2].tolist()] == [[1, 0, 2], [1, 1, -100]]
    there = (
        batch[STREAM_BATCHES]["target"]
        if separate
        else {key: value[2:] for key, value in batch.items()}
    )
    assert there["labels"].tolist() == [[-100] * there["input_ids"].shape[1]] * 2


@pytest.mark.parametrize("length", [2, 3, 6])
def test_sequence_to_sequence_labels_are_hidden_in_the_decoders_input_too(tokenizer, length):
    """The collator makes the decoder's input of the labels: they must be gone before it."""

    def shift(labels):
        return torch.cat([torch.zeros(len(labels), 1, dtype=torch.long), labels[:, :-1]], 1)

    model = SimpleNamespace(prepare_decoder_input_ids_from_labels=shift)
    source = tokens(3, labels=list(range(10, 10 + length)))
    rows = [PairedRow(source, [(1, tokens(4, 100, labels=[SENTINEL] * 5))])]
    batch = collate(rows, DataCollatorForSeq2Seq(tokenizer, model=model))
    assert SENTINEL not in values_in(batch)
    assert batch["labels"][0, :length].tolist() == list(range(10, 10 + length))
    assert set(batch["labels"][1].tolist()) == {-100}


@pytest.mark.parametrize("separate", [False, True], ids=["joint", "separate"])
def test_labels_that_a_collator_makes_of_the_tokens_are_hidden(tokenizer, separate):
    """The rows have no labels: a language-model collator copies the tokens into them."""
    rows = [PairedRow(tokens(4), [(1, tokens(4, 100))]) for _ in range(2)]
    batch = collate(rows, DataCollatorForLanguageModeling(tokenizer, mlm=False), separate=separate)
    assert batch["labels"][:2].tolist() == [[2, 3, 4, 5]] * 2
    there = batch[STREAM_BATCHES]["target"] if separate else {k: v[2:] for k, v in batch.items()}
    assert there["labels"].tolist() == [[-100] * 4] * 2
    assert there["input_ids"].tolist() == [[100, 101, 102, 103]] * 2


def test_rows_that_are_no_mapping_are_hidden_after_the_collator():
    def collator(rows):
        x, y = zip(*rows, strict=True)
        return {"x": torch.tensor(x), "labels": torch.tensor(y)}

    batch = collate([PairedRow((1, 0), [(1, (2, SENTINEL))])], collator)
    assert batch["x"].tolist() == [1, 2] and batch["labels"].tolist() == [0, -100]


def test_target_labels_are_kept_where_wanted():
    rows = [
        PairedRow(tokens(2, labels=1), [(1, tokens(2, 50, labels=2)), (2, tokens(2, 60))]),
    ]
    there = collate(rows, keeps_labels=True)[STREAM_BATCHES]["target"]["labels"]
    assert there.tolist() == [2, -100]  # a row without a label is still hidden


def test_target_labels_that_a_collator_makes_are_kept_where_wanted(tokenizer):
    rows = [PairedRow(tokens(2), [(1, tokens(2, 100))])]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    batch = collate(rows, collator, keeps_labels=True)
    assert batch["labels"].tolist() == [[2, 3]]
    assert batch[STREAM_BATCHES]["target"]["labels"].tolist() == [[100, 101]]


def test_rows_without_their_target_rows_are_refused():
    """An author's loader that does not read the paired dataset."""
    with pytest.raises(ValueError, match="came without its target rows"):
        collate([{"x": 1}, {"x": 2}])


def test_label_columns_are_the_trainers_the_usual_and_the_collators():
    collator = SimpleNamespace(valid_label_columns=["score"])
    assert {"start", "label", "labels", "label_ids", "score"} <= label_columns(["start"], collator)
    assert "score" not in label_columns([], default_data_collator)


def test_missing_columns_are_named():
    rows = [PairedRow(tokens(2, labels=1), [(1, {"input_ids": [5], "text": "raw"})])]
    with pytest.raises(ValueError, match=r"lacks the column\(s\) 'attention_mask'.*'text'"):
        collate(rows)
    message = missing_columns_message(["a", "b"], ["c"])
    assert "'a', 'b'" in message and "it has 'c'" in message


def test_collator_that_merges_rows_is_refused():
    flatten = DataCollatorWithFlattening(return_tensors="pt")
    rows = [PairedRow(tokens(3, labels=[1, 2, 3]), [(1, tokens(4, 50))])]
    with pytest.raises(ValueError, match="of 2 rows: it merges rows"):
        collate(rows, flatten)


@pytest.mark.parametrize("separate", [False, True])
def test_collator_that_returns_a_tuple_is_refused(separate):
    def collator(rows):
        return torch.zeros(len(rows)), torch.zeros(len(rows))

    with pytest.raises(TypeError, match="returns a dict of tensors; function returned tuple"):
        collate([PairedRow({"x": 1}, [(1, {"x": 2})])], collator, separate=separate)
