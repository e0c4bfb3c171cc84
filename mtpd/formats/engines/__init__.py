"""Serving engines that `mtpd verify` runs exports in."""

LAYOUTS = {
    "transformers": ("hf-mtp", "in-place", "glm4moe"),
    "vllm": ("mimo-draft", "mimo", "glm4moe", "in-place", "medusa"),
}
"""Layouts of exports that each engine loads."""
