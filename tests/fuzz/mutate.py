"""Damage stored files at random and read them again: `python tests/fuzz/mutate.py --cases 100000`.

A reader may refuse a damaged file with a sentence (UserError), or return what was written. Anything
else is a failure: a traceback, other data where a digest exists, a file written outside, or a case
that takes longer, or more memory, than it may.
"""

import argparse
import dataclasses
import json
import logging
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from datasets import write_faces, write_idx

from data_prep import building, celeba, mnist
from data_prep.build import build
from ivegan import checkpoint, storage
from ivegan.config import from_dict, override, preset, to_dict
from ivegan.data.cache import load_split
from ivegan.data.manifest import read_manifest
from ivegan.data.tars import read_shard
from ivegan.errors import UserError
from ivegan.evaluation.classifier import Settings, classifier_of
from ivegan.step import create_state
from pipelines import claim, record
from pipelines.models import artifact, card, package
from pipelines.reproduction import cells
from pipelines.reproduction.tasks import TASKS
from pipelines.reproduction.tasks import cells as cells_of
from pipelines.sweeps import definition
from pipelines.tracking import journals, mirror
from pipelines.training.plan import Run

LONGEST = 20.0  # seconds of one case
LARGEST = 4 << 30  # bytes of memory, the libraries included
EVALUATION = "evaluation-0000000016/metrics.json"
CLAIM = "claim-0000000001.json"

Read = Callable[[str], Any]


@dataclasses.dataclass(frozen=True)
class Target:
    """A folder of files and how they are read."""

    name: str
    folder: Path
    files: tuple[str, ...]
    """Those that are damaged."""
    read: Read
    has_digest: bool = False
    """Whether data other than those written must be refused."""


# --- Damage -------------------------------------------------------------------------------------


def damaged(content: bytes, draws: random.Random) -> bytes:
    """Return other bytes: a flip, a cut, zeros, a repetition, a foreign piece, or other JSON."""
    text = content.lstrip()[:1] in (b"{", b"[")
    if text and draws.random() < 0.6:
        return _other_json(content, draws)
    out, size = bytearray(content), len(content)
    start = draws.randrange(size + 1)
    length = min(draws.choice([1, 1, 4, 64, 512, 4096]), size - start)
    kind = draws.choice(["flip", "cut", "zeros", "repeat", "insert", "drop", "empty"])
    if kind == "flip" and start < size:
        out[start] ^= 1 << draws.randrange(8)
    elif kind == "cut":
        del out[start:]
    elif kind == "zeros":
        out[start : start + length] = bytes(length)
    elif kind == "repeat":
        out[start:start] = out[start : start + length]
    elif kind == "insert":
        out[start:start] = draws.randbytes(length or 1)
    elif kind == "drop":
        del out[start : start + length]
    elif kind == "empty":
        out.clear()
    return bytes(out)


STRANGE: list[Any] = [
    None, True, -1, 0, 2**70, 1.5, float("nan"), float("inf"), "", "../../outside", "/etc/passwd",
    "\0", [], {}, [[]], {"a": 1}, "x" * 5000,
]  # fmt: skip


def _other_json(content: bytes, draws: random.Random) -> bytes:
    """Return JSON with an entry replaced, deleted, added or nested."""
    try:
        value = json.loads(content.splitlines()[0] if b"\n{" in content else content)
    except ValueError:
        return content[: len(content) // 2]
    places = list(_places(value))
    if not places or draws.random() < 0.05:
        return draws.choice([b"[" * 3000, b'{"a":' * 3000, b"null", b"[]", b"{}", b'"x"'])
    where, key = draws.choice(places)
    kind = draws.choice(["replace", "replace", "delete", "add"])
    if kind == "replace":
        where[key] = draws.choice(STRANGE)
    elif kind == "delete":
        del where[key]
    elif isinstance(where, dict):
        where[f"{key}_"] = draws.choice(STRANGE)
    else:
        where.append(draws.choice(STRANGE))
    return json.dumps(value).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, one in list(inner):
        yield value, key
        if isinstance(one, dict | list):
            yield from _places(one)


# --- What is read -------------------------------------------------------------------------------


def targets(root: Path) -> list[Target]:
    """Write one of each kind of stored file below a folder."""
    build("digits", source=None, out=str(root / "data"), workers=0, shard_size=100)
    manifest = read_manifest(str(root / "data"))
    valid = manifest.of_split("valid")[0]
    load_split(str(root / "data"), "valid", root / "cache")
    (cached,) = (root / "cache").glob("*/valid")
    config = override(preset("digits-plus"), {"model.width": 0.125, "batch_size": 16})
    saved = Path(checkpoint.save(create_state(config), str(root / "run"), {"run_id": "run"}))
    again = create_state(config)  # each restored checkpoint replaces all of it
    own = record.RunRecord(run_id="run", preset="digits-plus", config=to_dict(config), key="run-1")
    record.write_record(str(root / "run"), own)
    record.write_points(str(root / "run"), 16, {"loss/D": 1.0})
    write_idx(root / "idx", train=24, test=6)
    write_faces(root / "faces")
    evaluation = {"metrics": {"eval/a": 1.0}, "metadata": {"config": to_dict(config)}}
    (root / "run" / EVALUATION).parent.mkdir()
    (root / "run" / EVALUATION).write_text(json.dumps(evaluation))
    mirror._Note("sqlite:///a.db", "0" * 32, "", ["metrics/0000000016.jsonl"]).write(
        str(root / "run")
    )
    claim._take(str(root / "claim"), 0.0, print)
    sweep = definition.Sweep(samples=2, search="random")
    definition.write(str(root / "sweeps/s"), definition.define("digits-plus", config, sweep))
    shutil.copytree(Path(__file__).parents[1] / "golden/start", root / "old")
    plan = building.make_plan("digits", None, str(root / "build"), shard_size=100)
    building.write_shard(plan, plan.jobs[0])
    storage.write_bytes(plan.marker, plan.identity)
    images, labels = np.zeros((8, 1, 16, 16), np.uint8), np.arange(8) % 2
    few = Settings(side=8, channels=(2, 2, 2), num_features=4, images=8, epochs=1, batch_size=8)
    classifier_of(images, labels, "hash", root / "judge", few)
    cell = cells_of(TASKS["digits"])[0]
    cells.write(root / "cells", cell, cells._result(cell, Run(), 1.0, 16, {"quality": 0.5}))
    registered = _write_model(root / "model", str(saved))

    def classifier(folder: str) -> Any:
        judge = classifier_of(images, labels, "hash", Path(folder), few)
        return [p.detach().numpy() for p in judge.parameters()]

    def model(folder: str) -> Any:
        artifact.check_sums(Path(folder), registered)
        return [p.detach().numpy() for p in package.load(Path(folder)).network.parameters()]

    def sweep_again(folder: str) -> Any:
        return definition.restored(definition.Sweep(restore="s", storage=folder))

    def unfinished(folder: str) -> Any:
        return sorted(building._finished(dataclasses.replace(plan, out=folder)))

    def cache(folder: str) -> Any:
        split = load_split(str(root / "data"), "valid", folder)
        return [np.array(split.images), split.labels, np.array(split.keys)]

    def state(folder: str) -> Any:
        checkpoint.restore(again, f"{folder}/{saved.name}")
        networks = (again.encoder_generator, again.discriminators)
        return [p.detach().numpy().copy() for one in networks for p in one.parameters()]

    def shard(folder: str) -> Any:
        samples = read_shard(folder, valid, manifest.image_shape)
        return [np.stack([s.image for s in samples]), [s.meta for s in samples]]

    def raw(module: Any) -> Read:
        def read(folder: str) -> Any:
            splits = module.describe(folder, "raw").splits
            return [s.image for s in module.read(folder, "test", 0, splits["test"])]

        return read

    metrics = "metrics/0000000016.jsonl"
    place = cached.relative_to(root / "cache")
    arrays = tuple(f"{place}/{n}" for n in ("images.npy", "labels.npy", "keys.npy", "sums.json"))
    parts = tuple(f"{saved.name}/{n}" for n in ("weights.safetensors", "training.safetensors"))
    run, old = root / "run", root / "old"
    return [
        Target("manifest", root / "data", ("manifest.json",), read_manifest),
        Target("shard", root / "data", (valid.key,), shard, has_digest=True),
        Target("cache", root / "cache", arrays, cache, has_digest=True),
        Target("weights", run, parts, state, has_digest=True),
        Target("config.json", run, (f"{saved.name}/config.json",), state),
        Target("run.json", run, ("run.json",), _record),
        Target("points", run, (metrics,), lambda f: record.read_point(f"{f}/{metrics}")),
        Target("idx", root / "idx", _names(root / "idx"), raw(mnist)),
        Target("celeba", root / "faces", _names(root / "faces"), raw(celeba)),
        Target("evaluation", run, (EVALUATION,), lambda f: card.evaluations_of(f, 16)),
        Target("mlflow.json", run, ("mlflow.json",), mirror.run_id_of),
        Target("claim", root / "claim", (CLAIM,), _claim),
        Target("sweep.json", root / "sweeps", ("s/sweep.json",), sweep_again),
        Target("unfinished", root / "build", _names(root / "build"), unfinished),
        Target("classifier", root / "judge", _names(root / "judge"), classifier, has_digest=True),
        Target("model", root / "model", _names(root / "model"), model, has_digest=True),
        Target("cell", root / "cells", (cell.path,), lambda f: cells.read(Path(f), cell)),
        Target("old journal", old, ("journal.jsonl",), lambda f: journals.waiting(Path(f))),
        Target("old checkpoint", old, _names(old), _old_checkpoint),
    ]


def _claim(folder: str) -> Any:
    return claim._parse(Path(folder, CLAIM).read_bytes(), folder)


def _old_checkpoint(folder: str) -> Any:
    return checkpoint.load_networks(f"{folder}/checkpoint-0000000032")[0]


def _record(folder: str) -> Any:
    found = record.read_record(folder)
    return found, from_dict(found.config)


def _names(folder: Path) -> tuple[str, ...]:
    return tuple(storage.list_files(str(folder)))


def _write_model(folder: Path, saved: str) -> str:
    """Write the files of a registered model, as far as they are ours, and return their digest."""
    config, encoder, _, metadata = checkpoint.load_networks(saved)
    half = package.Half(
        kind="encoder", preset="digits", config=config, network=encoder, metadata=metadata
    )
    for name in artifact.FILES:
        storage.write_bytes(folder / name, b"of MLflow")
    (folder / artifact.WEIGHTS).write_bytes(half.weights)
    stored = {**metadata, "half": "encoder"}
    (folder / artifact.CONFIG).write_text(json.dumps(stored))
    return artifact.write_sums(folder)


# --- Cases --------------------------------------------------------------------------------------


def run(target: Target, root: Path, seed: int) -> str | None:
    """Run one case and return what is wrong, if anything."""
    draws = random.Random(f"{target.name} {seed}")
    folder = root / "case" / "inner" / target.name
    shutil.copytree(target.folder, folder, copy_function=os.link)
    name = draws.choice(target.files)
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    changed = damaged(content, draws)
    (folder / name).write_bytes(changed)
    start = time.monotonic()
    try:
        found = target.read(str(folder))
        if (
            target.has_digest
            and changed != content
            and not _equal(found, target.read(str(target.folder)))
        ):
            return f"{name}: other data were accepted"
    except UserError:
        pass
    except Exception:
        return f"{name}: {traceback.format_exc(limit=-3)}"
    finally:
        outside = [p.name for p in (root / "case").iterdir() if p.name != "inner"]
        shutil.rmtree(root / "case")
    if outside:
        return f"{name}: wrote {outside} outside its folder"
    return f"{name}: slow" if time.monotonic() - start > LONGEST else None


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, list):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def fuzz(cases: int, seed: int = 0, only: str = "") -> tuple[Counter[str], list[str]]:
    """Run cases of all targets in turn, or of one; return their numbers, and the failures."""
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        chosen = [target for target in targets(root) if only in ("", target.name)]
        for target in chosen:
            target.read(str(target.folder))  # what is whole is not refused
        for number in range(cases):
            target = chosen[number % len(chosen)]
            if problem := run(target, root, seed + number):
                failures.append(f"{target.name}, case {seed + number}: {problem}")
                print(failures[-1], flush=True)
            counts[target.name] += 1
    return counts, failures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    resource.setrlimit(resource.RLIMIT_DATA, (LARGEST, LARGEST))
    numbers, wrong = fuzz(options.cases, options.seed)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{sum(numbers.values())} cases, {len(wrong)} failures, {peak} MiB: {dict(numbers)}")
    sys.exit(1 if wrong else 0)
