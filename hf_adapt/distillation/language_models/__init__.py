"""The losses of language models, computed from hidden states without the logits of all tokens."""
