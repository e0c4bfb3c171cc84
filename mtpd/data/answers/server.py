"""Answers by a server with OpenAI's interface for completions: vLLM, SGLang, llama.cpp's.

Prompts go as token ids, and ids come back where the server gives them (vLLM and those that know `return_token_ids`, and
llama.cpp in its own form); elsewhere the text is tokenised, and a warning says so. Many requests are under way at a
time. What fails for a while (no connection, a timeout, 429, 5xx, an answer that breaks off) is asked again, with pauses
that double.
"""

from __future__ import annotations

import logging
import os
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import TYPE_CHECKING, Any

from mtpd.data.answers import llama_cpp
from mtpd.data.answers.file import ids_of_text
from mtpd.data.answers.kept import are_ids
from mtpd.data.answers.task import Answered, Task, until_end
from mtpd.errors import MtpdError, UserError

if TYPE_CHECKING:
    import httpx2
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

KEYS = ("MTPD_API_KEY", "OPENAI_API_KEY")
"""Environment variables of which the first that is set has the server's key."""
TRIES, TRIES_AT_FIRST = 12, 3
"""Times that a request is made before the run ends: about six minutes, in which a server can start again. Before
anything was answered, a wrong address is the likelier cause."""
PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds before the second try, and at most before any."""
MOST_REFUSED = 8
"""Prompts that a server may refuse, beside a tenth of those that it answers."""
CONNECT, READ = 10.0, 900.0
"""Seconds that a connection and an answer may take."""
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
"""Answers of a server that may be others in a while."""
EXTENDED: dict[str, Any] = {
    "return_token_ids": True,
    "skip_special_tokens": False,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
"""What OpenAI's interface does not have: ids of the answer, and nothing of the checkpoint's generation settings."""


class _Again(Exception):
    """A failure that may pass."""

    def __init__(self, words: str, after: float | None = None) -> None:
        super().__init__(words)
        self.after = after


class _Refused(UserError):
    """A request that the server does not understand."""


class Server:
    """A server that answers prompts.

    Args:
        url: with or without `/v1`.
        model: the recipe's; where the server has several, the one of this name is asked.
        ends: ids that end an answer.
        tokens: how many tokens the model has.
        at_a_time: requests under way at most.
        key: what messages call the address.
        kept: what a message says of the answers there are, where the server fails for good.
        on_answer: called with each task and all that the server said of its answer.

    Raises:
        UserError: there is no such server, or it wants a key.
    """

    def __init__(
        self,
        url: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        model: str,
        ends: Sequence[int],
        tokens: int,
        temperature: float,
        top_p: float,
        max_new_tokens: int,
        at_a_time: int,
        key: str = "data.responses",
        kept: str = "; what was answered is kept, and the same command goes on with the rest",
        on_answer: Callable[[Task, Mapping[str, Any]], None] = lambda task, answer: None,
    ) -> None:
        import httpx2  # needed with a server alone

        self._key, self._kept, self._on_answer = key, kept, on_answer
        self.url = url.rstrip("/").removesuffix("/v1")
        self.at_a_time = at_a_time
        self._tokenizer, self._ends, self._tokens = tokenizer, list(ends), tokens
        secret = next((os.environ[name] for name in KEYS if os.environ.get(name)), None)
        self._client = httpx2.Client(
            headers={"Authorization": f"Bearer {secret}"} if secret else {},
            timeout=httpx2.Timeout(READ, connect=CONNECT, pool=None),
            limits=httpx2.Limits(max_connections=at_a_time, max_keepalive_connections=at_a_time),
        )
        self._stop = threading.Event()
        self._warned = threading.Lock()
        self._body: dict[str, Any] = {
            "model": self._model(model),
            "temperature": temperature,
            "top_p": top_p if temperature > 0 else 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }
        self.max_new_tokens = max_new_tokens
        self.further: Mapping[str, Any] = {}
        """What each request asks for besides."""
        self._as_text = self._llama_cpp = False
        self._find_form()

    def __call__(self, tasks: Sequence[Task]) -> Iterator[Answered]:
        """Tasks with their answers, as they come.

        Raises:
            MtpdError: the server failed again and again.
            UserError: it refuses a request, or answers another one.
        """
        self._stop.clear()
        waiting = iter(tasks)
        pending: set[Future[Answered]] = set()
        failure: MtpdError | None = None
        refused = answered_before = 0
        with ThreadPoolExecutor(self.at_a_time) as pool:
            try:
                while True:
                    while (
                        failure is None
                        and len(pending) < 2 * self.at_a_time
                        and (task := next(waiting, None)) is not None
                    ):
                        pending.add(pool.submit(self._answer, task))
                    if not pending:
                        break
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for future in done:
                        try:
                            answered = future.result()
                        except _Refused as error:
                            # One prompt that is too long for the server, say, ends no run.
                            refused += 1
                            if refused == 1:
                                logger.warning("%s; such prompts have no response", error)
                            if refused > MOST_REFUSED + answered_before // 10:
                                failure = failure or error
                            continue
                        except MtpdError as error:
                            failure = failure or error
                            self._stop.set()
                            # What is under way still comes; nothing is asked for twice.
                            pending = {each for each in pending if not each.cancel()}
                            continue
                        answered_before += 1
                        yield answered
            finally:
                self._stop.set()
                for future in pending:
                    future.cancel()
        if failure is not None:
            raise failure

    def page(self, path: str) -> str | None:
        """What the server has at a path beside OpenAI's interface, such as /metrics; None where it has nothing.

        Raises:
            MtpdError: the server failed again and again.
        """
        return self._patiently(lambda: self._text(path), TRIES_AT_FIRST)

    def _text(self, path: str) -> str | None:
        import httpx2

        try:
            answer = self._client.get(self.url + path)
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise _Again(str(error) or type(error).__name__) from error
        return str(answer.text) if answer.status_code == 200 else None

    def close(self) -> None:
        """Ends the connections."""
        self._client.close()

    def _model(self, wanted: str) -> str:
        """The name under which the server has the model."""
        answer = self._patiently(lambda: self._request("GET", "/v1/models", None), TRIES_AT_FIRST)
        names = [each.get("id") for each in answer.get("data", []) if isinstance(each, dict)]
        names = [name for name in names if isinstance(name, str)]
        if not names:
            raise UserError(f"{self._key}: {self.url}: serves no model; accepted: a server with OpenAI's interface")
        return str(wanted if wanted in names else names[0])

    def _find_form(self) -> None:
        """Asks for one token, to see whether the server takes token ids, and what OpenAI's interface does not have.

        Raises:
            UserError: it answers in no form.
        """
        extended = {**EXTENDED, "stop_token_ids": self._ends}
        for further, as_text in ((extended, False), ({}, False), ({}, True)):
            body = {**self._body, **further, "prompt": "a" if as_text else self._ends[:1] or [0], "max_tokens": 1}
            try:
                answer = self._patiently(partial(self._request, "POST", "/v1/completions", body), TRIES_AT_FIRST)
            except _Refused:
                if as_text:
                    raise
                continue
            self._body |= further
            self._as_text = as_text
            self._llama_cpp = llama_cpp.is_llama_cpp(answer)
            if as_text:
                logger.warning("%s takes no token ids: it tokenises the text of the prompts itself", self.url)
            return

    def _answer(self, task: Task) -> Answered:
        text = str(self._tokenizer.decode(task.ids, skip_special_tokens=False)) if self._as_text else None
        body = {**self._body, **self.further, "max_tokens": self.max_new_tokens}
        body["prompt"] = task.ids if text is None else text
        return task, self._patiently(lambda: self._response(task, body), TRIES)

    def _response(self, task: Task, body: dict[str, Any]) -> list[int]:
        if self._llama_cpp:
            answer = llama_cpp.as_openai(self._request("POST", llama_cpp.PATH, llama_cpp.as_own(body)))
        else:
            answer = self._request("POST", "/v1/completions", body)
        try:
            choice = answer["choices"][0]
            reason, text, ids = choice.get("finish_reason"), choice["text"], choice.get("token_ids")
            seen = choice.get("prompt_token_ids", answer.get("prompt_token_ids"))
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise _Again("an answer without a choice") from error
        place = f"{self._key}: {self.url}: prompt {task.prompt.id}"
        if seen is not None and seen != task.ids:
            raise UserError(f"{place}: the server read other tokens than it was asked with ({len(seen)} of them)")
        self._on_answer(task, answer)
        if ids is None:
            self._warn_of_text()
            return ids_of_text(self._tokenizer, text, self._ends, ended=reason == "stop")
        if not are_ids(ids) or any(token >= self._tokens for token in ids):
            raise UserError(f"{place}: it has tokens that the model has not; accepted: 0 to {self._tokens - 1}")
        found = until_end(ids[: body["max_tokens"]], frozenset(self._ends))
        if not found:
            raise _Again("an empty answer")
        return found

    def _request(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        """The JSON that the server answers with."""
        import httpx2

        try:
            answer = self._client.request(method, self.url + path, json=body)
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
            raise UserError(f"{self._key}: {self.url}: {error}") from error
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise _Again(str(error) or type(error).__name__) from error
        if answer.status_code in AGAIN:
            raise _Again(f"status {answer.status_code}", _seconds(answer))
        if answer.status_code in (401, 403):
            raise UserError(
                f"{self._key}: {self.url}: status {answer.status_code}, it wants a key; accepted: one in the "
                f"environment variable {KEYS[0]}"
            )
        if answer.status_code != 200:
            said = " ".join(answer.text.split())[:200]
            raise _Refused(f"{self._key}: {self.url}{path}: status {answer.status_code}: {said}")
        try:
            found = answer.json()
        except ValueError as error:
            raise _Again("an answer that is no JSON") from error
        if not isinstance(found, dict):
            raise _Again("an answer that is no JSON object")
        return found

    def _patiently(self, ask: Callable[[], Any], tries: int) -> Any:
        """Asks until there is an answer, with pauses that double."""
        for number in range(1, tries + 1):
            try:
                return ask()
            except _Again as error:
                if number == tries or self._stop.is_set():
                    raise MtpdError(f"{self._key}: {self.url}: {error}, {number} times{self._kept}") from error
                pause = min(LONGEST_PAUSE, PAUSE * 2 ** (number - 1)) * (0.5 + random.random() / 2)
                self._stop.wait(max(pause, min(error.after or 0.0, LONGEST_PAUSE)))
        raise AssertionError

    def _warn_of_text(self) -> None:
        if self._warned.acquire(blocking=False):
            logger.warning(
                "%s returns no token ids: its text is tokenised here, and may have other tokens than the model wrote; "
                "vLLM returns ids",
                self.url,
            )


def _seconds(answer: httpx2.Response) -> float | None:
    """The pause that the server asks for."""
    try:
        return float(answer.headers.get("retry-after", ""))
    except ValueError:
        return None
