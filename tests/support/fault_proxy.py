"""A proxy between a program and a real server, which breaks some of what passes."""

import ssl
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self
from urllib.parse import urlsplit

_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}
_REFUSALS = {
    "AccessDenied": 403,
    "SlowDown": 503,
    "NotImplemented": 501,
    "ConditionalRequestConflict": 409,
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a client asked for."""

    method: str
    path: str
    """With the query."""
    headers: Mapping[str, str]
    """Their names in lower case."""
    body: bytes

    @property
    def start(self) -> int | None:
        """Return the first byte that a Range asks for, if there is one."""
        asked = self.headers.get("range")
        return int(asked.removeprefix("bytes=").partition("-")[0]) if asked else None


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to one request; places are counted in bytes of a body.

    A place behind a body's end is no fault, and is not counted as one.
    """

    refuse: (
        Literal["AccessDenied", "SlowDown", "NotImplemented", "ConditionalRequestConflict"] | None
    ) = None
    """The store is not asked; the answer is an error of this code."""
    drop: bool = False
    """The store is not asked; the connection ends without an answer."""
    delay: float = 0
    """Seconds before the answer."""
    cut_request: int | None = None
    """So much reaches the store, then both connections end."""
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


class FaultProxy:
    """An HTTP proxy on loopback in front of a store, to be used in a with block.

    Headers pass unchanged, Host among them, for signatures cover it.
    """

    def __init__(
        self, upstream: str, plan: Plan = lambda _: None, tls: ssl.SSLContext | None = None
    ) -> None:
        """Take the store's endpoint, what to do to each request, and how to speak TLS if so."""
        self.plan = plan
        """May be replaced at any time."""
        self.requests: list[Request] = []
        """All that came, in their order."""
        self.injected: Counter[str] = Counter()
        """How often each fault happened, by the names of ``Fault``'s fields."""
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy, self._server.upstream = self, urlsplit(upstream).netloc
        self._scheme = "https" if tls else "http"
        if tls:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        serve = self._server.serve_forever
        self._thread = threading.Thread(target=serve, args=(0.02,), daemon=True)

    @property
    def endpoint(self) -> str:
        """Return the URL to use in place of the store's."""
        return f"{self._scheme}://127.0.0.1:{self._server.server_address[1]}"

    def asked(self, method: str, part: str = "") -> list[Request]:
        """Return the requests so far of a method, for paths that contain a part."""
        return [one for one in self.requests if one.method == method and part in one.path]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _fault_for(self, request: Request) -> Fault:
        with self._lock:
            self.requests.append(request)
        return self.plan(request) or Fault()

    def _count(self, name: str) -> None:
        assert name in {field.name for field in fields(Fault)}
        with self._lock:
            self.injected[name] += 1


class _Server(ThreadingHTTPServer):
    proxy: FaultProxy
    upstream: str

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect early: the faults cause that."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def _origin(self) -> _Server:
        assert isinstance(self.server, _Server)
        return self.server

    def handle_one_request(self) -> None:
        """Read a request, pass it on with its fault, and answer."""
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if len(body) < length:
            self.close_connection = True
            return
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(method=self.command, path=self.path, headers=headers, body=body)
        fault = self._origin.proxy._fault_for(request)
        status, answered, content = self._ask(body, fault)
        if fault.delay:
            self._origin.proxy._count("delay")
            time.sleep(fault.delay)  # the fault itself
        if status:
            self._answer(status, answered, content, fault)
        else:
            self.close_connection = True

    def log_message(self, format: str, *_: Any) -> None:
        """Keep no log."""

    def _ask(self, body: bytes, fault: Fault) -> tuple[int, list[tuple[str, str]], bytes]:
        """Return the store's status, headers and body; status 0 if there is no answer."""
        count = self._origin.proxy._count
        if fault.drop:
            count("drop")
            return 0, [], b""
        if fault.refuse:
            count("refuse")
            text = f'<?xml version="1.0"?><Error><Code>{fault.refuse}</Code></Error>'.encode()
            content = b"" if self.command == "HEAD" else text
            return _REFUSALS[fault.refuse], [("Content-Type", "application/xml")], content
        if fault.corrupt_request is not None and fault.corrupt_request < len(body):
            count("corrupt_request")
            body = _flipped(body, fault.corrupt_request)
        cut = fault.cut_request is not None and fault.cut_request < len(body)
        upstream = HTTPConnection(self._origin.upstream, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() != "expect":  # answered here already
                    upstream.putheader(name, value)
            upstream.endheaders()
            if cut:
                count("cut_request")
                upstream.send(body[: fault.cut_request])
                return 0, [], b""
            upstream.send(body)
            answer = upstream.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        except (OSError, HTTPException):
            return 0, [], b""  # the store is gone, so this connection goes too
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
        if fault.corrupt_answer is not None and fault.corrupt_answer < len(body):
            self._origin.proxy._count("corrupt_answer")
            body = _flipped(body, fault.corrupt_answer)
        if fault.cut_answer is not None and fault.cut_answer < len(body):
            self._origin.proxy._count("cut_answer")
            body = body[: fault.cut_answer]
            self.close_connection = True
        self.wfile.write(body)


def _flipped(body: bytes, place: int) -> bytes:
    return body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :]
