"""Requests: what is tried again, what ends them, what is never shown."""

import asyncio
import base64
import gzip
import io
import json
import pickle
import random
import signal
import threading
import time

import httpx2
import numpy as np
import pytest
from fault_server import drip, endless, faults, hang_up, reply, slow
from PIL import Image

from trl_dgpo.rewards import http
from trl_dgpo.rewards.http import JSONService, ServiceError, ServiceUnavailableError
from trl_dgpo.rewards.scoring import RewardOutputError


SECRET = "sk-very-secret-1234"


@pytest.fixture(autouse=True)
def quick_backoff(monkeypatch):
    monkeypatch.setattr(http, "_BACKOFF", 0.01)


def service(server, **options):
    return JSONService(
        getattr(server, "url", server), **{"timeout": 5.0, "retries": 2, "max_concurrency": 4} | options
    )


def post(server, value=None, **options):
    [answer] = service(server, **options).post("/score", [lambda: value])
    return answer


def test_a_request_and_its_reply():
    with faults(reply({"a": [1, 2.5, None, "ü"]})) as server:
        assert post(server, {"x": "ü"}) == {"a": [1, 2.5, None, "ü"]}
    [(call, headers, body)] = server.requests
    assert (call, body) == ("POST /score", {"x": "ü"})
    assert headers["Accept-Encoding"] == "identity"
    assert "Authorization" not in headers


def test_replies_stand_in_the_order_of_the_requests():
    with faults(slow(0.2, reply(0)), reply(1)) as server:
        answers = service(server).post("/score", [lambda i=i: i for i in range(9)])
        sent = [body for _, _, body in server.requests]
    assert [answers[i] for i in sent] == [0] + [1] * 8
    assert service("http://127.0.0.1:1").post("/score", []) == []


@pytest.mark.parametrize("passing", [hang_up, *(reply(b"", status) for status in (408, 429, 500, 502, 503, 504))])
def test_what_may_pass_is_tried_again(passing):
    with faults(passing, passing, reply(7)) as server:
        assert post(server) == 7
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [201, 204, 301, 400, 401, 403, 404, 409, 413, 422, 501])
def test_what_is_refused_is_not_tried_again(status):
    text = b"" if status == 204 else b"line one\nline two" + b"x" * 1000
    with faults(reply(text, status, Location="http://127.0.0.1:1/")) as server:
        error = post(server)
    assert len(server.requests) == 1
    assert isinstance(error, ServiceError)
    assert isinstance(error, RewardOutputError)  # no single image is retried
    assert error.status == pickle.loads(pickle.dumps(error)).status == status
    assert "\n" not in str(error)
    assert len(str(error)) < 350


def test_waits_double():
    waits = []

    async def no_wait(seconds):
        waits.append(seconds)

    with faults(reply(b"", 500)) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(http, "_BACKOFF", 0.5)
        patch.setattr(http.asyncio, "sleep", no_wait)
        assert isinstance(post(server, retries=3), ServiceUnavailableError)
    assert [0.375 * 2**i <= wait <= 0.625 * 2**i for i, wait in enumerate(waits)] == [True] * 3
    assert len(set(waits)) == 3


def test_whether_a_server_is_there_is_asked_four_times_at_most():
    with faults(reply(b"", 500)) as server:
        with pytest.raises(ServiceUnavailableError, match="in 4 tries"):
            service(server, retries=8).get("/health")
        assert len(server.requests) == 4


@pytest.mark.parametrize(("asked", "waited"), [("0.3", 0.3), ("9" * 9, 0.2), ("-1", 0.0), ("nan", 0.0), ("inf", 0.0)])
def test_retry_after_is_kept_within_bounds(monkeypatch, asked, waited):
    monkeypatch.setattr(http, "_MAX_RETRY_AFTER", 0.5 if waited == 0.3 else 0.2)
    with faults(reply(b"", 429, Retry_After=asked), reply(7)) as server:
        start = time.monotonic()
        assert post(server) == 7
        assert waited <= time.monotonic() - start < waited + 1.0


@pytest.mark.parametrize(
    "act",
    [slow(9.0, reply(7)), drip(0.05), drip(0.05, in_head=True)],
    ids=["silent", "dripping body", "dripping head"],
)
def test_the_time_out_is_that_of_the_whole_request(act):
    with faults(act) as server:
        start = time.monotonic()
        error = post(server, timeout=0.25, retries=1)
        assert 0.5 <= time.monotonic() - start < 3.0
    assert isinstance(error, ServiceUnavailableError)
    assert "no whole reply within 0.25 s" in str(error)
    assert "2 tries" in str(error)


def test_after_a_time_out_the_next_try_may_be_quick():
    with faults(slow(9.0, reply(0)), reply(7)) as server:
        assert post(server, timeout=0.6) == 7


def test_an_endless_reply_ends():
    with faults(endless) as server:
        error = post(server)
    assert isinstance(error, ServiceError)
    assert "more than 16777216 bytes" in str(error)
    assert len(server.requests) == 1
    assert server.sent < 16777216 + (16 << 20)  # what the sockets hold besides


def test_a_compressed_reply_is_not_unpacked(monkeypatch):
    monkeypatch.setattr(httpx2.Response, "aiter_bytes", None)
    with faults(reply(gzip.compress(b" " * (1 << 24)), Content_Encoding="gzip")) as server:
        error = post(server)
    assert isinstance(error, ServiceError)
    assert "compressed" in str(error)


@pytest.mark.parametrize(
    "garbage", [b"", b"<html>", b"NaN", b"[Infinity]", b"\xff\xfe\xfd", b"[" * 100_000, b"[1" * 9, b"1" * 5000]
)
def test_garbage_is_no_reply(garbage):
    with faults(reply(garbage)) as server:
        error = post(server)
    assert isinstance(error, ServiceError)
    assert "not JSON" in str(error)
    assert len(str(error)) < 700
    assert len(server.requests) == 1


def test_json_has_no_nan():
    for value in (float("nan"), [float("inf")], {"a": float("-inf")}):
        with pytest.raises(ValueError):
            http.dumps(value)
    with pytest.raises(ValueError):
        http.loads(b'{"a": NaN}')


def test_nobody_there():
    error = post("http://127.0.0.1:1")
    assert isinstance(error, ConnectionError)
    assert "http://127.0.0.1:1/score" in str(error)
    with pytest.raises(ServiceUnavailableError):
        service("http://127.0.0.1:1").get("/health")


def test_a_key_is_sent_and_never_shown(monkeypatch, caplog):
    monkeypatch.setenv("JUDGE_KEY", SECRET + "\n")
    caplog.set_level("DEBUG")
    with faults(reply(b"try later, " + SECRET.encode(), 503), reply(b"wrong key: " + SECRET.encode(), 401)) as server:
        client = service(server, api_key_env="JUDGE_KEY")
        [error] = client.post("/score", [lambda: 1])
    assert {headers["Authorization"] for _, headers, _ in server.requests} == {f"Bearer {SECRET}"}
    assert "wrong key: ***" in str(error)
    assert SECRET.encode() not in pickle.dumps(client)
    assert "tried again" in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize("key", [SECRET, 'sk/with"\\odd/signs', "sk-" + "\\" * 6])
@pytest.mark.parametrize("escaped", [False, True], ids=["as Python writes it", "with escaped slashes"])
def test_a_key_that_an_answer_repeats_is_not_read(monkeypatch, key, escaped):
    monkeypatch.setenv("JUDGE_KEY", key)
    answer = json.dumps({"error": f"Bearer {key}, {key}?"}).replace("/", r"\/" if escaped else "/")
    with faults(reply(answer.encode()), reply(f"Bearer {key}".encode())) as server:
        client = service(server, api_key_env="JUDGE_KEY")
        assert client.get("/score") == {"error": "Bearer ***, ***?"}
        with pytest.raises(ServiceError, match=r"not JSON .*'Bearer \*\*\*'"):
            client.get("/score")


def test_a_placeholder_for_a_key_changes_no_answer(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "0")
    with faults(reply({"score": "40", "rewards": [10.5]}), reply(b"is 0 a key?", 401)) as server:
        client = service(server, api_key_env="JUDGE_KEY")
        assert client.get("/score") == {"score": "40", "rewards": [10.5]}
        with pytest.raises(ServiceError, match=r"is \*\*\* a key"):
            client.get("/score")


@pytest.mark.parametrize("key", [None, "", "two words" + SECRET, f"{SECRET}\r\nX: y", SECRET + "ü"])
def test_a_key_that_cannot_be_sent(monkeypatch, key):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("JUDGE_KEY", key)
    with pytest.raises(ValueError, match="`api_key_env` is 'JUDGE_KEY'") as caught:
        service("http://127.0.0.1:1", api_key_env="JUDGE_KEY")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8000", "ftp://host", "http://", f"http://me:{SECRET}@host", f"http://host/?key={SECRET}"]
)
def test_bad_urls(url):
    with pytest.raises(ValueError, match="`url`") as caught:
        service(url)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"timeout": 0}, {"timeout": float("inf")}, {"retries": -1}, {"max_concurrency": 0}]
)
def test_bad_numbers(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
        service("http://host", **options)


def test_no_proxy_for_the_loopback_address(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with faults(reply(7)) as server:
        assert post(server) == 7
    monkeypatch.setenv("HTTP_PROXY", server.url)
    with faults(reply(8)) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        assert post("http://rewards.example") == 8
        assert proxy.requests[0][0] == "POST http://rewards.example/score"


def test_the_runs_random_numbers_are_not_touched():
    before = random.getstate(), np.random.get_state()[1].tolist()
    with faults(reply(b"", 500), reply(7)) as server:
        assert post(server) == 7
    assert before == (random.getstate(), np.random.get_state()[1].tolist())


def test_inside_an_event_loop():
    async def notebook():
        return post(server)

    with faults(reply(7)) as server:
        assert asyncio.run(notebook()) == 7


def test_ctrl_c_does_not_wait():
    def interrupt(*_):
        raise KeyboardInterrupt

    with faults(slow(9.0, reply(7))) as server:
        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        try:
            start = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                post(server)
            assert time.monotonic() - start < 2.0
        finally:
            signal.signal(signal.SIGALRM, before)
    assert all(thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread())


def test_a_mistake_of_ours_is_not_the_servers():
    with faults(reply(7)) as server:
        with pytest.raises(TypeError, match="JSON serializable"):
            post(server, object())
        assert server.requests == []


def test_png_keeps_every_bit():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (33, 47, 3), dtype=np.uint8))

    def travelled(image_format):
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(http.encode_picture(picture, image_format)))))

    np.testing.assert_array_equal(travelled("png"), np.asarray(picture))
    assert travelled("jpeg").shape == (33, 47, 3)
    with pytest.raises(ValueError, match="`image_format` is 'webp'"):
        http.check_image_format("webp")
