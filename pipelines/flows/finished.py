"""What has been made, found again by what it was made from.

``STORAGE/finished/HASH.json`` stands for each sweep and training that a workflow saw to its end,
HASH being that of all inputs that decide the outcome. It is written last, so that what it names was
complete then; that it still is, is looked at before it is used.
"""

import hashlib
import json
from typing import Any

from ivegan import checkpoint, storage
from ivegan.config import config_hash
from ivegan.errors import UserError
from pipelines.training.plan import Plan, git_commit


def inputs_of(plan: Plan, dataset_hash: str) -> dict[str, Any]:
    """Return all that decides how a training ends."""
    return {
        "kind": "train",
        "preset": plan.preset,
        "config_hash": config_hash(plan.config),
        "dataset_hash": dataset_hash,
        "world_size": max(1, plan.run.workers),
        "threads": plan.run.threads,
        "device": "cuda" if plan.run.gpu else "cpu",
        "precision": plan.run.precision,
        "stream": plan.run.stream,
    }


def note(plan: Plan, inputs: dict[str, Any], outcome: dict[str, Any]) -> None:
    """Write down what came of these inputs, in the storage of a plan."""
    entry = {"inputs": inputs, "git_commit": git_commit(), "outcome": outcome}
    storage.write_bytes(_where(plan, inputs), json.dumps(entry, indent=2, default=str).encode())


def find(plan: Plan, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """Return the entry ``{inputs, git_commit, outcome}`` of these inputs, or None.

    Raises:
        UserError: there is one that cannot be read.
    """
    where = _where(plan, inputs)
    if not storage.exists(where):
        return None
    try:
        entry = json.loads(storage.read_bytes(where))
    except ValueError as error:
        raise UserError(f"{where} is not readable as JSON: {error}.") from error
    if not isinstance(entry, dict) or entry.get("inputs") != inputs or "outcome" not in entry:
        raise UserError(f"{where} is not of these inputs.")
    return entry


def note_training(plan: Plan, inputs: dict[str, Any], result: dict[str, Any]) -> None:
    """Write down a training that ended, with the digest of each file of its last checkpoint."""
    folder, _, name = result["checkpoint"].rpartition("/")
    # The place is kept relative to the storage, which may be moved as a whole.
    place = storage.join(folder.rpartition("/")[2], name)
    files = _digests(result["checkpoint"])
    note(plan, inputs, {"result": result, "checkpoint": place, "files": files})


def find_training(plan: Plan, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """Return the entry of a finished training, its result at ``outcome``; None if there is none.

    Raises:
        UserError: there is one, but its checkpoint is no longer whole, or not what it was.
    """
    entry = find(plan, inputs)
    if entry is None:
        return None
    at = storage.join(_storage(plan), entry["outcome"]["checkpoint"])
    facts = checkpoint.read_facts(at)
    if _digests(at) != entry["outcome"]["files"]:
        raise UserError(f"The files of {at} are not those that the training wrote.")
    result = {**entry["outcome"]["result"], "checkpoint": at}
    if facts["images_seen"] != plan.config.total_steps * plan.config.batch_size:
        raise UserError(f"{at} is not at the end of its training.")
    return {**entry, "outcome": result}


def _digests(uri: str) -> dict[str, str]:
    """Return the sha256 of every file of a folder."""
    return {
        name: hashlib.sha256(storage.read_bytes(storage.join(uri, name))).hexdigest()
        for name in sorted(storage.list_files(uri))
    }


def _storage(plan: Plan) -> str:
    return plan.run_uri.rpartition("/")[0]


def _where(plan: Plan, inputs: dict[str, Any]) -> str:
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()
    return storage.join(_storage(plan), "finished", f"{digest}.json")
