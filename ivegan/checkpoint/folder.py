"""The checkpoints of a run's folder: found, checked, kept and deleted."""

import logging
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ivegan import storage
from ivegan.config import Config
from ivegan.errors import UserError
from ivegan.storage.digest import sha256_hex
from ivegan.storage.schema import DamagedError, check, parse_json

PREFIX = "checkpoint-"
CONFIG = "config.json"
REMEDY = "restore or delete that checkpoint"
_KEEP = "keep"

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Header:
    """The entries of ``config.json`` that loading needs."""

    config: Config
    step: int
    images_seen: int
    files: dict[str, str] = field(default_factory=dict)
    """Name -> sha256."""
    half: Literal["encoder", "generator"] | None = None
    """Of a registered model, whose configuration is its checkpoint's."""


def read_metadata(uri: str) -> dict[str, Any]:
    """Return a checkpoint's ``config.json``.

    Raises:
        UserError: there is no finished checkpoint at the URI.
    """
    where = storage.join(uri, CONFIG)
    if not storage.exists(where):
        raise UserError(f"There is no checkpoint at {uri}: give a folder with a {CONFIG} in it.")
    metadata = parse_json(storage.read_bytes(where), where, REMEDY)
    names = {entry.name for entry in fields(_Header)}
    header = metadata
    if isinstance(metadata, dict):  # the other entries differ from version to version
        header = {k: v for k, v in metadata.items() if k in names}
    check(header, _Header, where, REMEDY)
    return metadata


def read_checked(uri: str, name: str, metadata: dict[str, Any]) -> bytes:
    """Return a file of a checkpoint after comparing its digest, if one was stored."""
    content = storage.read_bytes(storage.join(uri, name))
    if metadata.get("files", {}).get(name) not in (None, sha256_hex(content)):
        raise DamagedError(f"{storage.join(uri, name)} is not what was saved: {REMEDY}.")
    return content


def latest(run_uri: str) -> str | None:
    """Return the URI of a run's newest checkpoint that is whole, or None if there is none at all.

    Raises:
        UserError: all checkpoints are damaged.
    """
    damage: UserError | None = None
    for uri in reversed(checkpoints(run_uri)):
        try:
            metadata = read_metadata(uri)
            for name in metadata.get("files", {}):
                read_checked(uri, name, metadata)
            return uri
        except DamagedError as error:
            log.warning("%s; using the checkpoint before it", str(error).rstrip("."))
            damage = error
    if damage is not None:
        raise damage
    return None


def checkpoints(run_uri: str) -> list[str]:
    """Return the URIs of a run's finished checkpoints, oldest first."""
    names = sorted(n for n in storage.list_names(run_uri) if n.startswith(PREFIX))
    uris = [storage.join(run_uri, name) for name in names]
    return [uri for uri in uris if storage.exists(storage.join(uri, CONFIG))]


def keep(uri: str) -> None:
    """Mark a checkpoint as one that ``prune`` leaves, because it was evaluated or registered."""
    try:
        if not storage.exists(storage.join(uri, _KEEP)):
            storage.write_bytes(storage.join(uri, _KEEP), b"")
    except UserError as error:  # a run of another owner
        log.warning("%s cannot be marked as one to keep: %s", uri, error)


def prune(run_uri: str, count: int) -> None:
    """Delete a run's checkpoints, except for the last ``count`` and those that are marked."""
    for uri in checkpoints(run_uri)[:-count]:
        if not storage.exists(storage.join(uri, _KEEP)):
            storage.delete_folder(uri, first=CONFIG)


def clear_unfinished(run_uri: str) -> None:
    """Delete what a killed process left of the checkpoint that it was writing."""
    names = [n for n in storage.list_names(run_uri) if n.lstrip(".").startswith(PREFIX)]
    for uri in {storage.join(run_uri, name) for name in names} - set(checkpoints(run_uri)):
        log.info("deleting the unfinished checkpoint %s", uri)
        storage.delete_folder(uri)


def uri_of(run_uri: str, images_seen: int) -> str:
    """Return the URI of a run's checkpoint after a number of images."""
    return storage.join(run_uri, f"{PREFIX}{images_seen:010d}")


def find(uri: str) -> str:
    """Return the checkpoint that a URI names: itself, or the newest one of a run's folder.

    Raises:
        UserError: neither is there.
    """
    if storage.exists(storage.join(uri, CONFIG)):
        return uri
    newest = latest(uri)
    if newest is None:
        raise UserError(f"There is no checkpoint at {uri}, nor in a folder below it.")
    return newest
