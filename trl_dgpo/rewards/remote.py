"""
Rewards in another process: a client that is a reward, and a server that makes any reward a service.

The protocol is two JSON calls. `GET /health` answers `{"name": ..., "status": "ok"}`. `POST /score` takes

    {"prompts": [str, ...], "images": [base64 of a PNG or JPEG, ...], "columns": {name: [one value an image], ...}}

and answers

    {"rewards": [number or null, ...], "failed": [indexes], "metrics": {name: [number, ...]}, "error": null}

JSON has no NaN: `null` means not applicable, unless the image's index is in `failed`. `failed`, `metrics` and `error`
may be missing. What could not be scored at all has another status than 200 and `{"error": "why"}`.

A server needs torch, Pillow and numpy besides the reward's own packages, so that a reward with old pins can live in an
environment of its own. It has neither authentication nor encryption: keep it on the loopback address, or on a network
where all may use it.
"""

import base64
import io
import json
import logging
import math
import socket
import socketserver
import sys
import threading
import time
import urllib.parse
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from .http import JSONService, ServiceError, ServiceUnavailableError, check_image_format, dumps, encode_picture, loads
from .scoring import RewardOutputError, RewardScorer


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .scoring import RewardFunc


logger = logging.getLogger(__name__)

# Pixels of one request's pictures, 268 MB once unpacked (Pillow keeps 4 bytes each): a small file can claim any size.
_MAX_PIXELS = 1 << 26
# Pictures of one request.
_MAX_IMAGES = 1024
# Pixels of the pictures that a client sends together: 32 MiB as PNG in base64 if they do not compress at all, half of
# what a server takes.
_PART_PIXELS = 1 << 23
# Requests whose pictures are unpacked at one time: one is scored, the next is ready.
_UNPACKED = 2
# Connections at one time, each of which has a thread and may send a body.
_CONNECTIONS = 256
# Seconds that the rest of a refused request is read for, so that the client gets to read the answer.
_LINGER = 2.0


class RemoteReward:
    """
    Reward that a server gives: one of [`serve`], or any other that speaks this module's protocol.

    A batch goes out in parts, several at a time. A part that fails in every try (see
    [`~trl_dgpo.rewards.http.JSONService`] for which failures are tried again) gives NaN for its images alone, and an
    error in the log. A request that is refused, or a reply that breaks the protocol, would be so for every image and
    is raised.

    Args:
        url (`str`):
            Where the server is, e.g. `"http://127.0.0.1:8000"`.
        name (`str`, *optional*):
            Name in the log; the last part of the url's path if there is one, else host and port
            (`"127.0.0.1_8000"`).
        timeout (`float`, *optional*, defaults to `60.0`):
            Seconds for one try of one part as a whole. The server scores one part after another, so it must cover
            `max_concurrency` of them, from every process of the run. With a server that is silent, a call takes all
            its tries.
        retries (`int`, *optional*, defaults to `8`):
            Further tries.
        image_format (`str`, *optional*, defaults to `"png"`):
            `"png"` keeps every bit: the reward is what it would be here. `"jpeg"` (quality 95, colour at full
            resolution) costs a tenth of the time and a third of the bytes, and is another picture.
        batch_size (`int`, *optional*, defaults to `16`):
            Images of one part at most. Large ones go out fewer at a time: together they have at most 8 Mi pixels
            (eight of 1024 x 1024), unless a single one has more.
        max_concurrency (`int`, *optional*, defaults to `2`):
            Parts under way at one time: one is packed and unpacked while another is scored.
        columns (`list[str]`, *optional*):
            Columns of the data set to send. Not given, all that JSON can carry; one that it cannot (pictures, dates,
            NaN) is left out with a warning.

    Raises:
        `ValueError`: if an argument is out of its range.
    """

    input_type = "pil"

    def __init__(
        self,
        url: str,
        *,
        name: str | None = None,
        timeout: float = 60.0,
        retries: int = 8,
        image_format: str = "png",
        batch_size: int = 16,
        max_concurrency: int = 2,
        columns: list[str] | None = None,
    ):
        check_image_format(image_format)
        if not 1 <= batch_size <= _MAX_IMAGES:
            raise ValueError(f"`batch_size` is {batch_size}; it must be 1 to {_MAX_IMAGES}.")
        self.image_format = image_format
        self.batch_size = batch_size
        self.columns = columns
        self._service = JSONService(url, timeout=timeout, retries=retries, max_concurrency=max_concurrency)
        address = urllib.parse.urlsplit(self._service.url)
        self.__name__ = name or address.path.rpartition("/")[2] or address.netloc.replace(":", "_")
        self._left_out: set[str] = set()  # columns that the log has named

    def __call__(
        self,
        prompts: list[str],
        completions: "list[Image.Image]",
        log_metric: "Callable[[str, float], None] | None" = None,
        **columns: Any,
    ) -> list[float | None]:
        sent = self._carried(columns, len(prompts))
        parts = self._parts(completions)
        bodies = [partial(self._body, prompts, completions, sent, part) for part in parts]
        rewards: list[float | None] = []
        for part, reply in zip(parts, self._service.post("/score", bodies), strict=True):
            if isinstance(reply, ServiceError):
                raise reply
            if isinstance(reply, ServiceUnavailableError):
                logger.error("Reward `%s`: %d images get NaN: %s", self.__name__, part.stop - part.start, reply)
                rewards += [math.nan] * (part.stop - part.start)
                continue
            values, metrics = self._read(reply, part.stop - part.start)
            rewards += values
            if log_metric is not None:
                for name, numbers in metrics.items():
                    for number in numbers:
                        log_metric(name, number)
        return rewards

    def check(self) -> None:
        """
        Ask the server whether it is there.

        Raises:
            `ServiceUnavailableError`: if it is not, or is something else (a `ConnectionError`).
        """
        try:
            health = self._service.get("/health")
        except (ServiceError, ServiceUnavailableError) as error:
            reason = str(error)
        else:
            if isinstance(health, dict) and health.get("status") == "ok":
                return
            reason = f"{self._service.url}/health says {str(health)[:200]!r}"
        raise ServiceUnavailableError(
            f"Reward `{self.__name__}` has no server at {self._service.url}: {reason}. Start one (`trl-dgpo "
            "serve-reward NAME --port ...`, or `trl_dgpo.rewards.remote.serve`) or correct the url."
        )

    def _carried(self, columns: dict[str, Any], count: int) -> dict[str, list]:
        """Those of the columns that are to be sent and can be."""
        if missing := sorted(set(self.columns or ()) - columns.keys()):
            raise RewardOutputError(f"Reward `{self.__name__}` is to send the columns {missing}; there are none.")
        if self.columns is None:
            # Neither the pictures once more nor what is no column: the trainer's state, `log_extra`.
            columns = {k: v for k, v in columns.items() if k != "images" and isinstance(v, list) and len(v) == count}
        carried = {}
        for name in columns if self.columns is None else self.columns:
            values = columns[name]
            try:
                dumps(values)
            except (TypeError, ValueError) as error:
                if self.columns is not None:
                    raise RewardOutputError(
                        f"Reward `{self.__name__}` is to send column {name!r}, but JSON cannot carry it: {error}."
                    ) from None
                if name not in self._left_out:
                    self._left_out.add(name)
                    logger.warning("Reward `%s`: column %r is not sent: %s.", self.__name__, name, error)
                continue
            carried[name] = values
        return carried

    def _parts(self, completions: "list[Image.Image]") -> list[slice]:
        """What of a batch goes out together."""
        parts: list[slice] = []
        pixels = 0
        for i, picture in enumerate(completions):
            pixels += picture.width * picture.height
            if not parts or i - parts[-1].start == self.batch_size or pixels > _PART_PIXELS:
                parts.append(slice(i, i + 1))
                pixels = picture.width * picture.height
            else:
                parts[-1] = slice(parts[-1].start, i + 1)
        return parts

    def _body(self, prompts: list[str], completions: "list[Image.Image]", columns: dict[str, list], part: slice):
        return {
            "prompts": prompts[part],
            "images": [encode_picture(picture, self.image_format) for picture in completions[part]],
            "columns": {name: values[part] for name, values in columns.items()},
        }

    def _read(self, reply: Any, count: int) -> tuple[list[float | None], dict[str, list[float]]]:
        """Rewards and metrics of a reply, checked."""
        try:
            if not isinstance(reply, dict):
                raise ValueError("it must be an object")
            if reply.get("error") is not None:
                raise ValueError(f"its error is {str(reply['error'])[:200]!r}")
            rewards, failed, metrics = reply["rewards"], reply.get("failed", []), reply.get("metrics", {})
            if not isinstance(rewards, list) or len(rewards) != count:
                raise ValueError(f"`rewards` must be a list of {count}")
            if not all(value is None or _is_number(value) for value in rewards):
                raise ValueError("`rewards` must be numbers or null")
            if not all(isinstance(i, int) and 0 <= i < count for i in failed):
                raise ValueError(f"`failed` must be indexes below {count}")
            if not all(_is_number(number) for numbers in metrics.values() for number in numbers):
                raise ValueError("`metrics` must be lists of numbers")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ServiceError(
                f"{self._service.url}/score broke the protocol ({error!r}): {json.dumps(reply)[:200]!r}"
            ) from None
        return [math.nan if i in failed else value for i, value in enumerate(rewards)], metrics


def serve(
    reward: "RewardFunc",
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_body: int = 64 << 20,
    reward_timeout: float = 600.0,
) -> None:
    """
    Serve a reward until Ctrl-C.

    The reward is tried on a white picture first, without a time limit, so that its model is loaded before anyone waits
    for it.

    Args:
        reward (callable):
            Any reward in the keyword form. It is called once at a time; only a call that was given up may still be
            under way.
        host (`str`, *optional*, defaults to `"127.0.0.1"`):
            Address to listen on. There is no authentication: another than the loopback address is open to all who
            reach it.
        port (`int`, *optional*, defaults to `8000`):
            Port.
        max_body (`int`, *optional*, defaults to 64 MiB):
            Bytes of a request.
        reward_timeout (`float`, *optional*, defaults to `600.0`):
            Seconds that a call of the reward may take, `inf` for no limit. Then its images have failed, and the next
            request is scored.

    Raises:
        `ImportError`: if the reward lacks a package.
        `OSError`: if the port cannot be had.
        `ValueError`: if an argument is out of its range, or the reward's results are not one number an image.
    """
    with make_server(reward, host=host, port=port, max_body=max_body, reward_timeout=reward_timeout) as server:
        try:
            server.try_out()
            logger.info("Reward `%s` is served at http://%s:%d.", server.name, *server.server_address[:2])
            server.serve_forever()
        except KeyboardInterrupt:
            logger.info("Reward `%s` is no longer served.", server.name)


def make_server(
    reward: "RewardFunc",
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_body: int = 64 << 20,
    reward_timeout: float = 600.0,
    patience: float = 30.0,
) -> "RewardServer":
    """
    The server of [`serve`], bound to its port and not yet serving.

    Args:
        reward, host, port, max_body, reward_timeout:
            See [`serve`]. Port 0 takes a free one: `server.server_address[1]`.
        patience (`float`, *optional*, defaults to `30.0`):
            Seconds that a client may take to send a request's body, or be silent.

    Returns:
        [`RewardServer`], a `http.server.ThreadingHTTPServer`.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"`port` is {port}; it must be 1 to 65535, or 0 for a free one.")
    if max_body < 1:
        raise ValueError(f"`max_body` is {max_body}; it must be a number of bytes above 0.")
    if not reward_timeout > 0:
        raise ValueError(f"`reward_timeout` is {reward_timeout}; it must be a number of seconds above 0, or `inf`.")
    if not host.startswith("127.") and host not in ("localhost", "::1"):
        logger.warning(
            "The reward is served on %s without authentication: all who reach that address can use it.", host
        )
    return RewardServer(reward, host, port, max_body, reward_timeout, patience)


class RewardServer(ThreadingHTTPServer):
    """HTTP server of one reward, each connection in a thread of its own; made by [`make_server`]."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, reward: "RewardFunc", host: str, port: int, max_body: int, reward_timeout: float, patience: float
    ):
        self.scorer = RewardScorer([reward], timeout=reward_timeout)
        self.name = self.scorer.names[0]
        self.max_body = max_body
        self.patience = patience
        self.unpacked = threading.BoundedSemaphore(_UNPACKED)
        self.turn = threading.Lock()  # held by the thread whose request is scored
        self.places = threading.BoundedSemaphore(_CONNECTIONS)
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), _Handler)

    def try_out(self) -> None:
        """Score a white picture, unless the reward needs a column for it."""
        try:
            self.scorer.check({})
        except ValueError:
            logger.warning("Reward `%s` reads columns: what it loads, it loads at the first request.", self.name)
            return
        try:
            self.scorer.self_test({"prompt": "a white picture"}, 64, 64)
        except RuntimeError as error:
            logger.warning("Reward `%s` failed on a white picture.", self.name, exc_info=error.__cause__)

    def score(self, prompts: list[str], pictures: list[Image.Image], columns: dict[str, list]) -> dict[str, Any]:
        """The reply to a request."""
        rewards: list[float | None] = [None] * len(prompts)
        failed, metrics, given_up = [], {}, set()
        for size in dict.fromkeys(picture.size for picture in pictures):  # a tensor holds one size
            index = [i for i, picture in enumerate(pictures) if picture.size == size]
            images = torch.stack([torch.from_numpy(np.array(pictures[i])).permute(2, 0, 1) for i in index])
            scores = self.scorer(
                images,
                [prompts[i] for i in index],
                {name: [v[i] for i in index] for name, v in columns.items()},
                given_up=given_up,
            )
            values = scores.by_name[self.name].tolist()
            for i, value, fails in zip(index, values, scores.failed.tolist(), strict=True):
                rewards[i] = None if math.isnan(value) else value
                failed += [i] if fails else []
            for name, values in scores.metrics.items():
                metrics[name] = metrics.get(name, []) + [value for value in values if math.isfinite(value)]
        return {"rewards": rewards, "failed": failed, "metrics": metrics, "error": None}

    def server_bind(self) -> None:
        # `HTTPServer` asks for the host's full name, which takes seconds where there is no name server.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def process_request(self, request: socket.socket, client_address: Any) -> None:
        if self.places.acquire(blocking=False):
            try:
                super().process_request(request, client_address)
            except BaseException:  # no thread could be started, which would have given the place back
                self.places.release()
                raise
            return
        content = dumps({"error": f"the server has {_CONNECTIONS} connections already; try again later"})
        head = f"HTTP/1.1 503 Service Unavailable\r\nContent-Length: {len(content)}\r\nRetry-After: 1\r\n"
        with suppress(OSError):  # the client may have left
            request.settimeout(1.0)  # nobody else is let in meanwhile
            request.sendall(head.encode() + b"Content-Type: application/json\r\nConnection: close\r\n\r\n" + content)
        self.shutdown_request(request)

    def process_request_thread(self, request: socket.socket, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.warning("The connection to %s broke.", client_address[0], exc_info=True)


class _Refusal(Exception):
    """A request that is not served: a status and why."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "trl-dgpo", ""

    def setup(self) -> None:
        self.timeout = self.server.patience
        super().setup()

    def handle_one_request(self) -> None:
        # The socket's own limit is one of silence: a client that drips its head byte by byte must come to an end too.
        self._head = threading.Timer(2 * self.server.patience, self._hang_up)
        self._head.daemon = True
        self._head.start()
        try:
            super().handle_one_request()
        finally:
            self._head.cancel()

    def parse_request(self) -> bool:
        is_request = super().parse_request()
        self._head.cancel()  # it has come; a body has its own limit, and scoring takes its time
        return is_request

    def _hang_up(self) -> None:
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RD)

    def do_GET(self) -> None:
        self._answer(self._health)

    def do_POST(self) -> None:
        self._answer(self._score)

    def _wrong_method(self) -> None:
        self._answer(self._refuse_method)

    do_DELETE = do_HEAD = do_OPTIONS = do_PATCH = do_PUT = _wrong_method

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        # Called by the base class for what is not HTTP; its own answer is a web page.
        self._send(code, {"error": message or self.responses[code][0]}, close=True)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug("%s: " + format, self.client_address[0], *args)

    def _answer(self, make_reply: "Callable[[], dict[str, Any]]") -> None:
        try:
            status, reply = 200, make_reply()
        except _Refusal as refusal:
            status, reply = refusal.status, {"error": str(refusal)}
        self._send(status, reply, close=status != 200)

    def _send(self, status: int, reply: dict[str, Any], close: bool) -> None:
        content = dumps(reply)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if close:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        if close:
            # Closed with unread bytes, a connection is reset and the client may never see the answer.
            self.connection.shutdown(socket.SHUT_WR)
            for _ in self._chunks(sys.maxsize, _LINGER):
                pass

    def _health(self) -> dict[str, Any]:
        self._at("/health", "/score")
        return {"name": self.server.name, "status": "ok"}

    def _refuse_method(self) -> dict[str, Any]:
        raise _Refusal(405, f"{self.command} is not served; there are GET /health and POST /score")

    def _at(self, path: str, other: str) -> None:
        asked = self.path.partition("?")[0]
        if asked == other:
            self._refuse_method()
        if asked != path:
            raise _Refusal(404, f"there is no {asked[:100]}; there are GET /health and POST /score")

    def _score(self) -> dict[str, Any]:
        self._at("/score", "/health")
        prompts, files, columns = _parse_request(self._body())
        try:
            self.server.scorer.check(columns)
        except ValueError as error:
            raise _Refusal(400, str(error)) from None
        try:
            with self.server.unpacked:
                pictures = _unpack(files)
                with self.server.turn:
                    if self._client_has_left():
                        raise _Refusal(408, "the client left before its turn came")
                    return self.server.score(prompts, pictures, columns)
        except _Refusal:
            raise
        except (RewardOutputError, ImportError) as error:
            # Not 500, which clients repeat: the next try would end the same.
            logger.exception("Reward `%s` cannot be served.", self.server.name)
            raise _Refusal(501, f"{type(error).__name__}: {error}") from None
        except Exception as error:
            logger.exception("Reward `%s` failed.", self.server.name)
            raise _Refusal(500, f"{type(error).__name__}: {error}") from None

    def _client_has_left(self) -> bool:
        # One that gave up waiting asks again: without this its first request would be scored as well.
        self.connection.settimeout(0)
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            self.connection.settimeout(self.timeout)

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not length:
            raise _Refusal(411, "a request needs a Content-Length")
        if not (length.isascii() and length.isdigit()):
            raise _Refusal(400, f"the Content-Length is {length[:20]!r}")
        if int(length[:20]) > self.server.max_body:
            raise _Refusal(
                413,
                f"the request has {length[:20]} bytes and the limit is {self.server.max_body}; send fewer images at "
                "a time or as JPEG, or start the server with a larger `max_body`",
            )
        body = b"".join(self._chunks(int(length), self.server.patience))
        if len(body) < int(length):
            raise _Refusal(408, f"only {len(body)} of {length} bytes came within {self.server.patience:g} s")
        return body

    def _chunks(self, size: int, seconds: float):
        """Up to `size` bytes in pieces, as long as the client sends and time is left."""
        end = time.monotonic() + seconds
        try:
            while size > 0 and (left := end - time.monotonic()) > 0:
                self.connection.settimeout(left)
                chunk = self.rfile.read1(min(size, 1 << 20))
                if not chunk:
                    return
                size -= len(chunk)
                yield chunk
        except OSError:  # a time-out, or the client went away
            return
        finally:
            self.connection.settimeout(self.timeout)


def _parse_request(body: bytes) -> tuple[list[str], list[bytes], dict[str, list]]:
    try:
        request = loads(body)
    except ValueError as error:
        raise _Refusal(400, f"the request is not JSON: {error}") from None
    request = request if isinstance(request, dict) else {}
    prompts, images, columns = request.get("prompts"), request.get("images"), request.get("columns", {})
    if not _is_list_of_text(prompts) or not _is_list_of_text(images) or len(prompts) != len(images):
        raise _Refusal(400, "`prompts` and `images` must be two lists of text of one length")
    if not 1 <= len(prompts) <= _MAX_IMAGES:
        raise _Refusal(400, f"there are {len(prompts)} images; a request has 1 to {_MAX_IMAGES}")
    if not isinstance(columns, dict):
        raise _Refusal(400, "`columns` must be an object of lists")
    for name, values in columns.items():
        if not isinstance(values, list) or len(values) != len(prompts):
            raise _Refusal(400, f"`columns` must have one value an image: {name[:100]!r} does not")
    return prompts, _files(images), columns


def _files(images: list[str]) -> list[bytes]:
    """The pictures' files. Of their contents only the heads are read."""
    files, pixels = [], 0
    for i, text in enumerate(images):
        with _refused_if_broken(i):
            files.append(base64.b64decode(text, validate=True))
            picture = _open(files[-1])
        pixels += picture.width * picture.height
        if pixels > _MAX_PIXELS:
            raise _Refusal(413, f"the pictures up to `images[{i}]` have {pixels} pixels; the limit is {_MAX_PIXELS}")
    return files


def _unpack(files: list[bytes]) -> list[Image.Image]:
    pictures = []
    for i, file in enumerate(files):
        with _refused_if_broken(i):
            pictures.append(_open(file).convert("RGB"))
    return pictures


def _open(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file), formats=["PNG", "JPEG"])


@contextmanager
def _refused_if_broken(i: int) -> "Iterator[None]":
    try:
        yield
    except Exception as error:  # Pillow's readers raise errors of many kinds for a broken file
        raise _Refusal(400, f"`images[{i}]` is no PNG or JPEG in base64: {type(error).__name__}") from error


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_number(value: Any) -> bool:
    # Python counts True as an integer, reads 1e999 as infinite and knows integers beyond all floats.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
