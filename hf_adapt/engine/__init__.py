"""The engine: the only place that touches the Trainer."""
