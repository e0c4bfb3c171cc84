"""Prompts answered by a model, many at a time, as they end."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from mtpd.data.prompts import Prompt
from mtpd.decode.choice import Choice
from mtpd.decode.engine import Engine
from mtpd.decode.plain import plain_texts
from mtpd.decode.text import Request
from mtpd.files import fingerprint
from mtpd.parallel import ranks
from mtpd.trunk import Trunk


class InStep:
    """Lets the ranks run a partitioned trunk equally often, whatever each has to answer: called before each pass."""

    def __init__(self, trunk: Trunk) -> None:
        self.trunk = trunk

    def __call__(self) -> None:
        ranks.any_rank(True)

    def rest(self) -> None:
        """Passes over a token, as long as another rank has one to make."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.trunk.device)
        while ranks.any_rank(False):
            self.trunk.hidden(token, position_ids=token)


@dataclass(frozen=True)
class Task:
    """A prompt that is to be answered, with its tokens."""

    prompt: Prompt
    ids: list[int]


def answers(
    trunk: Trunk,
    tasks: Sequence[Task],
    choice: Choice,
    *,
    max_new_tokens: int,
    ends: Sequence[int],
    slots: int,
    seed: int,
) -> Iterator[tuple[Task, list[int]]]:
    """Each task with its response, as they end.

    On a CPU each core decodes a share of the prompts on its own, which is faster than all cores at one matrix.
    Which share a prompt is in follows from the whole list. Ranks that share a partitioned trunk keep step.
    """
    # Longest first: what does not fit into memory fails at once, and prompts that are read together are alike.
    order = sorted(tasks, key=lambda task: -len(task.ids))
    threads = torch.get_num_threads()
    workers = max(1, min(threads if trunk.device.type == "cpu" else 1, len(order), slots))
    step = InStep(trunk) if trunk.partitioned else None
    if step is not None:
        workers = 1
    results: queue.SimpleQueue[tuple[Task, list[int]] | None] = queue.SimpleQueue()
    stop = threading.Event()

    def work(share: Sequence[Task]) -> None:
        try:
            for group in _of_like_length(share, max_new_tokens):
                requests = [Request(task.ids, max_new_tokens, _seed(seed, task.prompt.id)) for task in group]
                engine = Engine(
                    trunk,
                    slots=min(-(-slots // workers), len(group)),
                    capacity=len(group[0].ids) + max_new_tokens,
                    choice=choice,
                    end_tokens=ends,
                    on_tokens=lambda text, new: stop.is_set(),
                    before_pass=step,
                )
                for text in engine.run(requests):
                    if stop.is_set():
                        return
                    results.put((group[text.number], text.tokens))
            if step is not None:
                step.rest()
        finally:
            results.put(None)

    torch.set_num_threads(threads // workers)
    try:
        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(work, order[number::workers]) for number in range(workers)]
            try:
                left = workers
                while left:
                    result = results.get()
                    if result is None:
                        left -= 1
                    else:
                        yield result
            finally:
                stop.set()
            for future in futures:
                future.result()
    finally:
        torch.set_num_threads(threads)


def plain_answers(
    model: PreTrainedModel,
    tasks: Sequence[Task],
    warped: tuple[float, float] | None,
    *,
    max_new_tokens: int,
    ends: Sequence[int],
    seed: int,
) -> Iterator[tuple[Task, list[int]]]:
    """Each task with the response of transformers' `generate`.

    Args:
        warped: temperature and top-p; None is greedy.
    """
    for task in tasks:
        ids = torch.tensor([task.ids], device=model.device)
        with torch.random.fork_rng():
            torch.manual_seed(_seed(seed, task.prompt.id) % 2**63)
            output = plain_texts(model, ids, max_new_tokens=max_new_tokens, ends=ends, warped=warped)
        yield task, output[0, ids.shape[1] :].tolist()


def _of_like_length(tasks: Sequence[Task], max_new_tokens: int) -> Iterator[Sequence[Task]]:
    """Parts of a list that goes from long to short, so that short prompts do not take the room of long ones."""
    start = 0
    for place, task in enumerate(tasks):
        if 4 * (len(task.ids) + max_new_tokens) < len(tasks[start].ids) + max_new_tokens:
            yield tasks[start:place]
            start = place
    if start < len(tasks):
        yield tasks[start:]


def _seed(seed: int, prompt: str) -> int:
    """A seed for each prompt that neighbouring seeds do not share."""
    return int(fingerprint(f"{seed}:{prompt}")[:15], 16)
