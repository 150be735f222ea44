"""Benchmarks: one command each, side by side with a peer or a limit."""
