"""The files of a registered model: an exact list of names, each with its sha256.

A pickle runs code when it is loaded, so no file outside ``FILES`` is accepted, and each file must
have the checksum that was registered.
"""

import zipfile
from pathlib import Path, PurePosixPath

from ivegan.errors import UserError
from ivegan.storage.digest import sha256_hex

WEIGHTS, CONFIG = "weights.safetensors", "config.json"
CARD, GRAPH = "model_card.md", "data/model.pt2"
SUMS = "SHA256SUMS"
"""Name of the file of checksums, as ``sha256sum --check`` reads it."""
FILES = frozenset(
    {WEIGHTS, CONFIG, CARD, GRAPH, "MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt"}
    | {"input_example.json", "serving_input_example.json"}
)
"""All that a model's folder holds beside ``SUMS``."""
_ADDED_BY_DOWNLOAD = "registered_model_meta"  # MLflow's own note


def write_sums(folder: Path) -> str:
    """Write the checksums of a model's files and return the sha256 of their list.

    Raises:
        UserError: MLflow wrote other files than the expected ones.
    """
    sums = _sums(folder)
    if difference := sums.keys() ^ FILES:
        raise UserError(
            f"MLflow writes other files than expected ({', '.join(sorted(difference))}): install "
            "the pinned versions of constraints.txt."
        )
    (folder / SUMS).write_text("".join(f"{sums[name]}  {name}\n" for name in sorted(FILES)))
    return sha256_hex((folder / SUMS).read_bytes())


def check_sums(folder: Path, expected: str) -> None:
    """Check that a folder holds exactly the files that were registered, before any is loaded.

    What ``write_sums`` returned, the registry keeps apart from the files.

    Raises:
        UserError: names the files that are missing, changed or not expected.
    """
    sums = _sums(folder)
    if sums.pop(SUMS, None) != expected:
        raise UserError(
            f"{SUMS} in {folder} is missing or not the one that was registered ({expected[:12]}…): "
            "do not load these files, and find out where they were changed."
        )
    lines = (folder / SUMS).read_text().splitlines()
    registered = dict(line.split("  ", 1)[::-1] for line in lines)
    faults = [f"{name} is missing" for name in sorted(FILES - sums.keys())]
    faults += [f"{name} is not expected" for name in sorted(sums.keys() - FILES)]
    faults += [
        f"{name} was changed"
        for name in sorted(sums.keys() & FILES)
        if sums[name] != registered.get(name)
    ]
    if faults:
        raise UserError(
            f"The model in {folder} is not as it was registered: {', '.join(faults)}. Do not load "
            "it, and find out where it was changed."
        )


def empty_members(archive: Path, folder: str) -> None:
    """Replace the content of all members of a zip archive that lie in a folder by nothing."""
    rewritten = archive.with_suffix(".rewritten")
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(rewritten, "w") as new:
        for member in old.infolist():
            inside = folder in PurePosixPath(member.filename).parts[:-1]
            new.writestr(member, b"" if inside else old.read(member))
    rewritten.replace(archive)


def _sums(folder: Path) -> dict[str, str]:
    """Return the sha256 of all files of a folder but MLflow's own note."""
    paths = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if not p.is_dir()}
    return {n: sha256_hex(p.read_bytes()) for n, p in paths.items() if n != _ADDED_BY_DOWNLOAD}
