"""Seconds of a pass by the tokens in it, and of a head: measured on the machine, since they decide which drafts pay."""

from __future__ import annotations

import functools
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch

from mtpd.decode.engine import Engine
from mtpd.decode.graphs import FIRST
from mtpd.decode.planner import BEAM, MOST, Costs
from mtpd.errors import MtpdError, UserError
from mtpd.files import CACHE, fingerprint_json, read_sealed, sealed, short, write_whole
from mtpd.heads import Heads
from mtpd.slots import Span
from mtpd.trunk import Trunk

SIZES = (1, 2, 4, 8, 16, 1 + MOST, 4 * (1 + MOST))
"""Tokens of the passes that are timed."""
CONTEXT = 128
"""Tokens before them."""
ROWS = 8
"""Texts with which the heads are timed, beside one alone."""
REPEATS = 5


def machine_costs(trunk: Trunk, heads: Heads | None, *, anew: bool = False) -> Costs:
    """The costs on this machine: those in the cache for these shapes, this number format and device, or measured now.

    Args:
        anew: measures even where the cache has them.
    """
    cuda = trunk.device.type == "cuda"
    of_heads = None if heads is None else heads.config.model_dump(mode="json", exclude={"trunk"})
    key = [
        trunk.model.config.to_json_string(use_diff=False),
        of_heads,
        str(trunk.dtype),
        torch.cuda.get_device_name(trunk.device) if cuda else torch.backends.cpu.get_cpu_capability(),
        "graphs" if cuda else torch.get_num_threads(),
        torch.__version__,
        platform.node(),
    ]
    file = CACHE / "costs" / f"{short(fingerprint_json(key))}.json"
    if not anew and file.is_file():
        try:
            found = read_sealed(file, refusal="not a measurement of costs")
            passes = {int(size): float(seconds) for size, seconds in found["passes"].items()}
            return Costs(passes, float(found["head"]), float(found["further_row"]))
        except (UserError, KeyError, TypeError, ValueError, AttributeError):
            # A damaged file is measured over.
            pass
    costs = measure_costs(trunk, heads)
    # Keys as JSON has them: the seal is that of what is read back.
    content = {
        "passes": {str(size): seconds for size, seconds in costs.passes.items()},
        "head": costs.head,
        "further_row": costs.further_row,
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(sealed(content)) + "\n")
    except (MtpdError, OSError):
        # Where nothing can be kept, the next process measures again.
        pass
    return costs


@torch.inference_mode()
def measure_costs(trunk: Trunk, heads: Heads | None) -> Costs:
    """Times passes of the trunk with its main head, and of the heads, behind a short text. Takes seconds."""
    capacity = CONTEXT + max(SIZES)
    engine = Engine(trunk, heads, slots=ROWS, capacity=capacity)
    tokens = torch.arange(capacity, device=trunk.device)[None] % (trunk.tokens or trunk.unembedding.weight.shape[0])
    engine.tokens[:, :capacity] = tokens
    start = Span([0] * ROWS, CONTEXT, trunk.device)
    engine.cache.begin(start)
    hidden = engine._read_by_heads(engine._pass(tokens[:, :CONTEXT].expand(ROWS, -1), start.positions, mask=None))
    # Graphs are there after the first calls.
    calls = 1 if engine.graphs is None else 1 + FIRST

    def one_pass(size: int) -> None:
        states = engine.verify(engine.places([CONTEXT], beyond=max(SIZES)), size, None)[0]
        engine.unembedding(states).argmax(-1).tolist()

    passes = {size: _seconds(functools.partial(one_pass, size), calls) for size in SIZES}
    # Rounding of clocks and other work on the machine must not make a wider pass look cheaper.
    for small, large in itertools.pairwise(SIZES):
        passes[large] = max(passes[large], passes[small])
    if engine.drafter is None or heads is None:
        return Costs(passes, head=0.0)
    drafter = engine.drafter
    drafter.begin(start, hidden, engine.tokens, [CONTEXT + 1] * ROWS)
    depth = heads.depth

    def draft(rows: int) -> None:
        newest = engine.places([CONTEXT] * rows, beyond=max(SIZES))
        drafter.draft_tree(engine.tokens, newest, depth, BEAM, lambda *_: True)

    one, many = (_seconds(functools.partial(draft, rows), calls) / depth for rows in (1, ROWS))
    return Costs(passes, head=one, further_row=max(0.0, many - one) / (ROWS - 1))


def _seconds(call: Callable[[], object], before: int) -> float:
    """Seconds of a call, after so many that are not timed."""
    for _ in range(before):
        call()
    taken = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)
