"""Time building, streaming and reading the cache beside what one would otherwise use, on one core.

    python benchmarks/data.py --source ~/celeba --images 4000 --rounds 5
    python benchmarks/data.py

The second takes photographs that come inside scikit-learn, cut to the size of aligned faces. The
readers take turns, round after round, and each ends in batches of 64 uint8 images of 128 x 128;
an absolute rate says little on a machine that is shared. Everything runs on one core, background
threads included. Files are in the page cache for all of them alike. The last line is one JSON
object.
"""

import argparse
import contextlib
import io
import itertools
import json
import logging
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_prep import celeba
from data_prep.build import build
from ivegan.config import override, preset
from ivegan.data import batches as data
from ivegan.data import shards

BATCH = 64
CONFIG = override(preset("celeba"), {"batch_size": BATCH})
Reader = Generator[torch.Tensor]


def photographs(folder: Path, count: int) -> None:
    """Write a folder in CelebA's layout from the two photographs inside scikit-learn."""
    from sklearn.datasets import load_sample_image

    pictures = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    rng = random.Random(0)
    names = [f"{i:06d}.jpg" for i in range(1, count + 1)]
    (folder / "img_align_celeba").mkdir(parents=True)
    for i, name in enumerate(names):
        left, top = rng.randrange(640 - 178), rng.randrange(427 - 218)
        cut = pictures[i % 2].crop((left, top, left + 178, top + 218))
        cut.save(folder / "img_align_celeba" / name, quality=90)
    attributes = " ".join(["-1"] * celeba.NUM_ATTRIBUTES)
    header = [str(count), " ".join(f"a{i}" for i in range(celeba.NUM_ATTRIBUTES))]
    rows = [f"{name} {attributes}" for name in names]
    (folder / celeba.ATTRIBUTES).write_text("\n".join(header + rows) + "\n")
    (folder / celeba.PARTITION).write_text("".join(f"{name} 0\n" for name in names))


def jpegs_of(source: str, count: int) -> list[bytes]:
    """Return the first images of a CelebA folder as they are."""
    import zipfile

    folder = Path(source)
    if (folder / celeba.ZIP).exists():
        with zipfile.ZipFile(folder / celeba.ZIP) as archive:
            names = [name for name in archive.namelist() if name.endswith(".jpg")]
            return [archive.read(name) for name in sorted(names)[:count]]
    found = sorted((folder / "img_align_celeba").glob("*.jpg"))[:count]
    return [path.read_bytes() for path in found]


def decode_and_encode(jpegs: list[bytes]) -> int:
    """Do what no build can do without."""
    for jpeg in jpegs:
        shards.encode(celeba.cut(jpeg, "c128"))
    return len(jpegs)


def crop(picture: Image.Image) -> np.ndarray:
    """Cut out the centre as a careful person would, on the fly."""
    square = picture.convert("RGB").crop((25, 45, 153, 173))
    return np.asarray(square).transpose(2, 0, 1)


def batched(images: Iterator[np.ndarray]) -> Reader:
    """Yield batches of so many images."""
    while some := list(itertools.islice(images, BATCH)):
        yield torch.from_numpy(np.stack(some))


def webdataset_of(folder: Path, pattern: str, image: Callable[[dict[str, Any]], Any]) -> Reader:
    """Read tars as webdataset's documentation shows it, over and over."""
    from webdataset.compat import WebDataset

    urls = sorted(str(path) for path in folder.glob(pattern))
    while True:
        dataset: Any = WebDataset(urls, shardshuffle=len(urls)).shuffle(1000).decode("pil")
        yield from batched(image(sample) for sample in dataset)


def folder_of_jpegs(folder: Path) -> Reader:
    """Read a folder as torch.utils.data's documentation shows it, over and over."""
    from torch.utils.data import DataLoader, Dataset

    class Folder(Dataset):
        def __init__(self) -> None:
            self.paths = sorted(folder.glob("*.jpg"))

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, place: int) -> torch.Tensor:
            with Image.open(self.paths[place]) as picture:
                return torch.from_numpy(np.ascontiguousarray(crop(picture)))

    while True:
        yield from DataLoader(Folder(), batch_size=BATCH, shuffle=True)


def ray_data(folder: Path) -> Reader:
    """Read our shards as Ray Data's documentation shows it, over and over."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    paths = sorted(str(path) for path in folder.glob("train/*.tar"))
    while True:
        dataset = ray.data.read_webdataset(paths, shuffle="files")
        for batch in dataset.iter_batches(batch_size=BATCH, local_shuffle_buffer_size=1000):
            yield torch.from_numpy(np.stack(list(batch["npy"])))


def streamed(stream: data.Stream) -> Reader:
    """Stream our shards."""
    yield from stream.batches(CONFIG, 0, 0, 1)


def warm(split: data.Split) -> Reader:
    """Read our cache."""
    for step in itertools.count():
        yield split.batch(CONFIG, step, 0, 1)


def memory_copy(split: data.Split) -> Reader:
    """Copy as many bytes of the same array, from its start to its end, over and over."""
    total = len(split.images) // BATCH
    while True:
        for place in range(total):
            yield torch.from_numpy(split.images[place * BATCH : (place + 1) * BATCH].copy())


def rate(reader: Callable[[], Reader], images: int) -> float:
    """Return images per second over so many images, in the steady state.

    Each turn starts anew, runs in over as many images as there are, and is closed: what a reader
    has read ahead serves nobody's next turn, and does not run on in the background of another's.
    """
    batches = reader()
    drain(batches, images)
    start = time.perf_counter()
    count = drain(batches, images)
    found = count / (time.perf_counter() - start)
    batches.close()
    return found


def drain(batches: Reader, images: int) -> int:
    """Take so many images, and return how many they were."""
    count = 0
    while count < images:
        count += len(next(batches))
    return count


def times(what: Callable[[], int]) -> float:
    """Return images per second of one call."""
    start = time.perf_counter()
    return what() / (time.perf_counter() - start)


def peak_memory(uri: str, cache: str, mode: str, repeat: int) -> dict[str, float]:
    """Return what a process of its own takes to read an epoch of a data set repeated so often."""
    program = [sys.executable, __file__, "--measure-memory", mode, uri, cache, str(repeat)]
    done = subprocess.run(program, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_memory(mode: str, uri: str, cache: str, repeat: int) -> None:
    """Read an epoch and print this process's peak memory, and what is its own at the end."""
    import dataclasses

    manifest = shards.read_manifest(uri)
    train = manifest.of_split("train") * repeat
    total = sum(shard.samples for shard in train)
    manifest = dataclasses.replace(manifest, shards=tuple(train), splits={"train": total})
    if mode == "cache":
        split = data.load_split(uri, "train", cache)
        images = split.images
        if repeat > 1:  # a file with the repeated images, as the cache of such a data set would be
            path = Path(cache) / "repeated.npy"
            large = np.lib.format.open_memmap(
                path, mode="w+", dtype=np.uint8, shape=(total, *images.shape[1:])
            )
            for i in range(repeat):
                large[i * len(images) :][: len(images)] = images
            del large
            images = np.load(path, mmap_mode="r")
        split = data.Split(images=images, labels=split.labels, keys=[], dataset_hash="")
        batches: Reader = warm(split)
    else:
        stream = data.Stream(data_uri=uri, manifest=manifest, split="train", loaders=0)
        batches = streamed(stream)
    for _ in range(total // BATCH):
        next(batches)
    status = dict(row.split(":") for row in Path("/proc/self/status").read_text().splitlines())
    peak, own = (int(status[name].split()[0]) // 1024 for name in ("VmHWM", "RssAnon"))
    print(json.dumps({"samples": total, "peak_mb": peak, "own_mb": own}))


def main() -> None:
    """Print a table and one JSON object."""
    if sys.argv[1:2] == ["--measure-memory"]:
        mode, uri, cache, repeat = sys.argv[2:]
        measure_memory(mode, uri, cache, int(repeat))
        return
    parser = argparse.ArgumentParser(description="Time the data plane")
    parser.add_argument("--source", help="CelebA as downloaded; photographs without it")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=9, help="of the data, to measure memory with")
    parser.add_argument("--no-ray", action="store_true", help="leave Ray Data out")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # children inherit it, Ray's too
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        report = measure(options, Path(temporary), stack)
    print(json.dumps(report))


def measure(
    options: argparse.Namespace, folder: Path, stack: contextlib.ExitStack
) -> dict[str, Any]:
    """Measure everything in a folder and return the report."""
    from webdataset.writer import TarWriter

    source = options.source
    if source is None:
        source = str(folder / "source")
        photographs(Path(source), options.images)
    jpegs = jpegs_of(source, options.images)
    count = len(jpegs)
    (folder / "jpegs").mkdir()
    for start in range(0, count, 1000):
        with TarWriter(str(folder / f"jpegs-{start // 1000:05d}.tar")) as tar:
            for place in range(start, min(start + 1000, count)):
                tar.write({"__key__": f"{place:06d}", "jpg": jpegs[place], "json": {"label": 0}})
                (folder / "jpegs" / f"{place:06d}.jpg").write_bytes(jpegs[place])
    uri = str(folder / "ours")
    numbers = itertools.count()

    def build_all() -> int:
        out = str(folder / f"built-{next(numbers)}")
        return build("celeba", source, out, 0, limit=count)["samples"]

    build("celeba", source, uri, 0, limit=count)
    split = data.load_split(uri, "train", folder / "cache")
    stream = data.Stream(data_uri=uri, manifest=shards.read_manifest(uri), split="train", loaders=0)
    readers: dict[str, Callable[[], Reader]] = {
        "cold: our stream": lambda: streamed(stream),
        "a: webdataset, JPEGs": lambda: webdataset_of(
            folder, "jpegs-*.tar", lambda sample: crop(sample["jpg"])
        ),
        "a': webdataset, our shards": lambda: webdataset_of(
            Path(uri), "train/*.tar", lambda sample: sample["npy"]
        ),
        "b: folder of JPEGs": lambda: folder_of_jpegs(folder / "jpegs"),
        "warm: our cache": lambda: warm(split),
        "memory copy": lambda: memory_copy(split),
    }
    if not options.no_ray:
        import ray

        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
        )
        stack.callback(ray.shutdown)
        readers["c: Ray Data, our shards"] = lambda: ray_data(Path(uri))
    fast = ("warm: our cache", "memory copy")
    found: dict[str, list[float]] = {name: [] for name in readers}
    found |= {"build": [], "decode and encode": []}
    for number in range(options.rounds):
        order_of_turns = list(readers) if number % 2 == 0 else list(reversed(readers))
        for name in order_of_turns:
            found[name].append(rate(readers[name], count * (20 if name in fast else 1)))
        found["build"].append(times(build_all))
        found["decode and encode"].append(times(lambda: decode_and_encode(jpegs)))
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
    report = {
        "images": count,
        "rounds": options.rounds,
        "images_per_second": {name: statistics.median(all_) for name, all_ in found.items()},
        "ratios": ratios(found),
        "memory": {
            f"{mode} x{repeat}": peak_memory(uri, str(folder / "cache"), mode, repeat)
            for mode in ("cache", "stream")
            for repeat in (1, options.repeat)
        },
        "machine": platform.processor() or platform.machine(),
        "versions": {"torch": torch.__version__, "webdataset": version("webdataset")},
    }
    show(report)
    return report


def ratios(found: dict[str, list[float]]) -> dict[str, list[float]]:
    """Return each ratio's median, least and largest over the rounds."""
    wanted = [
        ("cold: our stream", "a: webdataset, JPEGs"),
        ("cold: our stream", "a': webdataset, our shards"),
        ("cold: our stream", "b: folder of JPEGs"),
        ("cold: our stream", "c: Ray Data, our shards"),
        ("warm: our cache", "a: webdataset, JPEGs"),
        ("warm: our cache", "memory copy"),
        ("build", "decode and encode"),
    ]
    out = {}
    for one, other in wanted:
        if other in found:
            each = [a / b for a, b in zip(found[one], found[other], strict=True)]
            out[f"{one} / {other}"] = [statistics.median(each), min(each), max(each)]
    return out


def show(report: dict[str, Any]) -> None:
    """Print the report as people read it."""
    into = io.StringIO()
    print(f"{report['images']} images, one core, {report['rounds']} rounds", file=into)
    for name, value in report["images_per_second"].items():
        print(f"  {name:28} {value:>12,.0f} images/s", file=into)
    for name, (median, least, most) in report["ratios"].items():
        print(f"  {name:48} {median:7.2f}  ({least:.2f} to {most:.2f})", file=into)
    for name, value in report["memory"].items():
        print(
            f"  {name:12} {value['samples']:>8,} samples: peak {value['peak_mb']:,} MB, "
            f"{value['own_mb']:,} MB of its own",
            file=into,
        )
    print(into.getvalue(), end="", flush=True)


if __name__ == "__main__":
    main()
