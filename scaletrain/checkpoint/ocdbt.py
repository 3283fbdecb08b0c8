"""The byte ranges of leaves in the files of a checkpoint, from the index Orbax writes.

OCDBT is TensorStore's format: one B-tree of keys over many files. Small values are
stored inside the nodes of the tree; they have no byte range and are not listed.
Source: https://google.github.io/tensorstore/kvstore/ocdbt/index.html
"""

import dataclasses
import pathlib
import urllib.parse

import tensorstore


@dataclasses.dataclass(frozen=True)
class Place:
    """The bytes `start` to `end` (exclusive) of a file that belong to a leaf."""

    leaf: str
    file: str  # relative to the folder of the index
    start: int
    end: int


def places(folder: pathlib.Path) -> list[Place]:
    """Returns the byte ranges of one item's leaves, none if its index is damaged."""
    try:
        base = tensorstore.KvStore.open(f"file://{folder}/").result()
        root = tensorstore.ocdbt.dump(base).result()["versions"][-1]["root"]
        ranges, nodes = [], [root["location"]]
        while nodes:
            node = tensorstore.ocdbt.dump(base, nodes.pop()).result()
            for entry in node["entries"]:
                if "location" in entry:
                    nodes.append(entry["location"])
                elif "indirect_value" in entry:
                    # A key is a leaf and a chunk, as in blocks/mlp/up/weight/0.0.
                    leaf = entry["key"].decode().rpartition("/")[0]
                    ranges.append(_place(leaf, entry["indirect_value"]))
    except (OSError, ValueError, KeyError, IndexError):
        return []
    return ranges


def _place(leaf: str, location: str) -> Place:
    """Returns the byte range that value:FOLDER:FILE:OFFSET:LENGTH names."""
    _, folder, file, offset, length = location.split(":")
    path = urllib.parse.unquote(folder) + urllib.parse.unquote(file)
    return Place(leaf, path, int(offset), int(offset) + int(length))
