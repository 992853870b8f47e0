from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from finetune.data.path_list import CHUNK_BYTES, read_path_list

PATHS = [Path("/photos/one.jpg"), Path("/photos/zwei Hündchen.jpg"), Path("/photos/犬.png")]
LINES = "".join(f"{path}\n" for path in PATHS)


@pytest.mark.parametrize(
    "data",
    [
        LINES.encode(),
        LINES.encode().rstrip(),
        b"\n\n" + LINES.replace("\n", "\r\n\r\n").encode(),
        b"\xef\xbb\xbf" + LINES.encode(),
        LINES.replace("\n", "\0").encode(),
        LINES.replace("\n", "\0").encode() + b"\n",
        LINES.replace("\n", "\r\n").encode("utf-16"),
        LINES.encode("utf-16-le"),
        b"\xfe\xff" + LINES.encode("utf-16-be"),
        LINES.encode("utf-16-be"),
    ],
    ids=["lines", "no last line end", "crlf", "bom", "nul", "nul and line end", "powershell", "le", "be bom", "be"],
)
def test_lists_of_any_program_are_read(data: bytes) -> None:
    assert list(read_path_list(io.BytesIO(data))) == PATHS


@pytest.mark.parametrize("separator", [b"\n", b"\0"])
def test_names_that_are_not_utf8_are_read(separator: bytes) -> None:
    (path,) = read_path_list(io.BytesIO(b"/photos/caf\xe9.jpg" + separator))
    assert os.fsencode(path) == b"/photos/caf\xe9.jpg"


def test_a_name_may_contain_a_line_end_in_a_list_with_nul() -> None:
    assert list(read_path_list(io.BytesIO(b"a\nb.jpg\0c.jpg\0"))) == [Path("a\nb.jpg"), Path("c.jpg")]


@pytest.mark.parametrize(("encoding", "separator"), [("utf-8", "\n"), ("utf-8", "\0"), ("utf-16", "\n")])
def test_long_lists_are_read_in_chunks(encoding: str, separator: str) -> None:
    paths = [Path(f"/photos/犬 {number}.jpg") for number in range(CHUNK_BYTES // 8)]
    data = separator.join(map(str, paths)).encode(encoding)
    assert len(data) > 2 * CHUNK_BYTES
    assert list(read_path_list(io.BytesIO(data))) == paths


def test_an_empty_list_has_no_paths() -> None:
    assert list(read_path_list(io.BytesIO(b""))) == []
    assert list(read_path_list(io.BytesIO(b"\xef\xbb\xbf\n"))) == []
