"""Every architecture that the tests run over. A new one joins by its line in `ARCHITECTURES`."""

from __future__ import annotations

import copy
import functools

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from mtpd.heads import Heads, HeadsConfig, build_heads
from mtpd.heads.chain.start import Start, initialise
from mtpd.heads.first_weights import source_layers
from mtpd.trunk import Trunk

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOKENS = 120
"""Rows of the vocabulary that are tokens; the last 8 only pad it."""

WINDOW = 16
LOCAL_AND_GLOBAL = ["sliding_attention", "full_attention", "sliding_attention"]
LONG_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}

ARCHITECTURES: dict[str, PretrainedConfig] = {
    "llama": transformers.LlamaConfig(**SIZES, tie_word_embeddings=False, rope_parameters=LONG_ROPE),
    "qwen2": transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=8),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=WINDOW),
    "smollm3": transformers.SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1]),
    "gemma2": transformers.Gemma2Config(
        **SIZES,
        head_dim=8,
        sliding_window=WINDOW,
        layer_types=LOCAL_AND_GLOBAL,
        tie_word_embeddings=False,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": transformers.Gemma3TextConfig(
        **SIZES,
        head_dim=8,
        sliding_window=WINDOW,
        layer_types=LOCAL_AND_GLOBAL,
        tie_word_embeddings=False,
        final_logit_softcapping=3.0,
    ),
    "phi3": transformers.Phi3Config(**SIZES, sliding_window=WINDOW, rope_parameters=PARTIAL_ROPE),
    "olmo2": transformers.Olmo2Config(**SIZES),
    "granite": transformers.GraniteConfig(
        **SIZES, embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.5, attention_multiplier=0.3
    ),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    ),
}


def tiny_model(name: str, *, seed: int = 0) -> PreTrainedModel:
    """A random model. Its weights are large and its gains uneven, so that texts vary and a wrong norm shows."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(ARCHITECTURES[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25)
            else:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3))
        # Gemma multiplies embeddings: at full size they would drown what attention adds.
        embedding = model.get_input_embeddings()
        embedding.weight /= float(getattr(embedding, "embed_scale", 1.0))
        # Rows that only pad the vocabulary have middling logits: never chosen, but above half of the tokens.
        model.get_output_embeddings().weight[TOKENS:] = 0.0
    model.generation_config = GenerationConfig()
    return model


@functools.cache
def tiny_trunk(name: str) -> Trunk:
    """The frozen model of an architecture, made once. No test may change it."""
    return Trunk(tiny_model(name), tokens=TOKENS)


def new_heads(
    trunk: Trunk,
    start: Start,
    *,
    depth: int = 3,
    vocabulary: Tensor | None = None,
    shared: bool = False,
    fingerprint: str = "",
) -> Heads:
    """Heads as a run makes them, in eval mode."""
    layers = source_layers(start, depth, trunk.depth)
    config = HeadsConfig(
        depth=depth,
        hidden_size=trunk.hidden_size,
        source_layers=layers[:1] if shared else layers,
        shared=shared,
        vocabulary_size=0 if vocabulary is None else len(vocabulary),
        trunk=fingerprint,
    )
    heads = build_heads(trunk, config)
    initialise(heads, trunk, start)
    if vocabulary is not None:
        heads.vocabulary.copy_(vocabulary)
    return heads.eval()


def random_heads(trunk: Trunk, *, depth: int = 3, vocabulary: Tensor | None = None, shared: bool = False) -> Heads:
    """Heads with blocks of every kind that the trunk has, in which all that a head reads has weight."""
    heads = new_heads(trunk, "copy_last_k", depth=depth, vocabulary=vocabulary, shared=shared)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for head in heads.layers:
            weight = head.get_parameter("project.weight")
            weight.normal_(std=0.25, generator=generator)
    return heads


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    """Tokens that are none of the special ones."""
    return torch.randint(3, TOKENS, shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def greedy_text(name: str, length: int, tokens: int = 30) -> tuple[list[int], list[int]]:
    """A prompt of `length` tokens, and what `generate` of transformers writes after it, end tokens or not."""
    prompt = random_tokens(length, seed=length)
    return prompt.tolist(), plain_text(tiny_trunk(name), prompt, GenerationConfig(max_new_tokens=tokens))


def plain_text(trunk: Trunk, prompt: Tensor, config: GenerationConfig) -> list[int]:
    """The new tokens of transformers' greedy `generate`."""
    config.do_sample, config.pad_token_id = False, 0
    mask = torch.ones_like(prompt)[None]
    output = trunk.model.generate(prompt[None], attention_mask=mask, generation_config=config)
    return output[0, len(prompt) :].tolist()
