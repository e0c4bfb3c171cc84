"""The same heads in transformers' own decoder, `generate(use_mtp=True)`: what this package is compared with.

Its MTP layers compute what chain heads do: norms of embedding and state, the projection, one decoder
layer, a norm. They are built here in memory; transformers reads them only from checkpoints of families
that were published with MTP layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from transformers.modeling_layers import MtpModel

from mtpd.errors import UserError
from mtpd.heads import Heads
from mtpd.trunk import Trunk


@contextmanager
def mtp_in_transformers(trunk: Trunk, heads: Heads) -> Iterator[None]:
    """Within it `trunk.model.generate(use_mtp=True)` drafts with these heads, over the whole vocabulary.

    Raises:
        UserError: transformers cannot build these heads for this model.
    """
    chain: Any = heads.as_chain(what="transformers' generate(use_mtp=True)").merged()
    settings: Any = trunk.model.config.get_text_config(decoder=True)
    if hasattr(settings, "num_mtp_layers") and settings.num_mtp_layers is not None:
        raise UserError(f"{trunk.name}: it has MTP layers of its own; heads cannot take their place in transformers")
    settings.num_mtp_layers = chain.depth
    kinds = getattr(settings, "layer_types", None)
    if kinds is not None:
        settings.mtp_layer_types = [head.block.config.layer_types[0] for head in chain.chain()]
    try:
        built = _build(trunk, chain)
        with patch.object(MtpModel, "from_pretrained", lambda *args, **kwargs: built):
            yield
    finally:
        del settings.num_mtp_layers
        if kinds is not None:
            del settings.mtp_layer_types


def _build(trunk: Trunk, heads: Any) -> MtpModel:
    try:
        built = MtpModel(trunk.model, heads.depth)
        for each, head in zip(built.layers, heads.chain(), strict=True):
            layer: Any = each
            layer.enorm.load_state_dict(head.embed_norm.state_dict())
            layer.hnorm.load_state_dict(head.hidden_norm.state_dict())
            layer.eh_proj.load_state_dict(head.project.state_dict())
            layer.mtp_block.load_state_dict(head.block.layers[0].state_dict())
            layer.post_norm.load_state_dict(head.block.norm.state_dict())
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{trunk.name}: transformers cannot build these heads ({str(error).splitlines()[0]})"
        ) from error
    return built.to(device=trunk.device, dtype=trunk.dtype).eval()
