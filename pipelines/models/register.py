"""Register both halves of a checkpoint as candidates in staging."""

from datetime import UTC, datetime
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from ivegan import checkpoint, storage
from ivegan.config import config_hash, flatten
from pipelines import record as records
from pipelines.models import package
from pipelines.models.card import evaluations_of
from pipelines.models.package import Half
from pipelines.models.stages import move
from pipelines.models.versions import (
    KINDS,
    Pair,
    aliases_of,
    describe,
    model_name,
    registry_client,
    tag,
    versions_of,
)
from pipelines.tracking import client as tracking
from pipelines.tracking import mirror


def register(checkpoint_uri: str, *, dry_run: bool = False) -> dict[str, Any]:
    """Register both halves of a checkpoint as candidates in staging; return what ``--json`` prints.

    Before either is registered, both are fetched back, loaded as MLflow loads them and compared
    with the networks. The same checkpoint again makes no second version, and completes a
    registration that was interrupted.

    Args:
        checkpoint_uri: a checkpoint, or a run's folder, whose newest is taken.
        dry_run: return the names without registering anything.

    Raises:
        UserError: no checkpoint, no MLflow, or a registered model that computes something else.
    """
    uri = checkpoint.find(storage.absolute(checkpoint_uri))
    if dry_run:
        metadata = checkpoint.read_metadata(uri)
        preset = metadata.get("preset") or metadata["config"]["dataset"]
        names = [model_name(preset, kind) for kind in KINDS]
        return {"checkpoint": uri, "names": names, "stage": "staging"}
    checkpoint.keep(uri)
    config, encoder, generator, metadata = checkpoint.load_networks(uri)
    preset = metadata.get("preset") or config.dataset
    halves = [
        Half(kind=kind, preset=preset, config=config, network=network, metadata=metadata)
        for kind, network in zip(KINDS, (encoder, generator), strict=True)
    ]
    noted = metadata.get("tracking_uri", "")  # by version 0.1
    with registry_client(mirror.store_of(uri.rpartition("/")[0], noted)) as client:
        found = {half.kind: _version_of(client, half) for half in halves}
        versions = {kind: version for kind, version in found.items() if version is not None}
        missing = [half for half in halves if half.kind not in versions]
        if missing:
            run_ids = [version.run_id for version in versions.values()]
            run_id = run_ids[0] if run_ids else _mlflow_run(client, uri, halves[0])
            assert run_id
            versions |= _add(client, missing, run_id, uri)
        pair = Pair(**versions)
        tag(client, pair.encoder, partner_version=pair.generator.version)
        tag(client, pair.generator, partner_version=pair.encoder.version)
        if aliases_of(client, halves[0].name).get("production") != str(pair.encoder.version):
            move(client, pair, "staging")
        rows = {
            half.kind: describe(version, aliases_of(client, half.name))
            for half, version in zip(halves, pair, strict=True)
        }
    return {
        "preset": preset,
        "run_id": metadata.get("run_id"),
        "mlflow_run_id": pair.encoder.run_id,
        "stage": rows["encoder"]["stage"],
        "new": bool(missing),
        "names": [half.name for half in halves],
        **rows,
    }


def _version_of(client: MlflowClient, half: Half) -> ModelVersion | None:
    """Return the version that holds exactly these weights of this run, or None."""
    tags = {"weights_sha256": half.weights_sha256, "run_id": str(half.metadata.get("run_id"))}
    for version in versions_of(client, half.name):
        if tags.items() <= version.tags.items():
            return version
    return None


def _add(
    client: MlflowClient, halves: list[Half], run_id: str, checkpoint_uri: str
) -> dict[str, ModelVersion]:
    """Log the halves, check the logged files, and return versions, made of them only then.

    Raises:
        UserError: a logged model differs from its network; nothing is left registered.
    """
    evaluations = evaluations_of(
        checkpoint_uri.rpartition("/")[0], halves[0].metadata["images_seen"]
    )
    logged = [(half, *package.log(client, half, run_id, evaluations)) for half in halves]
    versions = {}
    for half, model_id, digest in logged:
        if not client.search_registered_models(f"name='{half.name}'"):
            client.create_registered_model(half.name, {"preset": half.preset}, half.usage)
        metadata = half.metadata
        copied = ("run_id", "images_seen", "dataset_hash", "git_commit")
        tags = {
            **{name: metadata.get(name) for name in copied},
            "registered_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "preset": half.preset,
            "checkpoint": checkpoint_uri,
            "config_hash": config_hash(half.config),
            "sha256": digest,
            "weights_sha256": half.weights_sha256,
        }
        versions[half.kind] = client.create_model_version(
            half.name,
            f"models:/{model_id}",
            run_id,
            tags={name: str(value) for name, value in tags.items()},
            description=f"Run {metadata.get('run_id')} after {metadata['images_seen']:,} images.",
            model_id=model_id,
        )
    return versions


def _mlflow_run(client: MlflowClient, checkpoint_uri: str, half: Half) -> str:
    """Return the MLflow run of a checkpoint, made where the store has none."""
    metadata, config = half.metadata, half.config
    name, key = str(metadata.get("run_id")), metadata.get("mlflow_run_id")  # of version 0.1
    if records.exists(run_uri := checkpoint_uri.rpartition("/")[0]):
        mirror.mirror(run_uri, client.tracking_uri)  # MLflow may have been away during the run
        key = mirror.run_id_of(run_uri)
    if key is not None and (existing := tracking.find_run(client, key)) is not None:
        return existing
    tags = {name: str(metadata.get(name)) for name in ("preset", "git_commit", "dataset_hash")}
    tags["config_hash"] = config_hash(config)
    tags["mlflow.note.content"] = f"Created when {name} was registered; tracked elsewhere."
    experiment = tracking.experiment_of(client, f"ivegan-{config.dataset}", client.tracking_uri)
    run_id = client.create_run(experiment, run_name=name).info.run_id
    tracking.log_settings(client, run_id, flatten(config), tags)
    client.set_terminated(run_id, "FINISHED")
    return run_id
