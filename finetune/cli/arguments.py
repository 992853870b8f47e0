"""The folder that a command is about: an argument without a flag, or the flag that other commands have for it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DATA = ("data_dir", "--data-dir", "DATA")
BUNDLE = ("bundle", "--bundle", "BUNDLE")


def add_folder(parser: argparse.ArgumentParser, names: tuple[str, str, str], help: str, required: bool = False) -> None:
    """Let a command take its folder as an argument without a flag, or by the flag.

    Args:
        parser: The command's parser.
        names: ``DATA`` or ``BUNDLE``: the destination, the flag and the name in the help.
        help: Description of the folder.
        required: Reject a command line without the folder.
    """
    dest, flag, metavar = names
    options: dict[str, Any] = {"type": Path, "metavar": metavar}
    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument(flag, dest=dest, help=help, **options)
    group.add_argument(dest, nargs="?", action=_StoreIfGiven, help=f"same as {flag}", **options)


class _StoreIfGiven(argparse.Action):
    """Store the value of an optional argument, unless it is absent: its default would replace the value of the flag."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        if values is not None:
            setattr(namespace, self.dest, values)
