"""Checkpoints: parameters, optimizer state, step, key, data identity and settings.

Each step has a folder. It is written in the background under a temporary name, with a
manifest of its files, and renamed when it is complete; a folder without a final name
does not count as a checkpoint. Arrays are stored under their paths, so a checkpoint
does not depend on Python classes, and they are restored directly onto the present mesh.

    warm_start    weights of other workdirs: `init_from`, `eval`, `generate`, `export`
    store         the checkpoints of a run: saved, verified, set aside, removed
      writer      a step while it is written: in all processes or in none
      retention   the steps that stay
      reader      steps on disk, compared with the settings and restored
        manifest  the files of a step with their checksums
          ocdbt   the byte ranges of each parameter in a step's files
"""

from scaletrain.checkpoint.reader import Reader, flat, reading
from scaletrain.checkpoint.store import Store

__all__ = ["Reader", "Store", "flat", "reading"]
