"""The structure of Hugging Face models; nothing here knows a Trainer."""
