"""Checkpoints: folders that hold all an exact continuation needs, whole or not there.

    weights.safetensors   E, G, D, D', the trunk, and the averages of E and G where there are any
    training.safetensors  the moments and steps of both optimizers
    config.json           the configuration, each file's sha256, and where the weights came from;
                          written last

They lie beside each other as ``STORAGE/RUN_ID/checkpoint-0000012800``, numbered by images seen. A
folder without ``config.json`` is an unfinished upload and counts as absent.
"""

from ivegan.checkpoint.content import load_networks, restore, save
from ivegan.checkpoint.folder import (
    CONFIG,
    PREFIX,
    checkpoints,
    clear_unfinished,
    find,
    keep,
    latest,
    prune,
    read_metadata,
    uri_of,
)

__all__ = [
    "CONFIG",
    "PREFIX",
    "checkpoints",
    "clear_unfinished",
    "find",
    "keep",
    "latest",
    "load_networks",
    "prune",
    "read_metadata",
    "restore",
    "save",
    "uri_of",
]
