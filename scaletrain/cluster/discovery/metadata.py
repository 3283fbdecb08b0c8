"""Attributes that Google's cloud gives a machine, from its metadata server."""

import socket
import time
import urllib.error
import urllib.request

from scaletrain.errors import ConfigError

_HOST = "metadata.google.internal"
_TIMEOUT_S = 5.0  # for one answer
_TRIES = 6
_RETRY_S = 0.5


def attribute(key: str) -> str | None:
    """Returns an attribute of this machine, None if it has none of that name.

    Raises:
      ConfigError: there is a metadata server and it does not answer.
    """
    try:
        socket.getaddrinfo(_HOST, 80)
    except OSError:
        return None  # another cloud
    request = urllib.request.Request(
        f"http://{_HOST}/computeMetadata/v1/instance/attributes/{key}",
        headers={"Metadata-Flavor": "Google"},
    )
    # A proxy that the environment names cannot reach this machine's own server.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    error = ""
    for _ in range(_TRIES):
        try:
            with direct.open(request, timeout=_TIMEOUT_S) as answer:
                return answer.read().decode("utf-8")
        except urllib.error.HTTPError as err:
            if err.code == 404:
                return None
            error = str(err)
        except OSError as err:
            error = str(err)
        time.sleep(_RETRY_S)
    raise ConfigError(
        [
            f"TPU metadata: {_HOST} does not answer ({error}); start again, or give "
            "--coordinator, --num_processes and --process_id."
        ]
    )
