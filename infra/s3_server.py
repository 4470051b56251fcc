"""A real S3 server on loopback, for tests and for one machine: OpenStack Swift from PyPI.

It checks signatures and checksums and keeps its data on disk, so what passes here has met a store
that can refuse. One node, one copy, no TLS: nothing to run in production.

    python infra/s3_server.py runs/s3 --port 9000

prints the variables to export and serves until it is interrupted.
"""

import argparse
import getpass
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

HOST = "127.0.0.1"
STARTS_WITHIN = 60  # seconds; a cold start takes four
ACCESS_KEY = "ivegan:ivegan"  # Swift's account and user
_STORES = ("account", "container", "object")
_PIPELINE = (
    "catch_errors gatekeeper healthcheck cache listing_formats bulk s3api tempauth copy slo dlo "
    "versioned_writes symlink proxy-server"
)


@dataclass(frozen=True)
class Server:
    """Where a running server is, and how to get in."""

    endpoint: str
    access_key: str
    secret_key: str

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables that lead a client here."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
        }


@contextmanager
def serve(folder: Path, *, port: int = 0, secret: str | None = None) -> Iterator[Server]:
    """Run the server on a data folder for the length of a with block.

    Args:
        folder: made if need be; the same folder again holds the same objects.
        port: of the S3 interface; 0 takes a free one.
        secret: the secret key; a random one by default.

    Raises:
        RuntimeError: it did not start; the message ends with its log.
    """
    folder = folder.absolute()
    secret = secret or secrets.token_hex(16)
    names: list[str] = ["proxy", *_STORES]
    ports = dict(zip(names, _free_ports(port, *[0] * len(_STORES)), strict=True))
    _write_settings(folder, ports, secret)
    # The proxy finds the cache below as a module: it lies beside this file.
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent)}
    programs = Path(sys.executable).parent
    with ExitStack() as stack:
        log = stack.enter_context((folder / "server.log").open("wb"))
        children: list[subprocess.Popen[bytes]] = []

        def start(names: tuple[str, ...]) -> None:
            for name in names:
                child = subprocess.Popen(
                    [programs / f"swift-{name}-server", folder / f"{name}.conf"],
                    env=environment,
                    stdout=log,
                    stderr=log,
                )
                stack.callback(_stop, child)
                children.append(child)
            _wait([ports[name] for name in names], children, folder / "server.log")

        start(_STORES)
        start(("proxy",))  # last: a proxy without its stores reports that no bucket exists
        yield Server(f"http://{HOST}:{ports['proxy']}", ACCESS_KEY, secret)


def cache_factory(_settings: dict[str, str], **_more: str) -> Callable[[Any], Any]:
    """Return the part of the proxy that stands in for memcached, which Swift insists on."""
    cache = _Cache()

    def add_cache(app: Callable[..., Any]) -> Callable[..., Any]:
        def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
            environ["swift.cache"] = cache
            return app(environ, start_response)

        return answer

    return add_cache


class _Cache:
    """The interface of Swift's memcached client over a dict of (value, time of expiry)."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[Any, float]] = {}

    def get(self, key: str, raise_on_error: bool = False) -> Any:
        value, expiry = self._entries.get(key, (None, 0.0))
        return value if time.monotonic() < expiry else None

    def set(self, key: str, value: Any, time: float = 0, **_ignored: Any) -> None:
        self._entries[key] = (value, _now() + time if time else float("inf"))

    def delete(self, key: str, server_key: str | None = None) -> None:
        self._entries.pop(key, None)

    def incr(self, key: str, delta: int = 1, time: float = 0) -> int:
        value = max(0, int(self.get(key) or 0) + int(delta))
        self.set(key, value, time=time)
        return value

    def decr(self, key: str, delta: int = 1, time: float = 0) -> int:
        return self.incr(key, -int(delta), time)

    def set_multi(self, mapping: dict[str, Any], *_: Any, time: float = 0, **_more: Any) -> None:
        for key, value in mapping.items():
            self.set(key, value, time=time)

    def get_multi(self, keys: list[str], server_key: str | None = None) -> list[Any]:
        return [self.get(key) for key in keys]


def _now() -> float:
    return time.monotonic()


def _free_ports(*wanted: int) -> list[int]:
    """Return the ports, each 0 replaced by a free one."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in wanted]
        for one, port in zip(sockets, wanted, strict=True):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind((HOST, port))
        return [one.getsockname()[1] for one in sockets]


def _write_settings(folder: Path, ports: dict[str, int], secret: str) -> None:
    """Write the settings of the four servers, and the rings that tell them of each other."""
    from swift.common.ring import RingBuilder

    disk = folder / "disks" / "one"
    disk.mkdir(parents=True, exist_ok=True)
    everywhere = {
        "bind_ip": HOST,
        "swift_dir": folder,
        "devices": disk.parent,
        "mount_check": "false",
        "user": getpass.getuser(),
        "workers": 0,
        "log_level": "WARNING",
        "log_address": folder / "no-syslog",
    }
    _write_ini(
        folder / "swift.conf",
        {
            "swift-hash": {"swift_hash_path_prefix": "ivegan", "swift_hash_path_suffix": "ivegan"},
            "storage-policy:0": {"name": "one", "default": "yes"},
        },
    )
    for name in _STORES:
        _write_ini(
            folder / f"{name}.conf",
            {
                "DEFAULT": everywhere | {"bind_port": ports[name]},
                "pipeline:main": {"pipeline": f"healthcheck {name}-server"},
                "filter:healthcheck": {"use": "egg:swift#healthcheck"},
                f"app:{name}-server": {"use": f"egg:swift#{name}"},
            },
        )
        ring = RingBuilder(1, 1, 1)  # two partitions, one copy
        place = {"ip": HOST, "port": ports[name], "device": disk.name}
        copy = {"replication_ip": HOST, "replication_port": ports[name]}
        ring.add_dev({"id": 0, "region": 1, "zone": 1, "weight": 1.0, "meta": "", **place, **copy})
        ring.rebalance()
        ring.get_ring().save(str(folder / f"{name}.ring.gz"))
    account, user = ACCESS_KEY.split(":")
    parts: dict[str, dict[str, Any]] = {
        "cache": {"paste.filter_factory": f"{Path(__file__).stem}:cache_factory"},
        "s3api": {"location": "us-east-1"},
        "tempauth": {f"user_{account}_{user}": f"{secret} .admin"},
        "versioned_writes": {"allow_object_versioning": "true"},
    }
    filters = [name for name in _PIPELINE.split() if name != "proxy-server"]
    _write_ini(
        folder / "proxy.conf",
        {
            "DEFAULT": everywhere | {"bind_port": ports["proxy"]},
            "pipeline:main": {"pipeline": _PIPELINE},
            "app:proxy-server": {
                "use": "egg:swift#proxy",
                "account_autocreate": "true",
                "allow_account_management": "true",
            },
        }
        | {
            f"filter:{name}": ({} if name == "cache" else {"use": f"egg:swift#{name}"})
            | parts.get(name, {})
            for name in filters
        },
    )


def _write_ini(path: Path, sections: dict[str, dict[str, Any]]) -> None:
    lines = []
    for section, values in sections.items():
        lines += [f"[{section}]", *(f"{key} = {value}" for key, value in values.items()), ""]
    path.write_text("\n".join(lines))
    path.chmod(0o600)  # the proxy's holds the secret


def _wait(ports: list[int], children: list[subprocess.Popen[bytes]], log: Path) -> None:
    """Return once the servers at these ports answer."""
    deadline = _now() + STARTS_WITHIN
    while True:
        dead = [child for child in children if child.poll() is not None]
        if dead or _now() > deadline:
            what = f"exited with {dead[0].returncode}" if dead else "does not answer"
            tail = log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"the S3 server {what}; its log ends with:\n{tail}")
        try:
            for port in ports:
                with urlopen(f"http://{HOST}:{port}/healthcheck", timeout=5):
                    pass
            return
        except (OSError, URLError):
            time.sleep(0.05)  # between two looks, never instead of one


def _stop(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(timeout=10)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def command() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="where the objects are kept")
    parser.add_argument("--port", type=int, default=9000, help="default 9000")
    parser.add_argument("--secret", help="the secret key; a random one by default")
    arguments = parser.parse_args()
    # Interrupted or terminated, it leaves the with block and stops its children.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with serve(arguments.folder, port=arguments.port, secret=arguments.secret) as server:
            for name, value in server.environment.items():
                print(f"export {name}={value}", flush=True)
            signal.pause()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    command()
