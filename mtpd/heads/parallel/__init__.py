"""Parallel heads: K heads on the same state."""
