"""Benchmarks: each module is a command that writes its results to benchmarks/results."""
