"""Serving engines that `mtpd verify` runs exports in."""
