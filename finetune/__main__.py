"""The command line: ``finetune COMMAND``, with the commands of the table below."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import os
import sys
from collections.abc import Sequence

from models.errors import ConfigError, UserError, did_you_mean

COMMANDS = {
    "train": "a folder of photos becomes a bundle",
    "evaluate": "measure a bundle on labelled photos",
    "predict": "classify photos with a bundle",
    "audit": "what is wrong with a folder of photos",
    "download": "fetch real photos of cats and dogs",
    "synthesize": "draw labelled pictures of cats and dogs, to try things out",
    "merge": "merge a head-only bundle with its pretrained weights",
    "models": "the networks to start from",
    "visualize": "draw a network's filters, and what a photo leaves in its layers",
    "compare": "train several networks on the same photos and compare them",
}
MODULES = {
    "train": "cli.train",
    "evaluate": "evaluation.evaluate",
    "predict": "batch_inference.predict",
    "audit": "data.audit",
    "download": "data.download.downloader",
    "synthesize": "data.synthetic.dataset",
    "merge": "export.merge_head",
    "models": "cli.models",
    "visualize": "introspection.feature_maps",
    "compare": "compare.runner",
}
RENAMED = {"join": "merge", "bakeoff": "compare", "kernels": "visualize", "sample": "synthesize"}
MULTIPROCESS_COMMANDS = ("train", "predict")
# What an operating system refuses and a person can mend; any other OSError is a defect of ours and keeps its traceback.
_FULL = "cannot be written, as the disk is full; make room and run it again."
_DENIED = "may not be read or written by you; mend its permissions, or name another."
_NO_FOLDER = "is, or lies below, something that is not a folder; name another."
OS_ERROR_MESSAGES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: "cannot be written, as files may not grow so large here; raise the limit (ulimit -f) and run it again.",
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.EROFS: "cannot be written, as the disk is read-only; name another.",
    errno.ENOTDIR: _NO_FOLDER,
    errno.EEXIST: _NO_FOLDER,
    errno.ENAMETOOLONG: "is too long a name; name another.",
}


class _Parser(argparse.ArgumentParser):
    """argparse, with the nearest known word for a flag or command that is not known."""

    def error(self, message: str) -> None:  # type: ignore[override]
        words = message.rpartition(":")[2].split()
        known = list(self._option_string_actions)
        near = did_you_mean(words[0].split("=")[0], known) if message.startswith("unrecognized") and words else ""
        raise ConfigError(f"{message[0].upper()}{message[1:]}.{near} `{self.prog} --help` lists what there is.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 done, 1 done with findings, 2 a mistake to mend, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with _world(arguments):
            code = _run(arguments)
        sys.stdout.flush()  # here, where a reader that has gone is noticed in time
        return code
    except UserError as error:
        print(f"finetune: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what reads us has gone, as `head` does
        return 1
    except OSError as error:
        if error.errno not in OS_ERROR_MESSAGES:
            raise
        print(f"finetune: {error.filename or 'A file'} {OS_ERROR_MESSAGES[error.errno]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _world(arguments: Sequence[str]) -> contextlib.AbstractContextManager[None]:
    """The other processes, where torchrun started several; those of ``predict`` do not need to know of each other."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or arguments[:1] == ["predict"]:
        return contextlib.nullcontext()
    from finetune.compute import distributed

    return distributed.session()


def _run(arguments: list[str]) -> int:
    parser = _Parser(
        prog="finetune", description="Transfer learning for image classifiers: from photos to a bundle that serves."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for name, help in COMMANDS.items():
        commands.add_parser(name, help=help, allow_abbrev=False, description=f"{help[0].upper()}{help[1:]}.")
    if not arguments:
        parser.print_help()
        return 2
    name = arguments[0]
    if name in RENAMED:
        raise ConfigError(f"`finetune {name}` is now `finetune {RENAMED[name]}`.")
    if name not in COMMANDS and not name.startswith("-"):
        raise ConfigError(f"There is no command {name!r}.{did_you_mean(name, COMMANDS)} `finetune --help` lists them.")
    if name not in MULTIPROCESS_COMMANDS and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"`finetune {name}` runs in one process; torchrun is for {' and '.join(MULTIPROCESS_COMMANDS)}.")
    if name in COMMANDS:  # only the command that is called is imported: torch takes seconds
        module = importlib.import_module(f"finetune.{MODULES[name]}")
        module.add_arguments(commands.choices[name])
        return int(module.run(commands.choices[name].parse_args(arguments[1:])))
    parser.parse_args(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
