"""Several ranks: what they say to each other, and that none waits for one that has ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import free_port, in_ranks

from mtpd.errors import UserError
from mtpd.parallel import ranks

CPU = torch.device("cpu")


def talk(folder: Path) -> dict[str, Any]:
    with ranks.joined(CPU), ranks.joined(CPU):
        seen: dict[str, Any] = {"rank": ranks.rank(), "count": ranks.count(), "main": ranks.is_main()}
        seen["gathered"] = ranks.gather({"words": "é" * (3 + 5 * ranks.rank())})
        seen["from main"] = ranks.from_main(lambda: os.getpid())
        seen["share"] = ranks.share(range(5))
        seen["made"] = []
        for name, together in (("alone", False), ("together", True), ("alone", True)):
            ranks.once(
                folder / name,
                lambda name=name: seen["made"].append(name) or time.sleep(0.2) or str(ranks.rank()),
                (folder / name).write_text,
                together=together,
            )
        seen["read"] = [(folder / name).read_text() for name in ("alone", "together")]
        ranks.once(folder / "alone", lambda: "anew", (folder / "alone").write_text, whole=lambda: False)
        seen["read"].append((folder / "alone").read_text())
    seen["after"] = ranks.count()
    return seen


def test_ranks_know_each_other(tmp_path: Path) -> None:
    """Fault: values that come from the wrong rank or are cut, items that two ranks have, a file made twice."""
    ended = in_ranks(talk, tmp_path)
    assert ended.codes == [0, 0], ended.errors
    first, second = ended.values
    assert (first["rank"], second["rank"]) == (0, 1)
    assert (first["main"], second["main"]) == (True, False)
    assert first["gathered"] == second["gathered"] == [{"words": "é" * 3}, {"words": "é" * 8}]
    assert first["from main"] == second["from main"]
    assert (first["share"], second["share"]) == ([0, 2, 4], [1, 3])
    assert (first["made"], second["made"]) == (["alone", "together"], ["together"])
    assert first["read"] == second["read"] == ["0", "0", "anew"]
    assert (first["count"], first["after"]) == (2, 1)


def test_a_process_alone_is_the_main_rank(tmp_path: Path) -> None:
    """Fault: a run without a launcher that waits for others."""
    with ranks.joined(CPU):
        assert (ranks.rank(), ranks.count(), ranks.is_main()) == (0, 1, True)
        assert ranks.gather(3) == [3]
        assert ranks.share([1, 2]) == [1, 2]
        ranks.barrier()


def one_fails(how: str, failing: int) -> None:
    with ranks.joined(CPU):
        if ranks.rank() == failing:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise UserError("data: wrong")
        if ranks.rank() == (failing + 1) % 3:
            time.sleep(60)  # as in a long computation
        ranks.barrier()


def test_none_waits_for_a_rank_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a rank dies or raises, and the others wait for it until a timeout of hours."""
    monkeypatch.setattr(ranks, "GRACE", 1.0)
    for how, failing in (("killed", 2), ("raised", 1)):
        began = time.monotonic()
        ended = in_ranks(one_fails, how, failing, count=3, seconds=40)
        assert time.monotonic() - began < 30, ended
        assert None not in ended.codes
        assert 0 not in ended.codes
        # Of a rank that ends without a word one other tells.
        told = [f"rank {failing} was ended" in words for words in ended.errors]
        assert told == [how == "killed", False, False], ended.errors
        assert [rank for rank in range(3) if "data: wrong" in ended.errors[rank]] == ([1] if how == "raised" else [])


REFUSED = """
import sys, torch
from mtpd.errors import MtpdError, UserError
from mtpd.parallel import ranks

try:
    with ranks.joined(torch.device("cpu")):
        ranks.barrier()
        if ranks.rank() == 1:
            sum(range(10_000_000))  # no other thread of this process runs meanwhile, as on a busy machine
        raise UserError("data: wrong")
except MtpdError as error:
    sys.exit(error.exit_code)
"""


def test_a_refused_rank_ends_with_its_own_code() -> None:
    """Fault: Python shuts down while the listener receives, which aborts the process: exit code 134 in place of 2."""
    settings = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", REFUSED],
            env=settings | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=60)[1].decode() for process in started]
    assert [process.returncode for process in started] == [2, 2], errors
