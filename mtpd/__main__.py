"""`python -m mtpd`, which launchers call: each rank is a process of it."""

import sys

from mtpd.cli import main


def start() -> int:
    """Runs one command; what deepspeed puts before its words is left out, the environment says the same."""
    return main([word for word in sys.argv[1:] if not word.startswith("--local_rank=")])


if __name__ == "__main__":
    sys.exit(start())
