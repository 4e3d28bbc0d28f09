"""The chat client against a server that delays, fails, drops connections and returns nonsense."""

import dataclasses
import threading
import time
from email.utils import formatdate
from pathlib import Path

import pytest

from elbo_kto_jax.errors import UserError
from elbo_kto_jax.evaluation import endpoint
from elbo_kto_jax.evaluation.endpoint import Endpoint, Pace
from tests.evaluation.chat_server import ChatServer, serve

KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def client(server: ChatServer, cache: Path, **changes) -> Endpoint:
    settings = {"key": KEY, "temperature": 0.0, "parallel": 4, "requests_per_minute": 0.0, "timeout": 30.0}
    settings |= {"retries": 3, "backoff": 0.001, "base_url": server.url, "model": "judge-1", "cache": cache}
    return Endpoint(**{**settings, **changes})


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
        for endpoint in other:
            endpoint.ask(["a"])
        assert server.prompts.count("a") == 3


@pytest.mark.parametrize("content", [b"", b'{"prompt": "a", "repl', b"[]", b'{"prompt": "b", "reply": "x"}', b"\xff"])
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


@pytest.mark.parametrize("status", [400, 401, 403, 404, 302])
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


def test_an_address_with_a_password_is_shown_without():
    one = Endpoint("http://me:pw@host:8/v1", "m", "", 0.0, 1, 0.0, 1.0, 0, 0.0, Path("cache"))
    assert one.shown_url == "http://host:8/v1"


@pytest.mark.parametrize(
    "url", ["", "host/v1", "ftp://host", "http://", "http://host:port", "http://ho st", "http://[v"]
)
def test_addresses_that_are_none(url):
    with pytest.raises(UserError, match="OPENAI_BASE_URL: expected an address"):
        endpoint.check_url(url, "OPENAI_BASE_URL")


@pytest.mark.parametrize("key", ["a\nb", "a b", "schlüssel"])
def test_keys_that_no_header_can_carry(key):
    with pytest.raises(UserError, match="OPENAI_API_KEY: ") as refused:
        endpoint.check_key(key, "OPENAI_API_KEY")
    assert key not in str(refused.value)


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self):
        self.now, self.slept = 100.0, []

    def sleep(self, seconds: float) -> bool:
        self.slept.append(seconds)
        self.now += seconds
        return False


def test_requests_keep_their_distance():
    clock = Clock()
    pace = Pace(requests_per_minute=30, clock=lambda: clock.now, sleep=clock.sleep)
    for _ in range(4):
        pace.wait()
    assert clock.now == pytest.approx(106.0)  # 30 a minute are 2 seconds apart; the first does not wait


def test_retry_after_holds_every_request_back_and_a_failure_only_its_own():
    clock = Clock()
    pace = Pace(0, clock=lambda: clock.now, sleep=clock.sleep)
    pace.wait()
    pace.pause(17.0, own=False)
    assert clock.now == 100.0
    pace.wait()
    assert clock.now == pytest.approx(117.0)
    pace.pause(3.0, own=True)
    assert clock.now == pytest.approx(120.0)


def test_retry_after_is_obeyed(tmp_path, monkeypatch):
    """The pace is told what the header says, not the doubling pauses of other failures."""
    told = []
    monkeypatch.setattr(Pace, "pause", lambda self, seconds, own: told.append((seconds, own)))
    limit = {"status": 429, "headers": {"Retry-After": "17"}}
    with serve(lambda prompt, number: limit if number == 0 else "ok") as server:
        client(server, tmp_path).ask(["a"])
    assert told == [(17.0, False)]


def test_pauses_double_up_to_a_bound(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(Pace, "pause", lambda self, seconds, own: told.append(seconds))
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    with serve(lambda prompt, number: {"drop": True} if number < 8 else "ok") as server:
        client(server, tmp_path, retries=8, backoff=1.0).ask(["a"])
    assert told == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]


@pytest.mark.parametrize(
    ("value", "seconds"), [("3", 3.0), ("0.5", 0.5), ("soon", None), ("-1", None), ("nan", None), ("1e9", None)]
)
def test_retry_after(value, seconds):
    assert endpoint._retry_after(value) == seconds


def test_retry_after_as_a_date():
    later = formatdate(time.time() + 1800, usegmt=True)
    assert 1700 < endpoint._retry_after(later) <= 1800
    assert endpoint._retry_after(None) is None
