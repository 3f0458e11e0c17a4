"""
What the rewards that ask a server share: JSON over HTTP, bounded in time and in size, repeated where that can help.

Nothing outlives a call: each opens its connections, uses them for all its requests and closes them. So a server may be
restarted between two calls, and a client can be pickled, forked and called from any thread, also inside a notebook.
"""

import asyncio
import base64
import functools
import io
import json
import logging
import math
import os
import random
import re
import threading
import urllib.parse
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from .scoring import RewardOutputError


if TYPE_CHECKING:
    import httpx2
    from PIL.Image import Image


logger = logging.getLogger(__name__)

IMAGE_FORMATS = ("png", "jpeg")

# Statuses that may pass: the server's troubles, not the request's.
_RETRIED = (408, 429, 500, 502, 503, 504)
# Seconds before the first retry; doubled before each further one, up to the second number.
_BACKOFF = 0.5
_MAX_BACKOFF = 30.0
# Tries again of a `get`, by which is found out at the start whether a server is there at all.
_GET_RETRIES = 3
# A longer `Retry-After` is cut to this.
_MAX_RETRY_AFTER = 30.0
# Bytes of a reply.
_MAX_REPLY = 16 << 20
# Characters of a reply that an error shows.
_EXCERPT = 200
# Shorter keys are placeholders ("x", "EMPTY"), and may be part of any reply.
_LEAST_KEY = 8


class ServiceError(RewardOutputError):
    """
    A server refused a request, or its reply is not what the protocol says. Sent again, it would be so again.

    Args:
        message (`str`):
            What was wrong.
        status (`int`, *optional*):
            HTTP status of the reply.
    """

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class ServiceUnavailableError(ConnectionError):
    """A server did not answer, or answered that it cannot now, in any of the tries."""


class JSONService:
    """
    Client of a server that takes and gives JSON.

    A request is repeated where no connection came about or one was lost, after a time-out, and for the statuses 408,
    429, 500, 502, 503 and 504: after 0.5, 1, 2, ... and at most 30 seconds, each 25 % more or less, and not before the
    seconds that the reply's `Retry-After` asks for (30 at most; a date is not read). Any other status than 200 is
    final. Redirects are not followed, compressed replies are refused (none is asked for) and a reply may have 16 MiB.

    Proxies are taken from the environment (`HTTP_PROXY`, `HTTPS_PROXY`, `NO_PROXY`), except for loopback addresses.

    Args:
        url (`str`):
            Where the server's paths begin, `http://...` or `https://...`, without user name, query or fragment.
        timeout (`float`):
            Seconds for one try as a whole: name, connection, request and the reply's last byte.
        retries (`int`):
            Further tries. With 8 their pauses are 92 seconds together, 68 at least; a `get` has 3 at most.
        max_concurrency (`int`):
            Requests under way at one time.
        api_key_env (`str`, *optional*):
            Environment variable with a key that is sent as `Authorization: Bearer ...`. It is never logged: in a
            reply that repeats it, `***` takes its place before anything else is read; in one of status 200, if it has
            8 characters or more.

    Raises:
        `ValueError`: if an argument is out of its range, or the environment variable is not set.
    """

    def __init__(
        self, url: str, *, timeout: float, retries: int, max_concurrency: int, api_key_env: str | None = None
    ):
        self.url = _checked_url(url)
        if not 0 < timeout < math.inf:
            raise ValueError(f"`timeout` is {timeout}; it must be a number of seconds above 0.")
        if retries < 0:
            raise ValueError(f"`retries` is {retries}; it must be 0 or more.")
        if max_concurrency < 1:
            raise ValueError(f"`max_concurrency` is {max_concurrency}; it must be at least 1.")
        self.timeout = timeout
        self.retries = retries
        self.max_concurrency = max_concurrency
        self.api_key_env = api_key_env
        _api_key(api_key_env)

    def get(self, path: str) -> Any:
        """
        What the server has at a path.

        Raises:
            `ServiceUnavailableError`: if the server did not answer.
            `ServiceError`: if it refused, or its reply is not JSON.
        """
        [reply] = self._run("GET", path, [None])
        if isinstance(reply, (ServiceError, ServiceUnavailableError)):
            raise reply
        return reply

    def post(self, path: str, bodies: Sequence[Callable[[], Any]]) -> list[Any]:
        """
        Send requests, several at a time.

        Args:
            path (`str`):
                Where to.
            bodies (sequence of callables):
                Each makes one request's body, in a thread and just before it is sent, so that few lie in memory.

        Returns:
            `list`: each request's reply, or in its place the [`ServiceUnavailableError`] or [`ServiceError`] it met.
        """
        return self._run("POST", path, bodies) if bodies else []

    def _run(self, method: str, path: str, bodies: Sequence[Callable[[], Any] | None]) -> list[Any]:
        # A thread of its own, since the caller's may have an event loop at work already; and one that nobody need wait
        # for, so that Ctrl-C and the scorer's time limit need not either.
        outcome: Future = Future()

        def run() -> None:
            try:
                outcome.set_result(asyncio.run(self._gather(method, path, bodies)))
            except BaseException as error:
                outcome.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return outcome.result()

    async def _gather(self, method: str, path: str, bodies: Sequence[Callable[[], Any] | None]) -> list[Any]:
        import httpx2

        key = _api_key(self.api_key_env)
        headers = {"Accept": "application/json", "Accept-Encoding": "identity", "Content-Type": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        free = asyncio.Semaphore(self.max_concurrency)
        address = urllib.parse.urlsplit(self.url)
        async with httpx2.AsyncClient(
            headers=headers,
            verify=_tls() if address.scheme == "https" else False,  # no certificates are read for plain HTTP
            trust_env=not _is_loopback(address.hostname),
            timeout=None,  # httpx's are per read: a reply that drips would never end
            limits=httpx2.Limits(max_connections=self.max_concurrency),
        ) as client:

            async def exchange(make_body: Callable[[], Any] | None) -> Any:
                async with free:
                    body = b"" if make_body is None else await asyncio.to_thread(lambda: dumps(make_body()))
                    try:
                        return await self._exchange(client, method, self.url + path, body, key)
                    except (ServiceError, ServiceUnavailableError) as error:
                        return error

            return await asyncio.gather(*map(exchange, bodies))

    async def _exchange(self, client: "httpx2.AsyncClient", method: str, url: str, body: bytes, key: str | None):
        import httpx2

        jitter = random.Random()  # its own: the run's random numbers are not touched
        retries = self.retries if method == "POST" else min(self.retries, _GET_RETRIES)
        for attempt in range(retries + 1):
            wait = min(_BACKOFF * 2**attempt, _MAX_BACKOFF) * jitter.uniform(0.75, 1.25)
            try:
                status, headers, content = await asyncio.wait_for(_try(client, method, url, body), self.timeout)
            except asyncio.TimeoutError:
                reason = f"there was no whole reply within {self.timeout:g} s"
            except httpx2.TransportError as error:
                reason = f"{type(error).__name__}: {error}"
            else:
                masked = _masked(content, key)
                excerpt = repr(masked.decode(errors="replace")[:_EXCERPT])
                if status == 200:
                    try:
                        return loads(masked if key and len(key) >= _LEAST_KEY else content)
                    except ValueError as error:
                        raise ServiceError(f"{url} replied what is not JSON ({_shown(error)}): {excerpt}") from None
                if status not in _RETRIED:
                    raise ServiceError(f"{url} answered with status {status}: {excerpt}", status)
                reason = f"status {status}: {excerpt}"
                wait = max(wait, _retry_after(headers))
            if attempt < retries:
                # From the fourth on it takes seconds, and whoever looks at a run that stands still should know why.
                logger.log(
                    logging.WARNING if attempt >= 3 else logging.INFO,
                    "%s: %s; tried again in %.1f s.",
                    url,
                    reason,
                    wait,
                )
                await asyncio.sleep(wait)
        raise ServiceUnavailableError(f"{url} did not serve a request in {retries + 1} tries; the last: {reason}")


def dumps(value: Any) -> bytes:
    """A value as JSON; a `ValueError` or `TypeError` where there is none for it, as for NaN."""
    return json.dumps(value, allow_nan=False).encode()


def loads(text: bytes) -> Any:
    """The value of JSON in its strict form, which knows no NaN and no Infinity; else a `ValueError`."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def encode_picture(picture: "Image", image_format: str) -> str:
    """
    A picture as base64 text.

    Args:
        picture (`PIL.Image.Image`):
            The picture; made RGB.
        image_format (`str`):
            `"png"`, which keeps every bit, or `"jpeg"` (quality 95, colour at full resolution), ten times quicker.
    """
    buffer = io.BytesIO()
    if image_format == "png":
        # Level 1 with run-length matching alone (zlib's Z_RLE): quicker and smaller than plain level 1 on photographs.
        picture.convert("RGB").save(buffer, "PNG", compress_level=1, compress_type=3)
    else:
        picture.convert("RGB").save(buffer, "JPEG", quality=95, subsampling=0)
    return base64.b64encode(buffer.getvalue()).decode()


def check_image_format(image_format: str) -> None:
    """A `ValueError` for a format that [`encode_picture`] does not know."""
    if image_format not in IMAGE_FORMATS:
        raise ValueError(f"`image_format` is {image_format!r}; it must be one of {IMAGE_FORMATS}.")


async def _try(client: "httpx2.AsyncClient", method: str, url: str, body: bytes) -> tuple[int, Any, bytes]:
    async with client.stream(method, url, content=body) as response:
        if response.headers.get("Content-Encoding", "identity") != "identity":
            # Unpacked, a few kilobytes may be gigabytes.
            raise ServiceError(f"{url} sent a compressed reply, which was not asked for", response.status_code)
        content = bytearray()
        async for chunk in response.aiter_raw():
            content += chunk
            if len(content) > _MAX_REPLY:
                raise ServiceError(f"{url} sent a reply of more than {_MAX_REPLY} bytes", response.status_code)
        return response.status_code, response.headers, bytes(content)


def _checked_url(url: str) -> str:
    address = urllib.parse.urlsplit(url)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise ValueError("`url` must begin with http:// or https:// and a host, as in 'http://127.0.0.1:8000'.")
    if address.username or address.password or address.query or address.fragment:
        # Not shown: it may hold a password, and later messages give the whole address.
        raise ValueError("`url` has a user name, a query or a fragment; give scheme, host, port and path alone.")
    return url.rstrip("/")


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    # A header with other characters would be refused in words that repeat it.
    if not re.fullmatch(r"[!-~]+", key):
        raise ValueError(
            f"`api_key_env` is {variable!r}, but that environment variable is not set to a key (visible ASCII "
            "characters without spaces)."
        )
    return key


def _masked(content: bytes, key: str | None) -> bytes:
    """A reply without the key, plain or as JSON may write it."""
    if key is None:
        return content
    in_json = json.dumps(key)[1:-1]
    for form in (in_json.replace("/", r"\/"), in_json, key):  # the longest first
        content = content.replace(form.encode(), b"***")
    return content


@functools.cache
def _tls() -> Any:
    import httpx2

    return httpx2.create_ssl_context()  # 40 ms, once a process


def _retry_after(headers: Any) -> float:
    seconds = headers.get("Retry-After", "")
    return min(float(seconds), _MAX_RETRY_AFTER) if re.fullmatch(r"\d{1,9}(\.\d+)?", seconds) else 0.0


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _shown(error: Exception) -> str:
    return str(error)[:_EXCERPT]
