"""One optimizer step and everything around it: the trainer, its checkpoints, and resuming."""
