"""The version of the code that this process runs."""

import hashlib
import pathlib


def code_version() -> str:
    """Returns a digest of the source files of this package, 16 hexadecimal digits.

    A commit would not do: an installed package has none, an edited one is not it.
    """
    root = pathlib.Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
