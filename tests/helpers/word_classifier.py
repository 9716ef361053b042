"""A tiny classifier of a few words, as a folder: what the examples' tests train."""

from pathlib import Path

from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

WORDS = "good bad fine poor film phone battery plot the a is was not very".split()


def save_tiny_model(folder: Path) -> Path:
    """Write a two-layer BERT and its tokenizer to a folder that exists."""
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])
    )
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(WORDS) + 5,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder
