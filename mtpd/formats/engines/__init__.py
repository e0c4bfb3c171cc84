"""Serving engines that `mtpd verify` runs exports in."""

ENGINES = ("transformers", "vllm")
