"""Checkpoints: parameters, optimizer state, step, key, data identity and settings.

One directory a step, written in the background under a temporary name and renamed when
complete, with a manifest of its files; what has no final name does not exist. Arrays
are stored under their paths, so a checkpoint does not depend on the classes that held
them, and are restored straight onto whatever mesh there is now.

    warm_start    weights of other workdirs: `init_from`, `eval`, `generate`, `export`
    store         the checkpoints of a run: saved, verified, set aside, removed
      writer      a step on its way to the disk: in all processes or in none
      retention   which steps stay
      reader      steps as they are on disk, compared with the settings and restored
        manifest  the files of a step with their checksums
          ocdbt   which parameter lies where in a step's files
"""

from scaletrain.checkpoint.reader import Reader, flat, reading
from scaletrain.checkpoint.store import Store

__all__ = ["Reader", "Store", "flat", "reading"]
