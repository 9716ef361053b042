"""What a Hugging Face model is made of; knows no Trainer."""
