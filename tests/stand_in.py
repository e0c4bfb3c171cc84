"""An HTTP server in a thread, in the place of a serving engine, for what goes wrong between the two."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Ids = tuple[int, ...] | str


class StandIn:
    """Answers prompts from a table, after the faults that it is told.

    Attributes:
        faults: what happens to the next requests, by name; then all goes well.
        asked: prompts of all requests, but for those of one token that see what the server takes.
        served: prompts that were answered.
    """

    def __init__(self, answers: Mapping[Ids, Sequence[int]], *, port: int = 0, ids: bool = True) -> None:
        self.answers, self.ids = answers, ids
        self.faults: list[str] = []
        self.refuses: set[str] = set()
        self.refuses_ids = False
        self.key: str | None = None
        self.texts: Any = None
        self.asked: list[Ids] = []
        self.served: list[Ids] = []
        self.bodies: list[dict[str, Any]] = []
        self.dies_after: int | None = None
        self.pages: dict[str, str] = {}
        self.rounds: Mapping[Ids, Sequence[tuple[int, int]]] | None = None
        """By prompt, drafted and accepted of each round: then answers and /metrics tell of them, as the engine does."""
        self.counted = True
        self.engine = "vllm"
        """Or llamacpp, or sglang."""
        self.others = 0
        """Tokens that other users get with each answer."""
        self._lock = threading.Lock()
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                page = stand_in.page(self.path)
                if page is not None:
                    send(self, 200, page.encode())
                elif self.path == "/v1/models":
                    stand_in.models(self)
                else:
                    send(self, 404, b"not found")

            def do_POST(self) -> None:
                stand_in.complete(self)

            def log_message(self, *args: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args: Any) -> None:
                pass

        self.server = Quiet(("127.0.0.1", port), Handler)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def models(self, handler: BaseHTTPRequestHandler) -> None:
        if self.key is not None and handler.headers.get("Authorization") != f"Bearer {self.key}":
            send(handler, 401, b"{}")
            return
        send(handler, 200, json.dumps({"data": [{"id": "other"}, {"id": "mine"}]}).encode())

    def page(self, path: str) -> str | None:
        if path != "/metrics" or path in self.pages or self.rounds is None:
            return self.pages.get(path)
        with self._lock:
            rounds = [each for prompt in self.served for each in self.rounds[prompt]]
            tokens = sum(len(self.answers[prompt]) + self.others for prompt in self.served)
        depth = max(drafted for each in self.rounds.values() for drafted, _ in each)
        if self.engine == "sglang":
            return f"sglang:generation_tokens_total {tokens}.0\nsglang:spec_verify_calls_total {len(rounds)}.0\n"
        name = f"{self.engine}:spec_decode_num_accepted_tokens_per_pos_total"
        counted = "tokens_predicted_total" if self.engine == "llamacpp" else "generation_tokens_total"
        lines = [f"{self.engine}:{counted} {tokens}.0", f"{self.engine}:spec_decode_num_drafts_total {len(rounds)}.0"]
        lines += [f'{name}{{position="{k}"}} {sum(accepted > k for _, accepted in rounds)}.0' for k in range(depth)]
        return "".join(f"{line}\n" for line in lines)

    def complete(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        own = handler.path == "/completion"
        if own:
            body["max_tokens"] = body["n_predict"]
        with self._lock:
            self.bodies.append(body)
            if unknown := self.refuses & body.keys():
                send(handler, 400, json.dumps({"message": f"unknown field {sorted(unknown)}"}).encode())
                return
            if self.refuses_ids and not isinstance(body["prompt"], str):
                send(handler, 422, b'{"message": "prompt: a string is expected"}')
                return
            if body["max_tokens"] == 1:
                further = {"timings": {"predicted_n": 1}} if self.engine == "llamacpp" else {}
                choices = [{"text": "a", "finish_reason": "length"}]
                send(handler, 200, json.dumps({"choices": choices, **further}).encode())
                return
            prompt = body["prompt"] if self.refuses_ids else tuple(body["prompt"])
            self.asked.append(prompt)
            fault = self.faults.pop(0) if self.faults else None
            if self.dies_after is not None and len(self.served) >= self.dies_after:
                fault = "half"
        if fault in ("429", "500", "503"):
            send(handler, int(fault), b"busy", {"Retry-After": "0"})
            return
        if fault == "400":
            send(handler, 400, b'{"message": "This model\'s maximum context length is 8 tokens"}')
            return
        if fault == "timeout":
            time.sleep(1.0)
        content = json.dumps(self.own_answer(prompt, body) if own else self.answer(prompt, fault, body)).encode()
        if fault == "no json":
            content = b"<html>"
        if fault == "half":
            send(handler, 200, content[: len(content) // 2], {"Content-Length": str(len(content))})
            handler.close_connection = True
            return
        with self._lock:
            self.served.append(prompt)
        send(handler, 200, content)

    def answer(self, prompt: Ids, fault: str | None, body: dict[str, Any]) -> dict[str, Any]:
        ids = list(self.answers[prompt])[: body["max_tokens"]]
        choice: dict[str, Any] = {"text": "", "finish_reason": "length" if len(ids) == body["max_tokens"] else "stop"}
        if self.texts is not None:
            choice["text"] = self.texts(ids)
        if self.ids and body.get("return_token_ids"):
            choice |= {"token_ids": ids, "prompt_token_ids": list(prompt)}
        if fault == "wrong prompt":
            choice["prompt_token_ids"] = [1, 2, 3]
        if fault == "wrong ids":
            choice["token_ids"] = [10**6]
        found: dict[str, Any] = {"choices": [choice]}
        if self.rounds is not None and self.engine == "sglang":
            if body.get("return_spec_tokens_details") and self.counted:
                accepted = [each for _, each in self.rounds[prompt]]
                histogram = [accepted.count(n) for n in range(max(accepted) + 1)]
                found["sglext"] = {"spec_tokens_details": {"spec_correct_drafts_histogram": histogram}}
        elif self.rounds is not None and self.counted:
            drafted, accepted = zip(*self.rounds[prompt], strict=True)
            steps = {"per_step_drafted": list(drafted), "per_step_accepted": list(accepted)}
            found["metrics"] = {"speculative_decoding": steps}
        return {} if fault == "no choice" else found

    def own_answer(self, prompt: Ids, body: dict[str, Any]) -> dict[str, Any]:
        """llama.cpp's own form."""
        ids = list(self.answers[prompt])[: body["max_tokens"]]
        drafted, accepted = (sum(each) for each in zip(*(self.rounds or {})[prompt], strict=True))
        timings = {"predicted_n": len(ids)} | ({"draft_n": drafted, "draft_n_accepted": accepted} if drafted else {})
        stop = "limit" if len(ids) == body["max_tokens"] else "eos"
        return {"content": "", "tokens": ids, "tokens_predicted": len(ids), "stop_type": stop, "timings": timings}


def send(
    handler: BaseHTTPRequestHandler, status: int, content: bytes, headers: Mapping[str, str] | None = None
) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(content)
