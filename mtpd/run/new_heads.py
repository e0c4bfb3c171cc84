"""Heads with their first weights."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from mtpd.data.packing import PackedRows, collate
from mtpd.data.store import HiddenStates, with_hidden
from mtpd.data.vocabulary import draft_vocabulary, load_vocabulary
from mtpd.formats.importing import native_heads
from mtpd.heads import WEIGHTS, Heads, build_heads, configure_heads, load_heads, read_config, save_heads, start_heads
from mtpd.parallel import ranks
from mtpd.parallel.sequence import shared_trunk
from mtpd.run.check import source_folder
from mtpd.run.session import Session
from mtpd.train.rows import TrainingRows

logger = logging.getLogger(__name__)


def new_heads(session: Session, rows: PackedRows, store: HiddenStates | None) -> Heads:
    """Heads with their first weights, kept in `heads-before/`."""
    folder, trunk = session.run.heads_before, session.trunk
    ranks.once(
        folder / WEIGHTS,
        lambda: _started(session, rows, store),
        lambda heads: save_heads(heads, folder),
        together=trunk.partitioned or session.recipe.train.sequence_parallel > 1,
    )
    return load_heads(folder, trunk, fingerprint=session.fingerprint)


def _started(session: Session, rows: PackedRows, store: HiddenStates | None) -> Heads:
    trunk, recipe = session.trunk, session.recipe
    vocabulary = vocabulary_of(session, rows)
    if recipe.heads.init == "native":
        return native_heads(
            recipe.model,
            trunk,
            depth=recipe.heads.depth,
            shared=recipe.heads.shared,
            vocabulary=vocabulary,
            fingerprint=session.fingerprint,
        )
    size = 0 if vocabulary is None else len(vocabulary)
    heads = build_heads(
        trunk,
        configure_heads(recipe.heads.model_dump(), trunk, vocabulary=size, fingerprint=session.fingerprint),
    )
    if vocabulary is not None:
        heads.get_buffer("vocabulary").copy_(vocabulary)
    source = None
    if recipe.heads.source is not None:
        source = _others(session, source_folder(recipe.heads.source))
    start_heads(
        heads,
        trunk,
        recipe.heads.init,
        lambda: fitting_batches(session, rows, store),
        seed=recipe.seed,
        source=source,
    )
    if store is not None:
        # The states that the start was fitted to are those that training reads, also after an interruption.
        store.flush()
    return heads


def _others(session: Session, folder: Path) -> Heads:
    """Heads to start from; says so where they were trained for another model, such as this one before a fine-tuning."""
    trunk = read_config(folder).trunk
    if trunk not in ("", session.fingerprint):
        logger.warning(
            "heads.source: %s: were trained for another trunk (%s) than %s (%s): they are trained on from there, with "
            "this one as the teacher",
            folder,
            trunk[:12],
            session.recipe.model,
            session.fingerprint[:12],
        )
    return load_heads(folder, session.trunk)


def fitting_batches(
    session: Session, rows: PackedRows, store: HiddenStates | None, tokens: int = 100_000
) -> list[dict[str, torch.Tensor]]:
    """Rows with hidden states, enough for a regression."""
    training, size = TrainingRows(rows), session.recipe.train.micro_batch_rows
    chosen = range(min(len(rows), -(-tokens // rows.row_length)))
    batches = [
        collate([training[index] for index in chosen[first : first + size]]) for first in range(0, len(chosen), size)
    ]
    before_last = session.recipe.heads.shared_layers
    device = session.trunk.device
    with shared_trunk(session.recipe, session.trunk) as trunk:
        found = [with_hidden(batch, trunk, store, before_last=before_last) for batch in batches]
    # Rows come from the host; what is fitted, and layers that run again, are where the trunk is.
    return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in found]


def vocabulary_of(session: Session, rows: PackedRows) -> torch.Tensor | None:
    """Token ids of the draft vocabulary, or None where all tokens can be drafted."""
    trunk, wanted = session.trunk, session.recipe.heads.vocabulary
    tokens = trunk.tokens or trunk.unembedding.weight.shape[0]
    if isinstance(wanted, str):
        return load_vocabulary(wanted, tokens=tokens)
    # A tokenizer may have special tokens that the model does not embed.
    always = {token for token in (*session.ends, *session.tokenizer.all_special_ids) if token < tokens}
    return draft_vocabulary(rows, wanted, tokens=tokens, always=always)
