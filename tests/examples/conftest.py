"""The examples are scripts beside the package; what they share lies in benchmarks/."""

import sys
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.helpers.models import llama_config
from tests.helpers.word_classifier import WORDS

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "benchmarks")]


@pytest.fixture(autouse=True)
def one_thread():
    """Threads only cost time on a model this small, with other tests running beside it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def settings_of_the_process(monkeypatch):
    """What an example sets for its whole process does not outlive its test."""
    verbosity = transformers.logging.get_verbosity()
    callback = transformers.trainer.DEFAULT_PROGRESS_CALLBACK
    monkeypatch.setattr(transformers.trainer, "DEFAULT_PROGRESS_CALLBACK", callback)
    yield
    transformers.logging.set_verbosity(verbosity)


@pytest.fixture
def llama_dir(tmp_path):
    """A folder with a Llama of four layers and its tokenizer of fifteen words."""
    words = {word: i for i, word in enumerate(["<unk>", "<end>", *WORDS])}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<end>"
    )
    torch.manual_seed(0)
    config = llama_config(
        vocab_size=len(words), num_hidden_layers=4, tie_word_embeddings=True, eos_token_id=1
    )
    folder = tmp_path / "llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
