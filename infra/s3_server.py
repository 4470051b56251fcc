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
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic, sleep
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


@contextmanager
def serve(folder: Path, port: int, secret: str) -> Iterator[dict[str, str]]:
    """Run the server for the length of a with block, and yield the variables that lead to it.

    Args:
        folder: for the data; the same folder again holds the same objects.
        port: of the S3 interface; 0 takes a free one.
        secret: the secret key.

    Raises:
        RuntimeError: it did not start; the message ends with its log.
    """
    folder = folder.absolute()
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
        yield {
            "AWS_ENDPOINT_URL": f"http://{HOST}:{ports['proxy']}",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }


def cache_factory(_settings: dict[str, str], **_more: str) -> Callable[[Any], Any]:
    """Return the part of the proxy that stands in for memcached: it halves the requests inside."""
    cache = _Cache()

    def add_cache(app: Callable[..., Any]) -> Callable[..., Any]:
        def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
            environ["swift.cache"] = cache
            return app(environ, start_response)

        return answer

    return add_cache


class _Cache:
    """What the proxy uses of Swift's memcached client, over a dict of (value, time of expiry)."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[Any, float]] = {}

    def get(self, key: str, **_ignored: Any) -> Any:
        value, expiry = self._entries.get(key, (None, 0.0))
        return value if monotonic() < expiry else None

    def set(self, key: str, value: Any, time: float = 0, **_ignored: Any) -> None:
        self._entries[key] = (value, monotonic() + time if time else float("inf"))

    def delete(self, key: str, **_ignored: Any) -> None:
        self._entries.pop(key, None)


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
    shared = {
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
            "swift-hash": {f"swift_hash_path_{end}": "ivegan" for end in ("prefix", "suffix")},
            "storage-policy:0": {"name": "one", "default": "yes"},
        },
    )
    for name in _STORES:
        _write_ini(
            folder / f"{name}.conf",
            {
                "DEFAULT": shared | {"bind_port": ports[name]},
                "pipeline:main": {"pipeline": f"healthcheck {name}-server"},
                "filter:healthcheck": {"use": "egg:swift#healthcheck"},
                f"app:{name}-server": {"use": f"egg:swift#{name}"},
            },
        )
        ring = RingBuilder(1, 1, 1)  # two partitions, one copy
        place = {"ip": HOST, "port": ports[name], "device": disk.name, "region": 1, "zone": 1}
        ring.add_dev({"weight": 1.0, "replication_ip": HOST, "replication_port": 0, **place})
        ring.rebalance()
        ring.get_ring().save(str(folder / f"{name}.ring.gz"))
    account, user = ACCESS_KEY.split(":")
    sections: dict[str, dict[str, Any]] = {
        "DEFAULT": shared | {"bind_port": ports["proxy"]},
        "pipeline:main": {"pipeline": _PIPELINE},
        "app:proxy-server": {
            "use": "egg:swift#proxy",
            "account_autocreate": "true",
            "allow_account_management": "true",
        },
    }
    for name in _PIPELINE.split()[:-1]:
        sections[f"filter:{name}"] = {"use": f"egg:swift#{name}"}
    sections["filter:cache"] = {"paste.filter_factory": f"{Path(__file__).stem}:cache_factory"}
    sections["filter:s3api"]["location"] = "us-east-1"
    sections["filter:tempauth"][f"user_{account}_{user}"] = f"{secret} .admin"
    sections["filter:versioned_writes"]["allow_object_versioning"] = "true"
    _write_ini(folder / "proxy.conf", sections)


def _write_ini(path: Path, sections: dict[str, dict[str, Any]]) -> None:
    settings = ConfigParser(interpolation=None)
    settings.read_dict(sections)
    with path.open("w") as file:
        settings.write(file)
    path.chmod(0o600)  # the proxy's holds the secret


def _wait(ports: list[int], children: list[subprocess.Popen[bytes]], log: Path) -> None:
    """Return once the servers at these ports answer."""
    deadline = monotonic() + STARTS_WITHIN
    while True:
        dead = [child for child in children if child.poll() is not None]
        if dead or monotonic() > deadline:
            what = f"exited with {dead[0].returncode}" if dead else "does not answer"
            tail = log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"the S3 server {what}; its log ends with:\n{tail}")
        try:
            for port in ports:
                with urlopen(f"http://{HOST}:{port}/healthcheck", timeout=5):
                    pass
            return
        except (OSError, URLError):
            sleep(0.05)  # between two looks, never instead of one


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
    parser.add_argument("--secret", default=secrets.token_hex(16), help="default: a random one")
    arguments = parser.parse_args()
    # Interrupted or terminated, it leaves the with block and stops its children.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with serve(arguments.folder, arguments.port, arguments.secret) as variables:
            for name, value in variables.items():
                print(f"export {name}={value}", flush=True)
            signal.pause()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    command()
