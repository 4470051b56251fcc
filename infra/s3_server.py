"""The settings of a real S3 server on loopback, OpenStack Swift from PyPI: ``local_cluster.py``.

It checks signatures and checksums and keeps its data on disk, so what passes here has met a store
that can refuse. One node, one copy, no TLS: nothing to run in production. Run as a program, in a
process that may import Swift, this file reads one JSON object, the arguments of ``write_settings``.
"""

import getpass
import json
import sys
from collections.abc import Callable
from configparser import ConfigParser
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
ACCESS_KEY = "ivegan:ivegan"  # Swift's account and user
STORES = ("account", "container", "object")
_PIPELINE = (
    "catch_errors gatekeeper healthcheck cache listing_formats bulk s3api tempauth copy slo dlo "
    "versioned_writes symlink proxy-server"
)


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
    """What the proxy, which is one process, uses of Swift's memcached client."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}

    def get(self, key: str, **_ignored: Any) -> Any:
        return self._values.get(key)

    def set(self, key: str, value: Any, **_ignored: Any) -> None:
        self._values[key] = value

    def delete(self, key: str, **_ignored: Any) -> None:
        self._values.pop(key, None)


def write_settings(folder: str, ports: dict[str, int], secret: str) -> None:
    """Write the settings of the four servers, and the rings that tell them of each other.

    Args:
        folder: for the data too; the same folder again holds the same objects.
        ports: of the three stores and of the ``proxy``, which is the S3 server.
        secret: the secret key.
    """
    from swift.common.ring import RingBuilder

    here = Path(folder)
    disk = here / "disks" / "one"
    disk.mkdir(parents=True, exist_ok=True)
    shared = {
        "bind_ip": HOST,
        "swift_dir": here,
        "devices": disk.parent,
        "mount_check": "false",
        "user": getpass.getuser(),
        "workers": 0,
        "log_level": "WARNING",
        "log_address": here / "no-syslog",
    }
    _write_ini(
        here / "swift.conf",
        {
            "swift-hash": {f"swift_hash_path_{end}": "ivegan" for end in ("prefix", "suffix")},
            "storage-policy:0": {"name": "one", "default": "yes"},
        },
    )
    for name in STORES:
        _write_ini(
            here / f"{name}.conf",
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
        ring.get_ring().save(str(here / f"{name}.ring.gz"))
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
    _write_ini(here / "proxy.conf", sections)


def _write_ini(path: Path, sections: dict[str, dict[str, Any]]) -> None:
    settings = ConfigParser(interpolation=None)
    settings.read_dict(sections)
    with path.open("w") as file:
        settings.write(file)
    path.chmod(0o600)  # the proxy's holds the secret


if __name__ == "__main__":
    write_settings(**json.load(sys.stdin))
