"""Checkpoints: folders that hold all an exact continuation needs, whole or not there.

    weights.safetensors   E, G, D, D', the trunk, and the averages of E and G where there are any
    training.pt           optimizer and loop state, loadable with ``weights_only=True``
    config.json           the configuration and where the weights came from; written last

They lie beside each other as ``STORAGE/RUN_ID/checkpoint-0000012800``, numbered by images seen. A
folder without ``config.json`` is an unfinished upload and counts as absent.
"""

import io
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save_file
from torch import Tensor

from ivegan import storage
from ivegan.config import Config, from_dict, to_dict
from ivegan.errors import UserError
from ivegan.networks import Encoder, Generator
from ivegan.step import State

PREFIX = "checkpoint-"
_WEIGHTS, _TRAINING, _CONFIG = "weights.safetensors", "training.pt", "config.json"


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
        training = {
            "optimizer_g": state.optimizer_g.state_dict(),
            "optimizer_d": state.optimizer_d.state_dict(),
            "step": state.step,
        }
        torch.save(training, folder / _TRAINING)
        content = {
            "config": to_dict(state.config),
            "step": state.step,
            "images_seen": state.images_seen,
            **metadata,
        }
        (folder / _CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
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
    weights = load_safetensors(storage.patiently(storage.read_bytes, storage.join(uri, _WEIGHTS)))
    for name, network in _parts(state).items():
        network.load_state_dict(_below(weights, name))
    raw = storage.patiently(storage.read_bytes, storage.join(uri, _TRAINING))
    training = torch.load(io.BytesIO(raw), map_location=state.device, weights_only=True)
    state.optimizer_g.load_state_dict(training["optimizer_g"])
    state.optimizer_d.load_state_dict(training["optimizer_d"])
    state.step = training["step"]
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
    weights = load_safetensors(storage.patiently(storage.read_bytes, storage.join(uri, _WEIGHTS)))
    prefix = "ema_" if config.optim.ema else ""
    encoder, generator = Encoder(config.model), Generator(config.model)
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
    try:
        return json.loads(storage.read_bytes(where))
    except ValueError as error:
        raise UserError(f"{where} is not readable as JSON: {error}.") from error


def latest(run_uri: str) -> str | None:
    """Return the URI of a run's newest finished checkpoint, or None."""
    finished = checkpoints(run_uri)
    return finished[-1] if finished else None


def checkpoints(run_uri: str) -> list[str]:
    """Return the URIs of a run's finished checkpoints, oldest first."""
    names = sorted(n for n in storage.list_names(run_uri) if n.startswith(PREFIX))
    uris = [storage.join(run_uri, name) for name in names]
    return [uri for uri in uris if storage.exists(storage.join(uri, _CONFIG))]


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


def _below(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the entries under one name, without it."""
    start = f"{name}."
    return {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}
