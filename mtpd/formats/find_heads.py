"""The MTP heads that a checkpoint has: of which family, how many, and whether mtpd can compute them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from mtpd.errors import UserError
from mtpd.formats.directory import CONFIG, Checkpoint
from mtpd.formats.families import FAMILIES
from mtpd.formats.family import OTHER, Family
from mtpd.formats.layer_names import Tensors, to_module
from mtpd.formats.quantised_heads import beside, plain
from mtpd.formats.tensors import FLOATS, Stored, computed, joined, part

HEAD_LIKE = re.compile(
    r"(^|\.)(mtp\w*|nextn|medusa\w*|eh_proj|enorm|hnorm|pre_fc_norm\w*|shared_head)(\.|$)|^\d+\.\d+\.linear\."
)
"""Names that only heads have, in all families known and some that are not."""

HEAD = re.compile(r"layers\.(\d+)\.(.+)")
BLOCK = "block.layers.0."
PARTS = ("embed_norm.weight", "hidden_norm.weight", "project.weight", "block.norm.weight")

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Native:
    """The heads of a checkpoint."""

    checkpoint: Checkpoint
    family: Family
    count: int
    """Heads that have tensors."""
    key: str | None
    """The config key that declares them."""
    names: Mapping[str, str]
    """mtpd's names, with layers as the checkpoint spells them, and the checkpoint's."""
    base: Checkpoint
    """Where the base lies: the same checkpoint, but for families that keep heads apart."""

    @cached_property
    def raw(self) -> Tensors:
        """The heads' tensors by their names in the checkpoint, quantised ones in bfloat16."""
        found, settings = self.checkpoint.tensors, self.checkpoint.quantisation
        return {
            name: plain(name, found, settings, shown=self.checkpoint.shown)
            for name in dict.fromkeys(self.names.values())
        }

    @cached_property
    def quantised(self) -> list[str]:
        """The names in the checkpoint of weights that are quantised there."""
        return [name for name in self.raw if self.checkpoint.tensors[name].dtype not in FLOATS]

    @cached_property
    def tensors(self) -> Tensors:
        """The heads' tensors as `mtpd.heads` names and arranges them; `other.` ones only if they are no copies."""
        named = {ours: self.raw[theirs] for ours, theirs in self.names.items()}
        found = {ours: tensor for ours, tensor in named.items() if not HEAD.fullmatch(ours)}
        found = {ours: tensor for ours, tensor in found.items() if not self._copies(ours, tensor)}
        if self.family.stacked is not None and self.family.stacked in found:
            found |= unstacked(found.pop(self.family.stacked), self.count)
        for index in range(self.count):
            prefix = f"layers.{index}."
            own = {ours.removeprefix(prefix): tensor for ours, tensor in named.items() if ours.startswith(prefix)}
            layer = {name.removeprefix(BLOCK): tensor for name, tensor in own.items() if name.startswith(BLOCK)}
            found |= {prefix + name: tensor for name, tensor in own.items() if not name.startswith(BLOCK)}
            found |= {prefix + BLOCK + name: tensor for name, tensor in to_module(self.model_type, layer).items()}
            project = f"{prefix}project.weight"
            if self.family.order == "hidden" and project in found:
                found[project] = halves_swapped(found[project])
        return found

    @property
    def model_type(self) -> str:
        return str(self.base.text_config.get("model_type", ""))

    @property
    def hidden_size(self) -> int:
        return int(self.base.text_config.get("hidden_size", 0))

    @cached_property
    def source_layers(self) -> list[int]:
        """For each head the last layer of the base whose tensors have the names and shapes of the head's.

        Empty if a head has no such layer.
        """
        layers = layer_shapes(self.base, without=set(self.raw) if self.base is self.checkpoint else set())
        kinds = []
        for index in range(self.count):
            prefix = f"layers.{index}.{BLOCK}"
            own = {
                ours.removeprefix(prefix): self.raw[theirs].shape
                for ours, theirs in self.names.items()
                if ours.startswith(prefix)
            }
            alike = [number for number, shapes in layers.items() if shapes == own]
            kinds += [max(alike)] if alike else []
        return kinds if len(kinds) == self.count else []

    @property
    def cannot_run(self) -> str | None:
        """Why mtpd cannot compute these heads; None if it can."""
        if self.family.cannot_run:
            return self.family.cannot_run
        if self.family.whole is not None:
            return self._odd_head(*self.family.whole)
        if self.family.stacked is not None:
            return self._odd_stack(self.family.stacked)
        for index in range(self.count):
            for name in PARTS:
                if f"layers.{index}.{name}" not in self.names:
                    return f"head {index + 1} has no {name}"
        if any(name.startswith(OTHER) for name in self.tensors):
            return "its heads have embeddings or output heads of their own, and chain heads share the base's"
        if not self.source_layers:
            return "no layer of the base has the kind of its heads' layer"
        return None

    def _odd_stack(self, name: str) -> str | None:
        """Says what is wrong with a matrix in which output heads are stacked."""
        rows, size = self.raw[self.names[name]].shape
        tokens = int(self.base.text_config.get("vocab_size", 0))
        if (rows, size) == ((self.count + 1) * tokens, self.hidden_size):
            return None
        return f"its output matrix is {rows} x {size}, not {self.count + 1} x {tokens} rows of {self.hidden_size}"

    def _odd_head(self, known: frozenset[str], form: str) -> str | None:
        """Names what a head has, or lacks, that mtpd's does not."""
        for index in range(self.count):
            prefix = f"layers.{index}."
            own = {name.removeprefix(prefix) for name in self.names if name.startswith(prefix)}
            if own != known:
                odd = ", ".join(sorted(own ^ known)[:3])
                return f"head {index + 1} is no {form} ({odd})"
        return None

    def _copies(self, ours: str, tensor: Stored) -> bool:
        """Whether a tensor is only a copy of the base's embedding or output head."""
        if not ours.startswith(OTHER):
            return False
        source = base_tensor(self.base, ours.split(".")[2])
        return source is not None and tensor.same(source)


class NoHeads(UserError):
    """A checkpoint of an ordinary model: nothing declares heads, and nothing looks like any."""


def find_heads(checkpoint: Checkpoint, *, family: Family | str | None = None, base: Checkpoint | None = None) -> Native:
    """The heads of a checkpoint.

    Args:
        family: the family or its name, where the config does not tell.
        base: the model that heads in a directory of their own belong to.

    Raises:
        UserError: no heads, a family that is not known, heads that are declared and missing or the other way
            round, or heads that are quantised in a form that is not read.
    """
    chosen = _family(checkpoint, family)
    if chosen.separate and base is None:
        raise UserError(f"{checkpoint.shown}: {chosen.name} heads lie apart from their base; give it with --base")
    names = checkpoint.tensors
    per_head = chosen.per_head(checkpoint.text_config)
    key, declared = chosen.declared(checkpoint.config, checkpoint.text_config)
    found = chosen.heads_in(names, layers=checkpoint.layers, per_head=per_head)
    if not any(theirs.count("{") for theirs, _ in chosen.names):
        # All heads in one tensor: how many is what the config says.
        found = (declared or 0) if all(theirs in names for theirs, _ in chosen.names) else 0
    said = f"{key}: {declared}" if key else "nothing"
    if declared is None:
        declared = chosen.default_count if chosen.default_count is None or found == 0 else found
    if found == 0 and declared:
        raise UserError(
            f"{checkpoint.shown}: {CONFIG} declares {declared} MTP heads ({said}) and their tensors are missing "
            f"(such as {_first_name(chosen, checkpoint.layers)}); `mtpd graft` puts those of the original model back"
        )
    if found and not declared:
        raise UserError(
            f"{checkpoint.shown}: has the tensors of {found} MTP heads that {CONFIG} does not declare ({said}); "
            f"set {chosen.counts[0]} to {found} there"
        )
    if found == 0:
        raise NoHeads(f"{checkpoint.shown}: has no MTP heads ({CONFIG} declares none, and there are no tensors)")
    if found != declared:
        raise UserError(
            f"{checkpoint.shown}: {CONFIG} declares {declared} MTP heads ({said}) and there are tensors of {found}"
        )
    own = [name for name in names if not beside(name, names)]
    mapped = chosen.to_mtpd(own, heads=found, layers=checkpoint.layers, per_head=per_head)
    native = Native(checkpoint, chosen, found, key, mapped, base or checkpoint)
    assert native.raw, "heads have tensors, and those are read"
    return native


def _family(checkpoint: Checkpoint, name: Family | str | None) -> Family:
    if isinstance(name, Family):
        return name
    if name is not None:
        if name not in FAMILIES:
            raise UserError(f"family: {name} is not known; accepted: {', '.join(FAMILIES)}")
        return FAMILIES[name]
    architectures = set(checkpoint.config.get("architectures") or ())
    kinds = {checkpoint.config.get("model_type"), checkpoint.text_config.get("model_type")}
    for fits in (
        lambda family: architectures & set(family.architectures),
        lambda family: kinds & set(family.model_types),
        lambda family: family.any_base and family.declared(checkpoint.config, checkpoint.text_config)[1],
    ):
        if found := next(filter(fits, FAMILIES.values()), None):
            return found
    like = [tensor for tensor in checkpoint.tensors if HEAD_LIKE.search(tensor)]
    kind = checkpoint.text_config.get("model_type")
    if like:
        raise UserError(
            f"{checkpoint.shown}: MTP heads of no known family ({kind}); {len(like)} tensors look like heads, such as "
            f"{', '.join(like[:4])}; a family is a table in mtpd/formats/families, see docs/serving.md, or choose "
            f"one with --family ({', '.join(FAMILIES)})"
        )
    raise NoHeads(f"{checkpoint.shown}: has no MTP heads ({kind}: {CONFIG} declares none, and no tensor looks so)")


def layer_shapes(checkpoint: Checkpoint, *, without: set[str]) -> dict[int, Shapes]:
    """Names and shapes of the tensors of each layer of the base."""
    layers: dict[int, Shapes] = {}
    for name, tensor in checkpoint.tensors.items():
        match = re.fullmatch(r"(?:model\.|language_model\.|backbone\.)*layers\.(\d+)\.(.+)", name)
        if not match or name in without or int(match[1]) >= checkpoint.layers:
            continue
        if not beside(name, checkpoint.tensors):
            layers.setdefault(int(match[1]), {})[match[2]] = tensor.shape
    return layers


def base_tensor(base: Checkpoint, part: str) -> Stored | None:
    """The base's `embedding` or `unembedding`, which is the embedding where the two are tied."""
    if part == "unembedding":
        for name, tensor in base.tensors.items():
            if re.fullmatch(r"(language_model\.)?lm_head\.weight", name):
                return tensor
    for name, tensor in base.tensors.items():
        if re.fullmatch(r"(model\.|language_model\.|backbone\.)*(embed_tokens|embeddings)\.weight", name):
            return tensor
    return None


def halves_swapped(project: Stored) -> Stored:
    """[hidden, embedding] columns of a projection as [embedding, hidden], or the other way round."""

    def swap(weight: torch.Tensor) -> torch.Tensor:
        return torch.cat(weight.chunk(2, dim=1)[::-1], dim=1)

    return computed(project, swap)


MAIN = f"{OTHER}main.weight"


def unstacked(whole: Stored, heads: int) -> Tensors:
    """The output matrix of each head, and of the main one above them."""
    shape = whole.shape[0] // (heads + 1), whole.shape[1]
    names = [MAIN, *(f"layers.{index}.weight" for index in range(heads))]
    return {name: part(whole, place * shape[0] * shape[1], shape) for place, name in enumerate(names)}


def stacked(tensors: Tensors, heads: int) -> Stored:
    """The reverse of `unstacked`."""
    parts = [tensors.pop(name) for name in (MAIN, *(f"layers.{index}.weight" for index in range(heads)))]
    return joined(parts, (sum(each.shape[0] for each in parts), parts[0].shape[1]))


def _first_name(family: Family, layers: int) -> str:
    template = family.names[0][0]
    return template.replace("{n}", str(layers)).replace("{i}", "0").replace("{first}", "0").replace("{m}", "0")
