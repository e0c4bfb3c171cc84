"""Drafting, verification and generation."""

from mtpd.decode.counts import Counts
from mtpd.decode.greedy import generate

__all__ = ["Counts", "generate"]
