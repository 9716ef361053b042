"""The frozen lower layers of a model, computed once per example."""
