"""Losses: `kinds.py` has one entry for each, `reference.py` is the oracle, `fused.py` is what training runs."""

# Importing any part of this package registers the losses that come with it.
from mtpd.losses import kinds as kinds
