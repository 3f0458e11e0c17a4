"""A server on the loopback address that misbehaves on order."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FaultServer(ThreadingHTTPServer):
    """
    Answers the n-th request by the n-th act and all further ones by the last; keeps what it was sent.

    An act is a function of the handler: `reply(...)`, `drip(...)`, ...
    """

    daemon_threads = True

    def __init__(self, *acts, port=0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.acts = acts
        self.requests = []  # (method and path, headers, value of the body)
        self.sent = 0  # bytes of endless bodies
        self._lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def next_act(self, request):
        with self._lock:
            self.requests.append(request)
            return self.acts[min(len(self.requests), len(self.acts)) - 1]

    def handle_error(self, request, client_address):
        pass  # a client that hangs up on it is what it asked for


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.body = json.loads(body) if body else None
        self.server.next_act((f"{self.command} {self.path}", dict(self.headers), self.body))(self)

    do_GET = do_POST

    def log_message(self, *args):
        pass


@contextmanager
def running(server):
    """A server at work."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def faults(*acts):
    with running(FaultServer(*acts)) as server:
        yield server


def reply(content, status=200, **headers):
    """An answer; `content` is bytes, or a value that becomes JSON (as Python writes it: with NaN)."""
    content = content if isinstance(content, bytes) else json.dumps(content).encode()

    def act(handler):
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(content)

    return act


def by_request(make):
    """An answer that depends on the request's body."""
    return lambda handler: reply(make(handler.body))(handler)


def slow(seconds, then):
    def act(handler):
        time.sleep(seconds)
        then(handler)

    return act


def hang_up(handler):
    """The connection ends without an answer."""
    handler.close_connection = True


def drip(seconds, in_head=False):
    """A byte now and then, for ever: each read is quick, the whole is not."""

    def act(handler):
        handler.wfile.write(b"HTTP/1.0 200 OK\r\n" + (b"X: " if in_head else b"\r\n"))
        while True:
            handler.wfile.write(b" ")
            time.sleep(seconds)

    return act


def endless(handler):
    """A body that does not end."""
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.server.sent += handler.wfile.write(b" " * (1 << 16))
