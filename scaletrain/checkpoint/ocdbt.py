"""Which leaf lies where in the files of a checkpoint, by the index that Orbax writes.

OCDBT is TensorStore's format of one tree of keys over many files. Values too small to
have a place of their own lie in the nodes of the tree and are not told of here.
"""

import dataclasses
import pathlib
import urllib.parse

import tensorstore


@dataclasses.dataclass(frozen=True)
class Place:
    """The bytes from `start` to before `end` of a file, which a leaf has."""

    leaf: str
    file: str  # as seen from the folder of the index
    start: int
    end: int


def places(folder: pathlib.Path) -> list[Place]:
    """Returns where the leaves of one item lie, nothing if its index is damaged."""
    try:
        base = tensorstore.KvStore.open(f"file://{folder}/").result()
        root = tensorstore.ocdbt.dump(base).result()["versions"][-1]["root"]
        found, nodes = [], [root["location"]]
        while nodes:
            node = tensorstore.ocdbt.dump(base, nodes.pop()).result()
            for entry in node["entries"]:
                if "location" in entry:
                    nodes.append(entry["location"])
                elif "indirect_value" in entry:
                    # Keys are such as blocks/mlp/up/weight/0.0, a chunk at the end.
                    leaf = entry["key"].decode().rpartition("/")[0]
                    found.append(_place(leaf, entry["indirect_value"]))
    except (OSError, ValueError, KeyError, IndexError):
        return []
    return found


def _place(leaf: str, location: str) -> Place:
    """Reads value:FOLDER:FILE:OFFSET:LENGTH."""
    _, folder, file, offset, length = location.split(":")
    path = urllib.parse.unquote(folder) + urllib.parse.unquote(file)
    return Place(leaf, path, int(offset), int(offset) + int(length))
