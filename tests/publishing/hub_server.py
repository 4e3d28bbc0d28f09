"""A server on this machine that speaks as much of the Hugging Face hub's API as pushing a folder needs."""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_" + "secretsecretsecretsecretsecretsecr"


class Hub:
    """What the server holds and was asked.

    Attributes:
      repositories: name -> whether it is private; files: (name, branch) -> path -> content.
      refuses: part of an address -> status with which it is refused.
    """

    def __init__(self, server: ThreadingHTTPServer):
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        self.repositories: dict[str, bool] = {}
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.stored: dict[str, bytes] = {}  # of LFS, by sha256
        self.refuses: dict[str, int] = {}
        self.requests: list[tuple[str, str]] = []
        self.commits = 0

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, dict, str]:
        """Status, JSON and the hub's code of an error."""
        self.requests.append((method, path))
        for part, status in self.refuses.items():
            if part in path:
                return status, {"error": f"refused, as {TOKEN} says"}, ""
        if not path.startswith("/store/") and token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials in Authorization header"}, ""
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, ""
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.repositories[name] = asked["visibility"] == "private"
            return 200, {"url": f"{self.url}/{name}"}, ""
        if path.startswith("/store/"):
            self.stored[path.removeprefix("/store/")] = body
            return 200, {}, ""
        name = "/".join(path.removeprefix("/api/models/").strip("/").split("/")[:2]).removesuffix(".git")
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}, "RepoNotFound"
        return 200, self._of_repository(name, path, body), ""

    def _of_repository(self, name: str, path: str, body: bytes) -> dict:
        what, _, branch = path.removeprefix(f"/api/models/{name}").strip("/").partition("/")
        held = self.files.setdefault((name, branch), {})
        if path.endswith("/objects/batch"):
            objects = json.loads(body)["objects"]
            missing = {"actions": {"upload": {"href": f"{self.url}/store/{{}}"}}}
            for one in objects:
                if one["oid"] not in self.stored:
                    one |= json.loads(json.dumps(missing).replace("{}", one["oid"]))
            return {"objects": objects, "transfer": "basic"}
        if what == "preupload":
            files = json.loads(body)["files"]
            return {"files": [{"path": file["path"], "shouldIgnore": False, **_mode(file, held)} for file in files]}
        if what == "commit":
            self._commit(held, body)
            commit = f"{self.commits:040x}"
            return {"commitUrl": f"{self.url}/{name}/commit/{commit}", "commitOid": commit}
        return {"id": name, "private": self.repositories[name], "sha": f"{self.commits:040x}"}

    def _commit(self, held: dict[str, bytes], body: bytes) -> None:
        self.commits += 1
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                held[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                held[value["path"]] = self.stored[value["oid"]]


def _mode(file: dict, held: dict[str, bytes]) -> dict:
    content = held.get(file["path"], b"")
    is_large = file["path"].endswith(".safetensors")
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    oid = hashlib.sha256(content).hexdigest() if is_large else blob
    return {"uploadMode": "lfs" if is_large else "regular", "oid": oid if content else None}


@contextlib.contextmanager
def hub_server() -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self._body()
            path = self.path.partition("?")[0]
            status, found, code = hub.answer(self.command, path, body, self.headers.get("authorization", ""))
            content = json.dumps(found).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Content-Length": len(content)}.items():
                self.send_header(name, str(value))
            if code:
                self.send_header("X-Error-Code", code)
            self.end_headers()
            self.wfile.write(content)

        def _body(self) -> bytes:
            if "content-length" in self.headers:
                return self.rfile.read(int(self.headers["content-length"]))
            content = b""
            while "chunked" in self.headers.get("transfer-encoding", "") and (size := int(self.rfile.readline(), 16)):
                content += self.rfile.read(size)
                self.rfile.readline()
            return content

        do_GET = do_POST = do_PUT = _answer

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub = Hub(server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
