"""Paths as a user writes them: with `~`, and local where nothing else can be used."""

import os
import re
from collections.abc import Iterator

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def expanded(path: str) -> str:
    """Returns `path` with the home folder in the place of a leading `~` or `~NAME`.

    It stays as it is where no such home is known, of which `problems` tells.
    """
    return os.path.expanduser(path)


def is_url(path: str) -> bool:
    """Returns whether `path` begins with a scheme such as `gs://` or `file://`."""
    return bool(_URL.match(path))


def problems(setting: str, path: str, *, local: bool) -> Iterator[str]:
    """Yields why an expanded path cannot be used, as `setting=value; why; what to do`.

    Args:
      local: a URL cannot be read or written here.
    """
    if path.startswith("~"):
        yield f"{setting}={path}; no such home folder is known; give the full path."
    if local and (scheme := _URL.match(path)):
        yield (
            f"{setting}={path}; a URL where only local paths can be used; give the "
            f"path of a local or mounted file system, without {scheme[0]}."
        )
