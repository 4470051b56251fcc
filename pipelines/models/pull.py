"""Registered models by name: fetched and verified, or traced back to their checkpoint."""

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ivegan.errors import UserError
from ivegan.storage.errors import local_sentences
from pipelines.models import package
from pipelines.models.artifact import CARD, CONFIG, WEIGHTS
from pipelines.models.versions import aliases_of, describe, registry_client, resolve
from pipelines.paths import present


def pull(
    name: str, *, stage: str = "production", to: Path, dry_run: bool = False
) -> dict[str, Any]:
    """Fetch one model into a folder, verified before anything of it is loaded.

    The folder then holds ``model/`` for MLflow, ``weights.safetensors``, ``config.json`` and
    ``model_card.md``; other files in it stay.

    Args:
        name: of the registered model.
        stage: an alias, an MLflow stage or a version; the alias counts where they differ.
        to: the folder.
        dry_run: fetch nothing.

    Returns:
        the version's metadata, its partner's version among them.

    Raises:
        UserError: no such model or stage, or files that are not as they were registered.
    """
    with registry_client() as client:
        version = resolve(client, name, stage)
        metadata = describe(version, aliases_of(client, name)) | {"to": str(to)}
        if dry_run:
            return metadata
        with local_sentences(to):
            to.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=to, prefix=".pull-") as tmp:
                uri = f"models:/{name}/{version.version}"
                folder = package.fetch(uri, version.tags.get("sha256"), Path(tmp))
                for extra in (WEIGHTS, CONFIG, CARD):
                    shutil.copyfile(folder / extra, Path(tmp) / extra)
                    (Path(tmp) / extra).replace(to / extra)
                if (to / "model").exists():
                    (to / "model").rename(Path(tmp) / "former")
                folder.rename(to / "model")
    return metadata


def checkpoint_of(model_uri: str) -> str:
    """Return the checkpoint that a registered model of either half was made from.

    Raises:
        UserError: no such model.
    """
    match = re.fullmatch(r"models:/+([^/@]+)[/@]([^/@]+)", model_uri)
    if match is None:
        raise UserError(
            f"{model_uri} is no model: write models:/NAME@production or models:/NAME/3."
        )
    with registry_client() as client:
        checkpoint_uri = resolve(client, match[1], match[2]).tags.get("checkpoint")
    if checkpoint_uri is None:
        raise UserError(f"{model_uri} does not record its checkpoint: give the checkpoint instead.")
    return present(checkpoint_uri)
