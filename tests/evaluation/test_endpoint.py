"""The chat client against a server that delays, fails, drops connections, returns nonsense and echoes keys."""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path

import openai
import pytest

from elbo_kto_jax.evaluation import client as client_module
from elbo_kto_jax.evaluation import session
from elbo_kto_jax.evaluation.address import check_key, check_url
from elbo_kto_jax.evaluation.endpoint import Endpoint
from elbo_kto_jax.evaluation.pace import Pace
from elbo_kto_jax.evaluation.replies import Failure, Reply, read_reply, retry_after
from elbo_kto_jax.runtime.errors import Interrupted, UserError
from tests.evaluation.chat_server import ChatServer, serve

KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    """No proxy, and pauses of milliseconds."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr(session, "backoff", lambda repeated: 0.001)


def client(server: ChatServer, cache: Path, **changes) -> Endpoint:
    settings = {"key": KEY, "temperature": 0.0, "parallel": 4, "requests_per_minute": 0.0, "timeout": 30.0}
    settings |= {"retries": 3, "base_url": server.url, "model": "judge-1", "cache": cache}
    return Endpoint(**{**settings, **changes})


def completion(content: object, finish_reason: str = "stop", **message) -> dict:
    """What a server says that ended for `finish_reason`."""
    choice = {"finish_reason": finish_reason, "message": {"role": "assistant", "content": content, **message}}
    return {"body": json.dumps({"choices": [choice]})}


def test_replies_come_in_order_and_equal_prompts_are_asked_once(tmp_path):
    prompts = [f"question {i % 20}" for i in range(50)]
    with serve(lambda prompt, _: f"to {prompt}: 👍") as server:
        assert client(server, tmp_path).ask(prompts) == [f"to {prompt}: 👍" for prompt in prompts]
    assert sorted(server.prompts) == sorted(set(prompts))
    first = server.requests[0]
    assert first["path"] == "/v1/chat/completions"
    assert first["authorization"] == f"Bearer {KEY}"
    assert (first["model"], first["temperature"]) == ("judge-1", 0.0)


def test_requests_are_sent_at_once_but_no_more_than_asked(tmp_path):
    """Three threads meet at a barrier, so three requests are in flight; the server never sees a fourth."""
    meeting = threading.Barrier(3, timeout=30)

    def behave(prompt: str, number: int) -> str:
        meeting.wait()
        return "ok"

    with serve(behave) as server:
        client(server, tmp_path, parallel=3).ask([str(i) for i in range(9)])
    assert server.most_at_once == 3


def test_nothing_is_asked_twice(tmp_path):
    with serve(lambda prompt, _: f"to {prompt}") as server:
        one = client(server, tmp_path)
        one.ask(["a", "b"])
        assert one.ask(["b", "c", "a"]) == ["to b", "to c", "to a"]
        assert server.prompts.count("a") == server.prompts.count("b") == 1
        other = [dataclasses.replace(one, model="judge-2"), dataclasses.replace(one, temperature=0.5)]
        for changed in [*other, dataclasses.replace(one, temperature=None)]:
            changed.ask(["a"])
        assert server.prompts.count("a") == 4
    assert "temperature" not in server.requests[-1]


@pytest.mark.parametrize(
    "content",
    [b"", b'{"prompt": "a", "repl', b"[]", b'{"prompt": "b", "reply": "x"}', b"\xff", b'{"prompt": "a", "reply": " "}'],
)
def test_a_damaged_reply_is_asked_again(tmp_path, content):
    with serve(lambda prompt, _: f"to {prompt}") as server:
        one = client(server, tmp_path)
        one.ask(["a"])
        (file,) = tmp_path.rglob("*.json")
        file.write_bytes(content)
        assert one.ask(["a"]) == ["to a"]
    assert server.prompts == ["a", "a"]


FAILURES = {
    "server error": {"status": 500, "body": "<html>oops"},
    "overloaded": {"status": 503},
    "rate limit": {"status": 429, "headers": {"Retry-After": "0"}},
    "rate limit, no word when": {"status": 429},
    "dropped": {"drop": True},
    "broken off": {"cut": '{"choices": [{"mess'},
    "no JSON": {"body": "<html>login</html>"},
    "no completion": {"body": '{"choices": []}'},
    "no text": {"body": '{"choices": [{"message": {"content": null}}]}'},
    "empty": completion(" \n"),
    "an error of status 200": {"body": '{"error": {"message": "slow down", "code": 429}}'},
    "an error in a choice": {"body": '{"choices": [{"error": {"message": "x", "code": 502}, "message": {}}]}'},
    "deep": {"body": "[" * 100_000},
    "not gzip": {"body": "{}", "headers": {"Content-Encoding": "gzip"}},
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_failures_that_pass_are_repeated(tmp_path, failure):
    with serve(lambda prompt, number: failure if number < 2 else f"to {prompt}") as server:
        assert client(server, tmp_path).ask(["a", "b", "c"]) == ["to a", "to b", "to c"]
    assert sorted(server.prompts) == sorted("abc" * 3)


def test_a_request_that_hangs_is_repeated(tmp_path):
    released = threading.Event()
    with serve(lambda prompt, number: {"wait": released} if number == 0 else "late") as server:
        assert client(server, tmp_path, timeout=0.3).ask(["a"]) == ["late"]
        released.set()
    assert server.prompts == ["a", "a"]


def test_failures_that_stay_end_the_work_and_keep_what_is_known(tmp_path):
    with serve(lambda prompt, _: {"drop": True} if prompt == "bad" else "fine") as server:
        one = client(server, tmp_path, parallel=1)
        with pytest.raises(UserError, match=r"127\.0\.0\.1:\d+/v1 failed 4 times.*\n.*the same command goes on"):
            one.ask(["a", "b", "bad", "c"])
        assert server.prompts.count("bad") == 4
        assert one.ask(["a", "b"]) == ["fine", "fine"]
        assert server.prompts.count("a") == 1


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 302])
def test_a_refusal_is_not_repeated_and_shows_no_key(tmp_path, status):
    said = f'{{"error": {{"message": "Incorrect API key provided: {KEY}"}}}}'
    with serve(lambda prompt, _: {"status": status, "body": said}) as server, pytest.raises(UserError) as refused:
        client(server, tmp_path).ask(["a"])
    assert server.prompts == ["a"]
    message = str(refused.value)
    assert f"HTTP {status} Incorrect API key provided: [key]" in message
    assert len(message.splitlines()) <= 2
    for error in (refused.value, refused.value.__cause__):
        assert KEY not in repr(error)


# ---- what concerns one prompt ----

NO_REPLY = {
    "cut off": completion("[[A]] is", "length"),
    "all tokens went into reasoning": completion("", "length", reasoning_content="Hm"),
    "filtered": completion(None, "content_filter"),
    "refused": completion(None, refusal="I cannot judge this."),
    "filtered, Azure's way": {"status": 400, "body": '{"error": {"message": "no", "code": "content_filter"}}'},
    "filtered, inside": {
        "status": 400,
        "body": '{"error": {"message": "no", "innererror": {"code": "ContentFilter"}}}',
    },
    "flagged": {"status": 400, "body": '{"error": {"message": "no", "code": "invalid_prompt"}}'},
    "too long": {"status": 400, "body": '{"error": {"message": "long", "code": "context_length_exceeded"}}'},
    "much too long": {"status": 413, "body": "<html>"},
    "filtered, in a body of status 200": {"body": '{"error": {"message": "no", "code": 403}}'},
    "reasoning only": completion("<think>[[A]]</think>"),
}


@pytest.mark.parametrize("what", NO_REPLY.values(), ids=NO_REPLY)
def test_a_prompt_without_a_reply_ends_nothing_and_is_asked_again_next_time(tmp_path, what, caplog):
    prompts = ["a", "bad", "b", "c"]
    with serve(lambda prompt, number: what if (prompt, number) == ("bad", 0) else f"to {prompt}") as server:
        one = client(server, tmp_path, parallel=1)
        assert one.ask(prompts) == ["to a", "", "to b", "to c"]
        assert server.prompts.count("bad") == 1
        assert "no reply to 1 of 4 questions" in caplog.text
        assert one.ask(prompts) == ["to a", "to bad", "to b", "to c"]
    assert [server.prompts.count(prompt) for prompt in prompts] == [1, 2, 1, 1]


def test_replies_that_stay_empty_are_none(tmp_path):
    with serve(lambda prompt, _: completion("")) as server:
        assert client(server, tmp_path, retries=2).ask(["a"]) == [""]
    assert len(server.prompts) == 3


def test_refusals_in_a_row_are_not_the_prompts(tmp_path):
    """Of 40 prompts the first two are answered, then every one is refused: it ends after ten."""
    refuse = {"status": 403, "body": '{"error": {"message": "key limit exceeded"}}'}
    message = r"HTTP 403 key limit exceeded;\nso it did with 10 in a row"
    with serve(lambda prompt, _: "fine" if int(prompt) < 2 else refuse) as server:
        one = client(server, tmp_path, parallel=1)
        with pytest.raises(UserError, match=message):
            one.ask([str(i) for i in range(40)])
    assert len(server.prompts) == 12


# ---- busy endpoints ----


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_a_busy_endpoint_that_makes_progress_is_waited_for(tmp_path, retries):
    """One request is let through at a time, and the others are sent away: the last of 30 waits for all before it."""
    gate, busy = threading.Semaphore(1), {"status": 429, "headers": {"Retry-After": "0.02"}}

    def behave(prompt: str, number: int):
        if not gate.acquire(blocking=False):
            return busy
        time.sleep(0.01)
        gate.release()
        return f"to {prompt}"

    prompts = [str(i) for i in range(30)]
    with serve(behave) as server:
        assert client(server, tmp_path, parallel=8, retries=retries).ask(prompts) == [f"to {p}" for p in prompts]
    assert len(server.prompts) > 40


def test_a_slow_endpoint_that_is_busy_with_others_is_waited_for(tmp_path):
    """One request takes far longer than all attempts of the other: that it is under way is reason enough to wait."""
    over, busy = threading.Event(), {"status": 429}

    def behave(prompt: str, number: int):
        if prompt == "slow":
            return "late" if over.wait(20) else busy
        if number == 12:
            over.set()
        return busy if not over.is_set() else "at last"

    with serve(behave) as server:
        assert client(server, tmp_path, parallel=2, retries=2).ask(["slow", "quick"]) == ["late", "at last"]


@pytest.mark.parametrize("status", [429, 503])
def test_an_endpoint_that_stays_busy_ends_the_work(tmp_path, status):
    busy = {"status": status, "body": "later", "headers": {"Retry-After": "0.01"}}
    with (
        serve(lambda prompt, _: busy) as server,
        pytest.raises(UserError, match=f"failed 3 times.*HTTP {status} later"),
    ):
        client(server, tmp_path, retries=2, parallel=1).ask(["a", "b"])
    assert server.prompts == ["a", "a", "a"]


def test_no_credit_is_not_waited_for(tmp_path):
    spent = {"status": 429, "body": '{"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}'}
    with serve(lambda prompt, _: spent) as server, pytest.raises(UserError, match="asks for payment: HTTP 429 You exc"):
        client(server, tmp_path, retries=0).ask(["a"])


def test_retry_after_is_obeyed(tmp_path, monkeypatch):
    """By the official client up to two minutes, by us up to an hour."""
    slept, sleep = [], asyncio.sleep

    async def note(seconds, *more):
        if seconds > 1:
            slept.append(seconds)
        await sleep(0)

    monkeypatch.setattr("anyio.sleep", note)
    monkeypatch.setattr("asyncio.sleep", note)
    waits = ["17", "1800", None]
    said = lambda number: {"status": 429, "headers": {"Retry-After": waits[number]}} if number < 2 else "ok"  # noqa: E731
    with serve(lambda prompt, number: said(number)) as server:
        assert client(server, tmp_path).ask(["a"]) == ["ok"]
    assert slept == [17.0, 1800.0]


# ---- settings that the endpoint does not take ----


@pytest.mark.parametrize(
    "said",
    [
        {"message": "Unsupported value: 'temperature' does not support 0.0 with this model."},
        {"message": "Unsupported parameter", "param": "temperature"},
        {"message": "`temperature` is deprecated for this model."},
    ],
)
def test_a_temperature_that_is_refused_names_the_flag(tmp_path, said):
    refuse = {"status": 400, "body": json.dumps({"error": said})}
    with serve(lambda prompt, _: refuse) as server, pytest.raises(UserError, match="--judge-temperature=1, or"):
        client(server, tmp_path).ask([str(i) for i in range(20)])
    assert len(server.prompts) <= 4


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("", r"/chat/completions: HTTP 404 .*\nOPENAI_BASE_URL usually ends in /v1, and this one does not"),
        ("/v1/chat/completions", r"/v1/chat/completions/chat/completions: .*\nOPENAI_BASE_URL ends before /chat/comp"),
        ("/v1/", r"/v1/chat/completions: .*\nOPENAI_BASE_URL usually ends in /v1$"),
    ],
)
def test_a_wrong_address_is_named(tmp_path, path, hint):
    with serve(lambda prompt, _: {"status": 404, "body": "404 page not found"}) as server:
        url = server.url.removesuffix("/v1") + path
        with pytest.raises(UserError, match=hint):
            client(server, tmp_path, base_url=url).ask(["a"])


def test_a_page_for_people_names_the_address_too(tmp_path):
    message = r"not a chat completion: '<html>Welcome.*\nOPENAI_BASE_URL usually ends in /v1, and this one does not"
    with serve(lambda prompt, _: {"body": "<html>Welcome</html>"}) as server:
        one = client(server, tmp_path, base_url=server.url.removesuffix("/v1"), retries=0)
        with pytest.raises(UserError, match=message):
            one.ask(["a"])


def test_a_query_goes_with_every_request(tmp_path):
    """As Azure wants it; its values are no part of what is shown, and those of a key are cut out."""
    with serve(lambda prompt, _: "the key is hunter2-hunter2") as server:
        url = f"{server.url}/deployments/j?api-version=2024-10&code=hunter2-hunter2"
        one = client(server, tmp_path, base_url=url)
        assert one.ask(["a"]) == ["the key is [key]"]
        assert "hunter2" not in repr(one)
    assert server.requests[0]["path"] == "/v1/deployments/j/chat/completions?api-version=2024-10&code=hunter2-hunter2"


# ---- deadlines and signals ----


@contextlib.contextmanager
def trickling(first: bytes, again: bytes) -> Iterator[tuple[str, list[int]]]:
    """A server that sends `first` and then `again` for ever; its address, and an entry per connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        over, connections = threading.Event(), []

        def trickle(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                connection.sendall(first)
                while not over.wait(0.02):
                    connection.sendall(again)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    connections.append(1)
                    threading.Thread(target=trickle, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1", connections
        over.set()
        listener.shutdown(socket.SHUT_RDWR)


TRICKLES = {
    "nothing": (b"", b""),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"X-More: x\r\n"),
    "one header": (b"HTTP/1.1 200 OK\r\nX-More: ", b"x"),
    "100 Continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "body": (b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b" "),
    "chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "body of an error": (b"HTTP/1.1 500 No\r\nContent-Length: 1000000\r\n\r\n", b" "),
}


@pytest.mark.parametrize(("first", "again"), TRICKLES.values(), ids=TRICKLES)
def test_an_attempt_has_one_deadline(tmp_path, first, again):
    with trickling(first, again) as (url, connections):
        one = Endpoint(url, "m", "", 0.0, 1, 0.0, timeout=0.4, retries=1, cache=tmp_path)
        began = time.monotonic()
        with pytest.raises(
            UserError, match=r"failed 2 times, the last time with: ReadTimeout: no whole reply within 0\.4"
        ):
            one.ask(["a"])
    assert 0.8 <= time.monotonic() - began < 3
    assert len(connections) == 2


def ends_soon(one: Endpoint) -> None:
    """Asks until it is interrupted, which must not take long."""
    began = time.monotonic()
    with pytest.raises(Interrupted, match="0 of 3 replies of the judge are kept; the same command goes on"):
        one.ask(["a", "b", "c"])
    assert time.monotonic() - began < 3


@pytest.mark.parametrize(("first", "again"), TRICKLES.values(), ids=TRICKLES)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_obeyed_while_a_reply_trickles(tmp_path, first, again, number, monkeypatch):
    before = signal.signal(number, signal.default_int_handler)  # as every command has it
    try:
        with trickling(first, again) as (url, _):
            threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
            ends_soon(Endpoint(url, "m", "", 0.0, 2, 0.0, 60.0, 6, tmp_path))
    finally:
        signal.signal(number, before)


def test_a_stop_is_obeyed_while_the_endpoint_asks_to_wait(tmp_path):
    with serve(lambda prompt, _: {"status": 429, "headers": {"Retry-After": "100"}}) as server:
        ends_soon(client(server, tmp_path, stop_requested=lambda: len(server.requests) > 0))


def test_a_name_that_is_looked_up_for_ever_holds_nothing_up(tmp_path, monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: over.wait())
    before = set(threading.enumerate())
    ends_soon(Endpoint("http://host.invalid/v1", "m", "", 0.0, 1, 0.0, 60.0, 6, tmp_path, stop_requested=_after(0.3)))
    assert all(thread.daemon for thread in set(threading.enumerate()) - before)
    over.set()


def _after(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def test_a_reply_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(client_module, "_MAX_REPLY", 1000)
    with serve(lambda prompt, _: "x" * 2000) as server, pytest.raises(UserError, match="the reply is too long"):
        client(server, tmp_path, retries=0).ask(["a"])


# ---- keys and passwords ----


def test_the_key_does_not_follow_a_redirect(tmp_path):
    with serve(lambda prompt, _: "stolen") as thief:
        moved = {"status": 302, "headers": {"Location": f"{thief.url}/chat/completions"}}
        with serve(lambda prompt, _: moved) as server, pytest.raises(UserError, match="HTTP 302"):
            client(server, tmp_path).ask(["a"])
    assert thief.requests == []


def test_a_key_that_is_echoed_is_stored_nowhere(tmp_path):
    with serve(lambda prompt, _: f"your key is {KEY}") as server:
        one = client(server, tmp_path)
        assert one.ask(["a"]) == ["your key is [key]"]
        assert KEY not in repr(one)
    assert all(KEY not in file.read_text() for file in tmp_path.rglob("*.json"))


def test_no_key_sends_no_header(tmp_path):
    with serve(lambda prompt, _: "ok") as server:
        client(server, tmp_path, key="").ask(["a"])
    assert server.requests[0]["authorization"] is None


def test_a_key_that_is_a_word_spoils_no_reply(tmp_path):
    with serve(lambda prompt, _: "[[A]]") as server:
        assert client(server, tmp_path, key="A").ask(["a"]) == ["[[A]]"]


@pytest.mark.parametrize("length", range(1, 400, 7))
def test_a_message_that_is_cut_shows_no_part_of_a_key(tmp_path, length):
    """Wherever the cut falls, ours or the endpoint's, no eight characters of the key are shown."""
    one = Endpoint("http://host/v1", "m", KEY, 0.0, 1, 0.0, 1.0, 0, tmp_path)
    for text in (f"{'x' * length}{KEY}", f"{'x ' * length}{KEY[: length % len(KEY)]}"):
        said = one.secrets.one_line(text)
        assert len(said) <= 300
        assert not any(KEY[i : i + 8] in said for i in range(len(KEY) - 7))


def test_a_password_in_the_address_is_sent_and_never_shown(tmp_path, caplog):
    """Neither in messages nor in what is kept, as it is, as the address writes it or as the header has it."""
    said = lambda prompt, _: "[[A]]" if prompt == "a" else {"status": 401, "body": f"bad: {sent()}, p@ss/word-1"}  # noqa: E731
    sent = lambda: server.requests[-1]["authorization"]  # noqa: E731
    with serve(said) as server:
        one = client(server, tmp_path, key="", base_url=server.url.replace("//", "//me:p%40ss%2Fword-1@"))
        assert one.ask(["a"]) == ["[[A]]"]
        assert sent() == "Basic bWU6cEBzcy93b3JkLTE="
        with pytest.raises(UserError, match=r"HTTP 401 bad: Basic \[key\], \[key\]") as refused:
            one.ask(["b"])
    kept = [file.read_text() for file in tmp_path.rglob("*.json")]
    for text in (*kept, str(refused.value), caplog.text, repr(one), one.shown_url):
        assert not any(secret in text for secret in ("p@ss", "p%40ss", "bWU6cEBzcy93b3JkLTE"))


def test_headers_and_proxies_of_the_environment_are_secrets_too(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "api-key: azure-secret-1\nX-Team: none")
    monkeypatch.setenv("https_proxy", "http://me:proxy-secret@proxy:3128")
    echo = {"status": 401, "body": "azure-secret-1 and proxy-secret"}
    with serve(lambda prompt, _: echo) as server, pytest.raises(UserError, match=r"HTTP 401 \[key\] and \[key\]"):
        client(server, tmp_path).ask(["a"])


def test_a_proxy_that_is_none_is_named_without_its_password(tmp_path, monkeypatch):
    monkeypatch.setenv("all_proxy", "nonsense://me:proxy-secret@proxy:3128")
    with serve(lambda prompt, _: "ok") as server, pytest.raises(UserError, match="cannot be set up") as refused:
        client(server, tmp_path).ask(["a"])
    assert "proxy-secret" not in str(refused.value)


def test_the_logs_of_the_client_are_silent(tmp_path, monkeypatch, caplog):
    caplog.set_level("DEBUG")
    with serve(lambda prompt, _: "ok") as server:
        client(server, tmp_path, base_url=f"{server.url}?code=hunter2-hunter2").ask(["a"])
    assert "hunter2" not in caplog.text


def test_an_error_cannot_write_to_the_terminal(tmp_path):
    colour = {"status": 401, "body": "\x1b]0;title\x07\x1b[31mred\r\nagain"}
    with serve(lambda prompt, _: colour) as server, pytest.raises(UserError) as refused:
        client(server, tmp_path).ask(["a"])
    assert str(refused.value).isprintable()


def test_halves_of_characters_are_sent_as_something_else(tmp_path):
    with serve(lambda prompt, _: "ok") as server:
        assert client(server, tmp_path).ask(["a\ud800"]) == ["ok"]
    assert server.prompts == ["a\ufffd"]


def test_an_address_with_a_password_is_shown_without():
    one = Endpoint("http://me:pw@host:8/v1", "m", "", 0.0, 1, 0.0, 1.0, 0, Path("cache"))
    assert one.shown_url == "http://host:8/v1"
    assert "pw" not in repr(one)


@pytest.mark.parametrize(
    "url",
    ["http://me:1/secret@host/v1", "http://me:1?secret@host", "http://me:1#secret@host", "http://me:x/secret@host"],
)
def test_a_password_that_is_no_part_of_an_address_is_not_shown(url):
    with pytest.raises(UserError, match="OPENAI_BASE_URL: ") as refused:
        check_url(url, "OPENAI_BASE_URL")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "url", ["", "host/v1", "ftp://host", "http://", "http://host:port", "http://ho st", "http://[v"]
)
def test_addresses_that_are_none(url):
    with pytest.raises(UserError, match="OPENAI_BASE_URL: expected an address"):
        check_url(url, "OPENAI_BASE_URL")


@pytest.mark.parametrize("key", ["a\nb", "a b", "schlüssel"])
def test_keys_that_no_header_can_carry(key):
    with pytest.raises(UserError, match="OPENAI_API_KEY: ") as refused:
        check_key(key, "OPENAI_API_KEY")
    assert key not in str(refused.value)


# ---- pace and reading ----


def test_requests_keep_their_distance(monkeypatch):
    now = [100.0]

    async def sleep(seconds):
        now[0] += seconds

    async def four_requests():
        pace = Pace(requests_per_minute=30, clock=lambda: now[0])
        for _ in range(4):
            await pace.wait()

    monkeypatch.setattr("asyncio.sleep", sleep)
    asyncio.run(four_requests())
    assert now[0] == pytest.approx(106.0)  # 30 a minute are 2 seconds apart; the first does not wait


def test_attempts_keep_their_distance_too(tmp_path):
    times = []
    behave = lambda prompt, number: times.append(time.monotonic()) or ({"drop": True} if number < 3 else "ok")  # noqa: E731
    with serve(behave) as server:
        client(server, tmp_path, requests_per_minute=600).ask(["a"])
    assert min(b - a for a, b in itertools.pairwise(times)) > 0.08


def stream(*events: object) -> bytes:
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"


def delta(content: object, **more) -> dict:
    return {"choices": [{"delta": {"content": content}, **more}]}


PARTS = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "[[A]]"}]


@pytest.mark.parametrize(
    ("body", "reply"),
    [
        (completion("[[A]]")["body"].encode(), Reply("[[A]]")),
        (b"\xef\xbb\xbf" + completion("[[A]]")["body"].encode(), Reply("[[A]]")),
        (completion(PARTS)["body"].encode(), Reply("[[A]]")),
        (completion("[[A]]", reasoning_content="B?")["body"].encode(), Reply("[[A]]")),
        (completion("[[A]]", finish_reason="end_turn")["body"].encode(), Reply("[[A]]")),
        (stream(delta("[["), delta("A]]"), delta(None, finish_reason="stop")), Reply("[[A]]")),
        (b": comment\n\n" + stream(delta("[[A]]")), Reply("[[A]]")),
        (completion(None)["body"].encode(), Reply("")),
    ],
)
def test_read_reply(body, reply):
    assert read_reply(body) == reply


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"null", b"[]", b"1", b"{}", b'{"choices": 1}', b'{"choices": [1]}', b'{"choices": [{"message": 1}]}'),
        *(b'{"choices": [{"message": {"content": 1}}]}', b'{"choices": [{"message": {"content": [1]}}]}'),
        *(b'{"error": "no"}', b'{"error": {"code": {}}}', b"data: {", b"data: 1", b"\xff\xfe"),
    ],
)
def test_what_is_no_completion_is_a_failure(body):
    with pytest.raises(Failure):
        read_reply(body)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("3", 3.0), ("0.5", 0.5), ("soon", None), ("-1", None), ("nan", None), ("1e9", None), ("3600", 3600.0)],
)
def test_retry_after(value, seconds):
    assert retry_after({"retry-after": value}) == seconds


def test_retry_after_as_a_date():
    later = formatdate(time.time() + 1800, usegmt=True)
    assert 1700 < retry_after({"retry-after": later}) <= 1800
    assert retry_after({}) is None
