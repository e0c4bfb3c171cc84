"""Medusa heads as recipes know them."""

from __future__ import annotations

from mtpd.heads.kinds import Kind

KIND = Kind(
    name="medusa",
    about="K heads on the same state, each with a residual block and an unembedding of its own",
    heads="mtpd.heads.medusa.heads:MedusaHeads",
    start="mtpd.heads.medusa.start",
)
