"""Command-line interface: ``finetune COMMAND [OPTIONS]``."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import importlib.metadata
import io
import os
import sys
from collections.abc import Sequence

from finetune.io.terminal import escape_controls
from models.errors import ConfigError, UserError, did_you_mean

COMMANDS = {
    "train": "train a classifier on a folder of photos and export it as a bundle",
    "evaluate": "evaluate a bundle on labeled photos",
    "predict": "classify photos with a bundle",
    "audit": "check a folder of photos for damaged files, duplicates and leakage",
    "download": "download photos of cats and dogs",
    "synthesize": "draw a synthetic dataset of cats and dogs for trying things out",
    "threshold": "show or change when a bundle gives no label: the OOD limit and the thresholds of the classes",
    "quantize": "add a graph in int8 to a bundle that was exported without one",
    "merge": "add the pretrained weights to a bundle without the full weights",
    "models": "list the available networks",
    "visualize": "draw a network's filters and the feature maps of a photo",
    "tune": "choose a network and its head by cross-validation of cached features",
    "compare": "train several networks on the same photos and compare them",
}
RENAMED = {"join": "merge", "bakeoff": "compare", "kernels": "visualize", "sample": "synthesize"}
MULTIPROCESS_COMMANDS = ("train", "predict")
# Operating system errors that a user can fix. Any other OSError is a bug and keeps its traceback.
_DISK_FULL = "the disk is full. Free some space and run the command again."
_PERMISSION_DENIED = "permission denied. Fix the permissions or choose another path."
_NOT_A_FOLDER = "the path, or a parent of it, is not a folder. Choose another path."
OS_ERROR_MESSAGES = {
    errno.ENOSPC: _DISK_FULL,
    errno.EDQUOT: _DISK_FULL,
    errno.EFBIG: "the file size limit is exceeded. Raise it (ulimit -f) and run the command again.",
    errno.EACCES: _PERMISSION_DENIED,
    errno.EPERM: _PERMISSION_DENIED,
    errno.EROFS: "the file system is read-only. Choose another path.",
    errno.ENOTDIR: _NOT_A_FOLDER,
    errno.EEXIST: _NOT_A_FOLDER,
    errno.ENAMETOOLONG: "the name is too long. Choose another path.",
}


MISSING_PACKAGE = "Install the packages for training, in a checkout with: pip install -e '.[finetune]'"


class _Parser(argparse.ArgumentParser):
    """An argument parser that raises ConfigError and suggests the closest flag for an unknown one."""

    def error(self, message: str) -> None:  # type: ignore[override]
        words = message.rpartition(":")[2].split()
        known = list(self._option_string_actions)
        hint = did_you_mean(words[0].split("=")[0], known) if message.startswith("unrecognized") and words else ""
        raise ConfigError(f"{message[0].upper()}{message[1:]}.{hint} See `{self.prog} --help`.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0 success, 1 success with findings (or standard output was closed), 2 usage or input error,
        130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    _configure_streams()
    try:
        with _process_group(arguments):
            code = _run(arguments)
        sys.stdout.flush()  # raises BrokenPipeError here rather than at interpreter exit
        return code
    except UserError as error:
        print("\n".join(map(escape_controls, f"finetune: {error}".split("\n"))), file=sys.stderr)  # bad rows have a line each
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("finetune", "models"):
            raise
        print(f"finetune: The package {error.name} is not installed. {MISSING_PACKAGE}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has exited, as `head` does
        return 1
    except OSError as error:
        if error.errno not in OS_ERROR_MESSAGES:
            raise
        prefix = f"{error.filename}: " if error.filename else ""
        print(f"finetune: {escape_controls(prefix)}{OS_ERROR_MESSAGES[error.errno]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _configure_streams() -> None:
    """Print each line at once, also into a pipe, and escape what the encoding cannot represent, such as odd file names."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not in tests that capture the output
            stream.reconfigure(line_buffering=True, errors="backslashreplace")


def _version() -> str:
    try:
        return importlib.metadata.version("dogs-vs-cats")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _process_group(arguments: Sequence[str]) -> contextlib.AbstractContextManager[None]:
    """Join torchrun's process group if there are several processes. Those of ``predict`` do not communicate."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or arguments[:1] == ["predict"]:
        return contextlib.nullcontext()
    from finetune.compute import distributed

    return distributed.session()


def _run(arguments: list[str]) -> int:
    parser = _Parser(
        prog="finetune", description="Transfer learning for image classifiers: from a folder of photos to a servable bundle."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for name, help in COMMANDS.items():
        commands.add_parser(name, help=help, allow_abbrev=False, description=f"{help[0].upper()}{help[1:]}.")
    for command in (parser, *commands.choices.values()):
        command.add_argument("--version", action="version", version=f"finetune {_version()}")
    if not arguments:
        parser.print_help()
        return 2
    name = arguments[0]
    if name in RENAMED:
        raise ConfigError(f"`finetune {name}` is now `finetune {RENAMED[name]}`.")
    if name not in COMMANDS and not name.startswith("-"):
        raise ConfigError(f"Unknown command {name!r}.{did_you_mean(name, COMMANDS)} See `finetune --help`.")
    if name not in MULTIPROCESS_COMMANDS and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"`finetune {name}` runs in one process. Use torchrun only with {' and '.join(MULTIPROCESS_COMMANDS)}."
        )
    if name in COMMANDS:  # import only the requested command, as importing torch takes seconds
        module = importlib.import_module(f"finetune.cli.{name}")
        module.add_arguments(commands.choices[name])
        return int(module.run(commands.choices[name].parse_args(arguments[1:])))
    parser.parse_args(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
