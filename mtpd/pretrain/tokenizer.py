"""The tokenizer of a pretraining run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers.implementations.byte_level_bpe import ByteLevelBPETokenizer
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from mtpd.errors import UserError
from mtpd.files import replacing
from mtpd.parallel import ranks
from mtpd.recipe.pretrain import BPE, PretrainRecipe

END = "<|endoftext|>"
CHARACTERS = 200_000_000
"""Of the text, from its beginning, that a BPE is trained on: more does not change its merges."""
FOLDER = "tokenizer"
"""In a run directory: a tokenizer that was trained."""


def tokenizer_of(recipe: PretrainRecipe, texts: Iterable[str]) -> Any:
    """Gives the tokenizer that a recipe names; a BPE is trained on the texts, once in a run.

    Raises:
        UserError: it cannot be loaded, or the texts have not enough to train it on.
    """
    name = recipe.tokenizer or "bytes"
    if name == "bytes":
        # No sentinels: one token a byte, and padding, end and unknown.
        return ByT5Tokenizer(extra_ids=0)
    if name.startswith(BPE):
        folder = recipe.output / FOLDER
        ranks.once(
            folder / "tokenizer.json",
            lambda: _trained(int(name.removeprefix(BPE)), texts),
            lambda tokenizer: _save(tokenizer, folder),
        )
        name = str(folder)
    return load_tokenizer(name)


def load_tokenizer(name: str) -> Any:
    """Loads the tokenizer of a hub id or directory.

    Raises:
        UserError: it cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"tokenizer: {name} cannot be loaded ({reason}); accepted: bytes, bpe:N, a hub id, a directory"
        ) from error


def _trained(size: int, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    trainer = ByteLevelBPETokenizer()
    settings: dict[str, Any] = {"min_frequency": 2, "special_tokens": [END], "show_progress": False}
    trainer.train_from_iterator(_first(texts), vocab_size=size, **settings)
    found = trainer.get_vocab_size()
    if found < size:
        raise UserError(
            f"tokenizer: {BPE}{size} is more than the text can train, which has merges for {found} tokens; accepted: "
            f"at most {BPE}{found}, or more text"
        )
    return PreTrainedTokenizerFast(tokenizer_object=trainer._tokenizer, eos_token=END, pad_token=END)


def _first(texts: Iterable[str]) -> Iterator[str]:
    left = CHARACTERS
    for text in texts:
        yield text
        left -= len(text)
        if left <= 0:
            return


def _save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    with replacing(folder) as beside:
        tokenizer.save_pretrained(beside)
