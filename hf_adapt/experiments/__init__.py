"""Methods × pairs of domains (or tasks) × seeds in one table: what `hf-adapt run` runs.

Needs the extra `run`: `pip install "hf-adapt[run]"`.
"""
