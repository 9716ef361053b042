"""The output of a module is captured when it is asked for, and no trace is left."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_adapt.models.capture import OutputCapture, hidden_state


def test_hidden_state_of_every_form_of_output():
    hidden, ids = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long)
    pooler = torch.zeros(2, 4)
    for output in (
        hidden,
        (hidden, pooler),
        [ids, hidden],
        {"pooler_output": pooler, "last_hidden_state": hidden},
        {"sentence_embedding": pooler, "token_embeddings": hidden},
        {"ids": ids, "anything": hidden},
    ):
        assert hidden_state(output) is hidden
    for output in (None, "text", (), {"ids": ids}, SimpleNamespace(last_hidden_state=hidden)):
        assert hidden_state(output) is None


# ---- OutputCapture ----


def test_tap_records_only_while_told_to():
    module = nn.Linear(2, 3)
    tap = OutputCapture(module)
    module(torch.zeros(1, 2))
    assert tap.take() == []
    tap.record()
    first, second = module(torch.zeros(1, 2)), module(torch.ones(1, 2))
    tap.stop()
    module(torch.zeros(1, 2))
    captured = tap.take()
    assert [mask for _, mask in captured] == [None, None]
    assert captured[0][0] is first and captured[1][0] is second
    assert tap.take() == []


def test_tap_starts_anew():
    module = nn.Linear(2, 3)
    tap = OutputCapture(module)
    tap.record()
    module(torch.zeros(1, 2))
    tap.record()
    last = module(torch.ones(1, 2))
    ((hidden, _),) = tap.take()
    assert hidden is last


@pytest.mark.parametrize("trained", [True, False])
def test_tap_keeps_to_forwards_with_the_gradient_mode_it_began_in(trained):
    """A teacher's forward inside a trained loss is not the features; in evaluation all are."""
    module = nn.Linear(2, 3)
    tap = OutputCapture(module)
    with torch.set_grad_enabled(trained):
        tap.record()
        with torch.set_grad_enabled(not trained):
            module(torch.zeros(1, 2))
        own = module(torch.ones(1, 2))
    ((hidden, _),) = tap.take()
    assert hidden is own


def test_tap_takes_the_mask_that_the_output_holds():
    """A sentence-transformer has a mask per text column, and its modules hand it on."""

    class Column(nn.Module):
        def forward(self, mask):
            return {"token_embeddings": torch.zeros(2, 3, 4), "attention_mask": mask}

    module, mask = Column(), torch.tensor([[1, 1, 0], [1, 1, 1]])
    tap = OutputCapture(module)
    tap.record()
    module(mask)
    module(mask[:, None, None])  # a mask for the attention, not for the tokens
    (_, first), (_, second) = tap.take()
    assert first is mask and second is None


def test_tap_leaves_no_trace():
    module = nn.Linear(2, 3)
    tap = OutputCapture(module, extract=lambda output: "seen")
    tap.record()
    module(torch.zeros(1, 2))
    assert tap.take() == ["seen"]
    tap.remove()
    module(torch.zeros(1, 2))
    assert tap.take() == [] and not module._forward_hooks
