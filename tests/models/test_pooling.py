"""Pooling never sees padding, whatever lies there."""

import pytest
import torch
from torch import nn

from hf_adapt.models.pooling import pool, token_mask

# ---- pool ----

ROWS = torch.tensor([[[1.0, 10.0], [2.0, 20.0], [6.0, 60.0]], [[5.0, 50.0], [7.0, 70.0], [0, 0]]])
LENGTHS = (3, 2)
POOLED = {
    "mean": [[3.0, 30.0], [6.0, 60.0]],
    "cls": [[1.0, 10.0], [5.0, 50.0]],
    "last": [[6.0, 60.0], [7.0, 70.0]],
    "tokens": [[1.0, 10.0], [2.0, 20.0], [6.0, 60.0], [5.0, 50.0], [7.0, 70.0]],
}


def padded(side, content, width=5):
    """The rows, padded on one side to `width` with `content`, and their mask."""
    hidden = torch.full((2, width, 2), content)
    mask = torch.zeros(2, width, dtype=torch.bool)
    for row, length in enumerate(LENGTHS):
        place = slice(0, length) if side == "right" else slice(width - length, width)
        hidden[row, place] = ROWS[row, :length]
        mask[row, place] = True
    return hidden, mask


@pytest.mark.parametrize("content", [0.0, 1e6, float("inf"), float("nan")])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", POOLED)
def test_padding_does_not_matter(pooling, side, content):
    """Neither where it is nor what is in it: a masked position may hold anything, also NaN."""
    hidden, mask = padded(side, content)
    hidden.requires_grad_()
    pooled = pool(hidden, mask, pooling)
    assert pooled.tolist() == POOLED[pooling]
    pooled.sum().backward()
    assert torch.isfinite(hidden.grad).all() and (hidden.grad[~mask] == 0).all()


@pytest.mark.parametrize("pooling", POOLED)
def test_a_mask_with_holes_counts_real_positions_only(pooling):
    hidden = torch.arange(5.0).view(1, 5, 1)
    mask = torch.tensor([[False, True, False, True, False]])
    expected = {"mean": [[2.0]], "cls": [[1.0]], "last": [[3.0]], "tokens": [[1.0], [3.0]]}
    assert pool(hidden, mask, pooling).tolist() == expected[pooling]


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_a_row_without_real_positions_stays_finite(pooling):
    assert torch.isfinite(pool(torch.ones(1, 3, 2), torch.zeros(1, 3).bool(), pooling)).all()


def test_pooled_features_pass_through_and_feature_maps_are_averaged():
    mask = torch.ones(2, 1).bool()
    vectors = torch.randn(2, 4)
    maps = torch.arange(2 * 3 * 2 * 2.0).view(2, 3, 2, 2)
    for pooling in POOLED:
        assert torch.equal(pool(vectors, mask, pooling), vectors)
        assert pool(maps, mask, pooling).tolist() == [[1.5, 5.5, 9.5], [13.5, 17.5, 21.5]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pooling_is_in_float32(dtype):
    """The sum of 300 values of 300 has no float16, and too few digits in bfloat16."""
    pooled = pool(torch.full((1, 300, 1), 300.0, dtype=dtype), torch.ones(1, 300).bool(), "mean")
    assert pooled.dtype == torch.float32 and pooled.item() == 300


def test_a_callable_pools_as_it_likes():
    hidden, mask = padded("right", 0.0)
    assert torch.equal(pool(hidden, mask, lambda h, m: h[:, 1] * m[:, 1:2]), ROWS[:, 1])
    five = torch.zeros(2, 1, 1, 1, 3)
    assert pool(five, mask, lambda h, m: h[:, 0, 0, 0]).shape == (2, 3)


@pytest.mark.parametrize("shape", [(2, 4, 3), (2, 3), (2, 3, 2, 2)])
def test_unknown_pooling_is_refused(shape):
    with pytest.raises(ValueError, match="pooling='max' is unknown"):
        pool(torch.zeros(shape), torch.ones(shape[:2]).bool(), "max")


@pytest.mark.parametrize("shape", [(2,), (2, 1, 1, 1, 3)])
def test_other_numbers_of_dimensions_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(B, D\), \(B, T, D\) or \(B, C, H, W\)"):
        pool(torch.zeros(shape), torch.ones(2, 1).bool(), "mean")


# ---- token_mask ----


def test_token_mask_is_the_attention_mask():
    hidden, mask = torch.zeros(2, 3, 4), torch.tensor([[1, 1, 0], [0, 1, 1]])
    result = token_mask(hidden, mask, nn.Identity())
    assert result.dtype == torch.bool and result.tolist() == mask.bool().tolist()
    assert token_mask(hidden, None, nn.Identity()).tolist() == [[True] * 3] * 2


def test_token_mask_of_audio_is_reduced_by_the_models_rule():
    model = nn.Identity()
    model._get_feature_vector_attention_mask = lambda frames, mask: mask[:, ::2][:, :frames]
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    assert token_mask(torch.zeros(1, 3, 4), mask, model).tolist() == [[True, True, False]]


@pytest.mark.parametrize("shape", [(2, 4), (1, 3)])
def test_token_mask_that_does_not_fit_is_refused(shape):
    with pytest.raises(ValueError, match=r"mask has shape .* output is \(2, 3, 4\): expected"):
        token_mask(torch.zeros(2, 3, 4), torch.ones(shape), nn.Identity())
