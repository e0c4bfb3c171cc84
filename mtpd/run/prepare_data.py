"""Makes what training reads ahead of it: `mtpd data store` and `mtpd data vocab`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mtpd.data.disk_store import DiskStore
from mtpd.data.models import real_tokens, resolve_device
from mtpd.data.packing import PackedRows
from mtpd.data.prompts import Prompt
from mtpd.data.vocabulary import coverage, save_vocabulary
from mtpd.errors import UserError
from mtpd.parallel import ranks
from mtpd.recipe import Recipe
from mtpd.run.directory import open_together
from mtpd.run.material import fill_store, hidden_states, split_prompts, training_rows
from mtpd.run.new_heads import vocabulary_of
from mtpd.run.session import Session, start, with_fitting_defaults


def store_hidden_states(recipe: Recipe, *, progress: bool = True) -> Path:
    """Computes the hidden states of all training rows of a recipe ahead of training, by all ranks.

    The responses that they need are written into the run directory, where training finds them.

    Returns:
        The directory of the store.

    Raises:
        UserError, MtpdError: with one line that names the cause.
    """
    with _rows(recipe, progress=progress) as (session, rows, prompts):
        store = hidden_states(session, rows, prompts)
        assert isinstance(store, DiskStore)
        fill_store(session, rows, store)
    return store.directory


def count_vocabulary(recipe: Recipe, path: Path, *, progress: bool = True) -> tuple[int, float]:
    """Writes the draft vocabulary that a recipe means, from the responses that it trains on.

    Returns:
        How many tokens it has, and their share of the response tokens.

    Raises:
        UserError, MtpdError: with one line that names the cause.
    """
    with _rows(recipe, progress=progress) as (session, rows, _):
        vocabulary = vocabulary_of(session, rows)
        tokens = real_tokens(session.trunk.model, session.tokenizer)
        if vocabulary is None:
            raise UserError(
                f"heads.vocabulary: {recipe.heads.vocabulary} leaves nothing out; accepted: less than {tokens}, all "
                "tokens"
            )
        share = coverage(rows, vocabulary, tokens=tokens)
        if ranks.is_main():
            save_vocabulary(path, vocabulary, share=share)
    return len(vocabulary), share


@contextmanager
def _rows(recipe: Recipe, *, progress: bool) -> Iterator[tuple[Session, PackedRows, list[Prompt]]]:
    """Opens what a recipe trains on: rows, and the prompts that they answer."""
    with ranks.joined(resolve_device(recipe.device)):
        recipe = with_fitting_defaults(recipe)
        with start(recipe, open_together(recipe, fresh=False), progress=progress) as session:
            prompts = split_prompts(recipe).train
            yield session, training_rows(session, prompts), prompts
