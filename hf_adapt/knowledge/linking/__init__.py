"""Where a text names entities, by characters and by tokens."""
