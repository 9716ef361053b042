"""Keys of rows: what they depend on, and what not."""

import pytest
import torch

from hf_adapt.models import hashing
from hf_adapt.models.hashing import item_keys, row_keys


def test_padding_on_either_side_does_not_matter_with_and_without_a_mask() -> None:
    ids = torch.randint(1, 99, (6, 5), generator=torch.Generator().manual_seed(0))
    mask, zeros = torch.ones_like(ids), torch.zeros(6, 3, dtype=torch.long)
    plain = row_keys({"input_ids": ids, "attention_mask": mask})
    assert plain.unique().numel() == 6
    for order in (0, 1):
        wide, real = (torch.cat([x, zeros][:: 1 - 2 * order], 1) for x in (ids, mask))
        assert torch.equal(plain, row_keys({"input_ids": wide, "attention_mask": real}))
        assert torch.equal(plain, row_keys({"input_ids": wide}))
    waves = ids.float() / 7
    padded = torch.cat([waves, zeros], 1)
    assert torch.equal(row_keys({"input_values": waves}), row_keys({"input_values": padded}))


def test_order_content_and_every_main_input_matter() -> None:
    ids = torch.tensor([[1, 2, 3], [3, 2, 1], [1, 2, 4], [1, 2, 3]])
    keys = row_keys({"input_ids": ids})
    assert keys[:3].unique().numel() == 3 and keys[0] == keys[3]
    pixels = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    assert row_keys({"input_ids": ids, "pixel_values": pixels}).unique().numel() == 4
    black = torch.zeros(2, 1, 2, 2)
    black[0, 0, 0, 0] = black[1, 0, 1, 1] = 1.0  # the same picture, moved
    assert row_keys({"pixel_values": black}).unique().numel() == 2


@pytest.mark.parametrize("size", [24, 25])
def test_keys_are_those_of_the_row_however_it_is_read(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block by block, in other batches, and from the middle of a tensor."""
    values = torch.randn(6, 1, 1, size + 1, generator=torch.Generator().manual_seed(0))[..., 1:]
    kinds = {"pixel_values": values, "input_values": values[:, 0, 0]}
    for name, given in kinds.items():
        keys = row_keys({name: given})
        assert keys.unique().numel() == 6
        alone = torch.cat([row_keys({name: given[i : i + 1]}) for i in range(6)])
        assert torch.equal(keys, alone) and torch.equal(keys, row_keys({name: given.clone()}))
        for block in (6, 30, 1000):
            monkeypatch.setattr(hashing, "CPU_BLOCK", block)
            assert torch.equal(keys, row_keys({name: given}))
        for place in (0, size // 2, size - 1):
            other = given.clone()
            other[..., place] += 1e-6
            assert not torch.isin(row_keys({name: other}), keys).any()


def test_pictures_of_other_sizes_and_black_ones() -> None:
    black = [torch.zeros(1, 1, 1, size) for size in (3, 4, 5)]
    keys = torch.cat([row_keys({"pixel_values": each}) for each in black])
    assert keys.unique().numel() == 3
    bits = torch.eye(64).view(64, 1, 8, 8)  # few bits that differ, which two products could undo
    pairs = (bits[:, None] + bits[None]).clamp(max=1)[tuple(torch.triu_indices(64, 64))]
    assert row_keys({"pixel_values": pairs}).unique().numel() == len(pairs) == 2080
    halves = pairs[:, :, :, ::2].half()
    assert torch.equal(
        row_keys({"pixel_values": halves}), row_keys({"pixel_values": halves.float()})
    )


def test_tokens_of_equal_rows_share_keys_by_their_place() -> None:
    rows = torch.tensor([5, 9, 5])
    keys = item_keys(rows, torch.tensor([2, 3, 2]))
    assert torch.equal(keys[:2], keys[5:]) and keys[:5].unique().numel() == 5
