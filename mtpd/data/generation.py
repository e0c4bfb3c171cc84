"""Prompts answered by a model, many at a time, as they end."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import psutil  # type: ignore[import-untyped]
import torch
from transformers import PreTrainedModel

from mtpd.data.answers.task import Answered, Task
from mtpd.decode.choice import Choice
from mtpd.decode.engine import Engine
from mtpd.decode.plain import plain_texts
from mtpd.decode.text import Request
from mtpd.errors import is_out_of_memory
from mtpd.files import fingerprint
from mtpd.parallel import ranks
from mtpd.trunk import Trunk

FREE_SHARE = 0.8
"""Share of the free memory that keys and values of texts may take; passes need some of it too."""


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


def answers(
    trunk: Trunk,
    tasks: Sequence[Task],
    choice: Choice,
    *,
    max_new_tokens: int,
    ends: Sequence[int],
    slots: int,
    seed: int,
) -> Iterator[Answered]:
    """Each task with its response, as they end.

    On a CPU each core decodes a share of the prompts on its own, which is faster than all cores at one matrix.
    Which share a prompt is in follows from the whole list. Ranks that share a partitioned trunk keep step.

    Args:
        slots: texts at a time at most; where free memory holds fewer, those.
    """
    # Longest first: what does not fit into memory fails at once, and prompts that are read together are alike.
    order = sorted(tasks, key=lambda task: -len(task.ids))
    threads = torch.get_num_threads()
    workers = max(1, min(threads if trunk.device.type == "cpu" else 1, len(order), slots))
    step = InStep(trunk) if trunk.partitioned else None
    if step is not None:
        workers = 1
    results: queue.SimpleQueue[Answered | None] = queue.SimpleQueue()
    stop = threading.Event()
    most = -(-slots // workers)
    room = int(FREE_SHARE * free_memory(trunk.device) / workers) // bytes_of_a_token(trunk)

    def decode(group: Sequence[Task], slots: int) -> Iterator[Answered]:
        engine = Engine(
            trunk,
            slots=slots,
            capacity=len(group[0].ids) + max_new_tokens,
            choice=choice,
            end_tokens=ends,
            on_tokens=lambda text, new: stop.is_set(),
            before_pass=step,
        )
        requests = [Request(task.ids, max_new_tokens, _seed(seed, task)) for task in group]
        for text in engine.run(requests):
            yield group[text.number], text.tokens

    def work(share: Sequence[Task]) -> None:
        try:
            if trunk.device.type == "cuda":
                # A new thread computes on the first GPU; operators of libraries go by that, not by their tensors.
                torch.cuda.set_device(trunk.device)
            for group, fitting in groups(share, max_new_tokens, slots=most, room=room):
                left, at_a_time = list(group), fitting
                while left:
                    missing = {task.key for task in left}
                    try:
                        for task, tokens in decode(left, at_a_time):
                            if stop.is_set():
                                return
                            results.put((task, tokens))
                            missing.discard(task.key)
                        break
                    except (MemoryError, RuntimeError) as error:
                        # Ranks in step have to make the same passes.
                        if not is_out_of_memory(error) or at_a_time == 1 or step is not None:
                            raise
                    left, at_a_time = [task for task in left if task.key in missing], at_a_time // 2
                    if trunk.device.type == "cuda":
                        torch.cuda.empty_cache()
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
) -> Iterator[Answered]:
    """Each task with the response of transformers' `generate`.

    Args:
        warped: temperature and top-p; None is greedy.
    """
    for task in tasks:
        ids = torch.tensor([task.ids], device=model.device)
        with torch.random.fork_rng():
            torch.manual_seed(_seed(seed, task) % 2**63)
            output = plain_texts(model, ids, max_new_tokens=max_new_tokens, ends=ends, warped=warped)
        yield task, output[0, ids.shape[1] :].tolist()


def groups(
    tasks: Sequence[Task], max_new_tokens: int, *, slots: int, room: int
) -> Iterator[tuple[Sequence[Task], int]]:
    """Parts of a list that goes from long to short, with how many texts of each are decoded at a time.

    All slots are as long as the longest text, so short prompts would take the room of long ones: fourfold is allowed
    where memory holds all slots, half more where it does not.

    Args:
        room: tokens that memory holds; a part gets one slot at least.
    """
    start = 0
    for place in range(1, len(tasks) + 1):
        longest = len(tasks[start].ids) + max_new_tokens
        factor = 4 if slots * longest <= room else 1.5
        if place == len(tasks) or factor * (len(tasks[place].ids) + max_new_tokens) < longest:
            group = tasks[start:place]
            yield group, max(1, min(slots, len(group), room // longest))
            start = place


def bytes_of_a_token(trunk: Trunk) -> int:
    """Bytes of the keys and values of a token in all layers."""
    config = trunk.config
    heads = int(config.num_attention_heads)
    size = getattr(config, "head_dim", None) or trunk.hidden_size // heads
    kept = int(getattr(config, "num_key_value_heads", None) or heads)
    return 2 * trunk.depth * kept * int(size) * trunk.dtype.itemsize


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device, with those that PyTorch holds without using them."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def _seed(seed: int, task: Task) -> int:
    """A seed for each prompt that neighbouring seeds do not share."""
    return int(fingerprint(f"{seed}:{task.key}")[:15], 16)
