"""A chat endpoint on this machine that misbehaves as it is told."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class ChatServer(ThreadingHTTPServer):
    """Answers POST /v1/chat/completions with what `behave(prompt, n)` says, n counting the requests of that prompt.

    `behave` returns the reply, or: {"status", "body", "headers"}, "drop" as {"drop": True}, {"body": raw text},
    {"cut": text} to break off in the middle of a body, and {"wait": event} to hang until the event.
    """

    daemon_threads = True

    def __init__(self, behave: Callable[[str, int], Any]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behave = behave
        self.requests: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def prompts(self) -> list[str]:
        return [request["messages"][0]["content"] for request in self.requests]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is no error here."""


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server = self.server
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = asked["messages"][0]["content"]
        with server.lock:
            number = server.prompts.count(prompt)
            server.requests.append({**asked, "path": self.path, "authorization": self.headers["Authorization"]})
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            self._answer(server.behave(prompt, number))
        finally:
            with server.lock:
                server.at_once -= 1

    def _answer(self, what: Any) -> None:
        if isinstance(what, str):
            what = {"body": json.dumps({"choices": [{"message": {"role": "assistant", "content": what}}]})}
        if "wait" in what:
            what["wait"].wait()
            return
        if what.get("drop"):
            self.connection.close()
            return
        body = what.get("body", what.get("cut", "")).encode()
        self.send_response(what.get("status", 200))
        for name, value in what.get("headers", {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) + (7 if "cut" in what else 0)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.server.requests.append({"messages": [{"content": "GET"}], "path": self.path})
        self._answer("[[A]]")

    def log_message(self, *_: Any) -> None:
        """Silence."""


@contextlib.contextmanager
def serve(behave: Callable[[str, int], Any]) -> Iterator[ChatServer]:
    with ChatServer(behave) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
