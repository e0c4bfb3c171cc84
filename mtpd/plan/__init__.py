"""Memory, disk and steps of a run, from sizes alone: `--dry-run`."""
