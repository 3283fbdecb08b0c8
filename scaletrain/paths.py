"""Paths in settings: expansion of `~`, and errors for URLs."""

import os
import re
from collections.abc import Iterator

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def expanded(path: str) -> str:
    """Returns `path` with the home folder in place of a leading `~` or `~NAME`.

    An unknown `~NAME` stays, and `problems` reports it.
    """
    return os.path.expanduser(path)


def is_url(path: str) -> bool:
    """Returns whether `path` begins with a scheme such as `gs://` or `file://`."""
    return bool(_URL.match(path))


def problems(setting: str, path: str, *, local: bool) -> Iterator[str]:
    """Yields the errors of an expanded path, as `setting=value; why; what to do`.

    Args:
      setting: its name.
      path: its value, from `expanded`.
      local: whether the setting takes no URL.
    """
    if path.startswith("~"):
        yield f"{setting}={path}; no such home folder is known; give the full path."
    if local and (scheme := _URL.match(path)):
        yield (
            f"{setting}={path}; a URL where only local paths can be used; give the "
            f"path of a local or mounted file system, without {scheme[0]}."
        )
