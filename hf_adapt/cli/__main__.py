"""`python -m hf_adapt.cli`, for where the script `hf-adapt` is not on the path."""

from hf_adapt.cli import app

app()
