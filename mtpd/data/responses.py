"""Responses by the trunk itself, in batches, into a file that an interrupted run continues.

The file is JSON lines. The first holds the settings that the responses depend on; each other one is a
response: {"id", "prompt_ids", "response_ids"}, appended and synced batch by batch. Which prompts
share a batch follows from the whole list, and each batch is sampled with a seed of its own, so a run
that was interrupted and continued gives the responses of one that was not.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, StaticCache

from mtpd.data.packing import Sample
from mtpd.data.prompts import Prompt, render
from mtpd.errors import MtpdError, UserError
from mtpd.files import fingerprint, fingerprint_json, write_whole, writing

logger = logging.getLogger(__name__)


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
        batch: prompts generated at a time.
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
        "batch": batch,
        "seed": seed if temperature > 0 else 0,
    }
    done = {} if fresh else _read(path, settings)
    if not done:
        write_whole(path, json.dumps({"settings": settings}) + "\n")

    ends = end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        # None rather than numbers that greedy decoding would warn of.
        temperature=float(temperature) if temperature > 0 else None,
        top_p=float(top_p) if temperature > 0 else None,
        top_k=0 if temperature > 0 else None,
        eos_token_id=ends or None,
        pad_token_id=pad,
        disable_compile=True,
    )
    # Longest first: what does not fit into memory fails at once, and a batch wastes little on padding.
    order = sorted(range(len(tasks)), key=lambda index: (-len(tasks[index].ids), index))
    batches = [order[start : start + batch] for start in range(0, len(order), batch)]
    written, started = 0, time.monotonic()
    bar = tqdm(total=len(tasks), desc="responses", unit="prompt", disable=not progress)
    with bar, plain_generation(model):
        for number, members in enumerate(batches):
            missing = [index for index in members if tasks[index].prompt.id not in done]
            if missing:
                answers = _answer(
                    model, [tasks[index].ids for index in members], config, seed=_batch_seed(seed, number), pad=pad
                )
                responses = {index: _cut(answer, ends) for index, answer in zip(members, answers, strict=True)}
                lines = []
                for index in missing:
                    task = tasks[index]
                    done[task.prompt.id] = responses[index]
                    line = {"id": task.prompt.id, "prompt_ids": task.ids, "response_ids": responses[index]}
                    lines.append(json.dumps(line) + "\n")
                _append(path, "".join(lines))
                written += sum(map(len, responses.values()))
                bar.set_postfix_str(f"{written / (time.monotonic() - started):.0f} tokens/s")
            bar.update(len(members))
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


@torch.inference_mode()
def _answer(
    model: PreTrainedModel, prompts: list[list[int]], config: GenerationConfig, *, seed: int, pad: int
) -> list[list[int]]:
    """New tokens of each prompt, padded behind the end token."""
    width = max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        input_ids[row, width - len(ids) :] = torch.tensor(ids)
        mask[row, width - len(ids) :] = 1
    device = model.device
    with torch.random.fork_rng(devices=[device.index or 0] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        output: Any = model.generate(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            generation_config=config,
            past_key_values=_cache(model, width + config.max_new_tokens),
        )
    return output[:, width:].tolist()


def _cache(model: PreTrainedModel, length: int) -> Cache | None:
    """A cache of fixed size where the architecture takes one: a quarter faster, because nothing is copied to grow.

    It is made here and not by `generate`, which gives later batches the size of the longest one before
    them: rounding would then depend on what ran earlier.
    """
    if not getattr(model, "_can_compile_fullgraph", False):
        return None
    return StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=length)


def _cut(answer: list[int], ends: Sequence[int]) -> list[int]:
    """Up to and with the first end token. Padding comes after it and may be the same token."""
    stop = next((index + 1 for index, token in enumerate(answer) if token in ends), len(answer))
    return answer[:stop]


def _batch_seed(seed: int, number: int) -> int:
    """A seed for each batch that neighbouring seeds do not share."""
    return int(fingerprint(f"{seed}:{number}")[:15], 16)


def _append(path: Path, lines: str) -> None:
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path, settings: dict[str, Any]) -> dict[str, list[int]]:
    """Response tokens by prompt id. A line that a kill tore is dropped from the file.

    Raises:
        UserError: the file is none of ours, or its settings are other ones.
    """
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        head, *lines = [json.loads(line) for line in whole.splitlines()] or [{"settings": settings}]
        found = head["settings"]
        done = {line["id"]: line["response_ids"] for line in lines}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a file of responses; move it away, or choose another output directory") from error
    for key in settings:
        if found.get(key) != settings[key]:
            raise UserError(
                f"{path}: it was made with another {key} ({_brief(found.get(key))}, now {_brief(settings[key])}); "
                "delete it to generate anew, or choose another output directory"
            )
    if len(whole) < len(content):
        write_whole(path, whole)
    return done


def _brief(value: Any) -> str:
    return str(value)[:12]
