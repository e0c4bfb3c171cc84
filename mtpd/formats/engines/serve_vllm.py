"""Runs in vLLM's environment, without mtpd: decodes the prompts of requests and writes what it counted.

One process for all of them: importing vLLM takes longer than starting an engine.
"""

import gc
import json
import sys
from typing import Any


def main() -> None:
    import vllm  # type: ignore[import-not-found]
    from vllm.distributed import cleanup_dist_env_and_memory  # type: ignore[import-not-found]

    with open(sys.argv[1], encoding="utf-8") as file:
        requests = json.load(file)
    answers = []
    for request in requests:
        answers.append({"version": vllm.__version__, **served(vllm, request)})
        cleanup_dist_env_and_memory()
        gc.collect()
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(answers, file)


def served(vllm: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Texts, rounds, and accepted drafts by position, of one engine that ends with the call."""
    model = vllm.LLM(
        model=request["model"],
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=request["length"],
        enforce_eager=True,
        disable_log_stats=False,
        speculative_config=request["speculative"],
        hf_overrides=request["overrides"],
    )
    # Prompts one at a time: rows of a batch could round differently.
    sampling = vllm.SamplingParams(
        temperature=0, max_tokens=request["max_new_tokens"], detokenize=False, ignore_eos=True
    )
    texts = []
    for prompt in request["prompts"]:
        answer = model.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
        texts.append(list(answer[0].outputs[0].token_ids))
    counters = {metric.name: metric for metric in model.get_metrics()}
    return {
        "texts": texts,
        "drafts": counters["vllm:spec_decode_num_drafts"].value,
        "accepted": counters["vllm:spec_decode_num_accepted_tokens_per_pos"].values,
    }


if __name__ == "__main__":
    main()
