"""Responses that another program writes: a server, or whatever wrote a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mtpd.data.answers.file import FileAnswers
from mtpd.data.answers.server import Server
from mtpd.data.responses import Others
from mtpd.parallel import ranks
from mtpd.run.session import Session


@contextmanager
def other_answers(
    session: Session, *, training: bool, temperature: float, top_p: float, max_new_tokens: int
) -> Iterator[Others | None]:
    """Opens what `data.responses` names; None where the trunk answers in this process.

    A server answers the training prompts. A file may also have responses to prompts that are measured on; what it lacks
    of those, the trunk answers.
    """
    recipe, data = session.recipe, session.recipe.data
    tokens = int(session.trunk.model.config.get_text_config(decoder=True).vocab_size)
    if data.responses_file is not None and (training or recipe.trunk.train == "frozen"):
        path = Path(data.responses_file).expanduser()
        answers = FileAnswers(path, session.tokenizer, ends=session.ends, tokens=tokens, key="data.responses")
        yield Others(answers, data.responses_file, rest=not training)
    elif data.server is not None and training:
        server = Server(
            data.server,
            session.tokenizer,
            model=recipe.model,
            ends=session.ends,
            tokens=tokens,
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            at_a_time=max(1, data.generation_batch // ranks.count()),
        )
        try:
            yield Others(server, data.server)
        finally:
            server.close()
    else:
        yield None
