"""Knowledge graphs: made, read, kept and asked."""
