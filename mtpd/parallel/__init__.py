"""Several processes at work on one run: ranks, launchers, DeepSpeed, sharded trunks, sequence parallelism."""
