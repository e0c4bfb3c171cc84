"""The process of one command: `mtpd`, and `python -m mtpd`, which launchers call for each rank."""

import sys

from mtpd.interrupts import INTERRUPTED, TERMINATED, Terminated, command_ended, take_signals


def start() -> int:
    """Runs one command; what deepspeed puts before its words is left out, the environment says the same."""
    take_signals()
    try:
        from mtpd.cli import main  # here, so that a signal in the first moments is no traceback either

        return main([word for word in sys.argv[1:] if not word.startswith("--local_rank=")])
    except KeyboardInterrupt:
        return INTERRUPTED
    except Terminated:
        return TERMINATED
    finally:
        command_ended()


if __name__ == "__main__":
    sys.exit(start())
