"""Drafting, verification and generation."""
