"""Medusa heads: a residual block on the state and an unembedding each."""
