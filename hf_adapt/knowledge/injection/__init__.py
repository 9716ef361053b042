"""How knowledge enters a model, in training and afterwards."""
