"""A proxy between a program and a real server, which breaks some of what passes."""

import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, NamedTuple, Self
from urllib.parse import urlsplit

_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}
_REFUSALS = {"SlowDown": 503, "NotImplemented": 501}


class Request(NamedTuple):
    """What a client asked for."""

    method: str
    path: str
    """With the query."""
    headers: Mapping[str, str]
    """Their names in lower case."""
    body: bytes


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to one request; places are counted in bytes of a body.

    A place behind a body's end is no fault, and is not counted as one.
    """

    refuse: Literal["SlowDown", "NotImplemented"] | None = None
    """The store is not asked; the answer is an error of this code."""
    drop: bool = False
    """The store is not asked; the connection ends without an answer."""
    corrupt_request: int | None = None
    """This byte of what the client sends is another one."""
    cut_answer: int | None = None
    """So much reaches the client, then its connection ends."""
    corrupt_answer: int | None = None
    """This byte of what the store sends is another one."""


Plan = Callable[[Request], Fault | None]


def times(count: int, fault: Fault, where: Callable[[Request], bool] = lambda _: True) -> Plan:
    """Return a plan that does this to the first so many requests of a kind."""
    lock, left = threading.Lock(), count

    def plan(request: Request) -> Fault | None:
        nonlocal left
        with lock:
            if left == 0 or not where(request):
                return None
            left -= 1
            return fault

    return plan


class FaultProxy(ThreadingHTTPServer):
    """An HTTP proxy on loopback in front of a store, to be used in a with block.

    Headers pass unchanged, Host among them, for signatures cover it.
    """

    def __init__(self, upstream: str, plan: Plan = lambda _: None) -> None:
        """Take the store's endpoint and what to do to each request."""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.plan = plan
        """May be replaced at any time."""
        self.requests: list[Request] = []
        """All that came, in their order."""
        self.injected: Counter[str] = Counter()
        """How often each fault happened, by the names of ``Fault``'s fields."""
        self.lock = threading.Lock()
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        """The URL to use in place of the store's."""

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect early: the faults cause that."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def count(self, name: str) -> None:
        """Count a fault that happens now."""
        with self.lock:
            self.injected[name] += 1


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultProxy  # pyright: ignore[reportIncompatibleVariableOverride]

    def _pass(self) -> None:
        """Pass a request on with its fault, and answer."""
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if len(body) < length:
            self.close_connection = True
            return
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(method=self.command, path=self.path, headers=headers, body=body)
        with self.server.lock:
            self.server.requests.append(request)
        fault = self.server.plan(request) or Fault()
        answer = self._ask(request, fault)
        if answer is None:
            self.close_connection = True
        else:
            self._answer(*answer, fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = _pass

    def log_message(self, format: str, *_: Any) -> None:
        """Keep no log."""

    def _ask(
        self, request: Request, fault: Fault
    ) -> tuple[int, list[tuple[str, str]], bytes] | None:
        """Return the store's status, headers and body, or None if there is no answer."""
        if fault.drop:
            self.server.count("drop")
            return None
        if fault.refuse:
            self.server.count("refuse")
            text = f'<?xml version="1.0"?><Error><Code>{fault.refuse}</Code></Error>'.encode()
            content = b"" if request.method == "HEAD" else text
            return _REFUSALS[fault.refuse], [("Content-Type", "application/xml")], content
        body = self._flipped(request.body, fault.corrupt_request, "corrupt_request")
        headers = dict(request.headers)
        headers.pop("expect", None)  # answered here already
        upstream = HTTPConnection(self.server.upstream, timeout=60)
        try:
            upstream.request(request.method, request.path, body, headers)
            answer = upstream.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        except (OSError, HTTPException):
            return None  # the store is gone, so this connection goes too
        finally:
            upstream.close()

    def _answer(
        self, status: int, headers: list[tuple[str, str]], body: bytes, fault: Fault
    ) -> None:
        self.send_response_only(status)
        length = str(len(body))
        for name, value in headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                length = value
            if name.lower() not in _HOP:
                self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", length)
        self.end_headers()
        body = self._flipped(body, fault.corrupt_answer, "corrupt_answer")
        if fault.cut_answer is not None and fault.cut_answer < len(body):
            self.server.count("cut_answer")
            body = body[: fault.cut_answer]
            self.close_connection = True
        self.wfile.write(body)

    def _flipped(self, body: bytes, place: int | None, name: str) -> bytes:
        if place is None or place >= len(body):
            return body
        self.server.count(name)
        return body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :]
