"""What a checkpoint holds: written, and loaded after its digests are compared."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from ivegan import storage
from ivegan.checkpoint.folder import CONFIG, REMEDY, read_checked, read_metadata, uri_of
from ivegan.config import Config, from_dict, to_dict
from ivegan.errors import UserError
from ivegan.networks import Encoder, Generator
from ivegan.optimizer import Optimizer
from ivegan.step import State
from ivegan.storage.digest import sha256_hex
from ivegan.storage.schema import DamagedError

_WEIGHTS, _TRAINING = "weights.safetensors", "training.safetensors"


def save(state: State, run_uri: str, metadata: dict[str, Any]) -> str:
    """Write the state below a run's folder and return the checkpoint's URI.

    Args:
        state: taken as it stands.
        run_uri: ``STORAGE/RUN_ID``.
        metadata: plain values for ``config.json``: run id, dataset hash, world size, and the like.
    """
    uri = uri_of(run_uri, state.images_seen)
    optimizers = {name: o.state_dict() for name, o in _optimizers(state).items()}
    files = {
        _WEIGHTS: save_safetensors(_named_weights(state)),
        _TRAINING: save_safetensors(_named_moments(optimizers)),
    }
    metadata = {
        "config": to_dict(state.config),
        "step": state.step,
        "images_seen": state.images_seen,
        "files": {name: sha256_hex(content) for name, content in files.items()},
        **metadata,
    }
    files[CONFIG] = (json.dumps(metadata, indent=2, sort_keys=True) + "\n").encode()
    storage.write_folder(uri, files, last=CONFIG)
    return uri


def restore(state: State, uri: str) -> None:
    """Load a checkpoint into a state.

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
    raw = storage.read_bytes(storage.join(uri, "training.pt"))
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


def _read_tensors(uri: str, name: str, metadata: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a file."""
    with _named_damage(uri):
        return load_safetensors(read_checked(uri, name, metadata))


@contextmanager
def _named_damage(uri: str) -> Iterator[None]:
    """Turn what torch and safetensors raise about a checkpoint's content into a sentence."""
    try:
        yield
    except (SafetensorError, UnpicklingError, RuntimeError, LookupError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DamagedError(f"{uri} cannot be loaded ({reason}): {REMEDY}.") from error


def _below(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the entries under one name, without it."""
    start = f"{name}."
    return {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}
