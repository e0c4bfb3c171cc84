"""Responses by the trunk itself, many at a time, into a file that an interrupted run continues.

The file is JSON lines. The first holds the settings that the responses depend on; each other one is a
response: {"id", "prompt_ids", "response_ids"}, appended soon after it ends. Each prompt is sampled with a
seed of its own, so a run that was interrupted and continued gives the responses of one that was not: in
float32 to the token, in 16 bits up to what rounds differently next to other prompts.

Several ranks write files of their own beside it, `responses.rank-0.jsonl` and so on, of the same form. The main rank
takes them into the one file when all are done, or when the next call finds them, with however many ranks. They are
deleted after that file is durable, and ids make a response that is in both places one.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from glob import escape
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mtpd.data.generation import Task, answers, plain_answers
from mtpd.data.packing import Sample
from mtpd.data.prompts import Prompt, render
from mtpd.decode.choice import Choice, Greedy
from mtpd.decode.sampling import Sampling, temperature_and_top_p
from mtpd.errors import MtpdError, UserError
from mtpd.files import fingerprint_json, intact, sealed, write_whole, writing
from mtpd.parallel import ranks
from mtpd.progress import Bar
from mtpd.trunk import Trunk

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 1.0
"""What ends within this time is written to the file together."""


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
    together: bool = False,
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
        together: all ranks call this, and each answers its share of the prompts.

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
    header = json.dumps({"settings": settings}) + "\n"
    shared = together and ranks.count() > 1
    own = _of_rank(path, ranks.rank()) if shared else path
    if not shared or ranks.is_main():
        _collect(path, settings, header, fresh=fresh)
    if shared:
        ranks.barrier()
        ranks.wait_for(path)
    done = _read(path, settings)
    missing = [task for task in tasks if task.prompt.id not in done]
    left = len(missing)
    if shared and missing:
        # Longest first, so that shares are alike.
        missing = ranks.share(sorted(missing, key=lambda task: -len(task.ids)))
        write_whole(own, header)

    ends = end_tokens(model, tokenizer)
    choice: Choice = Greedy() if temperature == 0 else Sampling(temperature_and_top_p(temperature, top_p))
    written, started = 0, time.monotonic()
    share = f"responses (1 of {ranks.count()} shares)" if shared else "responses"
    total, known = (len(missing), 0) if shared else (len(tasks), len(done))
    with Bar(total=total, initial=known, desc=share, unit="prompt", disable=not progress) as bar:
        frozen = Trunk(model)
        if frozen.recurrent and frozen.partitioned:
            raise UserError(
                f"train.deepspeed: stage 3 is not accepted for {frozen.name}, whose responses come from transformers, "
                "which does not keep ranks in step; accepted: null, zero1, zero2"
            )
        if frozen.recurrent:
            # Their states have no slots: one prompt at a time, by transformers.
            warped = (temperature, top_p) if temperature > 0 else None
            found = plain_answers(model, missing, warped, max_new_tokens=max_new_tokens, ends=ends, seed=seed)
        else:
            found = answers(frozen, missing, choice, max_new_tokens=max_new_tokens, ends=ends, slots=batch, seed=seed)
        for together_ended in _gathered(found):
            lines = []
            for task, response in together_ended:
                done[task.prompt.id] = response
                line = {"id": task.prompt.id, "prompt_ids": task.ids, "response_ids": response}
                lines.append(json.dumps(sealed(line)) + "\n")
                written += len(response)
            _append(own, "".join(lines))
            bar.update(len(together_ended))
            bar.set_postfix_str(f"{written / (time.monotonic() - started):.0f} tokens/s")
    if shared and left:
        ranks.barrier()
        if ranks.is_main():
            _collect(path, settings, header)
        ranks.barrier()
        done = _read(path, settings)
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


def _tasks(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], *, max_new_tokens: int, max_length: int
) -> list[Task]:
    tasks: list[Task] = []
    longest = 0
    ids: set[str] = set()
    for prompt in prompts:
        if prompt.id in ids:
            raise UserError(f"data.prompts: two prompts have the id {prompt.id}")
        ids.add(prompt.id)
        tokens = render(tokenizer, prompt)
        longest = max(longest, len(tokens))
        if tokens and len(tokens) + max_new_tokens <= max_length:
            tasks.append(Task(prompt, tokens))
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


def _gathered(answers: Iterator[tuple[Task, list[int]]]) -> Iterator[list[tuple[Task, list[int]]]]:
    """Groups responses that end within FLUSH_SECONDS."""
    together: list[tuple[Task, list[int]]] = []
    last = time.monotonic()
    for answer in answers:
        together.append(answer)
        if time.monotonic() - last >= FLUSH_SECONDS:
            yield together
            together, last = [], time.monotonic()
    if together:
        yield together


def _append(path: Path, lines: str) -> None:
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())


def _of_rank(path: Path, rank: int | str) -> Path:
    """The file of one rank; "*" for a pattern of all."""
    return path.with_name(f"{path.stem}.rank-{rank}{path.suffix}")


def _collect(path: Path, settings: dict[str, Any], header: str, *, fresh: bool = False) -> None:
    """Takes what ranks have written into the one file, which is there afterwards.

    Raises:
        UserError: as `_read`, of any of the files.
    """
    parts = sorted(path.parent.glob(_of_rank(Path(escape(path.name)), "*").name))
    found = [] if fresh else [_lines(part, settings) for part in (path, *parts)]
    # A file without lines may lack the one with the settings as well.
    if fresh or any(found[1:]) or not found[0]:
        lines = {id: line for part in found for id, line in part.items()}
        write_whole(path, header + "".join(json.dumps(line) + "\n" for line in lines.values()))
    for part in parts:
        part.unlink()


def _read(path: Path, settings: dict[str, Any]) -> dict[str, list[int]]:
    """Response tokens by prompt id. Lines that a kill tore, or that are damaged, are dropped from the file.

    Raises:
        UserError: the file is none of ours, or its settings are other ones.
    """
    return {id: line["response_ids"] for id, line in _lines(path, settings).items()}


def _lines(path: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The lines of a file by prompt id, without what a kill tore, or what is damaged."""
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
    done: dict[str, dict[str, Any]] = {}
    kept = [first]
    for number, line in enumerate(lines, start=2):
        response = _response(line)
        if response is None:
            logger.warning("%s:%d: damaged; that prompt is answered again", path, number)
        elif response["id"] not in done:
            done[response["id"]] = response
            kept.append(line)
    if len(kept) <= len(lines) or len(whole) < len(content):
        write_whole(path, b"".join(line + b"\n" for line in kept))
    return done


def _response(line: bytes) -> dict[str, Any] | None:
    """A line with its prompt id and tokens, or None if it is damaged."""
    try:
        found: dict[str, Any] = json.loads(line)
        return found if intact(found) and isinstance(found["id"], str) and found["response_ids"] is not None else None
    except (ValueError, KeyError, TypeError):
        return None


def _brief(value: Any) -> str:
    return str(value)[:12]
