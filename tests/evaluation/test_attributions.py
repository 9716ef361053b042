"""Token attributions, against an independent sum and a model whose answer is known."""

import sys
from typing import Any

import pytest
import torch
from transformers import GPT2ForSequenceClassification

from hf_adapt.evaluation import compare_attributions, token_attributions
from tests.helpers.models import MODELS, bert, enlarged, family, gpt2_config
from tests.helpers.tokenizers import word_tokenizer

WORDS = [f"w{i}" for i in range(40)]
TEXT = "w3 w14 w15 w9 w26"


@pytest.fixture
def captum() -> None:
    pytest.importorskip("captum", reason="captum is not installed: pip install hf-adapt[test]")


def by_riemann(model: Any, ids: torch.Tensor, baseline: torch.Tensor, target: int) -> torch.Tensor:
    """Equation 1 of the paper as the mean of gradients at 2,000 midpoints."""
    embed, mask = model.get_input_embeddings(), torch.ones_like(ids)
    start, end = embed(baseline).detach(), embed(ids).detach()
    total = torch.zeros_like(end)
    for chunk in ((torch.arange(2000) + 0.5) / 2000).split(200):
        points = (start + chunk[:, None, None] * (end - start)).requires_grad_()
        logits = model(inputs_embeds=points, attention_mask=mask.expand(len(chunk), -1)).logits
        odds = logits[:, target] - logits.roll(-target, 1)[:, 1:].logsumexp(1)
        total += torch.autograd.grad(odds.sum(), points)[0].sum(0)
    return ((end - start) * total / 2000).sum(-1)[0]


@pytest.mark.usefixtures("captum")
@pytest.mark.parametrize("name", ["bert", "lora", "deberta", "modernbert"])
def test_attributions_are_the_integral(name: str) -> None:
    model, tokenizer = family(name).train(), word_tokenizer(WORDS)
    found = token_attributions(model, tokenizer, TEXT, target=1, steps=200)
    assert found.tokens == ["[CLS]", *TEXT.split(), "[SEP]"]
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    # Padding is a vector of zeros in all but ModernBERT's.
    nothing = tokenizer.pad_token_id if name == "modernbert" else tokenizer.mask_token_id
    baseline = torch.tensor([[ids[0, 0], *[nothing] * 5, ids[0, -1]]])
    expected = by_riemann(model.eval(), ids, baseline, 1)
    torch.testing.assert_close(torch.tensor(found.scores), expected, rtol=1e-2, atol=2e-3)
    assert found.scores[0] == found.scores[-1] == 0
    assert found.error < 1e-2 * max(abs(found.score - found.baseline_score), 0.1)


@pytest.mark.usefixtures("captum")
@pytest.mark.parametrize("name", ["bert", "dropout", "roberta", "gpt2", "llama_rows", "no padding"])
def test_the_sum_is_the_difference_of_the_scores(name: str, caplog: Any) -> None:
    inputs = ["input_ids", "attention_mask"]  # GPT-2 embeds token types as tokens
    tokenizer = word_tokenizer(WORDS, single=None, model_input_names=inputs)
    if name in ("gpt2", "no padding"):
        torch.manual_seed(0)
        model = enlarged(GPT2ForSequenceClassification(gpt2_config()), 5)
        model.config.pad_token_id = None if name == "no padding" else 0
    else:
        model = enlarged(bert(dropout=True), 5) if name == "dropout" else family(name)
    model.train()
    found = token_attributions(model, tokenizer, TEXT, steps=100)
    difference = found.score - found.baseline_score
    assert abs(difference) > 1e-3 and model.training
    assert sum(found.scores) == pytest.approx(difference, abs=found.error + 1e-9)
    assert found.error < 0.05 * max(abs(difference), 0.1)
    ids = tokenizer(TEXT, return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(**ids).logits[0]
    assert found.target == int(logits.argmax())
    others = torch.cat([logits[: found.target], logits[found.target + 1 :]])
    assert found.score == pytest.approx(float(logits.max() - others.logsumexp(0)), rel=1e-4)
    assert all(p.grad is None for p in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks
    caplog.clear()
    rough = token_attributions(model, tokenizer, TEXT, steps=1)
    assert ("use more than 1 steps" in caplog.text) == (
        rough.error > 0.05 * max(abs(difference), 0.01)
    )


class Bag(torch.nn.Module):
    """The sum of a weight of each word, for the second of two classes."""

    def __init__(self, weights: dict[int, float]) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(50, 1)
        self.config = MODELS["bert"]().config
        with torch.no_grad():
            self.embed.weight.zero_()
            for number, weight in weights.items():
                self.embed.weight[number] = weight

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embed

    def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any = None) -> Any:
        total = (self.embed(input_ids) * attention_mask.unsqueeze(-1)).sum(1)
        logits = torch.cat([torch.zeros_like(total), total], 1)
        return type("Output", (), {"logits": logits})


@pytest.mark.usefixtures("captum")
def test_words_of_a_bag_have_their_weights_and_models_are_compared() -> None:
    tokenizer = word_tokenizer(WORDS)
    good, bad = tokenizer.convert_tokens_to_ids(["w3", "w9"])
    before, after = Bag({good: 2.0, bad: -1.0}), Bag({good: 2.5, bad: 1.5})
    found = compare_attributions(before, after, tokenizer, "w3 w9 w1", steps=4)
    assert found.after.target == found.before.target == 1
    assert found.before.scores == pytest.approx([0, 2, -1, 0, 0], abs=1e-5)
    assert found.change == pytest.approx([0, 0.5, 2.5, 0, 0], abs=1e-5)
    assert str(found).splitlines()[2].split() == ["w9", "-1.000", "+1.500"]


@pytest.mark.usefixtures("captum")
def test_what_cannot_be_attributed_is_refused() -> None:
    tokenizer = word_tokenizer(WORDS)
    with pytest.raises(ValueError, match=r"BertForTokenClassification gave \(1, 7, 2\)"):
        token_attributions(family("bert_tokens"), tokenizer, TEXT)
    with pytest.raises(ValueError, match="target=5: the model has 2 classes"):
        token_attributions(family("bert"), tokenizer, TEXT, target=5)
    with pytest.raises(ValueError, match="Expected a text with tokens, got ''"):
        token_attributions(family("bert"), tokenizer, "")
    with pytest.raises(ValueError, match="a transformers model of text, got Linear"):
        token_attributions(torch.nn.Linear(2, 2), tokenizer, TEXT)


def test_without_captum_there_is_a_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(ImportError, match=r'pip install "hf-adapt\[attributions\]"'):
        token_attributions(family("bert"), word_tokenizer(WORDS), TEXT)
