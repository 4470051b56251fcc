"""Registered models: encoder and generator of one run, each loadable by MLflow alone.

    python pipelines/registry.py register runs/checkpoints/RUN_ID
    python pipelines/registry.py promote digits --to production
    python pipelines/registry.py pull ivegan-digits-encoder --stage production --to /tmp/encoder

``staging`` and ``production`` are an alias and an MLflow stage, so that ``models:/NAME@production``
and ``models:/NAME/Production`` both load; the alias counts where they differ.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ivegan import storage
from ivegan.errors import UserError
from pipelines import options as cli
from pipelines.paths import mlflow_place


@dataclass(frozen=True, kw_only=True)
class Register(cli.Options):
    """Register a checkpoint's encoder and generator as candidates in staging."""

    checkpoint: str
    """A checkpoint's folder, or a run's folder (its newest is taken)."""


@dataclass(frozen=True, kw_only=True)
class Promote(cli.Options):
    """Move the encoder and the generator of one run to a stage, together."""

    preset: str
    """Preset of the models: digits, celeba-plus, ..."""
    to: Literal["staging", "production"] = "production"
    """The stage."""
    version: int | None = None
    """The encoder's version; the one in staging by default."""
    data: str | None = None
    """Shards to measure on; those that the candidate was trained on by default."""
    force: str | None = None
    """Reason to go to production in spite of the gate's numbers; it is kept as a tag."""


@dataclass(frozen=True, kw_only=True)
class Rollback(cli.Options):
    """Put the pair that the present one replaced back into production."""

    preset: str
    """Preset of the models."""


@dataclass(frozen=True, kw_only=True)
class List(cli.Options):
    """Print all versions and their stages, and where alias and MLflow stage differ."""

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
    """Copy to MLflow what it lacks of the runs of a folder, after an outage or a lost node."""

    storage: str | None = None
    """Folder or s3:// URI of run folders; runs/checkpoints by default."""


def main_register(options: Register) -> dict[str, Any]:
    """Register both halves, or print their names."""
    from pipelines.models.register import register

    result = register(options.checkpoint, dry_run=options.dry_run)
    if options.dry_run:
        return _print(result)
    for kind in ("encoder", "generator"):
        half, verb = result[kind], "registered" if result["new"] else "already registered"
        print(f"{kind} {verb} as {half['name']} version {half['version']} ({half['stage']})")
    print(f"Models: {mlflow_place()}")
    return result


def main_promote(options: Promote) -> dict[str, Any]:
    """Promote a pair, or print which."""
    from pipelines.models.stages import promote

    result = promote(
        options.preset,
        to=options.to,
        version=options.version,
        data=options.data,
        force=options.force,
        dry_run=options.dry_run,
    )
    return _print(result) if options.dry_run else _print_move(result)


def main_rollback(options: Rollback) -> dict[str, Any]:
    """Roll back, or print to which pair."""
    from pipelines.models.stages import rollback

    result = rollback(options.preset, dry_run=options.dry_run)
    return _print(result) if options.dry_run else _print_move(result)


def main_list(options: List) -> dict[str, Any]:
    """Print a table of versions, and the differences between alias and stage."""
    from pipelines.models.stages import overview

    result = overview(options.preset)
    columns = ("name", "version", "stage", "run_id", "images_seen", "partner_version", "sha256")
    table: list[tuple[str, ...]] = [columns]
    for row in result["versions"]:
        texts = {c: "-" if row[c] is None else str(row[c]) for c in columns}
        table.append(tuple(texts[c][: 12 if c == "sha256" else 40] for c in columns))
    print("\n".join(cli.aligned(table)))
    for line in result["differences"]:
        print(f"differs: {line}")
    if result["differences"]:
        print("Repeat the promote or rollback that was interrupted, with --version where needed.")
    return result


def main_pull(options: Pull) -> dict[str, Any]:
    """Pull a model, or print which version."""
    from pipelines.models.pull import pull

    if options.to is None or not storage.is_local(options.to):
        raise UserError("pull needs --to, a folder of this machine for model/ and its weights.")
    to = Path(options.to).expanduser().absolute()
    return _print(pull(options.name, stage=options.stage, to=to, dry_run=options.dry_run))


def main_sync(options: Sync) -> dict[str, Any]:
    """Mirror runs, or print how many files wait."""
    from pipelines.paths import runs_uri
    from pipelines.tracking.mirror import sync, waiting

    uri = runs_uri(options.storage)
    if options.storage and not storage.exists(uri):
        raise UserError(f"There is no folder {uri}: name one with --storage.")
    if options.dry_run:
        return _print({"waiting": waiting(uri)})
    result = {"delivered": sync(uri)}
    print(f"{sum(result['delivered'].values())} files copied")
    print(f"Runs: {mlflow_place()}")
    return result


def _print(values: dict[str, Any]) -> dict[str, Any]:
    """Print values one a line, and return them."""
    print("\n".join(cli.aligned([(name, str(value)) for name, value in values.items()])))
    return values


def _print_move(result: dict[str, Any]) -> dict[str, Any]:
    """Print the moved versions and the gate's numbers, and return the result."""
    for half in (result["encoder"], result["generator"]):
        print(f"{half['name']} version {half['version']} is now in {result['stage']}")
    former = result.get("scores_of_replaced") or {}
    for name, score in result.get("scores", {}).items():
        comparison = f"  ({former[name]:.3f} of the pair before)" if name in former else ""
        print(f"{name:<15} {score:.3f}{comparison}")
    for fault in result.get("overruled", ()):
        print(f"overruled: {fault}")
    if result["replaced"] is not None:
        print(f"in place of version {result['replaced']} of the encoder and its partner")
    print(f"Models: {mlflow_place()}")
    return result


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
