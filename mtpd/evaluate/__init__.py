"""Acceptance: counted offline and by decoding, stored as counts, shown as ratios."""
