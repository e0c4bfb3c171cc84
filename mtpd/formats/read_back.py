"""The proof that a loader reads what an export wrote: each kind of tensor, in each head, moves what the head computes.

The loader is transformers' `MtpModel` where it has the family, and mtpd's own import elsewhere; what serving engines
read is what `mtpd verify` asks. In a copy of the export all of the heads' tensors are noise that keeps every part of a
head at work (`noise_check.noise`). Then those of one kind after the other become other noise: a head whose output stays
has not read them. Each head runs once on the base's states, in float32, so that what it computes depends on its own
tensors alone, and to rounding that is far smaller than what a tensor moves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.cache_utils import MtpCache

from mtpd import alignment
from mtpd.decode.plain import plain_texts
from mtpd.errors import MtpdError
from mtpd.formats.directory import Checkpoint
from mtpd.formats.engines import with_transformers
from mtpd.formats.exported_run import Run
from mtpd.formats.find_heads import HEAD, Native, find_heads, layer_shapes
from mtpd.formats.importing import heads_config
from mtpd.formats.layout import Layout
from mtpd.formats.noise_check import Perturbed, kind_of, perturbed
from mtpd.formats.tensors import is_zero
from mtpd.heads import KINDS, build_heads
from mtpd.heads.config import HeadsConfig
from mtpd.progress import Bar
from mtpd.trunk import Trunk

TEXTS, TOKENS = 4, 24
CHOOSES_ONLY = "e_score_correction_bias"
"""Decides which experts are asked, and may leave their choice as it is."""

MOVES = 1e-3
"""Share of its size by which an output moves at least where a tensor is read (docs/results.md: 0.05 and more where it
is, nothing where it is not)."""

Reader = Callable[[Path], list[Tensor]]
"""What the heads in a directory compute: for each head its states, or its logits, [B, T, D] or [B, T, V]."""


@dataclass(frozen=True)
class Texts:
    """Greedy texts of the base: ids, positions and rows of its choice [B, T], states [B, T, D]."""

    ids: Tensor
    positions: Tensor
    hidden: Tensor
    chosen: Tensor


def read_back(run: Run, folder: Path, layout: Layout) -> str:
    """Reads an export as a loader does, as it was written and with noise in it.

    Returns:
        What was found, for people.

    Raises:
        MtpdError: naming what was not read.
    """
    if run.base.quantisation:
        return f"not read back: the base is quantised ({run.base.quantisation.get('quant_method')})"
    written = Checkpoint(folder)
    apart = not layer_shapes(written, without=set())
    native = find_heads(written, family=layout.family, base=run.base if apart else written)
    where = run.base.path if apart else folder
    try:
        # Loading the base is the longest part of it where the base is large.
        with Bar(desc="reading back", total=1, leave=False) as bar:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                where, dtype="auto", trust_remote_code=run.recipe.trust_remote_code
            )
            trunk = Trunk(loaded.eval())
            bar.update()
            texts = texts_of(trunk)
            name, reader = reader_of(run, native, trunk, texts)
            with torch.inference_mode(), perturbed(native) as copy:
                before = _accepted(reader(folder), native, trunk, texts)
                after = _accepted(reader(copy.folder), native, trunk, texts)
                ignored = unread(native, movements(reader, copy, bar=bar))
    except MtpdError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MtpdError(
            f"export {layout.name}: what was written cannot be read back: {reason}; --no-perturb leaves this check out"
        ) from error
    if ignored:
        more = f" and {len(ignored) - 1} more" * (len(ignored) > 1)
        raise MtpdError(
            f"export {layout.name}: {name} does not read {ignored[0]}{more}: other numbers there leave what it drafts "
            f"as it is; `mtpd inspect {run.path}` lists the layouts that fit, `mtpd generate {run.path}` decodes "
            "without any, and --no-perturb writes this one all the same"
        )
    count = texts.ids[:, :-2].numel()
    return (
        f"read back by {name}, every tensor of the heads: CAR_1 {before / count:.3f}, with noise for heads "
        f"{after / count:.3f}, {count} places"
    )


def movements(
    reader: Reader, copy: Perturbed, *, kinds: Sequence[str] | None = None, bar: Bar | None = None
) -> dict[str, list[float]]:
    """By kind of tensor, and for each head: how far its output moves where other noise lies there.

    Args:
        kinds: None is all that have to move it.

    Returns:
        The size of the difference over that of the output.
    """
    if kinds is None:
        kinds = [kind for kind in copy.kinds if CHOOSES_ONLY not in kind]
    if bar is not None:
        bar.total += len(kinds)
    start = reader(copy.folder)
    found: dict[str, list[float]] = {}
    for kind in kinds:
        copy.spoil(kind, draw=1)
        found[kind] = [
            float((moved - still).norm() / still.norm())
            for moved, still in zip(reader(copy.folder), start, strict=True)
        ]
        copy.spoil(kind)
        if bar is not None:
            bar.update()
    return found


def unread(native: Native, moved: Mapping[str, Sequence[float]]) -> list[str]:
    """The checkpoint's names of tensors whose head stays where it is whatever lies in them."""
    found: list[str] = []
    for ours, theirs in native.names.items():
        shares = moved.get(kind_of(ours))
        if shares is None:
            continue
        head = HEAD.fullmatch(ours)
        # A matrix in which all heads are stacked has no number.
        deaf = shares[int(head[1])] < MOVES if head else max(shares) < MOVES
        # Layouts have biases of zero for bases whose layers have none.
        if deaf and not (theirs.endswith(".bias") and is_zero(native.raw[theirs])):
            found.append(theirs)
    return list(dict.fromkeys(found))


def _accepted(outputs: list[Tensor], native: Native, trunk: Trunk, texts: Texts) -> int:
    """Drafts of depth 1 that are the base's own choice."""
    logits = trunk.unembedding(outputs[0]) if KINDS[native.family.kind].loops else outputs[0]
    return int((logits[:, :-2].argmax(-1) == texts.chosen[:, 1:-1]).sum())


@torch.inference_mode()
def texts_of(trunk: Trunk) -> Texts:
    """Texts that the base writes after single tokens."""
    size = trunk.unembedding.weight.shape[0]
    starts = torch.linspace(1, size - 1, TEXTS).long()[:, None]
    ids = plain_texts(trunk.model, starts, max_new_tokens=TOKENS)
    positions = torch.arange(ids.shape[1])[None].expand_as(ids)
    hidden = trunk.hidden(ids, position_ids=positions)
    return Texts(ids, positions, hidden.float(), trunk.unembedding(hidden).argmax(-1))


def reader_of(run: Run, native: Native, trunk: Trunk, texts: Texts) -> tuple[str, Reader]:
    """The loader's name, and what it reads out of a directory."""
    count = getattr(trunk.model.config.get_text_config(), "num_mtp_layers", None)
    if "transformers" in native.family.engines and count == native.count:
        return f"transformers {transformers.__version__}", _by_transformers(native, trunk, texts)
    return "mtpd", _by_mtpd(run, native, trunk, texts)


def _by_transformers(native: Native, trunk: Trunk, texts: Texts) -> Reader:
    settings = trunk.model.config.get_mtp_config()
    # What `MtpModel` takes its number format from.
    trunk.model.config.dtype = torch.float32
    embeds = [trunk.embed(alignment.tokens_read(texts.ids, index + 1)).float() for index in range(native.count)]

    def read(folder: Path) -> list[Tensor]:
        model = with_transformers.mtp_model(trunk.model, folder, native)
        return [
            model.forward_layer(
                index,
                texts.hidden,
                texts.positions,
                MtpCache(config=settings),
                inputs_embeds=embeds[index],
            )
            for index in range(native.count)
        ]

    return read


def _by_mtpd(run: Run, native: Native, trunk: Trunk, texts: Texts) -> Reader:
    if KINDS[native.family.kind].loops and not native.source_layers:
        # Exports that lie apart have biases of zero that the base's layers lack, and so no layer of their kind.
        layers = [run.config.source_layers[block] for block in run.config.block_of[: native.count]]
        config = HeadsConfig(depth=native.count, hidden_size=native.hidden_size, source_layers=layers)
    else:
        config = heads_config(native, depth=native.count, shared=False)
    heads = build_heads(trunk, config).float().eval()
    names = [name for name in heads.state_dict() if name != "vocabulary"]

    def read(folder: Path) -> list[Tensor]:
        found = find_heads(Checkpoint(folder), family=native.family.name, base=native.base).tensors
        heads.load_state_dict({name: found[name].load() for name in names}, strict=False)
        return heads.each_alone(trunk, texts.hidden, texts.ids, position_ids_BT=texts.positions)

    return read
