"""One half of a trained pair as a model that MLflow loads without this repository.

A model's folder holds the graph as torch exports it (``data/model.pt2``), the same weights as
safetensors, the configuration, a model card and the checksums of all of them, and no pickle.
"""

import functools
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from mlflow import MlflowClient, pyfunc, pytorch
from mlflow.artifacts import download_artifacts
from mlflow.entities import LoggedModel, LoggedModelOutput
from mlflow.models import Model, infer_signature
from requests import RequestException
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ivegan import checkpoint
from ivegan.config import Config, flatten, from_dict, to_dict
from ivegan.errors import UserError
from ivegan.networks import Encoder, Generator, sample_shape
from ivegan.storage.digest import sha256_hex
from pipelines.models import card
from pipelines.models.artifact import (
    CARD,
    CONFIG,
    GRAPH,
    WEIGHTS,
    check_sums,
    empty_members,
    write_sums,
)
from pipelines.models.versions import model_name

TOLERANCE = 1e-5  # between a registered model and the network it was made from
_BATCHES = (1, 2, 5)  # one is the size that an exported graph is most easily frozen to


class EncoderModel(nn.Module):
    """The encoder as it is registered: uint8 images or float32 points -> float32 z."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        """Return z; the scaling of pixels is part of the model."""
        return self.encoder(x.float() / 255 if x.dtype == torch.uint8 else x)


class GeneratorModel(nn.Module):
    """The generator as it is registered: float32 [z, z'] -> float32 images in [0, 1], or points."""

    def __init__(self, generator: Generator, z_dim: int) -> None:
        super().__init__()
        self.generator = generator
        self.z_dim = z_dim

    def forward(self, latent: Tensor) -> Tensor:
        """Return G(z', z); MLflow's signatures know one input, hence the concatenation."""
        return self.generator(latent[:, self.z_dim :], latent[:, : self.z_dim])


@dataclass(frozen=True, kw_only=True)
class Half:
    """The encoder or the generator of a run, with the interface that is registered."""

    kind: str
    """encoder or generator"""
    preset: str
    config: Config
    network: nn.Module
    metadata: Mapping[str, Any]
    """Of its checkpoint."""

    @property
    def name(self) -> str:
        """Name of the registered model."""
        return model_name(self.preset, self.kind)

    @property
    def model(self) -> nn.Module:
        """The network behind the interface that is registered."""
        if isinstance(self.network, Encoder):
            return EncoderModel(self.network)
        assert isinstance(self.network, Generator)
        return GeneratorModel(self.network, self.config.model.z_dim)

    @property
    def weights(self) -> bytes:
        """The network's state, as safetensors."""
        state = self.network.state_dict()
        return save({name: value.detach().cpu().contiguous() for name, value in state.items()})

    @functools.cached_property
    def weights_sha256(self) -> str:
        """Checksum of the weights alone, by which an existing version is found."""
        return sha256_hex(self.weights)

    def outputs(self, batch: np.ndarray) -> np.ndarray:
        """Return what the network computes of a batch."""
        with torch.no_grad():
            return self.model(torch.from_numpy(batch)).numpy()

    @property
    def usage(self) -> str:
        """Inputs and outputs, in a sentence."""
        sizes, shape = self.config.model, ("N", *sample_shape(self.config.model))
        samples = f"{'points' if self.config.is_points else 'images'} {shape}".replace("'", "")
        if self.kind == "encoder":
            kind = "float32" if self.config.is_points else "uint8, 0 to 255,"
            return f"Encoder of IVE-GAN: {kind} {samples} -> float32 latents z (N, {sizes.z_dim})."
        scale = "" if self.config.is_points else " in [0, 1]"
        return (
            f"Generator of IVE-GAN: float32 [z, z'] (N, {sizes.z_dim} + {sizes.noise_dim}), z in "
            f"(-1, 1) and z' standard normal or zeros -> float32 {samples}{scale}."
        )

    def batch(self, size: int, seed: int = 0) -> np.ndarray:
        """Return random inputs of the kind that the model is made for."""
        random, sizes = np.random.default_rng(seed), self.config.model
        if self.kind == "generator":
            z = random.uniform(-1, 1, (size, sizes.z_dim))
            noise = random.standard_normal((size, sizes.noise_dim))
            return np.concatenate((z, noise), axis=1).astype(np.float32)
        shape = (size, *sample_shape(sizes))
        if self.config.is_points:
            return random.uniform(-1, 1, shape).astype(np.float32)
        return random.integers(0, 256, shape, dtype=np.uint8)


Halves = tuple[Half, Half]
"""Encoder and generator of one run."""


def log(
    client: MlflowClient, half: Half, run_id: str, evaluations: list[dict[str, float]]
) -> tuple[str, str]:
    """Log a half as a model of an MLflow run; return its id and the checksum of its files.

    Raises:
        UserError: it computes something else than its network when it is fetched back.
    """
    logged = client.create_logged_model(
        client.get_run(run_id).info.experiment_id,
        name=half.kind,
        source_run_id=run_id,
        params={name: str(value) for name, value in flatten(half.config).items()},
    )
    try:
        with tempfile.TemporaryDirectory() as tmp:
            folder = Path(tmp) / "model"
            digest = _write(folder, half, logged, run_id, evaluations)
            client.log_model_artifacts(logged.model_id, str(folder))
        client.finalize_logged_model(logged.model_id, "READY")
        check(f"models:/{logged.model_id}", digest, half)
        output = LoggedModelOutput(logged.model_id, step=half.metadata["images_seen"])
        client.log_outputs(run_id, [output])
    except BaseException:
        client.delete_logged_model(logged.model_id)
        raise
    return logged.model_id, digest


def _write(
    folder: Path,
    half: Half,
    logged: LoggedModel,
    run_id: str,
    evaluations: list[dict[str, float]],
) -> str:
    """Write all files of a model and return the checksum of their list."""
    description = Model(
        artifact_path=logged.artifact_location,
        model_uuid=logged.model_id,
        run_id=run_id,
        model_id=logged.model_id,
    )
    batch = half.batch(2)  # of one, the batch size would be frozen
    versions = {"mlflow": mlflow.__version__, "torch": torch.__version__, "numpy": np.__version__}
    pytorch.save_model(
        half.model.eval(),
        str(folder),
        mlflow_model=description,
        # Of arrays: MLflow hands named tensors over as a dictionary.
        signature=infer_signature(batch, half.outputs(batch)),
        input_example=batch,
        # "+cpu" is a build, not a version; it would keep others from installing theirs
        pip_requirements=[f"{k}=={v.partition('+')[0]}" for k, v in versions.items()],
        serialization_format="pt2",
    )
    # The exported graph is on the CPU, but MLflow picks a GPU where it finds one, and fails.
    description.flavors["python_function"]["config"]["device"] = "cpu"
    description.save(str(folder / "MLmodel"))
    # torch pickles the example beside the graph, and loads the graph if that file is empty.
    empty_members(folder / GRAPH, "sample_inputs")
    (folder / WEIGHTS).write_bytes(half.weights)
    stored = {**half.metadata, "config": to_dict(half.config)}
    stored |= {"half": half.kind, "usage": half.usage, "mlflow_run_id": run_id}
    (folder / CONFIG).write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n")
    text = card.render(half.name, half.kind, half.usage, stored, evaluations)
    (folder / CARD).write_text(text)
    return write_sums(folder)


def check(model_uri: str, sha256: str | None, half: Half | None = None) -> Half:
    """Check that a model comes back as it was registered and computes what its network does.

    Args:
        model_uri: in any form that MLflow resolves.
        sha256: the checksum that it was registered with.
        half: the network; by default the one of the model's own weights and configuration.

    Raises:
        UserError: changed files or other numbers.
    """
    with tempfile.TemporaryDirectory() as tmp:
        folder = fetch(model_uri, sha256, Path(tmp))
        half = half or load(folder)
        model = pyfunc.load_model(str(folder))
        for size in _BATCHES:
            batch = half.batch(size, seed=size)
            expected, output = half.outputs(batch), np.asarray(model.predict(batch))
            same_shape = output.shape == expected.shape
            distance = np.abs(output - expected).max() if same_shape else np.inf
            if not distance <= TOLERANCE:
                raise UserError(
                    f"{half.name} as MLflow loads it is {distance:.2g} away from its network on a "
                    f"batch of {size} (at most {TOLERANCE:g} is allowed): it cannot be registered."
                )
        return half


def fetch(model_uri: str, sha256: str | None, into: Path) -> Path:
    """Return the folder of a model, fetched and verified, nothing of it loaded.

    Raises:
        UserError: files that are missing, changed or unreadable.
    """
    if sha256 is None:
        raise UserError(f"{model_uri} has no checksum: register its checkpoint with registry.py.")
    try:
        folder = Path(download_artifacts(model_uri, dst_path=str(into / "model")))
    except RequestException:
        raise  # an OSError too, but of MLflow's server
    except OSError as error:
        raise UserError(
            f"{model_uri} cannot be copied to {into} ({error}): check that its files are in "
            "MLflow's store, and that there is space."
        ) from error
    check_sums(folder, sha256)
    return folder


def load(folder: Path) -> Half:
    """Return the half whose weights and configuration are in a verified folder."""
    metadata = checkpoint.read_metadata(str(folder))
    config = from_dict(metadata["config"])
    network = {"encoder": Encoder, "generator": Generator}[metadata["half"]](config.model).eval()
    network.load_state_dict(load_file(folder / WEIGHTS))
    return Half(
        kind=metadata["half"],
        preset=metadata.get("preset") or config.dataset,
        config=config,
        network=network,
        metadata=metadata,
    )
