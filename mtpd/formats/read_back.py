"""The proof that a loader reads what an export wrote: heads made noise accept less, and each tensor matters.

The loader is transformers' `MtpModel` where it has the family, and mtpd's own import elsewhere; what serving engines
read is what `mtpd verify` asks. A few texts are written by the base; each head is then run once on the base's states
there, so that what it computes depends on its own tensors alone. With noise in all tensors of all heads, those of one
kind after the other are given back: heads in which that changes nothing have not read them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.cache_utils import MtpCache

from mtpd import alignment
from mtpd.data.generation import plain_generation
from mtpd.errors import MtpdError
from mtpd.formats.directory import Checkpoint
from mtpd.formats.engines import with_transformers
from mtpd.formats.exported_run import Run
from mtpd.formats.find_heads import Native, find_heads, layer_shapes
from mtpd.formats.importing import heads_config
from mtpd.formats.noise_check import Perturbed, accepts_less, perturbed
from mtpd.formats.tensors import is_zero
from mtpd.heads import build_heads
from mtpd.heads.chain.heads import ChainHeads
from mtpd.heads.config import HeadsConfig
from mtpd.trunk import Trunk

TEXTS, TOKENS = 4, 24
CHOOSES_ONLY = "e_score_correction_bias"
"""Decides which experts are asked, and may leave their choice as it is."""

Reader = Callable[[Path], list[Tensor]]
"""What the heads in a directory compute: for each head its states, or its logits, [B, T, D] or [B, T, V]."""


@dataclass(frozen=True)
class Texts:
    """Greedy texts of the base: ids, positions and rows of its choice [B, T], states [B, T, D]."""

    ids: Tensor
    positions: Tensor
    hidden: Tensor
    chosen: Tensor


def read_back(run: Run, folder: Path, *, layout: str, family: str | None) -> str:
    """Reads an export as a loader does, as it was written and with noise in it.

    Args:
        family: to read the export with, where its config does not tell.

    Returns:
        What was found, for people.

    Raises:
        MtpdError: naming what was not read.
    """
    if run.base.quantisation:
        return f"not read back: the base is quantised ({run.base.quantisation.get('quant_method')})"
    written = Checkpoint(folder)
    apart = not layer_shapes(written, without=set())
    native = find_heads(written, family=family, base=run.base if apart else written)
    where = run.base.path if apart else folder
    try:
        # Loading the base is the longest part of it where the base is large.
        with tqdm(desc="reading back", total=1, leave=False) as bar:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                where, dtype="auto", trust_remote_code=run.recipe.trust_remote_code
            )
            trunk = Trunk(loaded.eval())
            bar.update()
            texts = _texts(trunk)
            name, reader = _reader(run, native, trunk, texts)
            with torch.inference_mode(), perturbed(native) as copy:
                unread, before, after = _compare(reader, trunk, texts, copy, bar)
    except MtpdError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MtpdError(
            f"export {layout}: what was written cannot be read back: {reason}; --no-perturb leaves this check out"
        ) from error
    if unread:
        more = f" and {len(unread) - 1} more" * (len(unread) > 1)
        raise MtpdError(f"export {layout}: {name} does not read {unread[0]}{more}: noise in its place changes nothing")
    count = texts.ids[:, :-2].numel()
    if accepts_less(before / count, after / count) is False:
        raise MtpdError(
            f"export {layout}: read by {name}, heads made noise accept as much as those that were written (CAR_1 "
            f"{after / count:.3f} and {before / count:.3f}, {count} places); --no-perturb leaves this check out"
        )
    return f"read back by {name}: CAR_1 {before / count:.3f}, with noise for heads {after / count:.3f}, {count} places"


def _compare(reader: Reader, trunk: Trunk, texts: Texts, copy: Perturbed, bar: tqdm[Any]) -> tuple[list[str], int, int]:
    """Tensors that were not read, and accepted drafts of depth 1 as written and with noise."""
    native = copy.native
    kinds = [kind for kind in copy.kinds if CHOOSES_ONLY not in kind]
    bar.total = 2 + len(kinds)
    written, noise = reader(native.checkpoint.path), reader(copy.folder)
    bar.update()
    unread: list[str] = []
    for kind in kinds:
        copy.give_back(kind)
        outputs = reader(copy.folder)
        copy.spoil(kind)
        bar.update()
        deaf = [index for index in range(native.count) if torch.equal(outputs[index], noise[index])]
        names = [name for name in copy.kinds[kind] for index in deaf if name.startswith(f"layers.{index}.")]
        # Layouts have biases of zero for bases whose layers have none.
        theirs = [native.names[name] for name in names]
        unread += [name for name in theirs if not (name.endswith(".bias") and is_zero(native.raw[name]))]
    logits = [
        outputs[0] if native.family.kind == "medusa" else trunk.unembedding(outputs[0]) for outputs in (written, noise)
    ]
    before, after = (_accepted(each, texts) for each in logits)
    return list(dict.fromkeys(unread)), before, after


def _accepted(logits: Tensor, texts: Texts) -> int:
    """Drafts of depth 1, of which the logits [B, T, V] are given, that are the base's own choice."""
    return int((logits[:, :-2].argmax(-1) == texts.chosen[:, 1:-1]).sum())


@torch.inference_mode()
def _texts(trunk: Trunk) -> Texts:
    """Texts that the base writes after single tokens."""
    size = trunk.unembedding.weight.shape[0]
    starts = torch.linspace(1, size - 1, TEXTS).long()[:, None]
    config = GenerationConfig(max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    with plain_generation(trunk.model):
        ids: Any = trunk.model.generate(starts, attention_mask=torch.ones_like(starts), generation_config=config)
    positions = torch.arange(ids.shape[1])[None].expand_as(ids)
    hidden = trunk.hidden(ids, position_ids=positions)
    return Texts(ids, positions, hidden, trunk.unembedding(hidden).argmax(-1))


def _reader(run: Run, native: Native, trunk: Trunk, texts: Texts) -> tuple[str, Reader]:
    """The loader's name, and what it reads out of a directory."""
    count = getattr(trunk.model.config.get_text_config(), "num_mtp_layers", None)
    if "transformers" in native.family.engines and count == native.count:
        return f"transformers {transformers.__version__}", _by_transformers(native, trunk, texts)
    return "mtpd", _by_mtpd(run, native, trunk, texts)


def _by_transformers(native: Native, trunk: Trunk, texts: Texts) -> Reader:
    settings = trunk.model.config.get_mtp_config()

    def read(folder: Path) -> list[Tensor]:
        model = with_transformers.mtp_model(trunk.model, folder, native)
        return [
            model.forward_layer(
                index,
                texts.hidden,
                texts.positions,
                MtpCache(config=settings),
                input_ids=alignment.tokens_read(texts.ids, index + 1),
            )
            for index in range(native.count)
        ]

    return read


def _by_mtpd(run: Run, native: Native, trunk: Trunk, texts: Texts) -> Reader:
    if native.family.kind == "chain" and not native.source_layers:
        # Exports that lie apart have biases of zero that the base's layers lack, and so no layer of their kind.
        layers = [run.config.source_layers[block] for block in run.config.block_of[: native.count]]
        config = HeadsConfig(depth=native.count, hidden_size=native.hidden_size, source_layers=layers)
    else:
        config = heads_config(native, depth=native.count, shared=False)
    heads = build_heads(trunk, config).to(trunk.dtype).eval()
    names = [name for name in heads.state_dict() if name != "vocabulary"]

    def read(folder: Path) -> list[Tensor]:
        found = find_heads(Checkpoint(folder), family=native.family.name, base=native.base).tensors
        heads.load_state_dict({name: found[name].load() for name in names}, strict=False)
        if not isinstance(heads, ChainHeads):
            along = heads.along(trunk, texts.hidden, texts.ids, position_ids_BT=texts.positions)
            at = torch.arange(texts.ids.numel())
            return [along.logits(depth, at).unflatten(0, texts.ids.shape) for depth in range(1, native.count + 1)]
        return [
            head(
                trunk.embed(alignment.tokens_read(texts.ids, depth)),
                texts.hidden,
                position_ids_BT=texts.positions,
            )
            for depth, head in enumerate(heads.chain(), start=1)
        ]

    return read
