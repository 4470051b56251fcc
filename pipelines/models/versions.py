"""Registered versions in MLflow: names, lookup by alias, stage or number, and pairs of one run."""

import contextlib
import difflib
import logging
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from requests import RequestException

from ivegan.errors import UserError
from pipelines.paths import tracking_uri
from pipelines.tracking import client as tracking

STAGES = ("staging", "production")
KINDS = ("encoder", "generator")


class Pair(NamedTuple):
    """Encoder and generator of one run."""

    encoder: ModelVersion
    generator: ModelVersion


def model_name(preset: str, kind: str) -> str:
    """Return the name that one half of a preset is registered under."""
    return f"ivegan-{preset}-{kind}"


@contextlib.contextmanager
def registry_client(uri: str | None = None) -> Iterator[MlflowClient]:
    """Yield a client of an MLflow store whose errors are raised as UserError, without warnings."""
    uri = uri or tracking_uri()
    logger = logging.getLogger("mlflow")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # stages are deprecated, and set as long as MLflow has them
        try:
            client = tracking.client(uri)
            logger.setLevel(logging.ERROR)
            yield client
        except (MlflowException, RequestException) as error:
            raise tracking.refusal(uri, error) from error
        finally:
            logger.setLevel(level)


def versions_of(client: MlflowClient, name: str) -> list[ModelVersion]:
    """Return all versions of a model, newest first; none of a model that is not registered."""
    versions = client.search_model_versions(f"name='{name}'")
    return sorted(versions, key=lambda version: int(version.version), reverse=True)


def aliases_of(client: MlflowClient, name: str) -> dict[str, str]:
    """Return the version, as text, that each stage's alias points to."""
    try:
        aliases = client.get_registered_model(name).aliases
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return {}
        raise
    return {stage: str(version) for stage, version in aliases.items() if stage in STAGES}


def resolve(client: MlflowClient, name: str, which: str) -> ModelVersion:
    """Return the version that an alias, a stage or a number names; an alias precedes a stage.

    Raises:
        UserError: no such model or version; the sentence lists the existing ones.
    """
    versions = versions_of(client, name)
    if not versions:
        names = [model.name for model in client.search_registered_models()]
        near = difflib.get_close_matches(name, names, n=3) or names[:6]
        existing = f"there are {', '.join(near)}" if near else "none is registered yet"
        raise UserError(f"No model is registered as {name}; {existing}.")
    aliases = aliases_of(client, name)
    number = which if which.isdecimal() else aliases.get(which.lower())
    for version in versions:
        by_stage = number is None and mlflow_stage(version) == which.lower()
        if by_stage or str(version.version) == number:
            return version
    existing = ", ".join(
        f"{v.version} ({stage_of(v, aliases) or 'no stage'})" for v in versions[:6]
    )
    raise UserError(f"{name} has no version {which}; there are {existing}.")


def pair_of(client: MlflowClient, preset: str, encoder_version: str) -> Pair:
    """Return the encoder of a version and the generator of the same run.

    Raises:
        UserError: one of them is missing.
    """
    encoder = resolve(client, model_name(preset, "encoder"), encoder_version)
    partner = encoder.tags.get("partner_version")
    if partner is None:
        raise UserError(
            f"Version {encoder_version} of {encoder.name} has no generator: register its "
            f"checkpoint again, {encoder.tags.get('checkpoint')}."
        )
    return Pair(encoder, resolve(client, model_name(preset, "generator"), partner))


def tag(client: MlflowClient, version: ModelVersion, **tags: object) -> None:
    """Set those tags of a version that have another value."""
    for name, value in tags.items():
        if version.tags.get(name) != str(value):
            client.set_model_version_tag(version.name, str(version.version), name, str(value))
            version.tags[name] = str(value)


def mlflow_stage(version: ModelVersion) -> str | None:
    """Return the MLflow stage of a version in small letters."""
    stage = (version.current_stage or "None").lower()
    return None if stage == "none" else stage


def stage_of(version: ModelVersion, aliases: dict[str, str]) -> str | None:
    """Return the stage of a version: that of its alias, archived, or None."""
    for stage in reversed(STAGES):
        if aliases.get(stage) == str(version.version):
            return stage
    return "archived" if mlflow_stage(version) == "archived" else None


def describe(version: ModelVersion, aliases: dict[str, str]) -> dict[str, Any]:
    """Return one version as ``--json`` prints it."""
    tags = version.tags
    name, _, kind = version.name.rpartition("-")
    # None for a number that the tags do not hold, so that a damaged tag hides no other version.
    images_seen, partner = (
        int(text) if (text := tags.get(name, "")).isdecimal() else None
        for name in ("images_seen", "partner_version")
    )
    return {
        "name": version.name,
        "version": int(version.version),
        "stage": stage_of(version, aliases),
        "run_id": tags.get("run_id"),
        "mlflow_run_id": version.run_id,
        "images_seen": images_seen,
        "registered_at": tags.get("registered_at"),
        "sha256": tags.get("sha256"),
        "partner": f"{name}-{'generator' if kind == 'encoder' else 'encoder'}",
        "partner_version": partner,
    }
