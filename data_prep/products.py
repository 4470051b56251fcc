"""The table of samples and the contact sheets that a build writes beside the shards."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ivegan import storage
from ivegan.data.manifest import Shard
from ivegan.data.tars import Row, decode

_CONTACTS = 80  # images on a contact sheet
_COLUMNS = 10


@dataclass(frozen=True, kw_only=True)
class Written:
    """A finished shard and where it holds its samples."""

    shard: Shard
    rows: list[Row]


def table(written: list[Written], label_names: tuple[str, ...]) -> bytes:
    """Return a Parquet file with a row per sample."""
    import pyarrow as pa
    from pyarrow import parquet

    rows = [(one.shard, row) for one in written for row in one.rows]
    columns: dict[str, pa.Array] = {
        "key": pa.array([row.key for _, row in rows]),
        "split": pa.array([shard.split for shard, _ in rows]).dictionary_encode(),
        "shard": pa.array([shard.key for shard, _ in rows]).dictionary_encode(),
        "offset": pa.array([row.offset for _, row in rows], pa.int64()),
        "bytes": pa.array([row.bytes for _, row in rows], pa.int32()),
    }
    for name in rows[0][1].meta:
        values = [row.meta[name] for _, row in rows]
        if name == "attributes":
            for place, attribute in enumerate(label_names):
                columns[attribute] = pa.array([bool(value[place]) for value in values])
        else:
            columns[name] = pa.array(values)
    into = io.BytesIO()
    parquet.write_table(pa.table(columns), into, compression="zstd")
    return into.getvalue()


def contact_sheets(out: str, written: list[Written]) -> dict[str, bytes]:
    """Return a PNG per split of images from its first to its last, read back from the shards."""
    sheets = {}
    for split in dict.fromkeys(one.shard.split for one in written):
        rows = [(one.shard, row) for one in written if one.shard.split == split for row in one.rows]
        count = min(len(rows), _CONTACTS)
        images = []
        for shard, row in (rows[index * len(rows) // count] for index in range(count)):
            with storage.open_file(storage.join(out, shard.key), buffer_size=row.bytes) as file:
                file.seek(row.offset)
                images.append(decode(file.read(row.bytes)))
        sheets[f"contact-{split}.png"] = _side_by_side(np.stack(images))
    return sheets


def _side_by_side(images: np.ndarray) -> bytes:
    """Return a PNG of images (n, c, h, w), ten in a row, enlarged where they are tiny."""
    count, channels, height, _ = images.shape
    scale, gap = max(1, 64 // height), 4
    tiles = images.repeat(scale, axis=2).repeat(scale, axis=3)
    around = ((0, -count % _COLUMNS), (0, 0), (0, gap), (0, gap))
    tiles = np.pad(tiles, around, constant_values=255)
    _, _, height, width = tiles.shape
    rows = tiles.reshape(-1, _COLUMNS, channels, height, width).transpose(0, 3, 1, 4, 2)
    page = rows.reshape(-1, _COLUMNS * width, channels)
    page = np.pad(page, ((gap, 0), (gap, 0), (0, 0)), constant_values=255)
    into = io.BytesIO()
    Image.fromarray(page[..., 0] if channels == 1 else page).save(into, "PNG", compress_level=1)
    return into.getvalue()
