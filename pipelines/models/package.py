"""One half of a trained pair as a model that MLflow serves to strangers: made, checked, fetched.

A model's folder holds the graph as torch exports it (``data/model.pt2``), the same weights as
safetensors, the configuration, a model card and the checksums of all of them. Nothing in it is a
pickle, and nothing of this project is needed to load it.
"""

import functools
import hashlib
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
from mlflow.entities import LoggedModel, LoggedModelOutput, Run
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ivegan.config import Config, flatten, from_dict, to_dict
from ivegan.errors import UserError
from ivegan.evaluation import report
from ivegan.networks import Encoder, Generator, sample_shape
from pipelines.models import card as model_card
from pipelines.models.artifact import check_sums, empty_members, find_pickles, write_sums

KINDS = ("encoder", "generator")

TOLERANCE = 1e-5  # between a registered model and the network it was made from

WEIGHTS, CONFIG, CARD = "weights.safetensors", "config.json", "model_card.md"
_ADDED_BY_MLFLOW = frozenset({"registered_model_meta"})  # a note that each download writes
_SAME_RESULT = frozenset({"seed", "workers", "threads", "stream"})  # settings that change nothing
_BATCHES = (1, 2, 5)  # one is the size that an exported graph is most easily frozen to


class EncoderModel(nn.Module):
    """E as it is registered: uint8 images (N, C, H, W), or float32 points (N, 2) -> float32 z."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        """Return z; pixels are scaled here, so that nobody has to know how."""
        return self.encoder(x.float() / 255 if x.dtype == torch.uint8 else x)


class GeneratorModel(nn.Module):
    """G as it is registered: one float32 tensor [z, z'] -> float32 images in [0, 1], or points."""

    def __init__(self, generator: Generator, z_dim: int) -> None:
        super().__init__()
        self.generator = generator
        self.z_dim = z_dim

    def forward(self, latent: Tensor) -> Tensor:
        """Return G(z', z); MLflow's signatures know one input, hence the concatenation."""
        return self.generator(latent[:, self.z_dim :], latent[:, : self.z_dim])


@dataclass(frozen=True, kw_only=True)
class Half:
    """One of the two models of a run, and what its users see of it."""

    kind: str
    """encoder or generator"""
    preset: str
    config: Config
    network: nn.Module
    facts: Mapping[str, Any]
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
        """Checksum of the weights alone, by which a version is known again."""
        return hashlib.sha256(self.weights).hexdigest()

    @property
    def signature(self) -> ModelSignature:
        """Types and shapes; unnamed, since MLflow hands named tensors over as a dictionary."""
        batch = self.batch(2)
        with torch.no_grad():
            answer = self.model(torch.from_numpy(batch)).numpy()
        inputs, outputs = (
            Schema([TensorSpec(array.dtype, (-1, *array.shape[1:]))]) for array in (batch, answer)
        )
        return ModelSignature(inputs=inputs, outputs=outputs)

    @property
    def usage(self) -> str:
        """What goes in and comes out, for people."""
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


def model_name(preset: str, kind: str) -> str:
    """Return the name that one half of a preset is registered under."""
    return f"ivegan-{preset}-{kind}"


def log(tracked: MlflowClient, half: Half, run_id: str) -> tuple[str, str]:
    """Return (id, checksum) of a half, logged as a model of its run."""
    run = tracked.get_run(run_id)
    logged = tracked.create_logged_model(
        run.info.experiment_id,
        name=half.kind,
        source_run_id=run_id,
        params={name: str(value) for name, value in flatten(half.config).items()},
    )
    try:
        with tempfile.TemporaryDirectory() as tmp:
            folder = Path(tmp) / "model"
            digest = _write(folder, half, logged, run_id, _evaluations(tracked, run))
            tracked.log_model_artifacts(logged.model_id, str(folder))
        tracked.finalize_logged_model(logged.model_id, "READY")
        output = LoggedModelOutput(logged.model_id, step=half.facts["images_seen"])
        tracked.log_outputs(run_id, [output])
    except BaseException:
        tracked.delete_logged_model(logged.model_id)
        raise
    return logged.model_id, digest


def _evaluations(tracked: MlflowClient, run: Run) -> dict[str, dict[str, float]]:
    """Return by run id the evaluation of this run, and of those that differ only in their seed."""

    def settings(one: Run) -> dict[str, str]:
        return {k: v for k, v in one.data.params.items() if k not in _SAME_RESULT}

    like = f"params.total_images = '{run.data.params.get('total_images')}'"
    found = tracked.search_runs([run.info.experiment_id], like, max_results=1000)
    out: dict[str, dict[str, float]] = {}
    seeds = set()
    for one in (run, *found):
        metrics = {k: v for k, v in one.data.metrics.items() if k.startswith(report.PREFIX)}
        seed = one.data.params.get("seed")
        if metrics and seed not in seeds and settings(one) == settings(run):
            seeds.add(seed)
            out[one.info.run_id] = metrics
    return out


def _write(
    folder: Path,
    half: Half,
    logged: LoggedModel,
    run_id: str,
    evaluations: Mapping[str, Mapping[str, float]],
) -> str:
    """Return the checksum of a model's folder, after writing all that belongs in it."""
    about = Model(
        artifact_path=logged.artifact_location,
        model_uuid=logged.model_id,
        run_id=run_id,
        model_id=logged.model_id,
    )
    versions = {"mlflow": mlflow.__version__, "torch": torch.__version__, "numpy": np.__version__}
    pytorch.save_model(
        half.model.eval(),
        str(folder),
        mlflow_model=about,
        signature=half.signature,
        input_example=half.batch(2),  # of one, the batch size would be frozen
        # "+cpu" is a build, not a version; it would keep others from installing theirs
        pip_requirements=[f"{k}=={v.partition('+')[0]}" for k, v in versions.items()],
        serialization_format="pt2",
    )
    # The exported graph lies on the CPU, but MLflow picks a GPU where it sees one, and fails.
    about.flavors["python_function"]["config"]["device"] = "cpu"
    about.save(str(folder / "MLmodel"))
    # torch keeps the example beside the graph, as a pickle, and does without it if it is empty.
    empty_members(folder / "data" / "model.pt2", "sample_inputs")
    (folder / WEIGHTS).write_bytes(half.weights)
    stored = {**half.facts, "config": to_dict(half.config), "half": half.kind, "usage": half.usage}
    (folder / CONFIG).write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n")
    own, seeds = evaluations.get(run_id, {}), list(evaluations.values())
    card = model_card.render(half.name, half.kind, half.usage, stored, own, seeds)
    (folder / CARD).write_text(card)
    return write_sums(folder)


def check(model_uri: str, digest: str, half: Half | None = None) -> Half:
    """Return a model's network if the model comes back as it was sent and computes what that does.

    Args:
        model_uri: of the model, any form that MLflow knows.
        digest: its checksum.
        half: the network; the one that the model's own weights and configuration make by default.

    Raises:
        UserError: changed files, a pickle among them, or other numbers.
    """
    with tempfile.TemporaryDirectory() as tmp:
        folder = fetch(model_uri, digest, Path(tmp))
        half = half or load(folder)
        model = pyfunc.load_model(str(folder))
        for size in _BATCHES:
            batch = half.batch(size, seed=size)
            with torch.no_grad():
                expected = half.model(torch.from_numpy(batch)).numpy()
            found = np.asarray(model.predict(batch))
            far = np.inf if found.shape != expected.shape else np.abs(found - expected).max()
            if not far <= TOLERANCE:
                raise UserError(
                    f"{half.name} as MLflow loads it is {far:.2g} away from its network on a batch "
                    f"of {size} (at most {TOLERANCE:g} is allowed): it cannot be registered."
                )
        return half


def fetch(model_uri: str, digest: str, into: Path) -> Path:
    """Return the folder of a model, fetched and verified, nothing of it loaded.

    Raises:
        UserError: changed files, or a pickle among them.
    """
    folder = Path(download_artifacts(model_uri, dst_path=str(into / "model")))
    check_sums(folder, digest, ignore=_ADDED_BY_MLFLOW)
    if pickles := find_pickles(folder):
        raise UserError(f"{model_uri} holds pickles ({', '.join(pickles)}): do not load it.")
    return folder


def load(folder: Path) -> Half:
    """Return the half whose weights and configuration lie in a verified folder."""
    facts = json.loads((folder / CONFIG).read_text())
    config = from_dict(facts["config"])
    network = (Encoder if facts["half"] == "encoder" else Generator)(config.model).eval()
    network.load_state_dict(load_file(folder / WEIGHTS))
    preset = facts.get("preset") or config.dataset
    return Half(kind=facts["half"], preset=preset, config=config, network=network, facts=facts)
