"""Registered models: encoder and generator of one run, each loadable by MLflow alone.

    python pipelines/registry.py register runs/checkpoints/RUN_ID
    python pipelines/registry.py promote digits --to production
    python pipelines/registry.py pull ivegan-digits-encoder --stage production --to /tmp/encoder

``staging`` and ``production`` are an alias and an MLflow stage, so that ``models:/NAME@production``
and ``models:/NAME/Production`` both load. A pair moves in a fixed order of calls:

    1. the encoder's alias: from this one call on, the change has happened
    2. the generator's alias, which follows to the encoder's partner
    3. ``staging``, which becomes empty where its version went to production
    4. the MLflow stages, and the tag ``stage``; whoever lost a word is archived; each change leaves
       a tag ``changed.TIME`` with what changed and the numbers of the gate

2 to 4 follow from 1 alone (``settle``), so whatever an interruption leaves half done, the next
``list``, ``register``, ``promote`` or ``rollback`` repairs.
"""

import contextlib
import dataclasses
import difflib
import json
import logging
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from requests import RequestException

from ivegan import checkpoint, storage
from ivegan.config import Config, config_hash, flatten, to_dict
from ivegan.errors import UserError
from pipelines import options as cli
from pipelines.models import gate
from pipelines.models import package as models
from pipelines.tracking import client as tracking

WORDS = ("staging", "production")
Pair = tuple[ModelVersion, ModelVersion]
"""Encoder and generator of one run."""

_CHANGED = "changed."  # and the time: the tags that tell a version's history


def register(checkpoint_uri: str, *, tracking_uri: str | None = None) -> dict[str, Any]:
    """Register both halves of a checkpoint as candidates in staging; return what ``--json`` prints.

    Before either counts as registered, both are fetched back, loaded as a stranger would and
    compared with the networks. The same checkpoint again makes no second version.

    Args:
        checkpoint_uri: a checkpoint, or a run's folder, whose newest is taken.
        tracking_uri: where runs and models are; where the run was tracked by default.

    Raises:
        UserError: no checkpoint, no MLflow, or a registered model that computes something else.
    """
    at = checkpoint.find(storage.absolute(checkpoint_uri))
    config, encoder, generator, facts = checkpoint.load_networks(at)
    preset = facts.get("preset") or config.dataset
    halves = [
        models.Half(kind=kind, preset=preset, config=config, network=network, facts=facts)
        for kind, network in zip(models.KINDS, (encoder, generator), strict=True)
    ]
    with _asking(tracking_uri or store_of(facts)) as tracked:
        versions = [_registered(tracked, half) for half in halves]
        missing = [h for h, version in zip(halves, versions, strict=True) if version is None]
        if missing:
            run_id = next((v.run_id for v in versions if v), None) or _run_of(
                tracked, config, facts
            )
            _add(tracked, missing, run_id, at)
        encoder_version, generator_version = (_registered(tracked, h) for h in halves)
        assert encoder_version
        assert generator_version
        _tag(tracked, encoder_version, partner_version=generator_version.version)
        _tag(tracked, generator_version, partner_version=encoder_version.version)
        if str(encoder_version.version) not in _aliases(tracked, halves[0].name).values():
            _set_alias(tracked, encoder_version, "staging")
        settle(tracked, preset)
        versions = [_registered(tracked, half) for half in halves]
        told = {h.kind: _facts_of(v) for h, v in zip(halves, versions, strict=True) if v}
        return {
            "preset": preset,
            "run_id": facts.get("run_id"),
            "mlflow_run_id": encoder_version.run_id,
            "stage": told["encoder"]["stage"],
            "new": bool(missing),
            "names": [half.name for half in halves],
            **told,
        }


def _registered(tracked: MlflowClient, half: models.Half) -> ModelVersion | None:
    """Return the version that holds these very weights of this very run, or None."""
    wanted = {"weights_sha256": half.weights_sha256, "run_id": str(half.facts.get("run_id"))}
    for version in _versions(tracked, half.name):
        if all(version.tags.get(name) == value for name, value in wanted.items()):
            return version
    return None


def _add(tracked: MlflowClient, halves: list[models.Half], run_id: str, at: str) -> None:
    """Log the halves, check what was logged, and make versions of them only then.

    Raises:
        UserError: what comes back is not what was sent; nothing is left registered.
    """
    logged: list[tuple[models.Half, str, str]] = []
    try:
        for half in halves:
            model_id, digest = models.log(tracked, half, run_id)
            logged.append((half, model_id, digest))
            models.check(f"models:/{model_id}", digest, half)
    except BaseException:
        for _, model_id, _ in logged:
            tracked.delete_logged_model(model_id)
        raise
    for half, model_id, digest in logged:
        if not tracked.search_registered_models(f"name='{half.name}'"):
            tracked.create_registered_model(half.name, {"preset": half.preset}, half.usage)
        facts = half.facts
        tags = {
            "registered_at": _now(),
            "preset": half.preset,
            "run_id": facts.get("run_id"),
            "checkpoint": at,
            "images_seen": facts["images_seen"],
            "dataset_hash": facts.get("dataset_hash"),
            "config_hash": config_hash(half.config),
            "git_commit": facts.get("git_commit"),
            "sha256": digest,
            "weights_sha256": half.weights_sha256,
        }
        tracked.create_model_version(
            half.name,
            f"models:/{model_id}",
            run_id,
            tags={name: str(value) for name, value in tags.items()},
            description=f"Run {facts.get('run_id')} after {facts['images_seen']:,} images.",
            model_id=model_id,
        )


def promote(
    preset: str,
    *,
    to: str = "production",
    version: int | None = None,
    data: str | None = None,
    force: str | None = None,
) -> dict[str, Any]:
    """Move the encoder and the generator of one run to a stage; return what ``--json`` prints.

    Args:
        preset: whose models.
        to: staging or production; the latter through the gate.
        version: of the encoder; the one in staging by default.
        data: shards to judge on; those that the candidate was trained on by default.
        force: why the gate's numbers do not count this time. Files that were changed, or models
            that compute something else than their network, never pass.

    Raises:
        UserError: no such pair, or one that does not pass, with the number.
    """
    with _asking() as tracked:
        pair = _candidates(tracked, preset, to, version)
        halves = _check_pair(pair)
        encoder, before = pair[0], _holder(tracked, preset, to)
        verdict = None
        if to == "production" and (before is None or before.version != encoder.version):
            verdict = _examine(tracked, pair, halves, before, data, force)
        if before is not None and before.version != encoder.version:
            _tag(tracked, encoder, replaces=before.version)
        told: dict[str, Any] = {}
        if verdict is not None:
            told = {
                "judged_at": _now(),
                "scores": dict(verdict.scores),
                "scores_of_replaced": verdict.holder_scores and dict(verdict.holder_scores),
                "overruled": list(verdict.faults),
                "forced_because": force if verdict.faults else None,
            }
            for half in pair:
                _tag(tracked, half, gate=json.dumps(told), quality=verdict.scores["quality"])
        _set_alias(tracked, encoder, to)
        settle(tracked, preset)
        return _moved(preset, to, pair, before) | told


def _examine(
    tracked: MlflowClient,
    pair: Pair,
    halves: list[models.Half],
    before: ModelVersion | None,
    data: str | None,
    force: str | None,
) -> gate.Verdict:
    """Return the gate's verdict on a pair.

    Raises:
        UserError: it does not pass, and is not forced.
    """
    from pipelines.paths import cache_dir

    preset, holder, unlike = halves[0].preset, None, _unlike_checkpoint(pair, halves)
    if before is not None:
        try:
            holder = _contender(map(_loaded, _pair(tracked, preset, str(before.version))))
        except storage.Unavailable:
            raise
        except (MlflowException, RequestException, UserError) as error:
            if not isinstance(error, UserError) and tracking.is_away(error):
                raise
            # Damaged or deleted: it must not stay in production for that.
            unlike.append(
                f"the pair in production cannot be measured ({tracking.first_line(error)})"
            )
    where = None if data is None else storage.absolute(data)
    verdict = gate.examine(_contender(halves), holder, data=where, cache_dir=cache_dir())
    verdict = dataclasses.replace(verdict, faults=(*unlike, *verdict.faults))
    if verdict.faults and not force:
        raise UserError(
            f"The {preset} of run {halves[0].facts.get('run_id')} does not go to production: "
            f"{'; '.join(verdict.faults)}. (--force REASON overrules this.)"
        )
    return verdict


def _unlike_checkpoint(pair: Pair, halves: list[models.Half]) -> list[str]:
    """Return, in words, what differs between a pair and the checkpoint that it was made from."""
    at = pair[0].tags.get("checkpoint")
    try:
        if at is None or not storage.exists(storage.join(at, models.CONFIG)):
            return [f"its checkpoint {at} is gone, so nobody can say that it was made from that"]
        _, encoder, generator, _ = checkpoint.load_networks(at)
    except UserError as error:
        return [f"its checkpoint cannot be read ({error})"]
    made = [
        dataclasses.replace(h, network=n) for h, n in zip(halves, (encoder, generator), strict=True)
    ]
    return [
        f"the {half.kind} is not that of its checkpoint {at}"
        for half, same in zip(halves, made, strict=True)
        if half.weights_sha256 != same.weights_sha256
    ]


def _loaded(version: ModelVersion) -> models.Half:
    """Return one half of a pair, from its own files, verified."""
    with tempfile.TemporaryDirectory() as tmp:
        return models.load(_fetched(version, Path(tmp)))


def _contender(halves: Iterable[models.Half]) -> gate.Contender:
    """Return the encoder and the generator of a pair as the gate takes them."""
    encoder, generator = halves
    return gate.Contender(
        config=encoder.config,
        encoder=encoder.network,
        generator=generator.network,
        facts=encoder.facts,
    )


def rollback(preset: str) -> dict[str, Any]:
    """Put back into production the pair that the present one replaced; return as ``promote``.

    Raises:
        UserError: nothing in production, or nothing that it replaced.
    """
    with _asking() as tracked:
        pair, present = _former(tracked, preset)
        _check_pair(pair)
        _set_alias(tracked, pair[0], "production")
        settle(tracked, preset)
        return _moved(preset, "production", pair, present)


def _candidates(tracked: MlflowClient, preset: str, to: str, version: int | None) -> Pair:
    """Return the pair that is to be promoted.

    Raises:
        UserError: there is none.
    """
    aliases = _aliases(tracked, models.model_name(preset, "encoder"))
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
    return _pair(tracked, preset, chosen)


def _former(tracked: MlflowClient, preset: str) -> tuple[Pair, ModelVersion]:
    """Return (the pair that the one in production replaced, the encoder in production).

    Raises:
        UserError: there is none.
    """
    present = _holder(tracked, preset, "production")
    if present is None:
        raise UserError(f"No version of {preset} is in production: there is nothing to undo.")
    former = present.tags.get("replaces")
    if former is None:
        raise UserError(
            f"Version {present.version} of {preset} replaced no other: there is no way back."
        )
    return _pair(tracked, preset, former), present


def _pair(tracked: MlflowClient, preset: str, encoder_version: str) -> Pair:
    """Return the encoder of a version and the generator of the same run.

    Raises:
        UserError: one of them is missing, or they are of different runs.
    """
    encoder = _resolve(tracked, models.model_name(preset, "encoder"), encoder_version)
    partner = encoder.tags.get("partner_version")
    if partner is None:
        raise UserError(
            f"Version {encoder_version} of {encoder.name} has no generator: register its "
            f"checkpoint again, {encoder.tags.get('checkpoint')}."
        )
    generator = _resolve(tracked, models.model_name(preset, "generator"), partner)
    if encoder.run_id != generator.run_id:
        raise UserError(
            f"Version {encoder.version} of {encoder.name} and version {generator.version} of "
            f"{generator.name} come from different runs: register the checkpoint again."
        )
    return encoder, generator


def _check_pair(pair: Pair) -> list[models.Half]:
    """Return both halves if they are as they were registered, and load.

    Raises:
        UserError: one is not.
    """
    return [models.check(f"models:/{v.name}/{v.version}", _digest(v)) for v in pair]


def settle(tracked: MlflowClient, preset: str) -> list[str]:
    """Make all else follow the encoder's aliases; return, in words, what had to change.

    Steps 2 to 4 of the order above. Doing it twice changes nothing more. If an alias moves while
    this goes on, it is done again.
    """
    done: list[str] = []
    encoders = models.model_name(preset, "encoder")
    while True:
        before = _aliases(tracked, encoders)
        done += _follow(tracked, preset)
        # An emptied staging is this function's own doing.
        if _aliases(tracked, encoders).items() <= before.items():
            return done


def _follow(tracked: MlflowClient, preset: str) -> list[str]:
    """Make all else follow the encoder's aliases, once."""
    done: list[str] = []
    encoders, generators = (models.model_name(preset, kind) for kind in models.KINDS)
    truth = _aliases(tracked, encoders)
    emptied = "staging" in truth and truth["staging"] == truth.get("production")
    if emptied:
        tracked.delete_registered_model_alias(encoders, "staging")
        truth = _aliases(tracked, encoders)
        done.append(f"{encoders}@staging emptied")
    # MLflow deletes an alias whichever version has got it meanwhile, and `register` can be cut
    # before it gives one: in both cases the newest is a candidate without its word.
    lost = (None, "staging") if emptied else (None,)
    newest = next(iter(_versions(tracked, encoders)), None)
    if (
        newest is not None
        and "partner_version" in newest.tags
        and newest.tags.get("stage") in lost
        and "staging" not in truth
        and str(newest.version) not in truth.values()
    ):
        _set_alias(tracked, newest, "staging")
        truth = _aliases(tracked, encoders)
        done.append(f"{encoders}@staging -> {newest.version}")
    present = _aliases(tracked, generators)
    for word in WORDS:
        partner = None
        if word in truth:
            holder = tracked.get_model_version(encoders, truth[word])
            partner = holder.tags.get("partner_version")
        if partner is not None and present.get(word) != partner:
            tracked.set_registered_model_alias(generators, word, partner)
            done.append(f"{generators}@{word} -> {partner}")
        elif partner is None and word in present:
            tracked.delete_registered_model_alias(generators, word)
            done.append(f"{generators}@{word} emptied")
    for name in (encoders, generators):
        words = {version: word for word, version in _aliases(tracked, name).items()}
        # Holders first: no moment without a production model.
        for version in sorted(_versions(tracked, name), key=lambda v: str(v.version) not in words):
            before = version.current_stage or "None"
            word = words.get(str(version.version), "archived")
            if word == "archived" and before.lower() not in WORDS and not _in_words(version):
                continue  # it never had a word, or lost it before
            if before.lower() != word:
                tracked.transition_model_version_stage(
                    name, str(version.version), word.capitalize()
                )
                done.append(f"{name} {version.version}: {before} -> {word.capitalize()}")
            _note_change(tracked, version, word)
            _tag(tracked, version, stage=word)
    return done


def _in_words(version: ModelVersion) -> bool:
    """Return whether a version's tag still says that it holds a stage."""
    return version.tags.get("stage") in WORDS


def _note_change(tracked: MlflowClient, version: ModelVersion, to: str) -> None:
    """Leave a tag on a version that comes to a stage, with the time and the gate's numbers."""
    earlier = sorted(name for name in version.tags if name.startswith(_CHANGED))
    last = json.loads(version.tags[earlier[-1]]) if earlier else {}
    if last.get("to") == to:
        return  # an interruption came between this tag and the next
    now = datetime.now(UTC)
    told = {"from": version.tags.get("stage"), "to": to, "at": now.isoformat(timespec="seconds")}
    if to == "production" and "gate" in version.tags:
        told["gate"] = json.loads(version.tags["gate"])
    _tag(tracked, version, **{f"{_CHANGED}{now:%Y%m%dT%H%M%S.%fZ}": json.dumps(told)})


def overview(preset: str | None = None, *, repair: bool = True) -> dict[str, Any]:
    """Return every version of every preset, newest first, after repairing what was left half done.

    Args:
        preset: only this one.
        repair: whether to mend, or only to look.
    """
    with _asking() as tracked:
        found = tracked.search_registered_models("name LIKE 'ivegan-%'", order_by=["name"])
        names = [m.name for m in found if preset is None or m.name in _names(preset)]
        presets = sorted({name.removeprefix("ivegan-").rpartition("-")[0] for name in names})
        repaired = [line for one in presets for line in settle(tracked, one)] if repair else []
        rows = [_facts_of(version) for name in names for version in _versions(tracked, name)]
    return {"versions": rows, "repaired": repaired}


def pull(name: str, *, stage: str = "production", to: Path) -> dict[str, Any]:
    """Fetch one model into a folder, verified before anything of it is loaded; return its facts.

    The folder then holds ``model/`` for MLflow, ``weights.safetensors``, ``config.json`` and the
    model card, ``model_card.md``. What else is in it stays.

    Args:
        name: of the registered model.
        stage: an alias or an MLflow stage; the alias counts where they differ.
        to: the folder.

    Raises:
        UserError: no such model or stage, or files that are not as they were registered.
    """
    with _asking() as tracked:
        version = _resolve(tracked, name, stage)
        facts = _facts_of(version)
        try:
            to.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=to, prefix=".pull-") as tmp:
                folder = _fetched(version, Path(tmp))
                for extra in (models.WEIGHTS, models.CONFIG, models.CARD):
                    shutil.copyfile(folder / extra, Path(tmp) / extra)
                    (Path(tmp) / extra).replace(to / extra)
                if (to / "model").exists():
                    (to / "model").rename(Path(tmp) / "former")
                folder.rename(to / "model")
        except OSError as error:
            raise UserError(f"{to} cannot be written ({error}): choose another --to.") from error
    return {**facts, "to": str(to)}


def _fetched(version: ModelVersion, into: Path) -> Path:
    """Return the folder of a version, fetched and verified.

    Raises:
        UserError: it is not as it was registered, or cannot be read.
    """
    try:
        return models.fetch(f"models:/{version.name}/{version.version}", _digest(version), into)
    except RequestException:
        raise  # a server's answer, or none
    except OSError as error:
        raise UserError(
            f"Version {version.version} of {version.name} cannot be copied to {into} ({error}): "
            "see that its files are still in MLflow's store, and that there is space."
        ) from error


def checkpoint_of(model_uri: str) -> str:
    """Return the checkpoint that a registered model of either half was made from.

    Args:
        model_uri: ``models:/NAME@ALIAS``, ``models:/NAME/STAGE`` or ``models:/NAME/VERSION``.

    Raises:
        UserError: no such model.
    """
    found = re.fullmatch(r"models:/+([^/@]+)[/@]([^/@]+)", model_uri)
    if found is None:
        raise UserError(
            f"{model_uri} is no model: write models:/NAME@production or models:/NAME/3."
        )
    with _asking() as tracked:
        version = _resolve(tracked, found[1], found[2])
    at = version.tags.get("checkpoint")
    if at is None:
        raise UserError(f"{model_uri} does not say which checkpoint it is from: give that instead.")
    return at


def sync(journals: str | Path) -> dict[str, Any]:
    """Deliver to MLflow what an outage held back; return the entries delivered, by MLflow run.

    Args:
        journals: a folder of journals, a run's folder or a folder of runs, the latter two here or
            in an object store.

    Raises:
        UserError: the server still does not answer.
    """
    return {"delivered": tracking.deliver(journals)}


@contextlib.contextmanager
def _asking(uri: str | None = None) -> Iterator[MlflowClient]:
    """Yield a client; what MLflow refuses becomes a sentence, and what it chats is not heard."""
    uri = uri or _default_uri()
    chatty = logging.getLogger("mlflow")
    level = chatty.level
    with warnings.catch_warnings():
        # Stages are deprecated, and wanted nevertheless: the design promises both.
        warnings.simplefilter("ignore")
        try:
            tracked = tracking.client(uri)
            chatty.setLevel(logging.ERROR)
            yield tracked
        except (MlflowException, RequestException) as error:
            raise tracking.refusal(uri, error) from error
        finally:
            chatty.setLevel(level)


def _default_uri() -> str:
    """Return the store that the environment names, or the local one."""
    from pipelines.paths import tracking_uri

    return tracking_uri()


def store_of(facts: Mapping[str, Any]) -> str:
    """Return the store of the run that made a checkpoint, as far as it can be reached from here."""
    told = facts.get("tracking_uri")
    gone = told and told.startswith("sqlite:///") and not Path(told[len("sqlite:///") :]).exists()
    return os.environ.get("MLFLOW_TRACKING_URI") or (told if told and not gone else _default_uri())


def _run_of(tracked: MlflowClient, config: Config, facts: Mapping[str, Any]) -> str:
    """Return the MLflow run that a checkpoint comes from, made anew where this store lacks it."""
    known, name = facts.get("mlflow_run_id"), str(facts.get("run_id"))
    if known is not None and tracking.run_exists(tracked, known):
        return known
    source = str(facts.get("data") or config.dataset)
    run_id = tracking.start_run(
        tracked.tracking_uri,
        experiment=f"ivegan-{config.dataset}",
        run_name=name,
        params=flatten(config),
        tags={
            "preset": str(facts.get("preset")),
            "git_commit": str(facts.get("git_commit")),
            "config_hash": config_hash(config),
            "dataset_hash": str(facts.get("dataset_hash")),
            "mlflow.note.content": f"Made when {name} was registered; it was tracked elsewhere.",
        },
        config=to_dict(config),
        dataset=(config.dataset, str(facts.get("dataset_hash")), source),
    )
    tracking.end_run(tracked.tracking_uri, run_id, "FINISHED")
    return run_id


def _names(preset: str) -> list[str]:
    return [models.model_name(preset, kind) for kind in models.KINDS]


def _versions(tracked: MlflowClient, name: str) -> list[ModelVersion]:
    """Return all versions of a model, newest first; none where there is no such model."""
    found = tracked.search_model_versions(f"name='{name}'")
    return sorted(found, key=lambda version: int(version.version), reverse=True)


def _aliases(tracked: MlflowClient, name: str) -> dict[str, str]:
    """Return which version (as text) each stage word points to."""
    try:
        aliases = tracked.get_registered_model(name).aliases
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return {}
        raise
    return {word: str(version) for word, version in aliases.items() if word in WORDS}


def _resolve(tracked: MlflowClient, name: str, word: str) -> ModelVersion:
    """Return the version that an alias, a stage or a number means.

    Raises:
        UserError: no such model or version, with those that there are.
    """
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"{name!r} is no name of a model: it looks like ivegan-digits-encoder.")
    versions = _versions(tracked, name)
    if not versions:
        names = [model.name for model in tracked.search_registered_models()]
        near = difflib.get_close_matches(name, names, n=3) or names[:6]
        there = f"there are {', '.join(near)}" if near else "none is registered yet"
        raise UserError(f"No model is registered as {name}; {there}.")
    alias = _aliases(tracked, name).get(word.lower())
    for version in versions:
        if str(version.version) == (word if word.isdecimal() else alias):
            return version
    for version in versions:
        if alias is None and (version.current_stage or "").lower() == word.lower():
            return version
    there = ", ".join(f"{v.version} ({v.tags.get('stage', 'no stage')})" for v in versions[:6])
    raise UserError(f"{name} has no version {word}; there are {there}.")


def _holder(tracked: MlflowClient, preset: str, word: str) -> ModelVersion | None:
    """Return the encoder that holds a stage word."""
    name = models.model_name(preset, "encoder")
    version = _aliases(tracked, name).get(word)
    return None if version is None else tracked.get_model_version(name, version)


def _set_alias(tracked: MlflowClient, version: ModelVersion, word: str) -> None:
    tracked.set_registered_model_alias(version.name, word, str(version.version))


def _tag(tracked: MlflowClient, version: ModelVersion, **tags: object) -> None:
    for name, value in tags.items():
        if version.tags.get(name) != str(value):
            tracked.set_model_version_tag(version.name, str(version.version), name, str(value))
            version.tags[name] = str(value)


def _digest(version: ModelVersion) -> str:
    """Return the checksum that a version was registered with.

    Raises:
        UserError: it has none.
    """
    if "sha256" not in version.tags:
        raise UserError(
            f"Version {version.version} of {version.name} has no checksum: register it with "
            "registry.py, and it gets one."
        )
    return version.tags["sha256"]


def _facts_of(version: ModelVersion) -> dict[str, Any]:
    """Return what people want to know of a version."""
    tags = version.tags
    name, _, kind = version.name.rpartition("-")
    partner = f"{name}-{'generator' if kind == 'encoder' else 'encoder'}"
    return {
        "name": version.name,
        "version": int(version.version),
        "stage": tags.get("stage"),
        "run_id": tags.get("run_id"),
        "mlflow_run_id": version.run_id,
        "images_seen": int(tags["images_seen"]) if "images_seen" in tags else None,
        "registered_at": tags.get("registered_at"),
        "sha256": tags.get("sha256"),
        "partner": partner,
        "partner_version": int(tags["partner_version"]) if "partner_version" in tags else None,
    }


def _moved(
    preset: str,
    to: str,
    pair: tuple[ModelVersion, ModelVersion],
    before: ModelVersion | None,
) -> dict[str, Any]:
    """Return what a change of stage has done."""
    encoder, generator = pair
    return {
        "preset": preset,
        "stage": to,
        "run_id": encoder.tags.get("run_id"),
        "encoder": {"name": encoder.name, "version": int(encoder.version)},
        "generator": {"name": generator.name, "version": int(generator.version)},
        "replaced": None if before is None else int(before.version),
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True)
class Register(cli.Options):
    """Register a checkpoint's encoder and generator as candidates in staging."""

    checkpoint: str
    """A checkpoint's folder, or a run's folder (its newest is taken)."""


@dataclass(frozen=True, kw_only=True)
class Promote(cli.Options):
    """Move the encoder and the generator of one run to a stage, together."""

    preset: str
    """Whose models: digits, celeba-plus, ..."""
    to: Literal["staging", "production"] = "production"
    """The stage."""
    version: int | None = None
    """The encoder's version; the one in staging by default."""
    data: str | None = None
    """Shards to judge on; those that the candidate was trained on by default."""
    force: str | None = None
    """Reason to go to production in spite of the gate's numbers; it is kept as a tag."""


@dataclass(frozen=True, kw_only=True)
class Rollback(cli.Options):
    """Put back into production what the present pair replaced."""

    preset: str
    """Whose models."""


@dataclass(frozen=True, kw_only=True)
class List(cli.Options):
    """Show all versions and their stages, and repair what an interruption left."""

    preset: str | None = None
    """Only this preset."""


@dataclass(frozen=True, kw_only=True)
class Pull(cli.Options):
    """Fetch one model, verified, for use without this repository."""

    name: str
    """Name of the registered model: ivegan-digits-encoder."""
    stage: str = "production"
    """An alias, a stage or a version."""
    to: str | None = None
    """Folder for model/, weights.safetensors and config.json."""


@dataclass(frozen=True, kw_only=True)
class Sync(cli.Options):
    """Deliver to MLflow what an outage held back."""

    journals: str | None = None
    """Folder of journals, a run's folder or a folder of runs, here or s3://; runs/journal by
    default. The journals of a node that is gone are in its runs' folders."""


def main_register(options: Register) -> dict[str, Any]:
    """Register, or tell what would be."""
    at = checkpoint.find(storage.absolute(options.checkpoint))
    if options.dry_run:
        facts = checkpoint.read_facts(at)
        preset = facts.get("preset") or facts["config"]["dataset"]
        return _print({"checkpoint": at, "names": _names(preset), "stage": "staging"})
    done = register(at)
    for kind in models.KINDS:
        half = done[kind]
        say = "registered as" if done["new"] else "was registered before, as"
        print(f"{kind} {say} {half['name']} version {half['version']} ({half['stage']})")
    return done


def main_promote(options: Promote) -> dict[str, Any]:
    """Promote, or tell what would be."""
    if options.dry_run:
        with _asking() as tracked:
            pair = _candidates(tracked, options.preset, options.to, options.version)
            before = _holder(tracked, options.preset, options.to)
        return _print(_moved(options.preset, options.to, pair, before))
    done = promote(
        options.preset,
        to=options.to,
        version=options.version,
        data=options.data,
        force=options.force,
    )
    return _print_move(done)


def main_rollback(options: Rollback) -> dict[str, Any]:
    """Roll back, or tell what would come back."""
    if options.dry_run:
        with _asking() as tracked:
            pair, present = _former(tracked, options.preset)
        return _print(_moved(options.preset, "production", pair, present))
    return _print_move(rollback(options.preset))


def main_list(options: List) -> dict[str, Any]:
    """Print a table; with ``--dry-run``, without repairing."""
    found = overview(options.preset, repair=not options.dry_run)
    for line in found["repaired"]:
        print(f"repaired: {line}")
    columns = ("name", "version", "stage", "run_id", "images_seen", "partner_version", "sha256")
    table = [
        columns,
        *(
            ["-" if row[c] is None else str(row[c])[: 12 if c == "sha256" else 40] for c in columns]
            for row in found["versions"]
        ),
    ]
    widths = [max(len(row[i]) for row in table) for i in range(len(columns))]
    for row in table:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    return found


def main_pull(options: Pull) -> dict[str, Any]:
    """Pull, or tell what would come."""
    if options.to is None:
        raise UserError(
            "pull needs --to, a folder for model/, weights.safetensors and config.json."
        )
    to = Path(options.to).expanduser().absolute()
    if options.dry_run:
        with _asking() as tracked:
            found = _facts_of(_resolve(tracked, options.name, options.stage))
        return _print({**found, "to": str(to)})
    return _print(pull(options.name, stage=options.stage, to=to))


def main_sync(options: Sync) -> dict[str, Any]:
    """Deliver, or tell how much waits."""
    from pipelines.paths import runs_dir

    where = storage.absolute(options.journals or runs_dir() / "journal")
    if not storage.exists(where):
        raise UserError(f"There is no folder {where} of journals: name one with --journals.")
    if options.dry_run:
        return _print({"waiting": tracking.waiting(where)})
    done = sync(where)
    print(f"{sum(done['delivered'].values())} entries delivered")
    return done


def _print(values: dict[str, Any]) -> dict[str, Any]:
    """Print values one a line, and return them."""
    width = max(map(len, values))
    for name, value in values.items():
        print(f"{name:{width}}  {value}")
    return values


def _print_move(done: dict[str, Any]) -> dict[str, Any]:
    for kind in models.KINDS:
        print(f"{done[kind]['name']} version {done[kind]['version']} is now in {done['stage']}")
    if "scores" in done:
        former = done["scores_of_replaced"] or {}
        for name, score in done["scores"].items():
            beside = f"  ({former[name]:.3f} of the pair before)" if name in former else ""
            print(f"{name:<15} {score:.3f}{beside}")
        for fault in done["overruled"]:
            print(f"overruled: {fault}")
    if done["replaced"] is not None:
        print(f"in place of version {done['replaced']} of the encoder and its partner")
    return done


def command() -> None:
    """Run from the command line."""
    cli.run_verb(
        {
            "register": (main_register, Register),
            "promote": (main_promote, Promote),
            "rollback": (main_rollback, Rollback),
            "list": (main_list, List),
            "pull": (main_pull, Pull),
            "sync": (main_sync, Sync),
        }
    )


if __name__ == "__main__":
    command()
