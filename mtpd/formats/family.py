"""Families of native MTP checkpoints: each is one small table that is read in two directions.

The left side of `names` is a tensor in the checkpoint, the right side its name in mtpd. Both are templates:

    {i}     the head, from 0 on          {n}     the head's layer: i + layers of the base
    {j}     a sub-layer of the head      {s}     i * sub-layers + j; {first} and {last}: its ends
    {rest}  anything

The first line that fits a tensor counts. A left side without {i}, {n} or {s} is one tensor for all heads.

To add a family, write a file in `families/` with a `FAMILY`. Another package calls `register` itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mtpd.heads.chain.config import KIND as CHAIN

Names = tuple[tuple[str, str], ...]

OTHER = "other."
"""mtpd's names of tensors that chain heads have no place for: copies of the embedding and the output head."""


@dataclass(frozen=True)
class Family:
    """One layout of MTP heads in a checkpoint.

    Attributes:
        name: as messages and `--to` call it.
        title: the models that have it.
        model_types: `model_type` in config.json (or in its text_config).
        counts: config keys that say how many heads there are; dotted keys are nested.
        names: tensors, as above.
        reference: where the names and conventions are from.
        architectures: of config.json, where the model type alone does not tell.
        default_count: heads where no key says how many; None where one has to.
        order: which half of the projection's input comes first.
        hidden: whether depth 1 reads the base's state after or before its final norm.
        recycled: what the next depth reads: the state after the head's last norm, before it, or without any.
        norm: how norms store their gain g: as g, or as g - 1.
        zeroes_first: whether the family's own code zeroes the embedding at position 0.
        own_output: whether heads have output heads of their own.
        sublayers: config key whose length is the number of sub-layers of a head.
        cannot_run: why mtpd cannot compute these heads, or None if it can. Their tensors go in and out anyway.
        separate: whether the heads lie in a directory of their own, without the base.
        kind: of mtpd's heads that compute the same.
        whole: the tensors of a head, where it has these and no others if mtpd can compute it; and what it is then.
        stacked: mtpd's name of one output matrix in which the heads lie below the main one, which counts as a head.
        engines: serving engines whose source reads the family: vLLM 0.32, SGLang 0.5.23, transformers 5.23.
        any_base: whether a key alone declares it, for a base of any type.
    """

    name: str
    title: str
    model_types: tuple[str, ...]
    counts: tuple[str, ...]
    names: Names
    reference: str
    architectures: tuple[str, ...] = ()
    default_count: int | None = None
    order: Literal["embedding", "hidden"] = "embedding"
    hidden: Literal["after", "before"] = "after"
    recycled: Literal["after", "before", "raw"] = "after"
    norm: Literal["plain", "one_plus"] = "plain"
    zeroes_first: bool = False
    own_output: bool = False
    sublayers: str | None = None
    cannot_run: str | None = None
    separate: bool = False
    engines: tuple[str, ...] = ()
    kind: str = CHAIN.name
    stacked: str | None = None
    whole: tuple[frozenset[str], str] | None = None
    any_base: bool = False

    def per_head(self, config: Mapping[str, Any]) -> int:
        """Sub-layers of a head: 1 but where the family builds a head of several."""
        value = lookup(config, self.sublayers) if self.sublayers else None
        return len(value) if isinstance(value, list | str) and value else 1

    @property
    def main_too(self) -> int:
        """1 where the main head counts as one of the heads."""
        return int(self.stacked is not None)

    def declared(self, config: Mapping[str, Any], text: Mapping[str, Any]) -> tuple[str | None, int | None]:
        """The config key that says how many heads there are, and what it says."""
        for key in self.counts:
            for where in (config, text):
                value = lookup(where, key)
                if isinstance(value, int) and not isinstance(value, bool):
                    return key, value - self.main_too
        return None, None

    def to_mtpd(self, names: Iterable[str], *, heads: int, layers: int, per_head: int = 1) -> dict[str, str]:
        """mtpd's names of the heads' tensors, each with its name in the checkpoint."""
        return {ours: theirs for theirs, ours in self._renamed(names, heads, layers, per_head, back=False)}

    def to_checkpoint(self, names: Iterable[str], *, heads: int, layers: int, per_head: int = 1) -> dict[str, str]:
        """The checkpoint's names of mtpd's tensors: mtpd's name -> its. Several may have one."""
        return dict(self._renamed(names, heads, layers, per_head, back=True))

    def _renamed(
        self, names: Iterable[str], heads: int, layers: int, per_head: int, *, back: bool
    ) -> Iterator[tuple[str, str]]:
        """Each name on one side that a line fits, with its name on the other."""
        names = list(names)
        for head in range(heads):
            rules = [rule[::-1] if back else rule for rule in self._rules(head, layers, per_head)]
            for name in names:
                for here, there in rules:
                    if match := here.pattern.fullmatch(name):
                        values = match.groupdict()
                        if "s" in values:
                            values["j"] = str(int(values["s"]) - head * per_head)
                        elif "j" in values:
                            values["s"] = str(head * per_head + int(values["j"]))
                        yield name, there.format(values)
                        break

    def heads_in(self, names: Iterable[str], *, layers: int, per_head: int = 1) -> int:
        """Counts the heads that have tensors, up to the first gap."""
        names = list(names)
        count = 0
        while True:
            rules = [theirs for theirs, ours in self._rules(count, layers, per_head) if theirs.of_head]
            if not any(rule.pattern.fullmatch(name) for rule in rules for name in names):
                return count
            count += 1

    def _rules(self, head: int, layers: int, per_head: int) -> list[tuple[_Side, _Side]]:
        fixed = {
            "i": str(head),
            "n": str(layers + head),
            "first": str(head * per_head),
            "last": str((head + 1) * per_head - 1),
        }
        own = range(head * per_head, (head + 1) * per_head)
        return [(_Side(theirs, fixed, own), _Side(ours, fixed, own)) for theirs, ours in self.names]


FAMILIES: dict[str, Family] = {}
"""The families by name; `mtpd.formats.families` fills it."""


def register(family: Family) -> Family:
    """Adds a family, and returns it. Its name has to be new."""
    assert family.name not in FAMILIES, f"a family named {family.name} is registered already"
    FAMILIES[family.name] = family
    return family


class _Side:
    """A template of one side for one head."""

    def __init__(self, template: str, fixed: Mapping[str, str], own: range) -> None:
        self.of_head = any("{" + key + "}" in template for key in ("i", "n", "s", "first", "last"))
        for key, value in fixed.items():
            template = template.replace("{" + key + "}", value)
        self.template = template
        free = {"rest": ".+", "j": r"\d+", "m": r"\d+", "s": "|".join(map(str, own))}
        pattern = re.escape(template)
        for key, expression in free.items():
            pattern = pattern.replace(re.escape("{" + key + "}"), f"(?P<{key}>{expression})")
        self.pattern = re.compile(pattern)

    def format(self, values: Mapping[str, str]) -> str:
        name = self.template
        for key, value in values.items():
            name = name.replace("{" + key + "}", value)
        return name


def lookup(config: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key, or None."""
    value: Any = config
    for step in key.split("."):
        value = value.get(step) if isinstance(value, Mapping) else None
    return value


EMBED, HIDDEN, PROJECT, NORM = (
    f"layers.{{i}}.{part}.weight" for part in ("embed_norm", "hidden_norm", "project", "block.norm")
)
LAYER = "layers.{i}.block.layers.0.{rest}"
EMBEDDING, UNEMBEDDING = (f"{OTHER}{{i}}.{part}.weight" for part in ("embedding", "unembedding"))


def layered(prefix: str) -> Names:
    """DeepSeek's names: the head is a further decoder layer with four more tensors."""
    return (
        (f"{prefix}.enorm.weight", EMBED),
        (f"{prefix}.hnorm.weight", HIDDEN),
        (f"{prefix}.eh_proj.weight", PROJECT),
        (f"{prefix}.shared_head.norm.weight", NORM),
        (f"{prefix}.shared_head.head.weight", UNEMBEDDING),
        (f"{prefix}.embed_tokens.weight", EMBEDDING),
        (f"{prefix}.{{rest}}", LAYER),
    )


def qwen(prefix: str = "mtp") -> Names:
    """Qwen's names: norms and projection are one for all heads, beside the layers."""
    return (
        (f"{prefix}.pre_fc_norm_embedding.weight", EMBED),
        (f"{prefix}.pre_fc_norm_hidden.weight", HIDDEN),
        (f"{prefix}.fc.weight", PROJECT),
        (f"{prefix}.norm.weight", NORM),
        (f"{prefix}.layers.{{i}}.{{rest}}", LAYER),
    )


def mimo(prefix: str) -> Names:
    """MiMo-7B's names."""
    return (
        (f"{prefix}.token_layernorm.weight", EMBED),
        (f"{prefix}.hidden_layernorm.weight", HIDDEN),
        (f"{prefix}.input_proj.weight", PROJECT),
        (f"{prefix}.final_layernorm.weight", NORM),
        (f"{prefix}.{{rest}}", LAYER),
    )
