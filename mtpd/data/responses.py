"""Responses by the trunk itself, many at a time, into a file that an interrupted run continues.

The file is JSON lines. The first holds the settings that the responses depend on; each other one is a
response: {"id", "prompt_ids", "response_ids"}, appended soon after it ends. Each prompt is sampled with a
seed of its own, so a run that was interrupted and continued gives the responses of one that was not: in
float32 to the token, in 16 bits up to what rounds differently next to other prompts.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from mtpd.data.packing import Sample
from mtpd.data.prompts import Prompt, render
from mtpd.decode.choice import Choice, Greedy
from mtpd.decode.engine import Engine, Request
from mtpd.decode.sampling import Sampling, temperature_and_top_p
from mtpd.errors import MtpdError, UserError
from mtpd.files import fingerprint, fingerprint_json, intact, sealed, write_whole, writing
from mtpd.trunk import Trunk

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 1.0
"""What ends within this time is written to the file together."""


@dataclass(frozen=True)
class _Task:
    """A prompt that is to be answered, with its tokens."""

    prompt: Prompt
    ids: list[int]


def generate_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    path: str | Path,
    *,
    trunk: str,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_new_tokens: int = 160,
    batch: int = 64,
    seed: int = 0,
    max_length: int,
    fresh: bool = False,
    progress: bool = True,
) -> list[Sample]:
    """Answers prompts with the model, or reads the answers that `path` already holds.

    Sampling is from the model's own distribution at this temperature and top-p: penalties and cuts that
    a checkpoint's generation settings ask for are left out. A response ends with the end token if the
    model wrote one. Prompts with more than `max_length - max_new_tokens` tokens are left out with a warning.

    Args:
        path: the JSONL file of responses; it is continued if its settings are the same.
        trunk: fingerprint of the model.
        temperature: 0 is greedy.
        batch: prompts decoded at a time.
        max_length: the model's context in tokens.
        fresh: starts anew whatever `path` holds.

    Returns:
        Samples in the order of the prompts.

    Raises:
        UserError: `path` was made with other settings, prompts share an id, or all are too long.
        MtpdError: the model ended every response at once, or the disk is full.
    """
    path = Path(path)
    tasks = _tasks(tokenizer, prompts, max_new_tokens=max_new_tokens, max_length=max_length)
    settings: dict[str, Any] = {
        "trunk": trunk,
        "prompts": fingerprint_json([[task.prompt.id, task.ids] for task in tasks]),
        "temperature": float(temperature),
        "top_p": float(top_p) if temperature > 0 else 1.0,
        "max_new_tokens": max_new_tokens,
        "seed": seed if temperature > 0 else 0,
    }
    done = {} if fresh else _read(path, settings)
    if not done:
        write_whole(path, json.dumps({"settings": settings}) + "\n")

    ends = end_tokens(model, tokenizer)
    missing = [task for task in tasks if task.prompt.id not in done]
    choice: Choice = Greedy() if temperature == 0 else Sampling(temperature_and_top_p(temperature, top_p))
    written, started = 0, time.monotonic()
    with tqdm(total=len(tasks), initial=len(done), desc="responses", unit="prompt", disable=not progress) as bar:
        frozen = Trunk(model)
        if frozen.recurrent:
            # Their states have no slots: one prompt at a time, by transformers.
            warped = (temperature, top_p) if temperature > 0 else None
            answers = _plain_answers(model, missing, warped, max_new_tokens=max_new_tokens, ends=ends, seed=seed)
        else:
            answers = _answers(
                frozen, missing, choice, max_new_tokens=max_new_tokens, ends=ends, slots=batch, seed=seed
            )
        for together in _gathered(answers):
            lines = []
            for task, response in together:
                done[task.prompt.id] = response
                line = {"id": task.prompt.id, "prompt_ids": task.ids, "response_ids": response}
                lines.append(json.dumps(sealed(line)) + "\n")
                written += len(response)
            _append(path, "".join(lines))
            bar.update(len(together))
            bar.set_postfix_str(f"{written / (time.monotonic() - started):.0f} tokens/s")
    samples = [Sample.of(task.prompt.id, task.ids, done[task.prompt.id], task.prompt.family) for task in tasks]
    if all(not set(sample.response_ids) - set(ends) for sample in samples):
        raise MtpdError(f"{path}: every response is empty: the model ends each answer at once; check its chat template")
    return samples


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a text: those of the checkpoint's generation settings and the tokenizer's."""
    settings: Any = getattr(model, "generation_config", None)
    named = getattr(settings, "eos_token_id", None)
    ids = [] if named is None else [named] if isinstance(named, int) else list(named)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids.append(tokenizer.eos_token_id)
    return ids


@contextmanager
def plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Within it `model.generate` knows no settings but those that it is given.

    Checkpoints bring settings like a repetition penalty; transformers fills them in wherever a call
    leaves them open, and what comes out is then not the model's own distribution.
    """
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


def _tasks(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], *, max_new_tokens: int, max_length: int
) -> list[_Task]:
    tasks: list[_Task] = []
    longest = 0
    ids: set[str] = set()
    for prompt in prompts:
        if prompt.id in ids:
            raise UserError(f"data.prompts: two prompts have the id {prompt.id}")
        ids.add(prompt.id)
        tokens = render(tokenizer, prompt)
        longest = max(longest, len(tokens))
        if tokens and len(tokens) + max_new_tokens <= max_length:
            tasks.append(_Task(prompt, tokens))
    too_long = len(prompts) - len(tasks)
    if not prompts:
        raise UserError("data.prompts: there are no prompts to answer")
    if too_long:
        reason = (
            f"{too_long} of {len(prompts)} prompts are longer than the context: up to {longest} tokens and "
            f"data.max_new_tokens={max_new_tokens} do not fit into {max_length}"
        )
        if not tasks:
            raise UserError(f"data.prompts: {reason}")
        logger.warning("%s; they are left out", reason)
    return tasks


def _answers(
    trunk: Trunk,
    tasks: Sequence[_Task],
    choice: Choice,
    *,
    max_new_tokens: int,
    ends: Sequence[int],
    slots: int,
    seed: int,
) -> Iterator[tuple[_Task, list[int]]]:
    """Each task with its response, as they end.

    On a CPU each core decodes a share of the prompts on its own, which is faster than all cores at one matrix.
    Which share a prompt is in follows from the whole list.
    """
    # Longest first: what does not fit into memory fails at once, and prompts that are read together are alike.
    order = sorted(tasks, key=lambda task: -len(task.ids))
    threads = torch.get_num_threads()
    workers = max(1, min(threads if trunk.device.type == "cpu" else 1, len(order), slots))
    results: queue.SimpleQueue[tuple[_Task, list[int]] | None] = queue.SimpleQueue()
    stop = threading.Event()

    def work(share: Sequence[_Task]) -> None:
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
                )
                for text in engine.run(requests):
                    if stop.is_set():
                        return
                    results.put((group[text.number], text.tokens))
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


def _plain_answers(
    model: PreTrainedModel,
    tasks: Sequence[_Task],
    warped: tuple[float, float] | None,
    *,
    max_new_tokens: int,
    ends: Sequence[int],
    seed: int,
) -> Iterator[tuple[_Task, list[int]]]:
    """Each task with the response of transformers' `generate`.

    Args:
        warped: temperature and top-p; None is greedy.
    """
    stops = list(ends)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=warped is not None,
        temperature=warped[0] if warped else 1.0,
        top_p=warped[1] if warped else 1.0,
        top_k=0,
        eos_token_id=stops or None,
        pad_token_id=stops[0] if stops else 0,
    )
    for task in tasks:
        ids = torch.tensor([task.ids], device=model.device)
        with plain_generation(model), torch.inference_mode(), torch.random.fork_rng():
            torch.manual_seed(_seed(seed, task.prompt.id) % 2**63)
            output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        yield task, output[0, ids.shape[1] :].tolist()


def _of_like_length(tasks: Sequence[_Task], max_new_tokens: int) -> Iterator[Sequence[_Task]]:
    """Parts of a list that goes from long to short, so that short prompts do not take the room of long ones."""
    start = 0
    for place, task in enumerate(tasks):
        if 4 * (len(task.ids) + max_new_tokens) < len(tasks[start].ids) + max_new_tokens:
            yield tasks[start:place]
            start = place
    if start < len(tasks):
        yield tasks[start:]


def _gathered(answers: Iterator[tuple[_Task, list[int]]]) -> Iterator[list[tuple[_Task, list[int]]]]:
    """What ends within FLUSH_SECONDS, together."""
    together: list[tuple[_Task, list[int]]] = []
    last = time.monotonic()
    for answer in answers:
        together.append(answer)
        if time.monotonic() - last >= FLUSH_SECONDS:
            yield together
            together, last = [], time.monotonic()
    if together:
        yield together


def _seed(seed: int, prompt: str) -> int:
    """A seed for each prompt that neighbouring seeds do not share."""
    return int(fingerprint(f"{seed}:{prompt}")[:15], 16)


def _append(path: Path, lines: str) -> None:
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path, settings: dict[str, Any]) -> dict[str, list[int]]:
    """Response tokens by prompt id. Lines that a kill tore, or that are damaged, are dropped from the file.

    Raises:
        UserError: the file is none of ours, or its settings are other ones.
    """
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    first, *lines = whole.split(b"\n")[:-1] or [json.dumps({"settings": settings}).encode()]
    try:
        head = json.loads(first)
        found = dict(head["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a file of responses; move it away, or choose another output directory") from error
    for key in settings:
        if found.get(key) != settings[key]:
            raise UserError(
                f"{path}: it was made with another {key} ({_brief(found.get(key))}, now {_brief(settings[key])}); "
                "delete it to generate anew, or choose another output directory"
            )
    done: dict[str, list[int]] = {}
    kept = [first]
    for number, line in enumerate(lines, start=2):
        response = _response(line)
        if response is None:
            logger.warning("%s:%d: damaged; that prompt is answered again", path, number)
        elif response[0] not in done:
            done[response[0]] = response[1]
            kept.append(line)
    if len(kept) <= len(lines) or len(whole) < len(content):
        write_whole(path, b"".join(line + b"\n" for line in kept))
    return done


def _response(line: bytes) -> tuple[str, list[int]] | None:
    """Prompt id and tokens of a line, or None if it is damaged."""
    try:
        found = json.loads(line)
        return (str(found["id"]), found["response_ids"]) if intact(found) else None
    except (ValueError, KeyError, TypeError):
        return None


def _brief(value: Any) -> str:
    return str(value)[:12]
