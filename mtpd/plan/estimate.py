"""How much text a recipe means, and what memory and disk it takes. Estimates, from sizes alone.

Where prompts are at hand (built in, or in a file) they are counted; the responses are yet to be written,
so each is taken to be as long as it may get. Nothing is downloaded for an estimate.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from mtpd.data.models import resolve_device
from mtpd.data.prompts import Prompt
from mtpd.data.rendering import render_all
from mtpd.data.rows.left_out import LeftOut
from mtpd.data.sources import at_hand
from mtpd.losses.fused import block_size
from mtpd.recipe import Recipe, checkpoints_kept
from mtpd.run.material import load_given, split_prompts, with_room
from mtpd.train.arguments import loss_settings

CHARACTERS_PER_TOKEN = 4
TEMPLATE_TOKENS = 20
ASSUMED_PROMPT = 200
"""Tokens of a prompt that cannot be counted."""
COUNTED = 1000
"""Prompts that are tokenised and packed; the others are taken to be like them."""
BYTES_OF_A_TOKEN_ID = 7
"""In responses.jsonl: digits, comma, space."""


@dataclass(frozen=True)
class TextEstimate:
    """Amounts of text; None where a data set has to be loaded to know."""

    prompts: int | None
    """Prompts that the trunk answers (or that bring their responses)."""
    given: int | None
    """Further texts with their own responses."""
    held_out: int | None
    tokens: int | None
    """Of all documents, prompts included, with responses of the greatest length."""
    rows: int | None
    steps: int | None
    """Optimizer steps."""
    saves: int | None
    """Checkpoints written."""
    notes: tuple[str, ...] = field(default=())
    """What was assumed."""


def estimate_text(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None, *, context: int, processes: int = 1
) -> TextEstimate:
    """Counts what is at hand, and takes `limit` for the rest.

    Args:
        context: tokens of the model's context.
        processes: that have rows of their own.

    Raises:
        UserError: a file that is missing or unreadable, prompts that the tokenizer's template refuses.
    """
    data = recipe.data
    notes: list[str] = []
    lengths: list[int] = []
    prompts, held_out = data.limit, None
    if at_hand(data.prompts) and at_hand(data.held_out or "builtin"):
        left_out = LeftOut(data.max_unusable)
        split = split_prompts(recipe, left_out)
        prompts, held_out = len(split.train), len(split.held_out)
        lengths = _prompt_lengths(recipe, split.train, tokenizer, left_out, notes, context=context)
        if left_out.total:
            notes.append(f"rows that cannot be used, left out: {left_out.words()}")
    else:
        notes.append("data sets of the hub are not loaded for a plan: data.limit stands for their size")
        if prompts is not None and data.held_out is None:
            held_out = data.held_out_count
            prompts = max(0, prompts - held_out)
    if prompts is not None and not lengths:
        notes.append(f"prompts are taken to have {ASSUMED_PROMPT} tokens")
        lengths = [ASSUMED_PROMPT] * min(prompts, COUNTED)
    documents = [min(data.row_length, length + data.max_new_tokens) for length in lengths]
    if data.responses == "given":
        notes.append(f"given responses are taken to have {data.max_new_tokens} tokens")

    counts = [len(load_given(recipe, text)) if at_hand(text.prompts) else text.limit for text in data.given]
    given = None if None in counts else sum(count or 0 for count in counts)
    if given:
        notes.append(f"given texts are taken to fill a row ({data.row_length} tokens) each")
    if prompts is None or given is None:
        notes.append("set data.limit (or limit of a given text) to see tokens, rows and steps")
        return TextEstimate(prompts, given, held_out, None, None, _steps(recipe, None, processes), None, tuple(notes))

    scale = prompts / max(1, len(documents))
    rows = math.ceil(_packed(documents, data.row_length) * scale) + given
    tokens = round(sum(documents) * scale) + given * data.row_length
    steps = _steps(recipe, rows, processes)
    assert steps is not None
    # Each measurement while training writes a checkpoint too.
    if save_steps := recipe.train.save_steps or recipe.evaluation.steps:
        saves = steps // save_steps + 1
    else:
        saves = math.ceil(steps / _steps_of_an_epoch(recipe, rows, processes))
    return TextEstimate(prompts, given, held_out, tokens, rows, steps, saves, tuple(notes))


def _prompt_lengths(
    recipe: Recipe,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase | None,
    left_out: LeftOut,
    notes: list[str],
    *,
    context: int,
) -> list[int]:
    chosen = prompts[:: math.ceil(len(prompts) / COUNTED)]
    if tokenizer is not None:
        refused = LeftOut(left_out.most)
        if recipe.data.responses == "given":
            kept = render_all(tokenizer, chosen, refused)
        else:
            kept = with_room(tokenizer, chosen, refused, context=context, max_new_tokens=recipe.data.max_new_tokens)
        refused.check(len(chosen), source="data.prompts")
        left_out.take(refused)
        return [len(ids) for _, ids in kept]
    notes.append(f"there is no tokenizer: {CHARACTERS_PER_TOKEN} characters of a prompt are taken for a token")
    return [TEMPLATE_TOKENS + len(prompt.text) // CHARACTERS_PER_TOKEN for prompt in chosen]


def _packed(lengths: Sequence[int], row_length: int) -> int:
    """Rows that documents fill, packed best fit and longest first."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        place = bisect_left(free, length)
        left = free.pop(place) if place < len(free) else row_length
        insort(free, left - length)
    return len(free)


def _steps_of_an_epoch(recipe: Recipe, rows: int, processes: int) -> int:
    """As transformers counts them: the last micro batch may be smaller, and so may the last step."""
    batches = math.ceil(rows / (recipe.train.micro_batch_rows * processes))
    return max(1, math.ceil(batches / recipe.train.gradient_accumulation))


def _steps(recipe: Recipe, rows: int | None, processes: int) -> int | None:
    if recipe.train.max_steps > 0:
        return recipe.train.max_steps
    return None if rows is None else math.ceil(recipe.train.epochs * _steps_of_an_epoch(recipe, rows, processes))


@dataclass(frozen=True)
class Sizes:
    """Parameters and shapes that memory and disk follow from."""

    frozen: int
    trained: int
    depth: int
    layers: int
    hidden: int
    columns: int
    """Of the draft vocabulary, or of the whole one."""
    tokens: int
    """Of the whole vocabulary."""
    projected: int
    """Features of queries, keys and values together."""
    cached: int
    """Features of keys and values together."""
    inner: int
    """Features inside of the MLP, of all experts that a token goes to."""
    experts: int
    """Experts that a token goes to; 0 for a dense MLP."""
    item: int
    """Bytes of a number of the trunk."""

    @classmethod
    def of(cls, config: Any, *, frozen: int, trained: int, depth: int, columns: int, tokens: int, item: int) -> Sizes:
        """Reads the shapes from a model's configuration."""
        heads = int(config.num_attention_heads)
        width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        cached = 2 * width * int(getattr(config, "num_key_value_heads", None) or heads)
        experts = int(getattr(config, "num_experts_per_tok", None) or 0)
        inner: Any = getattr(config, "moe_intermediate_size", None) if experts else None
        inner = inner or config.intermediate_size
        inner = max(inner) if isinstance(inner, list | tuple) else int(inner)
        return cls(
            frozen=frozen,
            trained=trained,
            depth=depth,
            layers=int(config.num_hidden_layers),
            hidden=int(config.hidden_size),
            columns=columns,
            tokens=tokens,
            projected=width * heads + cached,
            cached=cached,
            inner=inner * max(1, experts),
            experts=experts,
            item=item,
        )


def estimate_memory(
    recipe: Recipe,
    sizes: Sizes,
    text: TextEstimate,
    *,
    decoding_item: int,
    own_logits: int = 0,
    of_trunk: int = 0,
) -> dict[str, dict[str, int]]:
    """Bytes by phase and purpose. What allocators and libraries add is left out.

    Args:
        decoding_item: bytes of a number while decoding; another one than the trunk's means a second model.
        own_logits: bytes that the loss takes of heads with logits of their own, 0 for the others.
        of_trunk: parameters that `trunk.train` trains.
    """
    data, item = recipe.data, sizes.item
    weights = sizes.frozen * item
    batch_tokens = recipe.train.micro_batch_rows * data.row_length // recipe.train.sequence_parallel
    # What autograd keeps of a head, counted in a llama block: 22 D of norms, projection and residuals.
    elements = 22 * sizes.hidden + 2 * sizes.projected + 4 * sizes.inner + 6 * sizes.hidden * sizes.experts
    # Losses of the teacher's true probabilities read its logits over all tokens.
    tokens = sizes.tokens if loss_settings(recipe).true_probabilities else sizes.columns
    device = resolve_device("auto").type if recipe.device == "auto" else recipe.device.split(":")[0]
    phases = {
        "generating": {
            "trunk": weights,
            "key/value cache": data.generation_batch
            * (ASSUMED_PROMPT + data.max_new_tokens)
            * sizes.layers
            * sizes.cached
            * item,
        },
        "training": {
            **_of_trunk(recipe, sizes, of_trunk),
            "unembedding of the draft vocabulary": sizes.columns * sizes.hidden * item
            if recipe.heads.vocabulary
            else 0,
            "heads, float32": 4 * sizes.trained,
            "gradients": 4 * (sizes.trained + of_trunk),
            "optimizer": 8 * (sizes.trained + of_trunk),
            "heads in the trunk's number format": item * sizes.trained if item < 4 else 0,
            "activations of the heads": batch_tokens * sizes.depth * elements * item,
            "activations of the trunk": batch_tokens * sizes.layers * elements * item if of_trunk else 0,
            "hidden states kept": (hidden_state_bytes(recipe, sizes, text) or 0)
            if data.hidden_states == "memory"
            else 0,
            "hidden states of a batch": batch_tokens * sizes.hidden * item,
            "loss": own_logits or block_size(sizes.columns, tokens, item, device=device)[1],
        },
    }
    if data.responses == "given":
        del phases["generating"]
    if recipe.evaluation.decode_prompts:
        other = sizes.frozen * decoding_item if decoding_item != item else 0
        phases["decoding"] = {
            "trunk": weights,
            "trunk in evaluation.dtype": other,
            "heads, before and after": 2 * sizes.trained * decoding_item,
        }
    return phases


def _of_trunk(recipe: Recipe, sizes: Sizes, trained: int) -> dict[str, int]:
    """Counts the bytes of the trunk's own parameters while heads are trained."""
    weights = sizes.frozen * sizes.item
    if recipe.trunk.train != "full":
        return {"trunk": weights, "adapters of the trunk, float32": 4 * trained}
    return {
        "trunk, float32": 4 * trained,
        "trunk in its number format": weights if sizes.item < 4 else 0,
        "trunk as it was, a second model (trunk.teacher: original)": weights
        if recipe.trunk.teacher == "original"
        else 0,
        "gradient of the main head in the loss": 4 * sizes.tokens * sizes.hidden,
    }


def hidden_state_bytes(recipe: Recipe, sizes: Sizes, text: TextEstimate) -> int | None:
    """Counts the bytes of the hidden states of all rows, kept; None where the amount of text is not known."""
    return None if text.rows is None else text.rows * recipe.data.row_length * sizes.hidden * sizes.item


def estimate_disk(recipe: Recipe, sizes: Sizes, text: TextEstimate, *, of_trunk: int = 0) -> dict[str, int | None]:
    """Bytes of the run directory by file, at most; None where the amount of text is not known."""
    kept = checkpoints_kept(recipe.train) + 1  # One more while it is being written.
    checkpoints = kept if text.saves is None else min(kept, text.saves)
    responses = None if text.tokens is None else BYTES_OF_A_TOKEN_ID * text.tokens
    states: int | None = 0
    if recipe.data.on_disk:
        states = hidden_state_bytes(recipe, sizes, text)
    return {
        "hidden states": states,
        f"checkpoints, {checkpoints} at a time": checkpoints * 12 * (sizes.trained + of_trunk),
        "heads before and after": 8 * sizes.trained,
        "trunk": sizes.frozen * sizes.item if of_trunk else 0,
        "responses": responses,
    }
