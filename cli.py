"""Starts mtpd under a launcher: `torchrun cli.py distill ...` and `deepspeed cli.py distill ...`."""

import sys

from mtpd.cli import main

if __name__ == "__main__":
    # deepspeed puts --local_rank=N before our arguments; the environment that it sets says the same.
    sys.exit(main([word for word in sys.argv[1:] if not word.startswith("--local_rank=")]))
