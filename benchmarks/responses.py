"""Responses by the engine's slots, by a vLLM server, and by transformers' `generate_batch`: tokens/s, and equal tokens.

    python benchmarks/responses.py --prompts 24

Greedy, float32, the same prompts as token ids for all. The time of a server is that of all answers from the first
request on, without its start. vLLM gets a virtual environment of its own (`--environment`).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig

from mtpd.data import builtin_models
from mtpd.data.answers.server import Server
from mtpd.data.answers.task import Answered, Answerer, Task
from mtpd.data.generation import answers
from mtpd.data.models import load_model
from mtpd.data.prompts import load_prompts
from mtpd.data.rendering import render
from mtpd.data.responses import end_tokens
from mtpd.decode.choice import Greedy
from mtpd.formats.engines import with_vllm
from mtpd.trunk import Trunk


def measured(
    name: str, answerer: Answerer, tasks: list[Task], own: dict[str, list[int]] | None
) -> dict[str, list[int]]:
    """Answers by one way, and a row of the table."""
    began = time.monotonic()
    found = {task.key: response for task, response in answerer(tasks)}
    seconds = time.monotonic() - began
    tokens = sum(map(len, found.values()))
    equal = "" if own is None else f"{sum(found[key] == own[key] for key in own)} of {len(own)}"
    print(f"| {name} | {tokens} | {seconds:.1f} | {tokens / seconds:.1f} | {equal} |", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--at-a-time", type=int, default=64)
    parser.add_argument("--ways", default="slots,vllm,generate_batch")
    parser.add_argument("--environment", type=Path, help="a virtual environment with vLLM, made if it is missing")
    options = parser.parse_args()
    ways = options.ways.split(",")
    name = str(builtin_models.demo_directory()) if options.model == "demo" else options.model
    model, tokenizer = load_model(name, dtype="float32")
    ends, new = end_tokens(model, tokenizer), options.max_new_tokens
    prompts = load_prompts("builtin", limit=options.prompts)
    tasks = list({task.key: task for task in (Task(each, render(tokenizer, each)) for each in prompts)}.values())
    print(f"{len(tasks)} prompts, {new} tokens at most, {torch.get_num_threads()} threads, {model.dtype}\n")
    print("| way | tokens | seconds | tokens/s | prompts with the slots' tokens |\n|---|---|---|---|---|")

    def by_slots(asked: Sequence[Task]) -> Iterator[Answered]:
        return answers(Trunk(model), asked, Greedy(), max_new_tokens=new, ends=ends, slots=options.at_a_time, seed=0)

    own = measured("slots", by_slots, tasks, None)
    if "generate_batch" in ways:
        config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=ends, pad_token_id=ends[0])

        def by_batch(asked: Sequence[Task]) -> Iterator[Answered]:
            by_ids = {tuple(task.ids): task for task in asked}
            found = model.generate_batch([task.ids for task in asked], generation_config=config)
            return iter([(by_ids[tuple(each.prompt_ids)], list(each.generated_tokens)) for each in found.values()])

        measured("transformers' generate_batch", by_batch, tasks, own)
    if "vllm" in ways:
        length = max(len(task.ids) for task in tasks) + new + 16
        with with_vllm.server(with_vllm.environment(options.environment), name, length=length) as url:
            server = Server(
                url,
                tokenizer,
                model=name,
                ends=ends,
                tokens=int(model.config.vocab_size),
                temperature=0.0,
                top_p=1.0,
                max_new_tokens=new,
                at_a_time=options.at_a_time,
            )
            found = measured(f"vLLM {with_vllm.VLLM}", server, tasks, own)
            server.close()
        if sum(found[key] == own[key] for key in own) < 0.9 * len(own):
            sys.exit("vLLM wrote other tokens than the slots")


if __name__ == "__main__":
    main()
