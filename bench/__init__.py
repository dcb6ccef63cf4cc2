"""Benches: `python -m bench --help`."""
