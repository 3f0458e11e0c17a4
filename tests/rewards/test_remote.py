"""A reward in another process is the same reward, or NaN, or an error: never a wrong number."""

import base64
import contextlib
import http.client
import inspect
import io
import json
import logging
import math
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from contextlib import ExitStack
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import torch
from fault_server import by_request, drip, endless, faults, hang_up, reply, running, slow
from PIL import Image

import trl_dgpo.rewards.http as client_http
import trl_dgpo.rewards.remote as remote_file
from trl_dgpo import cli
from trl_dgpo.rewards.http import ServiceError, ServiceUnavailableError, encode_picture
from trl_dgpo.rewards.jpeg import JPEGCompressibility
from trl_dgpo.rewards.remote import RemoteReward, make_server, serve
from trl_dgpo.rewards.scoring import FailureWindow, RewardScorer


@pytest.fixture(autouse=True)
def quick_backoff(monkeypatch):
    monkeypatch.setattr(client_http, "_BACKOFF", 0.01)


def noise(count, *sizes):
    rng = np.random.default_rng(0)
    sizes = sizes or ((24, 24),)
    return [Image.fromarray(rng.integers(0, 256, (*sizes[i % len(sizes)], 3), dtype=np.uint8)) for i in range(count)]


def kilobytes(prompts, completions, **columns):
    """Depends on every bit of an image."""
    return [
        len(zlib.compress(image.tobytes())) / 1000 + math.sin(zlib.crc32(image.tobytes())) for image in completions
    ]


def mean_of_tensor(prompts, completions, **columns):
    assert completions.dtype == torch.uint8
    return (completions.double().mean((1, 2, 3)) / 3).tolist()


mean_of_tensor.input_type = "pt"


def remote(server, **options):
    url = server if isinstance(server, str) else f"http://127.0.0.1:{server.server_port}"
    return RemoteReward(url, **{"timeout": 5.0, "retries": 2} | options)


def ask(server, count=4, **options):
    return remote(server, **options)(prompts=[f"p{i}" for i in range(count)], completions=noise(count))


def served(reward, **options):
    return running(make_server(reward, port=0, **options))


def raw(server, method="POST", path="/score", body=b"", headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=5)
    connection.request(method, path, body, headers or {})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, json.loads(content) if content else None


def request(count=1, **changes):
    buffer = io.BytesIO()
    noise(1)[0].save(buffer, "PNG")
    image = base64.b64encode(buffer.getvalue()).decode()
    return json.dumps({"prompts": ["p"] * count, "images": [image] * count, "columns": {}} | changes).encode()


# The same reward.


@pytest.mark.parametrize("reward", [kilobytes, JPEGCompressibility()])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_a_remote_reward_is_the_local_one_to_the_bit(batch_size, reward):
    prompts, images = [f"p{i}" for i in range(7)], noise(7)
    with served(reward) as server:
        assert remote(server, batch_size=batch_size)(prompts, images) == reward(prompts=prompts, completions=images)


def test_a_reward_of_tensors_gets_one_tensor_a_size():
    images = noise(5, (8, 8), (8, 16))
    with served(mean_of_tensor) as server:
        rewards = remote(server)([""] * 5, images)
    assert rewards == [torch.tensor(np.array(image)).double().mean().item() / 3 for image in images]


def test_sizes_may_differ_and_order_stays():
    def size(prompts, completions, **columns):
        assert len({image.size for image in completions}) == 1
        return [image.width * 1000 + image.height + int(p) / 10 for p, image in zip(prompts, completions, strict=True)]

    with served(size) as server:
        rewards = remote(server)(list("01234"), noise(5, (8, 9), (7, 6)))
    assert rewards == [9008.0, 6007.1, 9008.2, 6007.3, 9008.4]


def test_not_applicable_and_failed_are_two_things():
    def fickle(prompts, completions, **columns):
        return [{"none": None, "nan": math.nan, "inf": math.inf}.get(prompt, 0.25) for prompt in prompts]

    with served(fickle) as server:
        rewards = remote(server)(["fine", "none", "nan", "inf"], noise(4))
    assert rewards[:2] == [0.25, None]
    assert all(map(math.isnan, rewards[2:]))


@pytest.mark.parametrize(
    ("sides", "counts"),
    [
        ([512] * 20, [16, 4]),
        ([1024] * 16, [8, 8]),
        ([2048] * 5, [2, 2, 1]),
        ([4096, 4096, 16, 16], [1, 1, 2]),
        ([16, 4096], [1, 1]),
        ([], []),
    ],
)
def test_large_pictures_go_out_fewer_at_a_time(sides, counts):
    pictures = [Image.new("L", (side, side)) for side in sides]
    parts = RemoteReward("http://host")._parts(pictures)
    assert [part.stop - part.start for part in parts] == counts
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(len(sides)))


@pytest.mark.parametrize("image_format", ["png", "jpeg"])
def test_what_the_client_sends_together_the_server_takes(monkeypatch, image_format):
    images, [large] = noise(16, (64, 64)), noise(1, (512, 512))
    limit = inspect.signature(make_server).parameters["max_body"].default
    assert len(encode_picture(large, image_format)) / 512**2 * remote_file._PART_PIXELS < 0.51 * limit
    # The same proportion, smaller.
    monkeypatch.setattr(remote_file, "_PART_PIXELS", 1 << 14)
    with served(lambda completions, **_: [1.0] * len(completions), max_body=1 << 17) as server:
        assert remote(server, image_format=image_format)([""] * 16, images) == [1.0] * 16


def test_columns_and_metrics_travel(caplog):
    got, metrics = {}, []

    def reward(prompts, completions, text, log_metric, **columns):
        got.update(columns, text=text, prompts=prompts)
        log_metric("length", len(text))
        log_metric("bad", math.nan)
        return [float(len(t)) for t in text]

    columns = {
        "text": ["a", "bé"],
        "metadata": [{"a": [1, None]}, {}],
        "day": [date(2026, 1, 1)] * 2,
        "number": [1.0, math.nan],
        "image": noise(2),
        "images": noise(2),
        "log_extra": print,
        "trainer_state": object(),
    }
    with served(reward) as server:
        client = remote(server)
        for _ in range(2):
            assert client(["x", "y"], noise(2), lambda *pair: metrics.append(pair), **columns) == [1.0, 2.0]
        assert {"metadata", "text"} <= got.keys()
        assert not {"day", "number", "image", "trainer_state"} & got.keys()
        assert got["metadata"] == columns["metadata"]
        got.clear()
        remote(server, columns=["text"])(["x", "y"], noise(2), **columns)
        assert "metadata" not in got
        with pytest.raises(ValueError, match="send the columns \\['nope'\\]"):
            remote(server, columns=["nope"])(["x", "y"], noise(2), **columns)
        with pytest.raises(ValueError, match="send column 'day', but JSON cannot carry it"):
            remote(server, columns=["text", "day"])(["x", "y"], noise(2), **columns)
    assert metrics[0] == ("length", 2.0)
    warned = [record.getMessage() for record in caplog.records if "is not sent" in record.getMessage()]
    assert len(warned) == 3  # once each, not once a call
    assert all(name in "".join(warned) for name in ("'day'", "'number'", "'image'"))


def test_in_the_scorer():
    images = torch.from_numpy(np.stack([np.array(image) for image in noise(3)])).permute(0, 3, 1, 2)
    with served(kilobytes) as server:
        scores = RewardScorer([remote(server), kilobytes])(images, list("abc"), {"text": list("xyz")})
        address = f"127.0.0.1_{server.server_port}"
    assert torch.equal(scores.by_name[address], scores.by_name["kilobytes"])
    assert not scores.failed.any()


def test_names_and_copies():
    assert RemoteReward("http://host").__name__ == "host"
    assert RewardScorer([RemoteReward("http://host:1"), RemoteReward("http://host:2/")]).names == ["host_1", "host_2"]
    assert RemoteReward("http://host:1/rewards/ocr/").__name__ == "ocr"
    assert RemoteReward("http://host:1/ocr", name="mine").__name__ == "mine"
    with served(kilobytes) as server:
        copy = pickle.loads(pickle.dumps(remote(server, image_format="jpeg")))
        assert len(copy(["p"], noise(1))) == 1


@pytest.mark.parametrize(
    "options", [{"image_format": "gif"}, {"batch_size": 0}, {"max_concurrency": 0}, {"timeout": 0}]
)
def test_bad_arguments(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
        remote("http://host", **options)


# Faults of the server.


def test_the_check_at_the_start():
    with served(kilobytes) as server:
        remote(server).check()
        assert raw(server, "GET", "/health") == (200, {"name": "kilobytes", "status": "ok"})
        port = server.server_port
    with pytest.raises(ConnectionError, match=f"no server at http://127.0.0.1:{port}: .*serve-reward"):
        remote(f"http://127.0.0.1:{port}").check()
    for other in (reply({"hello": 1}), reply(b"<html>"), reply(b"", 404)):
        with faults(other) as server, pytest.raises(ServiceUnavailableError, match="/health"):
            remote(server).check()


def test_a_server_that_goes_and_comes_back(caplog):
    prompts, images = ["p"] * 4, noise(4)
    with served(kilobytes) as server:
        client, port = remote(server), server.server_port
        assert client(prompts, images) == kilobytes(prompts, images)
    rewards = client(prompts, images)
    assert all(map(math.isnan, rewards))
    [error] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "4 images get NaN" in error.getMessage()
    with pytest.raises(RuntimeError, match="Rewards failed"):
        FailureWindow().update(torch.isnan(torch.tensor(rewards)))
    with running(make_server(kilobytes, port=port)):
        assert client(prompts, images) == kilobytes(prompts, images)


def test_a_server_that_is_gone_for_a_minute_costs_no_reward(monkeypatch):
    # Fifty times as fast as it is by default, so that the tries take 1.4 s at least.
    monkeypatch.setattr(client_http, "_BACKOFF", 0.01)
    monkeypatch.setattr(client_http, "_MAX_BACKOFF", 0.6)
    prompts, images = ["p"] * 4, noise(4)
    with served(kilobytes) as server:
        port = server.server_port
    client, began = RemoteReward(f"http://127.0.0.1:{port}"), time.monotonic()
    with ExitStack() as stack:
        back = threading.Timer(0.5, lambda: stack.enter_context(running(make_server(kilobytes, port=port))))
        back.start()
        assert client(prompts, images) == kilobytes(prompts, images)
        back.join()
    assert time.monotonic() - began > 0.5


def test_the_waits_of_the_default_outlast_a_minute(monkeypatch):
    waits = []

    async def no_wait(seconds):
        waits.append(seconds)

    monkeypatch.setattr(client_http, "_BACKOFF", 0.5)
    monkeypatch.setattr(client_http.random.Random, "uniform", lambda self, low, high: low)
    monkeypatch.setattr(client_http.asyncio, "sleep", no_wait)
    assert math.isnan(RemoteReward("http://127.0.0.1:1")(["p"], noise(1))[0])
    assert sum(waits) > 60


def test_only_the_lost_part_is_nan():
    def score(body):
        return {"rewards": [float(prompt[1:]) for prompt in body["prompts"]]}

    def act(handler):
        fails = "p2" in handler.body["prompts"]
        (reply(b"", 500) if fails else by_request(score))(handler)

    with faults(act) as server:
        rewards = ask(server, 5, batch_size=2)
    assert rewards[:2] + rewards[4:] == [0.0, 1.0, 4.0]
    assert all(map(math.isnan, rewards[2:4]))


@pytest.mark.parametrize(
    "act", [slow(9.0, reply({"rewards": [0.0] * 4})), drip(0.05), hang_up, reply(b"", 503)],
    ids=["slow", "dripping", "hangs up", "503"],
)  # fmt: skip
def test_troubles_are_nan_after_the_tries(act, caplog):
    with faults(act) as server:
        start = time.monotonic()
        assert all(map(math.isnan, ask(server, timeout=0.2, retries=1)))
        assert time.monotonic() - start < 3.0
    assert len(server.requests) == 2
    assert "4 images get NaN" in caplog.text


@pytest.mark.parametrize("act", [hang_up, reply(b"", 500), slow(9.0, reply({"rewards": [0.0] * 4}))])
def test_troubles_that_pass_change_nothing(act):
    with faults(act, reply({"rewards": [1, 2.5, None, 4]})) as server:
        assert ask(server, timeout=0.8) == [1, 2.5, None, 4]
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    "act",
    [
        reply({"error": "what?"}, 400),
        reply(b"<html>"),
        reply([1, 2, 3, 4]),
        reply({}),
        reply({"rewards": [1, 2, 3]}),
        reply({"rewards": [1, 2, 3, 4, 5]}),
        reply({"rewards": "1234"}),
        reply({"rewards": {"0": 1, "1": 1, "2": 1, "3": 1}}),
        reply({"rewards": [1, 2, 3, "4"]}),
        reply({"rewards": [1, 2, 3, True]}),
        reply({"rewards": [1, 2, 3, math.nan]}),
        reply(b'{"rewards": [1, 2, 3, 1e999]}'),
        reply({"rewards": [1, 2, 3, 10**400]}),
        reply({"rewards": [1, 2, 3, [4]]}),
        reply({"rewards": [1, 2, 3, 4], "failed": [4]}),
        reply({"rewards": [1, 2, 3, 4], "failed": [-1]}),
        reply({"rewards": [1, 2, 3, 4], "failed": "0"}),
        reply({"rewards": [1, 2, 3, 4], "metrics": {"m": ["x"]}}),
        reply({"rewards": [1, 2, 3, 4], "metrics": [1]}),
        reply({"rewards": [1, 2, 3, 4], "error": "no model" * 1000}),
    ],
)
def test_broken_replies_are_raised_at_once(act):
    with faults(act) as server:
        with pytest.raises(ServiceError, match="/score") as caught:
            ask(server)
    assert len(server.requests) == 1
    assert len(str(caught.value)) < 500


def test_a_broken_reply_stops_the_scorer():
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    with faults(reply({"rewards": [1.0]})) as server:
        with pytest.raises(ServiceError, match="must be a list of 4"):
            RewardScorer(remote(server))(images, ["p"] * 4, {})
    assert len(server.requests) == 1  # not image by image


def test_an_endless_reply_takes_little_memory():
    with faults(endless) as server:
        tracemalloc.start()
        with pytest.raises(ServiceError, match="more than"):
            ask(server, 1)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 * (16 << 20)


# Faults of the reward, seen through the server.


def test_one_image_that_raises_costs_one_reward(caplog):
    def choosy(prompts, completions, **columns):
        if "p2" in prompts:
            raise RuntimeError("cannot read this one")
        return kilobytes(prompts, completions)

    with served(choosy) as server:
        rewards = ask(server)
    assert math.isnan(rewards[2])
    expected = kilobytes([], noise(4))
    assert [rewards[i] for i in (0, 1, 3)] == [expected[i] for i in (0, 1, 3)]
    assert "cannot read this one" in caplog.text


def test_a_reward_that_cannot_be_served_says_so_once():
    calls = []

    def short(prompts, completions, **columns):
        calls.append(len(prompts))
        return [1.0]

    def lacking(prompts, completions, **columns):
        import package_that_is_not_there  # noqa: F401

    with served(short) as server, pytest.raises(ServiceError, match=r"status 501.*returned 1 values for 4 images"):
        ask(server)
    assert calls == [4]
    with served(lacking) as server, pytest.raises(ServiceError, match="package_that_is_not_there"):
        ask(server)


def test_a_reward_that_hangs_fails_its_images_and_frees_the_turn(caplog):
    go = threading.Event()

    def reward(prompts, completions, **columns):
        if "hang" in prompts:
            go.wait()
        return [1.0] * len(prompts)

    with served(reward, reward_timeout=0.3) as server:
        start = time.monotonic()
        rewards = remote(server, batch_size=3)(["p", "hang", "p", "p"], noise(4, (8, 8), (8, 16), (8, 8), (8, 8)))
        assert time.monotonic() - start < 3.0
        assert rewards[::3] == [1.0, 1.0]
        assert math.isnan(rewards[1])
        assert raw(server, body=request(2, prompts=["hang", "p"]))[1]["failed"] == [0, 1]
        go.set()
    assert "did not return within 0.3 seconds" in caplog.text


def test_a_first_call_may_take_its_time(caplog):
    calls = []

    def reward(prompts, completions, **columns):
        calls.append(prompts)
        time.sleep(0.3)
        return [1.0]

    with make_server(reward, port=0, reward_timeout=0.1) as server:
        server.try_out()
    assert calls == [["a white picture"]]
    assert not caplog.records


def test_a_reward_that_fails_on_a_white_picture_is_served_with_a_warning(caplog):
    with make_server(lambda **_: 1 / 0, port=0) as server:
        server.try_out()
    [record] = caplog.records
    assert "failed on a white picture" in record.getMessage()
    assert "ZeroDivisionError" in caplog.text


def test_a_missing_column_is_the_clients_mistake():
    def needs(prompts, completions, text, **columns):
        return [1.0] * len(prompts)

    with served(needs) as server:
        with pytest.raises(ServiceError, match=r"status 400.*`needs` needs .*text"):
            ask(server)
        status, answer = raw(server, body=request(columns={"text": ["x"], "completions": [0]}))
    assert status == 400
    assert "completions" in answer["error"]


def test_the_client_sees_no_traceback(monkeypatch, caplog):
    with served(kilobytes) as server:
        monkeypatch.setattr(server, "score", lambda *_: 1 / 0)
        status, answer = raw(server, body=request())
    assert (status, answer) == (500, {"error": "ZeroDivisionError: division by zero"})
    assert "Traceback" in caplog.text


# Faults of a client.


@pytest.mark.parametrize(
    ("status", "call"),
    [
        (404, ("GET", "/")),
        (404, ("POST", "/../../etc/passwd")),
        (405, ("GET", "/score")),
        (405, ("POST", "/health", b"{}")),
        (405, ("PUT", "/score", b"{}")),
        (405, ("DELETE", "/score")),
        (501, ("BREW", "/score")),
        (400, ("POST", "/score", b"{}", {"Content-Length": "-1"})),
        (400, ("POST", "/score", b"{}", {"Content-Length": "two"})),
        (413, ("POST", "/score", b"{}", {"Content-Length": "9" * 5000})),
        (411, ("POST", "/score", b"0\r\n\r\n", {"Transfer-Encoding": "chunked"})),
        (400, ("POST", "/score", b"not JSON")),
        (400, ("POST", "/score", b"[" * 100_000)),
        (400, ("POST", "/score", b'{"prompts": ["p"], "images": [NaN]}')),
        (400, ("POST", "/score", b"[]")),
        (400, ("POST", "/score", request(prompts=[]))),
        (400, ("POST", "/score", request(prompts=[], images=[]))),
        (400, ("POST", "/score", request(prompts=[1]))),
        (400, ("POST", "/score", request(prompts="p"))),
        (400, ("POST", "/score", request(images=["?"]))),
        (400, ("POST", "/score", request(images=[base64.b64encode(b"GIF89a").decode()]))),
        (400, ("POST", "/score", request(images=[json.loads(request())["images"][0][:400]]))),  # a head, and then
        (400, ("POST", "/score", request(columns=[]))),
        (400, ("POST", "/score", request(columns={"text": []}))),
        (400, ("POST", "/score", request(1025))),
    ],
)  # fmt: skip
def test_bad_requests_are_answered(status, call):
    with served(kilobytes) as server:
        got, answer = raw(server, *call)
        assert (got, list(answer)) == (status, ["error"])
        assert raw(server, body=request())[0] == 200


def test_what_is_not_http_is_answered():
    with served(kilobytes) as server:
        for noise_on_the_line in (b"\x16\x03\x01 hello there\r\n\r\n", b"GET " + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", server.server_port), timeout=5) as connection:
                connection.sendall(noise_on_the_line)
                connection.shutdown(socket.SHUT_WR)
                assert b'{"error": ' in b"".join(iter(lambda: connection.recv(1 << 16), b""))
        assert raw(server, "GET", "/health")[0] == 200


def test_a_large_request_is_refused_before_it_is_read():
    images = noise(16, (400, 400))  # 10 MB: more than the sockets hold
    with served(kilobytes, max_body=100_000) as server:
        with pytest.raises(ServiceError, match=r"status 413.*the limit is 100000"):
            remote(server)([""] * 16, images)


def test_a_picture_that_unpacks_to_too_much_is_refused_by_its_head():
    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = chunk(b"IHDR", (9_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0]))
    bomb = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    with served(kilobytes) as server:
        status, answer = raw(server, body=request(images=[base64.b64encode(bomb).decode()]))
    assert status == 413
    assert "81000000 pixels" in answer["error"]


def test_a_slow_client_keeps_nobody_waiting():
    with served(kilobytes, patience=0.8) as server:
        with socket.create_connection(("127.0.0.1", server.server_port)) as slow_client:
            slow_client.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
            stop = threading.Event()

            def trickle():
                while not stop.wait(0.05):
                    slow_client.sendall(b" ")  # each byte is in time; the whole is not

            thread = threading.Thread(target=trickle)
            thread.start()
            start = time.monotonic()
            assert raw(server, "GET", "/health")[0] == 200
            assert time.monotonic() - start < 0.7
            slow_client.settimeout(9)
            assert b" 408 " in slow_client.recv(1000)
            assert time.monotonic() - start < 4
            stop.set()
            thread.join()


def test_a_head_that_drips_comes_to_an_end():
    with served(kilobytes, patience=0.3) as server:
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=5) as slow_client:
            start = time.monotonic()
            slow_client.sendall(b"GET /health HTTP/1.1\r\nX: ")
            slow_client.settimeout(0.05)
            while time.monotonic() - start < 4:
                try:
                    slow_client.sendall(b"x")
                    if not slow_client.recv(1):
                        break
                except TimeoutError:
                    continue
                except OSError:
                    break
        assert 0.5 < time.monotonic() - start < 3
        assert raw(server, "GET", "/health")[0] == 200


def test_more_connections_than_there_may_be_are_turned_away(monkeypatch):
    monkeypatch.setattr(remote_file, "_CONNECTIONS", 4)
    with served(kilobytes) as server:
        taken = [socket.create_connection(("127.0.0.1", server.server_port), timeout=5) for _ in range(4)]
        for connection in taken:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b" 200 " in connection.recv(1000)
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=5) as one_more:
            answer = b"".join(iter(lambda: one_more.recv(1000), b""))
        assert b" 503 " in answer
        assert b"Retry-After: 1" in answer
        assert json.loads(answer.partition(b"\r\n\r\n")[2]) == {
            "error": "the server has 4 connections already; try again later"
        }
        for connection in taken:
            connection.close()
        assert ask(server, 1, retries=5) == kilobytes(["p0"], noise(1))  # their places are free again


def random_request(number: int) -> bytes:
    """A request with anything in any of its places; most are not HTTP, JSON or the protocol."""
    rng = random.Random(number)
    good = json.loads(request(2))
    anything = [
        None,
        True,
        -1,
        1e999,
        "",
        "\ud800",
        "\0",
        "../x",
        [],
        {},
        [[]],
        [None, None],
        ["p", 1],
        {"a": 1},
        "9" * 9,
    ]
    if rng.random() < 0.3:  # bytes of a picture
        picture = bytearray(base64.b64decode(good["images"][0]))
        for _ in range(rng.randint(1, 20)):
            picture[rng.randrange(len(picture))] = rng.randrange(256)
        good["images"][0] = base64.b64encode(picture[: rng.choice((None, 30, 100))]).decode()
    else:
        for _ in range(rng.randint(1, 2)):
            good[rng.choice(("prompts", "images", "columns", "more"))] = rng.choice(anything)
    body = json.dumps(good if rng.random() < 0.9 else rng.choice(anything)).encode()
    if rng.random() < 0.2:
        body = bytes(rng.randrange(256) for _ in range(rng.randint(0, 200)))
    length = rng.choice((len(body),) * 6 + (len(body) - 1, 0, -5, "x", "1e3", "٣", 10**30))
    line = rng.choice(
        (b"POST /score HTTP/1.1",) * 8 + (b"GET /%00 HTTP/1.1", b"POST /score HTTP/9.9", b"\0\xff", b"POST", b"")
    )
    extra = rng.choice(
        (b"",) * 6 + (b"Transfer-Encoding: chunked\r\n", b"X" * 70_000 + b": 1\r\n", b"A: b\r\n" * 200, b"\xff\r\n")
    )
    return (
        line
        + b"\r\nHost: x\r\nConnection: close\r\nContent-Length: "
        + str(length).encode()
        + b"\r\n"
        + extra
        + b"\r\n"
        + body
    )


def test_random_requests_are_answered_and_leave_the_server_as_it_was():
    scored = []

    def reward(prompts, completions, **columns):
        scored.append(len(prompts))
        return [1.0] * len(prompts)

    statuses = []
    with served(reward, patience=2.0) as server:
        threads = threading.active_count()
        for number in range(300):
            with socket.create_connection(("127.0.0.1", server.server_port), timeout=5) as connection:
                with contextlib.suppress(OSError):  # answered and closed before all was sent
                    connection.sendall(random_request(number))
                answer = b""
                with contextlib.suppress(ConnectionResetError):
                    answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
            assert b"Traceback" not in answer
            assert b'File "' not in answer
            head, _, content = answer.partition(b"\r\n\r\n")
            if answer.startswith(b"HTTP/"):
                statuses.append(int(head.split()[1]))
                assert list(json.loads(content)) == (["error"] if statuses[-1] != 200 else [*json.loads(content)]), (
                    number
                )
        assert raw(server, body=request())[0] == 200
        end = time.monotonic() + 5
        while threading.active_count() > threads and time.monotonic() < end:
            time.sleep(0.05)
        assert threading.active_count() <= threads
    assert scored
    assert {200, 400} <= set(statuses)
    assert not {500} & set(statuses)


def test_one_call_at_a_time_and_health_meanwhile():
    active, most = [], []

    def reward(prompts, completions, **columns):
        active.append(1)
        most.append(len(active))
        time.sleep(0.1)
        active.pop()
        return [1.0] * len(prompts)

    with served(reward) as server:
        thread = threading.Thread(target=ask, args=(server, 4), kwargs={"batch_size": 1, "max_concurrency": 4})
        thread.start()
        assert raw(server, "GET", "/health")[0] == 200
        assert thread.is_alive()
        thread.join()
    assert most == [1, 1, 1, 1]


def test_what_nobody_waits_for_is_not_scored():
    scored, go = [], threading.Event()

    def reward(prompts, completions, **columns):
        scored.append(prompts[0])
        go.wait()
        return [1.0]

    with served(reward) as server:
        first = threading.Thread(target=raw, args=(server,), kwargs={"body": request(prompts=["first"])})
        first.start()
        while not scored:
            time.sleep(0.01)
        assert math.isnan(remote(server, timeout=0.5, retries=0)(["given up"], noise(1))[0])
        go.set()
        first.join()
        assert raw(server, body=request(prompts=["last"]))[0] == 200
    assert scored == ["first", "last"]


def test_what_waits_is_not_unpacked(monkeypatch):
    unpacked, go = [], threading.Event()
    unpack = remote_file._unpack

    def reward(prompts, completions, **columns):
        go.wait()
        return [1.0]

    monkeypatch.setattr(remote_file, "_unpack", lambda files: unpacked.append(1) or unpack(files))
    with served(reward) as server:
        threads = [threading.Thread(target=raw, args=(server,), kwargs={"body": request()}) for _ in range(6)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        assert len(unpacked) == 2
        assert raw(server, "GET", "/health")[0] == 200
        assert raw(server, body=request(images=["?"]))[0] == 400
        go.set()
        for thread in threads:
            thread.join()
    assert len(unpacked) == 6


def test_other_addresses_warn(caplog):
    make_server(kilobytes, host="127.0.0.1", port=0).server_close()
    assert not caplog.records
    make_server(kilobytes, host="0.0.0.0", port=0).server_close()
    assert "without authentication" in caplog.text


def test_a_taken_port_and_a_bad_limit():
    with served(kilobytes) as server, pytest.raises(OSError):
        serve(kilobytes, port=server.server_port)
    with pytest.raises(TypeError, match="not callable"):
        make_server([kilobytes], port=0)  # one reward, not several
    with pytest.raises(ValueError, match="`port` is 99999; it must be 1 to 65535"):
        make_server(kilobytes, port=99999)
    with pytest.raises(ValueError, match="`max_body`"):
        make_server(kilobytes, port=0, max_body=0)
    with pytest.raises(ValueError, match="`reward_timeout`"):
        make_server(kilobytes, port=0, reward_timeout=0)


@pytest.mark.parametrize("flags", [[], ["--normalize"]])
def test_the_scale_of_what_is_served(monkeypatch, caplog, flags):
    caplog.set_level("INFO", "trl_dgpo")  # the command sets it too: undone at the end
    rewards = []
    monkeypatch.setattr(remote_file, "serve", lambda reward, **where: rewards.append(reward))
    cli.main(["serve-reward", "pickscore", *flags])
    assert [reward.normalize for reward in rewards] == [bool(flags)]


# A process of its own.

SCRIPT = """
import logging, sys
# As in an old environment: only torch, Pillow and numpy besides the standard library.
for name in ("httpx2", "httpx", "transformers", "diffusers", "trl", "accelerate", "datasets", "huggingface_hub"):
    sys.modules[name] = None
from trl_dgpo.rewards.remote import serve
def mine(prompts, completions, **columns):
    print("called", prompts, flush=True)
    return [sum(image.tobytes()) / 7 for image in completions]
logging.basicConfig(level=logging.INFO)
serve(mine, port=0)
"""


def test_serve_needs_little_and_ends_cleanly(tmp_path):
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        cwd=root,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A shell lets what it starts in the background ignore Ctrl-C, and that is passed on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        line = process.stderr.readline()
        url = line.split(" served at ")[1].strip().rstrip(".")
        client = RemoteReward(url, timeout=60)
        client.check()
        assert client(["p"] * 3, noise(3)) == [sum(image.tobytes()) / 7 for image in noise(3)]
        process.send_signal(signal.SIGINT)  # Ctrl-C
        output, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0
    assert output.startswith("called ['a white picture']")  # the model is loaded before it is served
    assert "no longer served" in errors
    assert "Traceback" not in errors
