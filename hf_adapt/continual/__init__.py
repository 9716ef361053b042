"""Learning on without forgetting: a new task is learnt and the old ones are kept."""

__all__: list[str] = []
