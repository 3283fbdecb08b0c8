"""The processes that a person numbers: --coordinator, --num_processes, --process_id."""

import argparse

from scaletrain.cluster.discovery.membership import Membership
from scaletrain.errors import ConfigError


def detect(args: argparse.Namespace) -> Membership | None:
    """Returns the membership that the flags give, None without a number among them.

    A coordinator alone is no membership: it completes the one that a launcher gives.

    Raises:
      ConfigError: a number without the other flags.
    """
    flags = (args.num_processes, args.process_id, args.coordinator)
    if flags[:2] == (None, None):
        return None
    if None in flags:
        raise incomplete()
    return Membership("flags", *flags)


def incomplete() -> ConfigError:
    """Returns the error for flags of which some are missing."""
    return ConfigError(
        [
            "--coordinator, --num_processes, --process_id; only some are given; "
            "give all three to every process, or none."
        ]
    )
