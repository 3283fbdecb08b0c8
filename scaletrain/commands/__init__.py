"""The commands of `scaletrain`: each a file that ends in its `Command`.

Another command is such a file and a row in `COMMANDS`. Nothing imports jax before a
command's `execute`, so that help and refusals are immediate.

    line        the command line to a command, its options and its settings
      train ...   one file for each command
        options   options that several share
        settings  from an experiment or a workdir
        process   the other processes of the run, and the folder of executables
        command   the parts of a command
"""

from scaletrain.commands import (
    bench,
    config,
    evaluate,
    export,
    generate,
    import_,
    plan,
    supervise,
    train,
)
from scaletrain.commands.command import Command

COMMANDS: dict[str, Command] = {
    "train": train.COMMAND,
    "supervise": supervise.COMMAND,
    "eval": evaluate.COMMAND,
    "generate": generate.COMMAND,
    "plan": plan.COMMAND,
    "bench": bench.COMMAND,
    "import": import_.COMMAND,
    "export": export.COMMAND,
    "config": config.COMMAND,
}
