"""The HTML report of a run: its page, charts and token view."""
