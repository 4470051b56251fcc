"""Checkpoints: folders that hold all an exact continuation needs, whole or not there.

    weights.safetensors   E, G, D, D', the trunk, and the averages of E and G where there are any
    training.safetensors  the moments and steps of both optimizers
    config.json           the configuration, each file's sha256, and where the weights came from;
                          written last

They lie beside each other as ``STORAGE/RUN_ID/checkpoint-0000012800``, numbered by images seen. A
folder without ``config.json`` is an unfinished upload and counts as absent.
"""

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save_file
from torch import Tensor

from ivegan import storage
from ivegan.config import Config, from_dict, to_dict
from ivegan.digest import sha256_hex
from ivegan.errors import UserError
from ivegan.networks import Encoder, Generator
from ivegan.optimizer import Optimizer
from ivegan.schema import DamagedError, check, parse_json
from ivegan.step import State

PREFIX = "checkpoint-"
_WEIGHTS, _TRAINING, _CONFIG = "weights.safetensors", "training.safetensors", "config.json"
_KEEP = "keep"
_REMEDY = "restore or delete that checkpoint"

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Header:
    """The entries of ``config.json`` that loading needs."""

    config: Config
    step: int
    images_seen: int
    files: dict[str, str] = field(default_factory=dict)
    """Name -> sha256."""


def save(state: State, run_uri: str, metadata: dict[str, Any]) -> str:
    """Write the state below a run's folder and return the checkpoint's URI.

    Args:
        state: taken as it stands.
        run_uri: ``STORAGE/RUN_ID``.
        metadata: plain values for ``config.json``: run id, dataset hash, world size, and the like.
    """
    uri = storage.join(run_uri, f"{PREFIX}{state.images_seen:010d}")
    with TemporaryDirectory() as tmp:
        folder = Path(tmp)
        save_file(_named_weights(state), folder / _WEIGHTS)
        optimizers = {name: o.state_dict() for name, o in _optimizers(state).items()}
        save_file(_named_moments(optimizers), folder / _TRAINING)
        metadata = {
            "config": to_dict(state.config),
            "step": state.step,
            "images_seen": state.images_seen,
            "files": {n: sha256_hex((folder / n).read_bytes()) for n in (_WEIGHTS, _TRAINING)},
            **metadata,
        }
        (folder / _CONFIG).write_text(json.dumps(metadata, indent=2, sort_keys=True) + "\n")
        storage.patiently(storage.upload_folder, folder, uri, last=_CONFIG)
    return uri


def restore(state: State, uri: str) -> dict[str, Any]:
    """Load a checkpoint into a state and return the metadata saved with it.

    Raises:
        UserError: the checkpoint is of another architecture, or not readable.
    """
    metadata = read_metadata(uri)
    saved = from_dict(metadata["config"])
    if saved.model != state.config.model:
        raise UserError(
            f"The checkpoint {uri} holds {saved.model}, but this run asks for "
            f"{state.config.model}; resume with the settings it was started with."
        )
    weights, moments = _read_tensors(uri, _WEIGHTS, metadata), _read_moments(uri, metadata)
    with _named_damage(uri):
        for name, network in _parts(state).items():
            network.load_state_dict(_below(weights, name))
        for name, optimizer in _optimizers(state).items():
            _load_moments(optimizer, _below(moments, name))
    state.step = metadata["step"]
    for optimizer in (state.optimizer_g, state.optimizer_d):
        optimizer.restart(state.step)
    return metadata


def load_networks(uri: str) -> tuple[Config, Encoder, Generator, dict[str, Any]]:
    """Return (config, E, G, metadata) for evaluation, on the CPU and in eval mode.

    The averaged weights are returned where the run kept them.

    Raises:
        UserError: nothing readable at the URI.
    """
    metadata = read_metadata(uri)
    config = from_dict(metadata["config"])
    weights = _read_tensors(uri, _WEIGHTS, metadata)
    prefix = "ema_" if config.optim.ema else ""
    encoder, generator = Encoder(config.model), Generator(config.model)
    with _named_damage(uri):
        encoder.load_state_dict(_below(weights, f"{prefix}encoder"))
        generator.load_state_dict(_below(weights, f"{prefix}generator"))
    return config, encoder.eval(), generator.eval(), metadata


def read_metadata(uri: str) -> dict[str, Any]:
    """Return a checkpoint's ``config.json``.

    Raises:
        UserError: there is no finished checkpoint at the URI.
    """
    where = storage.join(uri, _CONFIG)
    if not storage.exists(where):
        raise UserError(f"There is no checkpoint at {uri}: give a folder with a {_CONFIG} in it.")
    metadata = parse_json(storage.read_bytes(where), where, _REMEDY)
    names = {"config", "step", "images_seen", "files"}
    header = metadata
    if isinstance(metadata, dict):  # the other entries differ from version to version
        header = {k: v for k, v in metadata.items() if k in names}
    check(header, _Header, where, _REMEDY)
    return metadata


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
                _read_checked(uri, name, metadata)
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
    return [uri for uri in uris if storage.exists(storage.join(uri, _CONFIG))]


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
            storage.delete_folder(uri, first=_CONFIG)


def clear_unfinished(run_uri: str) -> None:
    """Delete what a killed process left of the checkpoint that it was writing."""
    names = [n for n in storage.list_names(run_uri) if n.lstrip(".").startswith(PREFIX)]
    for uri in {storage.join(run_uri, name) for name in names} - set(checkpoints(run_uri)):
        log.info("deleting the unfinished checkpoint %s", uri)
        storage.delete_folder(uri)


def find(uri: str) -> str:
    """Return the checkpoint that a URI names: itself, or the newest one of a run's folder.

    Raises:
        UserError: neither is there.
    """
    if storage.exists(storage.join(uri, _CONFIG)):
        return uri
    newest = latest(uri)
    if newest is None:
        raise UserError(f"There is no checkpoint at {uri}, nor in a folder below it.")
    return newest


def _parts(state: State) -> dict[str, torch.nn.Module]:
    """Return the networks under the names that their weights are stored with."""
    generator_side, discriminator_side = state.encoder_generator, state.discriminators
    parts = {
        "encoder": generator_side.encoder,
        "generator": generator_side.generator,
        "trunk": discriminator_side.trunk,
        "pair_head": discriminator_side.pair_head,
        "sample_head": discriminator_side.sample_head,
    }
    if state.average is not None:
        parts |= {"ema_encoder": state.average.encoder, "ema_generator": state.average.generator}
    return parts


def _named_weights(state: State) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, network in _parts(state).items()
        for key, value in network.state_dict().items()
    }


def _optimizers(state: State) -> dict[str, Optimizer]:
    return {"optimizer_g": state.optimizer_g, "optimizer_d": state.optimizer_d}


def _named_moments(optimizers: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    """Return Adam's state of each parameter, which the optimizers number."""
    return {
        f"{name}.{number}.{key}": value.detach().cpu().contiguous()
        for name, state in optimizers.items()
        for number, values in state["state"].items()
        for key, value in values.items()
    }


def _read_moments(uri: str, metadata: dict[str, Any]) -> dict[str, Tensor]:
    if "files" in metadata:
        return _read_tensors(uri, _TRAINING, metadata)
    # Version 0.1 wrote torch's own format.
    raw = storage.patiently(storage.read_bytes, storage.join(uri, "training.pt"))
    with _named_damage(uri):
        saved = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        return _named_moments({name: saved[name] for name in ("optimizer_g", "optimizer_d")})


def _load_moments(optimizer: Optimizer, moments: dict[str, Tensor]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in moments.items():
        number, _, key = name.partition(".")
        if value.ndim:  # a fused Adam needs moments in their parameter's memory format
            value = torch.empty_like(parameters[int(number)]).copy_(value)
        state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _read_checked(uri: str, name: str, metadata: dict[str, Any]) -> bytes:
    """Return a file of a checkpoint after comparing its digest, if one was stored."""
    content = storage.patiently(storage.read_bytes, storage.join(uri, name))
    if metadata.get("files", {}).get(name, sha256_hex(content)) != sha256_hex(content):
        raise DamagedError(f"{storage.join(uri, name)} is not what was saved: {_REMEDY}.")
    return content


def _read_tensors(uri: str, name: str, metadata: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a file."""
    with _named_damage(uri):
        return load_safetensors(_read_checked(uri, name, metadata))


@contextmanager
def _named_damage(uri: str) -> Iterator[None]:
    """Turn what torch and safetensors raise about a checkpoint's content into a sentence."""
    try:
        yield
    except (SafetensorError, UnpicklingError, RuntimeError, LookupError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DamagedError(f"{uri} cannot be loaded ({reason}): {_REMEDY}.") from error


def _below(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the entries under one name, without it."""
    start = f"{name}."
    return {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}
