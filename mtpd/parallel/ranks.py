"""Several processes at work on one run: which one this is, what it does alone, and how all of them end together.

A launcher (torchrun, deepspeed) starts the processes, which are called ranks; rank 0 is the main one. `joined` makes
them known to each other, through accelerate, and a process that was started alone notices nothing of what is here.

What is said here goes through a group of its own, on the CPU, whose waiting may take long: one rank may measure for
hours while the others wait for it. Nobody waits for a rank that has ended, though. Each rank has a thread that listens
to the next one, as in a ring. A rank that is done says so; where one ends without a word, its listener tells the one
before it, and within seconds all have ended, whatever they were waiting for.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mtpd.errors import MtpdError, RankFailed
from mtpd.interrupts import INTERRUPTED

Item = TypeVar("Item")

STEP = timedelta(hours=1)
"""Time after which a collective operation of the training step fails; the other ranks may be saving meanwhile."""
WAITING = timedelta(days=2)
"""Time after which waiting for what one rank does alone fails."""
GRACE = 5.0
"""Seconds in which a rank may end by itself, with its own words, after another one has failed."""
EXIT = 30
"""Seconds after which a rank that failed is ended where it hangs while it ends."""
SEEN = 60.0
"""Seconds after which a file that another rank has written is not waited for any more."""
DONE = -1
"""What a rank says to the one before it when all went well; otherwise it names the rank that failed, and adds the
number of ranks where that one tells the user why."""
LAST = 1.0
"""Seconds in which the rank that failed ends before the others do, so that its exit code is the first."""

_control: dist.ProcessGroup | None = None
_speaks = True


def rank() -> int:
    """The number of this process, 0 where it was started alone."""
    return dist.get_rank() if _started() else 0


def count() -> int:
    """Counts the processes."""
    return dist.get_world_size() if _started() else 1


def is_main() -> bool:
    """Whether this process is the one that writes files and speaks to the user."""
    return rank() == 0


def speaks() -> bool:
    """Whether this process tells the user how a command ended, after `joined`: a process alone, or the main rank."""
    return _speaks


def share(items: Sequence[Item], *, together: int = 1) -> list[Item]:
    """Gives this rank's share of a list that all ranks have: each item to one rank, in turns.

    Args:
        together: so many neighbouring ranks get the same items.
    """
    return list(items[rank() // together :: count() // together])


def barrier() -> None:
    """Waits until all ranks have come here."""
    if count() > 1:
        dist.barrier(group=_control)


def gather(value: Any) -> list[Any]:
    """The values of all ranks by rank, on each of them. They are small, and JSON can hold them."""
    if count() == 1:
        return [value]
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = _all_gather(torch.tensor([len(content)]))
    padded = torch.zeros(int(max(lengths)), dtype=torch.uint8)
    padded[: len(content)] = content
    parts = _all_gather(padded)
    return [json.loads(bytes(part[: int(length)].tolist())) for part, length in zip(parts, lengths, strict=True)]


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    if count() == 1:
        return flag
    found = torch.tensor([flag], dtype=torch.uint8)
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=_control)
    return bool(found)


def from_main(work: Callable[[], Any]) -> Any:
    """Gives on all ranks what `work` gives on the main one, for which they wait. JSON can hold it."""
    return gather(work() if is_main() else None)[0]


def once(
    file: Path,
    make: Callable[[], Item],
    write: Callable[[Item], object],
    *,
    whole: Callable[[], bool] | None = None,
    together: bool = False,
) -> None:
    """Makes a file unless it is whole: the main rank does, the others wait, and then all see it. All ranks call it.

    Args:
        make: gives what `write` writes.
        whole: tells whether the file is what it should be; None: whether it is there.
        together: all ranks make it, as where they share the layers of the trunk, and the main rank writes it.

    Raises:
        MtpdError: the file is not seen here, as where the nodes share no file system.
    """
    if not from_main(whole or file.is_file):
        if together or is_main():
            made = make()
            if is_main():
                write(made)
        barrier()
    wait_for(file)


def wait_for(path: Path) -> None:
    """Waits until a file that the main rank has written is seen here.

    Raises:
        MtpdError: it is not, as where the nodes share no file system.
    """
    until = time.monotonic() + SEEN
    while not path.exists():
        if time.monotonic() > until:
            raise MtpdError(
                f"{path}: rank {rank()} does not see it, which rank 0 has written; the run directory must be on a "
                "file system that all nodes share"
            )
        time.sleep(0.1)


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Within it the processes that a launcher started are ranks of one run, and fail together.

    On an accelerator each rank has a device of its own, which becomes the current one.

    Args:
        device: where the run computes.

    Raises:
        RankFailed: another rank has failed.
    """
    from accelerate.state import AcceleratorState, PartialState  # takes a second to import

    global _control, _speaks
    if _control is not None:
        yield
        return
    alone = not _started()
    if alone:
        # What an earlier command of this process left would not look for a launcher again.
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState(cpu=device.type == "cpu", timeout=STEP)
    _speaks = is_main()
    if count() == 1:
        yield
        return
    _control = dist.new_group(backend="gloo", timeout=WAITING)
    listener = _Listener()
    listener.start()
    talk = logging.getLogger("mtpd")
    level = talk.level
    if not is_main():
        talk.setLevel(logging.ERROR)
    try:
        yield
        barrier()
    except BaseException as error:
        # Where another rank has ended, what fails here is the connection to it.
        others = isinstance(error, Exception) and not isinstance(error, MtpdError) and listener.failed.wait(1.0)
        listener.code = _exit_code(error)
        listener.tell(rank() + count())
        faulthandler.dump_traceback_later(EXIT, exit=True)
        # Word comes back around the ring. Python that shuts down while a thread is in there is aborted (exit code 134).
        listener.failed.wait(GRACE)
        if others:
            time.sleep(LAST)
            raise RankFailed(listener.words()) from error
        if isinstance(error, MtpdError) and not _first_with(str(error)):
            quiet = RankFailed()
            quiet.exit_code = error.exit_code
            raise quiet from error
        raise
    finally:
        talk.setLevel(level)
    listener.tell(DONE)
    listener.join()
    dist.destroy_process_group(listener.group)
    dist.destroy_process_group(_control)
    _control = None
    if alone:
        # DeepSpeed keeps groups of its own, which have to go too where another run follows in these processes.
        deepspeed = sys.modules.get("deepspeed.comm")
        owner = deepspeed if deepspeed is not None and deepspeed.is_initialized() else dist
        owner.destroy_process_group()


class _Listener(threading.Thread):
    """Hears of the rank after this one, and tells the rank before it."""

    def __init__(self) -> None:
        super().__init__(name="ranks", daemon=True)
        self.failed = threading.Event()
        self.cause = DONE
        self.code = RankFailed.exit_code
        """With which the process is ended, if it does not end by itself."""
        self.group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
        self._rank, self._count = rank(), count()
        self._told = False
        self._lock = threading.Lock()

    def run(self) -> None:
        after = (self._rank + 1) % self._count
        said = torch.tensor([DONE])
        try:
            dist.recv(said, src=after, group=self.group)
            self.cause = int(said)
        except RuntimeError:  # the connection is gone, and so is the process at its other end
            self.cause = after
        if self.cause == DONE:
            return
        self.failed.set()
        self.tell(self.cause)
        time.sleep(GRACE)
        if words := self.words():
            print(f"mtpd: error: {words}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(self.code)

    def tell(self, cause: int) -> None:
        """Says to the rank before this one, once, that all went well or which rank failed; then it has been said."""
        with self._lock:
            if self._told:
                return
            self._told = True
            with suppress(RuntimeError):  # it has ended before
                dist.send(torch.tensor([cause]), dst=(self._rank - 1) % self._count, group=self.group)

    def words(self) -> str:
        """Message about a rank that has ended without a word; one rank says it, and the others nothing."""
        if self.cause >= self._count or self._rank != (1 if self.cause == 0 else 0):
            return ""
        return f"rank {self.cause} was ended, or has failed without a word; all ranks end"


def _exit_code(error: BaseException) -> int:
    """With which a command ends after this error."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    code = getattr(error, "code" if isinstance(error, SystemExit) else "exit_code", None)
    return code if isinstance(code, int) else 1


def _first_with(words: str) -> bool:
    """Whether no other rank has failed for the same reason: then this one tells the user."""
    try:
        return dist.distributed_c10d._get_default_store().add(f"mtpd/{words}", 1) == 1
    except RuntimeError:  # the process that counts has ended
        return True


def _started() -> bool:
    return dist.is_available() and dist.is_initialized()


def _all_gather(tensor: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(count())]
    dist.all_gather(parts, tensor, group=_control)
    return parts
