"""Measure one checkpoint: numbers in ``metrics.json``, the paper's figures, one HTML page.

Images are measured on the test split, all of it unless a limit is given, with four draws of z' for
each sample; points on 2,500 fresh ones, the protocol of VEEGAN and PacGAN. Every draw comes from
the seed, so the same checkpoint gives the same numbers again.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ivegan import checkpoint, storage
from ivegan.config import PROTOCOLS, Config
from ivegan.errors import UserError
from ivegan.evaluation import figures, images, points
from ivegan.evaluation.report import PREFIX, Figure, render
from ivegan.evaluation.sampling import Sampler


def evaluate(
    checkpoint_uri: str,
    data_uri: str | None,
    out: str | Path,
    *,
    cache_dir: str | Path,
    device: str | torch.device = "cpu",
    seed: int = 0,
    limit: int | None = None,
    protocol: str | None = None,
) -> dict[str, Any]:
    """Measure a checkpoint, write ``metrics.json``, PNGs and ``report.html``; return a summary.

    Args:
        checkpoint_uri: a checkpoint's folder, or a run's, of which the newest is taken.
        data_uri: shards; those that the checkpoint was trained on where None; unused for points.
        out: folder or s3:// URI; files of the same names are replaced.
        cache_dir: for decoded images and the trained classifier.
        device: where E and G run.
        seed: of every draw.
        limit: held-out samples at most, evenly spread over the split.
        protocol: how to score points, one of ``PROTOCOLS``; the run's own by default.

    Returns:
        ``metrics`` (floats under ``eval/same_class`` and the like, explained in ``report``),
        ``metadata`` (checkpoint, data, settings), ``figures`` (paths by name), ``report`` (a path),
        ``files`` (contents by name).

    Raises:
        UserError: no checkpoint, data of another shape, or networks that diverged.
    """
    if limit is not None and limit < 2:
        raise UserError(f"limit is {limit}, but must be at least 2.")
    uri = checkpoint.find(checkpoint_uri)
    config, encoder, generator, saved = checkpoint.load_networks(uri)
    device = torch.device(device)
    sampler = Sampler(config, encoder.to(device), generator.to(device), device)
    names = ("run_id", "preset", "git_commit", "dataset_hash")
    metadata = {
        "dataset": config.dataset,
        "images_seen": saved["images_seen"],
        "checkpoint": uri,
        **{name: saved.get(name) for name in names},
        "seed": seed,
        "config": saved["config"],
    }
    if config.is_points:
        own, protocol = PROTOCOLS[config.protocol], protocol or config.protocol
        rules = PROTOCOLS[protocol]._replace(ring=own.ring, grid=own.grid)
        metadata |= {"protocol": protocol, "evaluated": limit or rules.samples}
        metadata["evaluated_dataset_hash"] = config.dataset
        metrics, pages = points.evaluate(sampler, uri, seed, metadata["evaluated"], rules)
    else:
        metadata["data"] = data_uri or saved.get("data")
        if not metadata["data"]:
            raise UserError(f"The checkpoint {uri} does not record its data: give --data.")
        left_out, cache = saved.get("skip_bad", False), Path(cache_dir)
        split = images.load(config, metadata["data"], "test", cache, limit, skip_bad=left_out)
        metadata |= {"evaluated": len(split.x), "evaluated_dataset_hash": split.hash}
        metrics, pages = images.evaluate(sampler, split, cache, seed)
    return _write(str(out), {PREFIX + k: v for k, v in metrics.items()}, metadata, pages)


def quality(
    config: Config,
    encoder: nn.Module,
    generator: nn.Module,
    data_uri: str | None,
    cache_dir: str | Path,
    *,
    seed: int = 0,
    limit: int | None = None,
    skip_bad: bool = False,
) -> dict[str, float]:
    """Return ``quality``, one number in [0, 1] to choose between runs by, and its components.

    Larger is better, and quality is the mean of three: one each for variations, for codes or
    modes, and for samples. Images, of the validation split: ``same_class`` after reconstruction,
    ``one_nn`` accuracy of codes (``same_attributes`` and ``probe_auroc`` for faces), and ``near``,
    the Fréchet distance's floor over itself; beside these ``frechet``, the distance, where smaller
    is better. Points: ``right_mode`` of variations, ``coverage``, exp(-reverse KL) over all
    samples, which is the share of modes reached, and ``high_quality``, the share of samples near a
    mode over a perfect sampler's.

    Args:
        encoder, generator: in eval mode.
        data_uri: shards; None for points.
        cache_dir: for decoded images and the trained classifier.
        limit: validation images at most, and five times as many of the train split; for searches,
            which score often.
        skip_bad: leave out train images that training has left out.
    """
    device = next(generator.parameters()).device
    sampler = Sampler(config, encoder, generator, device)
    if config.is_points:
        parts, beside = points.quality(sampler, seed), {}
    else:
        assert data_uri is not None, "images come with their data"
        cache = Path(cache_dir)
        split = images.load(config, data_uri, "valid", cache, limit, skip_bad=skip_bad)
        train = None if limit is None else 5 * limit
        parts, beside = images.quality(sampler, split, cache, seed, train)
    return {"quality": sum(parts.values()) / len(parts), **parts, **beside}


def _write(
    out: str, metrics: dict[str, float], metadata: dict[str, Any], pages: list[Figure]
) -> dict[str, Any]:
    """Write all files of an evaluation, ``metrics.json`` last, and return its summary."""
    files = {f"{page.name}.png": figures.png(page.image) for page in pages}
    files["report.html"] = render(metrics, metadata, pages, files).encode()
    result = {"metrics": metrics, "metadata": metadata}
    files["metrics.json"] = (json.dumps(result, indent=2, allow_nan=False) + "\n").encode()
    for name, data in files.items():
        storage.write_bytes(storage.join(out, name), data)
    return {
        **result,
        "figures": {page.name: storage.join(out, f"{page.name}.png") for page in pages},
        "report": storage.join(out, "report.html"),
        "files": files,
    }
