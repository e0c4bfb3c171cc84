"""Chain heads as recipes know them."""

from __future__ import annotations

from mtpd.heads.kinds import Kind

KIND = Kind(
    name="chain",
    about="K heads in DeepSeek-V3 form, each reading the hidden state of the one before",
    heads="mtpd.heads.chain.heads:ChainHeads",
    start="mtpd.heads.chain.start",
    keys=frozenset({"shared"}),
    blocks=lambda config: max(config.block_of) + 1,
    loops=True,
    native={},
)
