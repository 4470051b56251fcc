"""Compare the numbers of two checkouts bit for bit: losses, weights, and the files of data sets.

    python tests/golden/compare.py CHECKOUT OTHER [--data FOLDER]

Each argument is a checkout, or a JSON file with the numbers that ``--measure`` prints of one.
Losses are those of 20 steps in float64, on one rank and on two, cached and streamed. FOLDER holds
raw ``mnist/`` and ``celeba/``; without it only ``ring`` and ``digits`` are compared. Exit status 1
on any difference.
"""

import argparse
import gc
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

BATCH, STEPS = 64, 20


def _losses(rank: int, world: int, preset: str, source: str, data: str, out: str) -> None:
    """Train 20 steps in float64 and write every step's metrics and the sha256 of the weights."""
    import torch
    import torch.distributed as dist

    from ivegan import checkpoint, config, order, step
    from ivegan.data.batches import batches
    from ivegan.data.cache import load_split
    from ivegan.data.manifest import read_manifest
    from ivegan.data.stream import Stream

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    if world > 1:
        store = f"file://{out}-ranks"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    changes = {"batch_size": BATCH, "total_images": BATCH * STEPS}
    changes |= {"model.width": 0.25} if preset == "mnist" else {}
    settings = config.override(config.preset(preset), changes)
    state = step.create_state(settings)
    step.distribute(state)
    samples = None
    if source == "cached":
        samples = load_split(data, "train", f"{data}-cache")
    elif source == "streamed":
        manifest = read_manifest(data)
        samples = Stream(data_uri=data, manifest=manifest, split="train", loaders=0)
    doubles = (
        (x.double(), order.Draws(*(draw.double() for draw in draws)))
        for x, draws in batches(settings, samples, 0, rank, world, torch.device("cpu"))
    )
    metrics = [p.metrics for p in step.train(state, doubles, BATCH)]
    if rank == 0:
        uri = checkpoint.save(state, f"{out}-run", {})
        weights = hashlib.sha256(Path(uri, "weights.safetensors").read_bytes()).hexdigest()
        values = {n: [float(m[n]).hex() for m in metrics] for n in sorted(metrics[0])}
        Path(out).write_text(json.dumps(values | {"weights": weights}))
    gc.collect()
    if world > 1:
        dist.destroy_process_group()
    os._exit(0)  # the threads that read ahead do not end


def _sums(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def measure(raw: str | None) -> dict[str, Any]:
    """Return the numbers of the checkout that Python finds first."""
    from torch.multiprocessing.spawn import spawn

    from data_prep.building import build

    numbers: dict[str, Any] = {}
    sources = {"digits": None} | ({n: f"{raw}/{n}" for n in ("mnist", "celeba")} if raw else {})
    with tempfile.TemporaryDirectory() as tmp:
        for name, source in sources.items():
            limit: dict[str, Any] = {"limit": 67} if name == "celeba" else {}
            build(name, source, f"{tmp}/{name}", workers=0, **limit)
            numbers |= {f"build {name} {k}": v for k, v in _sums(Path(tmp, name)).items()}
        runs = {"ring": ("drawn",)} | dict.fromkeys([*sources][:2], ("cached", "streamed"))
        for preset, ways in runs.items():
            for way in ways:
                for world in (1, 2):
                    out = f"{tmp}/{preset}-{way}-{world}"
                    where = (world, preset, way, f"{tmp}/{preset}", out)
                    spawn(_losses, where, nprocs=world)
                    values = json.loads(Path(out).read_text())
                    where = f"losses {preset} {way} {world} ranks"
                    numbers |= {f"{where} {name}": v for name, v in values.items()}
    return numbers


def numbers_of(place: str, raw: str | None) -> dict[str, Any]:
    """Return the numbers of a checkout or of a JSON file."""
    if place.endswith(".json"):
        return json.loads(Path(place).read_text())
    words = [sys.executable, str(Path(__file__).resolve()), "--measure"]
    words += ["--data", str(Path(raw).resolve())] if raw else []
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "PYTHONPATH": str(Path(place).resolve()),
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            words, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE
        )
    return json.loads(done.stdout.splitlines()[-1])


def difference(ours: Any, theirs: Any) -> str:
    """Return how two values differ; of losses the largest relative difference and its step."""
    if not (isinstance(ours, list) and isinstance(theirs, list)):
        return "differs" if ours and theirs else ("is only in the first", "is new")[ours is None]
    pairs = [(float.fromhex(a), float.fromhex(b)) for a, b in zip(ours, theirs, strict=True)]
    relative = [abs(a - b) / max(abs(a), abs(b), 1e-12) for a, b in pairs]
    first = next(i for i, value in enumerate(relative) if value)
    return f"differs by {max(relative):.2g} of its value, first in step {first + 1}"


def main() -> None:
    """Compare, or with --measure print the numbers of this Python's checkout."""
    parser = argparse.ArgumentParser(description="Compare the numbers of two checkouts.")
    parser.add_argument("places", nargs="*", help="two checkouts or JSON files")
    parser.add_argument("--data", help="folder with raw mnist/ and celeba/")
    parser.add_argument(
        "--measure", action="store_true", help="print those of this Python's ivegan"
    )
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.data)))
        return
    numbers = [numbers_of(place, options.data) for place in options.places]
    names = numbers[0].keys() | numbers[1].keys()
    if any(place.endswith(".json") for place in options.places):
        names = numbers[0].keys() & numbers[1].keys()
    differing = [n for n in sorted(names) if numbers[0].get(n) != numbers[1].get(n)]
    for name in differing:
        print(f"{name} {difference(numbers[0].get(name), numbers[1].get(name))}")
    print(f"{len(names) - len(differing)} of {len(names)} values are equal.")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
