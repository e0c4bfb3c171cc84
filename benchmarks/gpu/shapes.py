"""Models with the shapes of real ones and random weights: nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu.outcome import Options
from mtpd.trunk import Trunk


@dataclass(frozen=True)
class Shape:
    """Of a Llama 3, and what is trained beside it."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    depth: int
    """MTP heads."""
    rows: int
    row_length: int
    vocabulary: int = 128_256

    @property
    def bytes_of_step(self) -> float:
        """Roughly what training takes: masters, gradients and both moments of the heads, the main head, activations."""
        block = self.hidden * (4 * self.hidden + 3 * self.inner)
        head = block + 2 * self.hidden**2
        tokens = self.rows * self.row_length
        return self.depth * (16 + 2) * head + 4 * self.vocabulary * self.hidden + self.depth * tokens * 60 * self.hidden


SHAPES = (
    Shape("1B", 2048, 8192, 16, 32, depth=4, rows=4, row_length=2048),
    Shape("8B", 4096, 14336, 32, 32, depth=4, rows=4, row_length=2048),
    Shape("70B", 8192, 28672, 80, 64, depth=2, rows=2, row_length=2048),
)
TINY = Shape("tiny", 32, 48, 2, 4, depth=2, rows=2, row_length=64, vocabulary=128)


def random_trunk(shape: Shape, options: Options, *, layers: int) -> Trunk:
    """A trunk with so many layers, on the device and in its format from the beginning."""
    settings: dict[str, Any] = {} if shape is TINY else {"head_dim": 128 if shape.hidden > 2048 else 64}
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=min(8, shape.heads),
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        **settings,
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        model: Any = LlamaForCausalLM._from_config(config, dtype=options.dtype)
    return Trunk(model.eval())
