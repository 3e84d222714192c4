"""Attention over contiguous keys and values: what the public library runs."""
