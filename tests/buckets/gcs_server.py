"""A server of the JSON protocol of Google Cloud Storage, in this process, with objects in memory.

The emulators of the package registry do not know preconditions (ifGenerationMatch), on which locks and TensorStore's
gcs driver rest. This one has what gcsfs, TensorStore and Orbax use: uploads in one piece and in resumable pieces,
ranges, lists with delimiters and pages, rewrite, batches of deletions, and generations with their preconditions.

`faults` are asked before every request: they fail, delay or cut it, or kill somebody. Standalone, for trying commands:

    python -m tests.buckets.gcs_server --port=4443
"""

import argparse
import contextlib
import dataclasses
import email.parser
import email.policy
import json
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

_PAGE = 1000  # names in one answer to a list


@dataclasses.dataclass(frozen=True)
class Stored:
    """An object as it is; whoever changes it puts another in its place."""

    content: bytes
    generation: int
    metadata: dict


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request. `writes` tells whether it changes an object, `name` which one (or which prefix is listed)."""

    method: str
    bucket: str
    name: str
    writes: bool
    query: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Fault:
    """What becomes of a request: a status instead of an answer; a wait first; cut: after half of what it sends."""

    status: int = 0
    delay: float = 0.0
    cut: bool = False
    applied: bool = False  # the request takes effect, though its answer is lost


class Bucket:
    """The objects of one bucket, and the uploads that are not finished."""

    def __init__(self) -> None:
        self.objects: dict[str, Stored] = {}
        self.uploads: dict[str, dict] = {}


class GcsServer:
    """The server, on a free port of this machine.

    Attributes:
      buckets: name -> its objects; make one with `server.buckets["name"] = Bucket()`.
      faults: asked in turn about every request; the first that returns a Fault decides.
      asked: every request that came.
    """

    def __init__(self, port: int = 0) -> None:
        self.buckets: dict[str, Bucket] = {}
        self.faults: list[Callable[[Asked], Fault | None]] = []
        self.asked: list[Asked] = []
        self.lock = threading.RLock()
        self._histories: list[list[dict[str, Stored]]] = []
        self._generation = int(time.time() * 1e6)
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.gcs = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.environment = {"STORAGE_EMULATOR_HOST": self.url, "GOOGLE_CLOUD_PROJECT": "test"}

    def __enter__(self) -> "GcsServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        with self.lock:
            return sorted(name for name in self.buckets[bucket].objects if name.startswith(prefix))

    def content(self, bucket: str, name: str) -> bytes:
        return self.buckets[bucket].objects[name].content

    def put(self, bucket: str, name: str, content: bytes, metadata: dict | None = None) -> Stored:
        with self.lock:
            self._generation += 1
            stored = Stored(content, self._generation, metadata or {})
            self.buckets.setdefault(bucket, Bucket()).objects[name] = stored
            self.changed(bucket)
            return stored

    def changed(self, bucket: str) -> None:
        for history in self._histories:
            history.append(dict(self.buckets[bucket].objects))

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[dict[str, Stored]]]:
        """Within it, the list that is yielded gets all objects of a bucket after each change: what a kill then leaves.

        A process that is killed leaves nothing else: what it had not sent whole does not count.
        """
        history: list[dict[str, Stored]] = []
        self._histories.append(history)
        try:
            yield history
        finally:
            self._histories.remove(history)

    @contextlib.contextmanager
    def failing(self, fault: Callable[[Asked], Fault | None]) -> Iterator[None]:
        """Within it the server asks `fault` about every request."""
        self.faults.append(fault)
        try:
            yield
        finally:
            self.faults.remove(fault)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    gcs: GcsServer

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed is no news."""


class _Answer(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str = ""):
        super().__init__(message)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_PUT = do_DELETE = do_PATCH = do_GET  # names of http.server

    def _serve(self) -> None:
        body = self._body()
        asked = _read_request(self.command, self.path)
        gcs, fault = self.server.gcs, None
        with gcs.lock:
            gcs.asked.append(asked)
        for rule in list(gcs.faults):
            if fault := rule(asked):
                break
        fault = fault or Fault()
        time.sleep(fault.delay)
        if fault.status or (fault.cut and not fault.applied and asked.writes):
            self._send(fault.status or 500, _error(fault.status, "as the test asked"), {}, fault.cut)
            return
        try:
            status, content, headers = self._answer(asked, body)
        except _Answer as error:
            status, content, headers = error.status, _error(error.status, str(error)), {}
        self._send(status, content, headers, fault.cut)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        size = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size)
        if len(body) < size:  # the client was killed while it wrote: nothing of it counts
            raise ConnectionError
        return body

    def _send(self, status: int, content: bytes, headers: dict, cut: bool) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, asked: Asked, body: bytes) -> tuple[int, bytes, dict]:
        path = urlsplit(self.path).path
        if path.startswith("/batch/"):
            return self._batch(body)
        gcs = self.server.gcs
        with gcs.lock:
            if path == "/storage/v1/b" and self.command == "POST":
                gcs.buckets.setdefault(json.loads(body)["name"], Bucket())
                return 200, body, {}
            if asked.bucket not in gcs.buckets:
                raise _Answer(404, "The specified bucket does not exist.")
            bucket = gcs.buckets[asked.bucket]
            if path.startswith("/upload/"):
                return self._upload(bucket, asked, body)
            if copied := re.search(r"/o/([^/]+)/(?:rewriteTo|copyTo)/b/([^/]+)/o/([^/]+)$", path):
                return self._copy(bucket, *map(unquote, copied.groups()))
            if not re.search("/o(/|$)", path):
                return _json({"kind": "storage#bucket", "name": asked.bucket, "location": "US"})
            if path.endswith("/o"):
                return _json(_list(bucket, asked.query))
            if self.command == "DELETE":
                _check(bucket, asked)
                if bucket.objects.pop(asked.name, None) is None:
                    raise _Answer(404, "No such object")
                gcs.changed(asked.bucket)
                return 204, b"", {}
            return self._read(bucket, asked)

    def _read(self, bucket: Bucket, asked: Asked) -> tuple[int, bytes, dict]:
        _check(bucket, asked)
        stored = bucket.objects.get(asked.name)
        if stored is None:
            raise _Answer(404, "No such object")
        if asked.query.get("alt") != "media":
            return _json(_describe(asked.bucket, asked.name, stored))
        headers = {"Content-Type": "application/octet-stream", "X-Goog-Generation": str(stored.generation)}
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not match:
            return 200, stored.content, headers
        size = len(stored.content)
        first = int(match[1]) if match[1] else max(0, size - int(match[2]))
        last = min(int(match[2]) if match[1] and match[2] else size - 1, size - 1)
        if first >= size:
            raise _Answer(416, "Requested range not satisfiable")
        return 206, stored.content[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{size}"}

    def _upload(self, bucket: Bucket, asked: Asked, body: bytes) -> tuple[int, bytes, dict]:
        gcs, kind, number = self.server.gcs, asked.query.get("uploadType"), asked.query.get("upload_id")
        if number is not None:
            return self._resume(bucket, asked, number, body)
        if kind == "resumable":
            _check(bucket, asked)
            number = secrets.token_hex(8)
            said = json.loads(body or b"{}")
            name = asked.query.get("name") or said["name"]
            bucket.uploads[number] = {"name": name, "query": asked.query, "parts": b"", "metadata": said}
            place = f"{gcs.url}{self.path}&upload_id={number}"
            return 200, b"", {"Location": place}
        name, metadata = asked.query.get("name", ""), {}
        if kind == "multipart":
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
            first, second = message.iter_parts()  # type: ignore[attr-defined]
            metadata = json.loads(first.get_payload(decode=True))
            body, name = second.get_payload(decode=True), metadata.get("name", name)
        asked = dataclasses.replace(asked, name=name)
        _check(bucket, asked)
        return _json(_describe(asked.bucket, name, gcs.put(asked.bucket, name, body, metadata)))

    def _resume(self, bucket: Bucket, asked: Asked, number: str, body: bytes) -> tuple[int, bytes, dict]:
        upload = bucket.uploads.get(number)
        if upload is None:
            raise _Answer(404, "No such upload")
        if self.command == "DELETE":
            del bucket.uploads[number]
            return 499, b"", {}
        match = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", self.headers.get("Content-Range", ""))
        if match and match[1]:
            upload["parts"] = upload["parts"][: int(match[1])] + body
        elif not match:
            upload["parts"] = body
        if match and (match[3] == "*" or int(match[3]) > len(upload["parts"])):
            size = len(upload["parts"])
            return 308, b"", {"Range": f"bytes=0-{size - 1}"} if size else {}
        _check(bucket, dataclasses.replace(asked, name=upload["name"], query=upload["query"]))
        del bucket.uploads[number]
        stored = self.server.gcs.put(asked.bucket, upload["name"], upload["parts"], upload["metadata"])
        return _json(_describe(asked.bucket, upload["name"], stored))

    def _copy(self, bucket: Bucket, source: str, to_bucket: str, to: str) -> tuple[int, bytes, dict]:
        if source not in bucket.objects:
            raise _Answer(404, "No such object")
        stored = self.server.gcs.put(to_bucket, to, bucket.objects[source].content)
        size = str(len(stored.content))
        found = {"done": True, "objectSize": size, "totalBytesRewritten": size}
        return _json({**found, "resource": _describe(to_bucket, to, stored)})

    def _batch(self, body: bytes) -> tuple[int, bytes, dict]:
        parts = []
        for number, match in enumerate(re.finditer(rb"(DELETE) (\S+) HTTP/1.1", body), start=1):
            asked = _read_request("DELETE", urlsplit(match[2].decode()).path)
            with self.server.gcs.lock:
                self.server.gcs.asked.append(asked)
                gone = self.server.gcs.buckets[asked.bucket].objects.pop(asked.name, None)
                self.server.gcs.changed(asked.bucket)
            status = "404 Not Found" if gone is None else "204 No Content"
            parts.append(
                f"--batch_x\r\nContent-Type: application/http\r\nContent-ID: <response-{number}>\r\n\r\n"
                f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n\r\n"
            )
        content = "".join(parts) + "--batch_x--\r\n"
        return 200, content.encode(), {"Content-Type": "multipart/mixed; boundary=batch_x"}


def _read_request(method: str, target: str) -> Asked:
    parts = urlsplit(target)
    query = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
    found = re.match(r"(?:/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/([^/]+))?)?", parts.path)
    bucket, name = (unquote(found[1]), unquote(found[2] or "")) if found else ("", "")
    writes = method == "DELETE" or (method in ("POST", "PUT", "PATCH") and bool(bucket))
    return Asked(method, bucket, name or query.get("name") or query.get("prefix", ""), writes, query)


def _check(bucket: Bucket, asked: Asked) -> None:
    """The preconditions; generation 0 is that of an object that is not there."""
    stored = bucket.objects.get(asked.name)
    generation = str(stored.generation if stored else 0)
    if asked.query.get("ifGenerationMatch", generation) != generation:
        raise _Answer(412, "At least one of the pre-conditions you specified did not hold.")
    if asked.query.get("ifGenerationNotMatch") == generation:
        raise _Answer(304 if asked.method == "GET" else 412)


def _list(bucket: Bucket, query: dict[str, str]) -> dict:
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    first, end = query.get("startOffset", ""), query.get("endOffset", "")
    after, most = unquote(query.get("pageToken", "")), int(query.get("maxResults", _PAGE))
    items: list[dict] = []
    prefixes: list[str] = []
    for name in sorted(bucket.objects):
        if not name.startswith(prefix) or name <= after or name < first or (end and name >= end):
            continue
        below = name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
        folder = f"{prefix}{below[0]}{delimiter}" if below[1] else ""
        if folder and (after.startswith(folder) or folder in prefixes):
            continue
        if len(items) + len(prefixes) >= most:
            last = max([item["name"] for item in items] + [f"{folder}\x7f" for folder in prefixes])
            return {"kind": "storage#objects", "items": items, "prefixes": prefixes, "nextPageToken": quote(last)}
        if folder:
            prefixes.append(folder)
        else:
            items.append(_describe("", name, bucket.objects[name]))
    return {"kind": "storage#objects", "items": items, "prefixes": prefixes}


def _describe(bucket: str, name: str, stored: Stored) -> dict:
    moment = "2026-01-01T00:00:00.000Z"
    said = {"kind": "storage#object", "bucket": bucket, "name": name, "size": str(len(stored.content))}
    times = {"timeCreated": moment, "updated": moment}
    return {**said, **times, "generation": str(stored.generation), "metageneration": "1"}


def _json(value: dict) -> tuple[int, bytes, dict]:
    return 200, json.dumps(value).encode(), {}


def _error(status: int, message: str) -> bytes:
    return b"" if status == 304 else json.dumps({"error": {"code": status, "message": message}}).encode()


def main() -> None:
    flags = argparse.ArgumentParser(description="A server of buckets for trying commands; its objects go with it.")
    flags.add_argument("--port", type=int, default=4443)
    flags.add_argument("--bucket", default="bucket")
    options = flags.parse_args()
    with GcsServer(options.port) as server:
        server.buckets[options.bucket] = Bucket()
        print("\n".join(f"export {name}={value}" for name, value in server.environment.items()), flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
