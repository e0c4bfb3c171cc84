"""Starts mtpd under a launcher: `torchrun cli.py distill ...` and `deepspeed cli.py distill ...`."""

import sys

from mtpd.__main__ import start

if __name__ == "__main__":
    sys.exit(start())
