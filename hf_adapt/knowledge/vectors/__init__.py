"""A vector for each entity: from descriptions, files or training."""
