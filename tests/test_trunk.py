"""The frozen model as heads see it: its pieces repeat the model, or the model is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from architectures import SIZES, TOKENS, WINDOW, random_tokens, tiny_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaModel

from mtpd.errors import UnsupportedModel
from mtpd.heads.norms import gain, set_gain
from mtpd.trunk import Trunk, Unembedding


def test_check_passes(trunk: Trunk) -> None:
    """Fault: an architecture of the list that is refused."""
    trunk.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_check_passes_in_half_precision(name: str, dtype: torch.dtype) -> None:
    """Fault: a real model refused because of rounding."""
    Trunk(tiny_model(name).to(dtype), tokens=TOKENS).check()


def test_logits_are_the_models_own(trunk: Trunk) -> None:
    """Fault: logit scale, soft-capping or the final norm left out, or applied twice."""
    ids = random_tokens(2, 40)
    with torch.no_grad():
        expected = trunk.model(input_ids=ids, use_cache=False).logits
    assert torch.equal(trunk.unembedding(trunk.hidden(ids)), expected)


def test_a_block_repeats_its_layer(trunk: Trunk) -> None:
    """Fault: a block of another kind than its layer (local or global attention, rotary positions or none)."""
    ids = random_tokens(1, 2 * WINDOW + 3)
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        seen.append((given, output[0] if isinstance(output, tuple) else output))

    hooks = [layer.register_forward_hook(keep, with_kwargs=True) for layer in trunk.decoder.layers]
    trunk.hidden(ids)
    for hook in hooks:
        hook.remove()
    assert len(seen) == trunk.depth
    for index, (given, output) in enumerate(seen):
        block: Any = trunk.block(index).eval()
        assert all(p.requires_grad and p.dtype == torch.float32 for p in block.parameters())
        block.layers[0].load_state_dict(trunk.decoder.layers[index].state_dict())
        block.norm.load_state_dict(trunk.decoder.norm.state_dict())
        with torch.no_grad():
            ours = block(inputs_embeds=given, use_cache=False).last_hidden_state
            torch.testing.assert_close(ours, trunk.decoder.norm(output), rtol=1e-4, atol=1e-4)


def test_a_block_shares_nothing_with_the_trunk(llama: Trunk) -> None:
    """Fault: training a head changes the trunk, its settings, or holds a second embedding."""
    before = llama.config.to_dict()
    block: Any = llama.block(1)
    assert llama.config.to_dict() == before
    assert block.embed_tokens is None
    pointers = {p.data_ptr() for p in llama.parameters()}
    assert not any(p.data_ptr() in pointers for p in block.parameters())


def test_learned_positions_are_refused() -> None:
    """Fault: heads without positions, built for a model that adds learned ones."""
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)
    with pytest.raises(UnsupportedModel, match=r"GPT2LMHeadModel: .*rotary positions"):
        Trunk(transformers.GPT2LMHeadModel(config))


def test_a_model_without_output_head_is_refused() -> None:
    """Fault: an AttributeError in the middle of a run for a checkpoint that is no language model."""
    with pytest.raises(UnsupportedModel, match="LlamaModel"):
        Trunk(LlamaModel(transformers.LlamaConfig(**SIZES)))


class ScaledEmbeddings(LlamaForCausalLM):
    """Scales embeddings within its decoder, which no setting tells."""

    def __init__(self, config: transformers.LlamaConfig) -> None:
        super().__init__(config)
        inner = self.model.forward

        def forward(input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: Any) -> Any:
            if inputs_embeds is None:
                inputs_embeds = 5.0 * self.model.embed_tokens(input_ids)
            return inner(inputs_embeds=inputs_embeds, **kwargs)

        self.model.forward = forward


class ShiftedLogits(LlamaForCausalLM):
    """Does more with its logits than its settings tell."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output


class TwoNorms(LlamaForCausalLM):
    """Its decoder goes on after the last layer, which a decoder of one layer repeats with other weights."""

    def __init__(self, config: transformers.LlamaConfig) -> None:
        super().__init__(config)
        if config.num_hidden_layers > 1:
            self.model.layers[-1].mlp.register_forward_hook(lambda module, args, output: 2.0 * output)


@pytest.mark.parametrize(
    ("model_class", "piece"), [(ScaledEmbeddings, "embeddings"), (ShiftedLogits, "logits"), (TwoNorms, "last layer")]
)
def test_arithmetic_that_we_do_not_know_is_refused(model_class: type[LlamaForCausalLM], piece: str) -> None:
    """Fault: hours of training on inputs that are not the model's."""
    torch.manual_seed(0)
    model = model_class(transformers.LlamaConfig(**SIZES))
    nn.init.normal_(model.model.layers[-1].mlp.down_proj.weight)
    with pytest.raises(UnsupportedModel, match=f"{model_class.__name__}: .*its {piece} cannot be repeated"):
        Trunk(model).check()


def test_it_stays_frozen_and_in_eval_mode() -> None:
    """Fault: a trainer's model.train() switches on the teacher's dropout, or its parameters get gradients."""
    config = transformers.LlamaConfig(**SIZES, attention_dropout=0.5)
    trunk = Trunk(LlamaForCausalLM(config))
    outer = nn.ModuleList([trunk]).train()
    assert outer.training
    assert not any(module.training for module in trunk.modules())
    assert not any(parameter.requires_grad for parameter in trunk.parameters())
    ids = random_tokens(1, 10)
    assert torch.equal(trunk.hidden(ids), trunk.hidden(ids))
    assert not trunk.hidden(ids).requires_grad
    assert not trunk.embed(ids).requires_grad


def test_unembedding_rows() -> None:
    """Fault: padding rows of the vocabulary, or rows outside of the draft vocabulary, among the columns."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(10, 4, generator=generator), torch.randn(10, generator=generator)
    hidden = torch.randn(3, 4, generator=generator)
    whole = Unembedding(weight, bias, scale=0.5, softcap=2.0, vocabulary=7)
    logits = 2.0 * torch.tanh(0.5 * (hidden @ weight.T + bias) / 2.0)
    torch.testing.assert_close(whole(hidden), logits)
    torch.testing.assert_close(whole.select(None)(hidden), logits[:, :7])
    rows = torch.tensor([6, 1, 2])
    torch.testing.assert_close(whole.select(rows)(hidden), logits[:, rows])
    assert Unembedding(weight).select(None).weight.shape == (10, 4)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"], indirect=True)
def test_gains_of_norms(trunk: Trunk) -> None:
    """Fault: norm weights that are stored as 1 + w taken for w."""
    norm: Any = trunk.block(0).norm  # type: ignore[union-attr]
    hidden = torch.randn(5, trunk.hidden_size)
    unit = hidden * (hidden.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    wanted = torch.linspace(-1.0, 3.0, trunk.hidden_size)
    set_gain(norm, wanted)
    torch.testing.assert_close(gain(norm), wanted)
    torch.testing.assert_close(norm(hidden), unit * wanted)
    assert torch.equal(norm.weight == wanted, torch.full_like(wanted, "gemma" not in trunk.name.lower()).bool())
