"""Stages of registered pairs: staging and production, each an alias and an MLflow stage.

The alias is the truth, so that ``models:/NAME@production`` and ``models:/NAME/Production`` both
load; the MLflow stage is set beside it for as long as MLflow has stages. A move sets the encoder's
alias last: until then the same command repeats the whole move, so it completes one that was cut.
"""

import json
from datetime import UTC, datetime
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from ivegan import storage
from ivegan.errors import UserError
from ivegan.storage import schema
from pipelines.models import gate, package
from pipelines.models.versions import (
    KINDS,
    STAGES,
    Pair,
    aliases_of,
    describe,
    mlflow_stage,
    model_name,
    pair_of,
    registry_client,
    stage_of,
    tag,
    versions_of,
)
from pipelines.paths import cache_dir


def promote(
    preset: str,
    *,
    to: str = "production",
    version: int | None = None,
    data: str | None = None,
    force: str | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Move the encoder and the generator of one run to a stage; return what ``--json`` prints.

    The arguments are those of ``registry.py promote``. Files that were changed, or models that
    compute something else than their network, are not forced.

    Raises:
        UserError: no such pair, or one that does not pass, with the numbers.
    """
    with registry_client() as client:
        pair = _candidate(client, preset, to, version)
        incumbent = aliases_of(client, pair.encoder.name).get(to)
        again = incumbent == str(pair.encoder.version)
        result = _result(preset, to, pair, None if again else incumbent)
        if dry_run:
            return result
        halves = _check_pair(pair)
        if to == "production" and not again:
            numbers = _measure(client, preset, pair, halves, incumbent, data, force)
            result |= numbers
            for half in pair:
                quality = numbers["scores"]["quality"]
                tag(client, half, gate=json.dumps(numbers), quality=quality)
            if incumbent is not None:
                tag(client, pair.encoder, replaces=incumbent)
        move(client, pair, to)
        return result


def rollback(preset: str, *, dry_run: bool = False) -> dict[str, Any]:
    """Move the pair that the one in production replaced back; return as ``promote``.

    Raises:
        UserError: nothing in production, or nothing that it replaced.
    """
    with registry_client() as client:
        name = model_name(preset, "encoder")
        present = aliases_of(client, name).get("production")
        if present is None:
            raise UserError(f"No version of {preset} is in production: there is nothing to undo.")
        former = client.get_model_version(name, present).tags.get("replaces")
        if former is None:
            raise UserError(f"Version {present} of {preset} replaced no other pair.")
        pair = pair_of(client, preset, former)
        if not dry_run:
            _check_pair(pair)
            move(client, pair, "production")
        return _result(preset, "production", pair, present)


def move(client: MlflowClient, pair: Pair, stage: str) -> None:
    """Move a pair to a stage and archive the one that leaves it; repeating it changes nothing."""
    for half in reversed(pair):
        aliases, number = aliases_of(client, half.name), str(half.version)
        for other in versions_of(client, half.name):
            if str(other.version) != number and mlflow_stage(other) == stage:
                _enter(client, other, stage_of(other, aliases), "archived")
        if (aliases.get(stage), mlflow_stage(half)) != (number, stage):
            _enter(client, half, stage_of(half, aliases), stage)
        client.set_registered_model_alias(half.name, stage, str(half.version))
    for half in reversed(pair) if stage == "production" else ():
        # The encoder's last: it is how a repeated promote finds its candidate.
        if aliases_of(client, half.name).get("staging") == str(half.version):
            client.delete_registered_model_alias(half.name, "staging")


def overview(preset: str | None = None) -> dict[str, Any]:
    """Return all versions of one or all presets, and in words where their stages differ."""
    with registry_client() as client:
        models = client.search_registered_models("name LIKE 'ivegan-%'")
        presets = {model.name.removeprefix("ivegan-").rpartition("-")[0] for model in models}
        rows, differences = [], []
        for one in sorted(presets if preset is None else presets & {preset}):
            encoders, generators = names = [model_name(one, kind) for kind in KINDS]
            holders: dict[str, dict[str, Any]] = {}
            for name in names:
                aliases = aliases_of(client, name)
                for version in versions_of(client, name):
                    number, stage = str(version.version), version.current_stage
                    rows.append(describe(version, aliases))
                    own = sorted(alias for alias, holder in aliases.items() if holder == number)
                    holders |= {f"{name}@{alias}": rows[-1] for alias in own}
                    if set(own) != {mlflow_stage(version)} & set(STAGES):
                        alias = " and ".join(own) or "none"
                        line = f"{name} version {number}: alias {alias}, MLflow stage {stage}"
                        differences.append(line)
            for stage in STAGES:
                partner = holders.get(f"{encoders}@{stage}", {}).get("partner_version")
                present = holders.get(f"{generators}@{stage}", {}).get("version")
                if partner != present:
                    differences.append(
                        f"{generators}@{stage} is version {present}, but the partner of "
                        f"{encoders}@{stage} is version {partner}"
                    )
    return {"versions": rows, "differences": differences}


def _candidate(client: MlflowClient, preset: str, to: str, version: int | None) -> Pair:
    """Return the pair that is to be promoted.

    Raises:
        UserError: there is none.
    """
    aliases = aliases_of(client, model_name(preset, "encoder"))
    if version is None and to == "staging":
        raise UserError("promote --to staging needs --version, the encoder's version to put there.")
    if version is None and "staging" not in aliases:
        raise UserError(
            f"No version of {preset} is in staging: register a checkpoint first, or name one with "
            "--version."
        )
    chosen = aliases["staging"] if version is None else str(version)
    if to == "staging" and aliases.get("production") == chosen:
        raise UserError(f"Version {chosen} of {preset} is in production: roll back to take it out.")
    return pair_of(client, preset, chosen)


def _check_pair(pair: Pair) -> package.Halves:
    """Check that both halves are as they were registered and load; return them."""
    encoder, generator = (
        package.check(f"models:/{half.name}/{half.version}", half.tags.get("sha256"))
        for half in pair
    )
    return encoder, generator


def _measure(
    client: MlflowClient,
    preset: str,
    pair: Pair,
    halves: package.Halves,
    incumbent: str | None,
    data: str | None,
    force: str | None,
) -> dict[str, Any]:
    """Return the gate's numbers as they are kept in tags.

    Raises:
        UserError: the pair does not pass, and is not forced.
    """
    former, damage = None, []
    try:
        if incumbent is not None:
            with registry_client():
                former = _check_pair(pair_of(client, preset, incumbent))
    except storage.Unavailable:
        raise
    except UserError as error:  # damaged or deleted: it must not stay in production for that
        damage.append(f"the pair in production cannot be measured ({error})")
    place = None if data is None else storage.absolute(data)
    scores, scores_of_replaced, faults = gate.examine(halves, former, place, cache_dir())
    faults = damage + faults
    if faults and not force:
        raise UserError(
            f"The {preset} of run {halves[0].metadata.get('run_id')} does not go to production: "
            f"{'; '.join(faults)}. (--force REASON overrules this.)"
        )
    return {
        "judged_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "scores": scores,
        "scores_of_replaced": scores_of_replaced,
        "overruled": faults,
        "forced_because": force if faults else None,
    }


def _enter(client: MlflowClient, version: ModelVersion, former: str | None, stage: str) -> None:
    """Add a change of stage, with the gate's numbers, to a version's history, and make it.

    Raises:
        UserError: the tag with the numbers is damaged.
    """
    now, number = datetime.now(UTC), str(version.version)
    change: dict[str, Any] = {"from": former, "to": stage, "at": now.isoformat(timespec="seconds")}
    if stage == "production" and "gate" in version.tags:
        where = f"The tag gate of version {number} of {version.name}"
        change["gate"] = schema.read(version.tags["gate"].encode(), dict, where, "delete the tag")
    tag(client, version, **{f"changed.{now:%Y%m%dT%H%M%S.%fZ}": json.dumps(change)})
    client.transition_model_version_stage(version.name, number, stage.capitalize())


def _result(preset: str, stage: str, pair: Pair, replaced: str | None) -> dict[str, Any]:
    return {
        "preset": preset,
        "stage": stage,
        "run_id": pair.encoder.tags.get("run_id"),
        "encoder": {"name": pair.encoder.name, "version": int(pair.encoder.version)},
        "generator": {"name": pair.generator.name, "version": int(pair.generator.version)},
        "replaced": None if replaced is None else int(replaced),
    }
