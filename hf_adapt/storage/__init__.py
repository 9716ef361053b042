"""Rows, arrays, fingerprints and atomic files on disk."""
