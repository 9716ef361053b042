"""Keys of rows: what they depend on, and what not."""

import torch

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


def test_tokens_of_equal_rows_share_keys_by_their_place() -> None:
    rows = torch.tensor([5, 9, 5])
    keys = item_keys(rows, torch.tensor([2, 3, 2]))
    assert torch.equal(keys[:2], keys[5:]) and keys[:5].unique().numel() == 5
