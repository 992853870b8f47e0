"""``finetune download``: resuming, checksums, safe unpacking and atomic output."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import http.server
import io
import json
import re
import stat
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.cli import download as command
from finetune.data.download import downloader as module
from finetune.data.download.downloader import SOURCES, download
from models.errors import DataError

PHOTO = b"\xff\xd8 not much of a photo \xff\xd9"


def zip_of(members: dict[str, bytes]) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return memory.getvalue()


def filtered_members(count: int = 3) -> dict[str, bytes]:
    folders = [f"cats_and_dogs_filtered/{s}/{c}" for s in ("train", "validation") for c in ("cats", "dogs")]
    photos = {f"{folder}/{folder[-4:-1]}.{i}.jpg": PHOTO + bytes([i]) for folder in folders for i in range(count)}
    return {**photos, "cats_and_dogs_filtered/vectorize.py": b"print()", "__MACOSX/cats/._cat.0.jpg": b""}


def microsoft_members(count: int = 10) -> dict[str, bytes]:
    photos = {f"PetImages/{c}/{i}.jpg": PHOTO + c.encode() for c in ("Cat", "Dog") for i in range(count)}
    return {**photos, "PetImages/Cat/Thumbs.db": b"x", "readme[1].txt": b"x", "MSR-LA - 3467.docx": b"x"}


def kaggle_zip(count: int = 5) -> bytes:
    train = zip_of({"train/": b""} | {f"train/{c}.{i}.jpg": PHOTO for c in ("cat", "dog") for i in range(count)})
    return zip_of({"train.zip": train, "test1.zip": zip_of({"test1/1.jpg": PHOTO}), "sampleSubmission.csv": b"id"})


FILTERED = zip_of(filtered_members())


class Server(http.server.ThreadingHTTPServer):
    """Serves ``body`` at every path, with configurable failures, and records the requests."""

    body = FILTERED
    ranges = True
    etag: str | None = '"one"'
    drops: list[int]  # bytes that each of the next responses sends before the connection closes
    statuses: list[int]  # error statuses of the next responses
    requested_ranges: list[str | None]  # the Range header of each request
    sent: list[int]  # bytes sent in each response

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/pets.zip"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, requested_range = self.server, self.headers.get("Range")
        server.requested_ranges.append(requested_range)
        body, start = server.body, 0
        fresh = self.headers.get("If-Range") in (None, server.etag)
        if server.statuses:
            self.send_error(server.statuses.pop(0))
            return
        if requested_range and server.ranges and fresh:
            start = int(re.fullmatch(r"bytes=(\d+)-", requested_range)[1])  # type: ignore[index]
            if start >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body) - start))
        if server.etag:
            self.send_header("ETag", server.etag)
        self.end_headers()
        chunk = body[start:]
        if server.drops:
            chunk = chunk[: server.drops.pop(0)]
        server.sent.append(len(chunk))
        self.wfile.write(chunk)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(("127.0.0.1", 0), Handler) as running:
        running.drops, running.statuses, running.requested_ranges, running.sent = [], [], [], []
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "pets"


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def source_json(out: Path) -> dict[str, object]:
    record: dict[str, object] = json.loads((out / "SOURCE.json").read_text(encoding="utf-8"))
    return record


def archive_file(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "manual.zip"
    path.write_bytes(content)
    return path


def never_wait(seconds: float) -> None:
    raise AssertionError(f"waited {seconds} s instead of failing at the first attempt")


def no_wait(seconds: float) -> None:
    pass


# Layouts


def test_filtered_keeps_its_split_and_skips_other_files(server: Server, out: Path) -> None:
    summary = download("filtered", out, url=server.url, sleep=never_wait)
    assert summary.image_counts == {"train": {"cats": 3, "dogs": 3}, "valid": {"cats": 3, "dogs": 3}}
    photos = [f"{s}/{c}s/{c}.{i}.jpg" for s in ("train", "valid") for c in ("cat", "dog") for i in range(3)]
    assert names(out) == ["SOURCE.json", *photos]
    assert (out / "valid/dogs/dog.2.jpg").read_bytes() == PHOTO + b"\x02"
    assert [path.name for path in out.parent.iterdir()] == ["pets"]


def test_source_json_records_the_origin(server: Server, out: Path) -> None:
    download("filtered", out, url=server.url)
    assert source_json(out) == {
        "source": "filtered",
        "url": server.url,
        "competition": None,
        "archive": None,
        "sha256": hashlib.sha256(FILTERED).hexdigest(),
        "sha256_verified": False,
        "split": None,
        "photos": {"train": {"cats": 3, "dogs": 3}, "valid": {"cats": 3, "dogs": 3}},
    }


def test_microsoft_is_split_by_class_with_a_seed(tmp_path: Path) -> None:
    content = zip_of(microsoft_members())
    archive, sha256 = archive_file(tmp_path, content), hashlib.sha256(content).hexdigest()
    one = download("microsoft", tmp_path / "one", archive=archive, sha256=sha256, valid_fraction=0.3)
    assert one.image_counts == {"train": {"cats": 7, "dogs": 7}, "valid": {"cats": 3, "dogs": 3}}
    assert one.verified
    for label, was in (("cats", b"Cat"), ("dogs", b"Dog")):
        both = [path.name for split in ("train", "valid") for path in (tmp_path / "one" / split / label).iterdir()]
        assert sorted(both) == sorted(f"{i}.jpg" for i in range(10))
        assert all(path.read_bytes() == PHOTO + was for path in (tmp_path / "one").rglob(f"{label}/*.jpg"))
    download("microsoft", tmp_path / "same", archive=archive, sha256=sha256.upper(), valid_fraction=0.3)
    download("microsoft", tmp_path / "other", archive=archive, sha256=sha256, valid_fraction=0.3, seed=1)
    assert names(tmp_path / "same") == names(tmp_path / "one")
    assert names(tmp_path / "other") != names(tmp_path / "one")
    assert source_json(tmp_path / "other")["split"] == {"valid_fraction": 0.3, "seed": 1}
    assert archive.exists()


def test_the_published_sha256_is_checked_even_for_a_mirror(server: Server, out: Path) -> None:
    server.body = zip_of(microsoft_members())
    with pytest.raises(DataError, match=SOURCES["microsoft"].sha256):
        download("microsoft", out, url=server.url)
    assert names(out.parent) == []


# Downloads that go wrong


def test_a_dropped_connection_resumes_with_the_missing_bytes(server: Server, out: Path) -> None:
    server.drops = [500, 300]
    waits: list[float] = []
    download("filtered", out, url=server.url, sleep=waits.append)
    assert server.requested_ranges == [None, "bytes=500-", "bytes=800-"]
    assert sum(server.sent) == len(FILTERED)
    assert waits == [1.0, 1.0]
    assert source_json(out)["sha256"] == hashlib.sha256(FILTERED).hexdigest()


def test_another_run_resumes_a_failed_one(server: Server, out: Path) -> None:
    server.drops = [700, 0, 0, 0, 0]
    waits: list[float] = []
    with pytest.raises(DataError, match=r"closed after 700 of .* bytes.*Re-run the same command to resume.*--archive FILE"):
        download("filtered", out, url=server.url, sleep=waits.append)
    assert waits == [1.0, 2.0, 4.0, 8.0]
    assert not out.exists()
    server.requested_ranges.clear()
    download("filtered", out, url=server.url)
    assert server.requested_ranges == ["bytes=700-"]
    assert len(names(out)) == 13


def test_without_range_support_the_download_restarts(server: Server, out: Path) -> None:
    server.ranges, server.drops = False, [500]
    download("filtered", out, url=server.url, sleep=no_wait)
    assert server.requested_ranges == [None, "bytes=500-"]
    assert server.sent == [500, len(FILTERED)]


def test_the_download_fails_after_max_attempts_without_progress(server: Server, out: Path) -> None:
    server.ranges, server.drops = False, [500] * 50
    with pytest.raises(DataError, match="closed after 500"):
        download("filtered", out, url=server.url, sleep=no_wait)
    assert len(server.requested_ranges) == 5


def test_a_changed_file_restarts_the_download(server: Server, out: Path, tmp_path: Path) -> None:
    server.drops = [500, 0, 0, 0, 0]
    with pytest.raises(DataError):
        download("filtered", out, url=server.url, cache_dir=tmp_path / "cache", sleep=no_wait)
    server.body, server.etag = zip_of(filtered_members(4)), '"two"'
    summary = download("filtered", out, url=server.url, cache_dir=tmp_path / "cache", sleep=never_wait)
    assert summary.sha256 == hashlib.sha256(server.body).hexdigest()
    assert summary.image_counts["train"]["cats"] == 4


def test_without_an_etag_a_changed_length_restarts_the_download(server: Server, out: Path) -> None:
    server.etag, server.drops = None, [500, 0, 0, 0, 0]
    with pytest.raises(DataError):
        download("filtered", out, url=server.url, sleep=no_wait)
    server.body = zip_of(filtered_members(4))
    assert download("filtered", out, url=server.url, sleep=no_wait).image_counts["train"]["cats"] == 4


def test_a_complete_partial_file_is_used(server: Server, out: Path) -> None:
    server.drops = [len(FILTERED) - 1, 0, 0, 0, 0]
    with pytest.raises(DataError):
        download("filtered", out, url=server.url, sleep=no_wait)
    (part,) = out.parent.rglob("*.part")
    part.write_bytes(FILTERED)
    server.requested_ranges.clear()
    download("filtered", out, url=server.url, sleep=never_wait)
    assert server.requested_ranges == [f"bytes={len(FILTERED)}-"]


def test_an_oversized_partial_file_is_discarded(server: Server, out: Path) -> None:
    server.drops = [500, 0, 0, 0, 0]
    with pytest.raises(DataError):
        download("filtered", out, url=server.url, sleep=no_wait)
    (part,) = out.parent.rglob("*.part")
    part.write_bytes(bytes(len(FILTERED) + 10))
    server.requested_ranges.clear()
    download("filtered", out, url=server.url, sleep=no_wait)
    assert server.requested_ranges == [f"bytes={len(FILTERED) + 10}-", None]


def test_a_busy_server_is_retried(server: Server, out: Path) -> None:
    server.statuses = [503, 429]
    download("filtered", out, url=server.url, sleep=no_wait)
    assert len(server.requested_ranges) == 3


def test_404_fails_without_retries(server: Server, out: Path) -> None:
    server.statuses = [404]
    with pytest.raises(DataError, match=r"404 Not Found for http://.*--archive FILE"):
        download("filtered", out, url=server.url, sleep=never_wait)
    assert list(out.parent.iterdir()) == []


def test_an_unreachable_server_is_explained(server: Server, out: Path) -> None:
    closed = server.url
    server.shutdown()
    server.server_close()
    with pytest.raises(DataError, match=r"Could not download http://.*refused.*in a browser and pass --archive FILE"):
        download("filtered", out, url=closed, sleep=no_wait)


@pytest.mark.parametrize("url", ["pets.zip", "file:///etc/hosts", "https://", "http://[half", "http://a b/", "http://a:x/"])
def test_an_invalid_url_is_rejected(out: Path, url: str) -> None:
    with pytest.raises(DataError, match="Invalid download URL"):
        download("filtered", out, url=url, sleep=never_wait)


def test_an_archive_with_the_wrong_sha256_is_deleted(server: Server, out: Path, tmp_path: Path) -> None:
    expected = hashlib.sha256(FILTERED).hexdigest()
    server.body = b"?" * len(FILTERED)
    with pytest.raises(DataError, match=f"expected {expected}"):
        download("filtered", out, url=server.url, sha256=expected, cache_dir=tmp_path / "cache")
    assert names(tmp_path) == []
    server.body = FILTERED
    assert download("filtered", out, url=server.url, sha256=expected, cache_dir=tmp_path / "cache").verified


def test_cache_dir_keeps_the_archive_for_the_next_download(server: Server, out: Path, tmp_path: Path) -> None:
    download("filtered", out, url=server.url, cache_dir=tmp_path / "cache")
    download("filtered", tmp_path / "again", url=server.url, cache_dir=tmp_path / "cache")
    assert server.requested_ranges == [None]
    assert len(names(tmp_path / "cache")) == 1


def test_an_unwritable_cache_is_explained(server: Server, out: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match="choose another folder with --cache-dir"):
        download("filtered", out, url=server.url, cache_dir=tmp_path / "cache")


# Invalid archives


def with_member(member: zipfile.ZipInfo | str, content: bytes = PHOTO) -> bytes:
    memory = io.BytesIO(FILTERED)
    with zipfile.ZipFile(memory, "a") as archive:
        archive.writestr(member, content)
    return memory.getvalue()


def symlink() -> zipfile.ZipInfo:
    member = zipfile.ZipInfo("cats_and_dogs_filtered/train/cats/link.jpg")
    member.create_system = 3
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    return member


@pytest.mark.parametrize(
    "member",
    [
        "../outside.jpg",
        "cats_and_dogs_filtered/train/cats/../../../../outside.jpg",
        "/tmp/outside.jpg",
        "C:/outside.jpg",
        "cats_and_dogs_filtered\\train\\outside.jpg",
        symlink(),
    ],
    ids=str,
)
def test_a_member_with_an_unsafe_path_is_rejected(tmp_path: Path, out: Path, member: zipfile.ZipInfo | str) -> None:
    name = member if isinstance(member, str) else member.filename
    archive = archive_file(tmp_path, with_member(member, b"/etc/hosts"))
    with pytest.raises(DataError, match=re.escape(f"its member {name!r}")):
        download("filtered", out, archive=archive)
    assert names(tmp_path) == ["manual.zip"]


def test_a_duplicate_member_is_rejected(tmp_path: Path, out: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        content = with_member("cats_and_dogs_filtered/train/cats/cat.0.jpg")
    with pytest.raises(DataError, match="occurs more than once"):
        download("filtered", out, archive=archive_file(tmp_path, content))


@pytest.mark.parametrize("limit", [{"max_bytes": 10_000}, {"max_members": 10}])
def test_an_oversized_archive_is_rejected(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, limit: dict[str, Any]
) -> None:
    monkeypatch.setitem(SOURCES, "filtered", dataclasses.replace(SOURCES["filtered"], **limit))
    memory = io.BytesIO(FILTERED)
    with zipfile.ZipFile(memory, "a", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("cats_and_dogs_filtered/train/cats/cat.9.jpg", bytes(1_000_000))
    assert len(memory.getvalue()) < 10_000
    with pytest.raises(DataError, match="but the limits are"):
        download("filtered", out, archive=archive_file(tmp_path, memory.getvalue()))
    assert not out.exists()


def test_a_member_that_understates_its_size_is_rejected(tmp_path: Path, out: Path) -> None:
    memory = io.BytesIO(FILTERED)
    with zipfile.ZipFile(memory, "a", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("cats_and_dogs_filtered/train/cats/cat.9.jpg", bytes(1_000_000))
    lying = memory.getvalue().replace((1_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    with pytest.raises(DataError, match="not a complete zip archive"):
        download("filtered", out, archive=archive_file(tmp_path, lying))
    assert not out.exists()


@pytest.mark.parametrize("content", [b"<html>Sorry</html>", b"", FILTERED[:-30], FILTERED.replace(PHOTO, PHOTO[::-1], 1)])
def test_an_incomplete_zip_is_rejected(tmp_path: Path, out: Path, content: bytes) -> None:
    with pytest.raises(DataError, match="not a complete zip archive"):
        download("filtered", out, archive=archive_file(tmp_path, content))
    assert names(tmp_path) == ["manual.zip"]


def test_a_web_page_instead_of_the_archive_is_not_kept(server: Server, out: Path, tmp_path: Path) -> None:
    server.body = b"<html>Please log in</html>"
    with pytest.raises(DataError, match="not a complete zip archive"):
        download("filtered", out, url=server.url, cache_dir=tmp_path / "cache")
    assert names(tmp_path) == []


def test_another_layout_is_rejected(tmp_path: Path, out: Path) -> None:
    archive = archive_file(tmp_path, zip_of(microsoft_members()))
    with pytest.raises(DataError, match=r"no photos for train/cats, train/dogs, valid/cats, valid/dogs\."):
        download("filtered", out, archive=archive)
    few = archive_file(tmp_path, zip_of({"PetImages/Cat/1.jpg": PHOTO, "PetImages/Dog/1.jpg": PHOTO}))
    sha256 = hashlib.sha256(few.read_bytes()).hexdigest()
    with pytest.raises(DataError, match=r"no photos for train/cats, train/dogs\."):
        download("microsoft", out, archive=few, sha256=sha256)


# Atomic output


def test_interrupted_unpacking_leaves_only_the_archive(
    server: Server, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "extract", interrupt)
        with pytest.raises(KeyboardInterrupt):
            download("filtered", out, url=server.url)
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".zip"]
    download("filtered", out, url=server.url)
    assert server.requested_ranges == [None]


def test_a_kill_during_unpacking_leaves_no_output_folder(tmp_path: Path, out: Path) -> None:
    archive = archive_file(tmp_path, FILTERED)
    program = (
        "import os, sys; from pathlib import Path; from finetune.data.download import downloader as d; real = d.extract\n"
        "def extract(archive, member, path):\n"
        "    real(archive, member, path)\n"
        "    if member.filename.endswith('1.jpg'): os._exit(9)\n"
        "d.extract = extract; d.download('filtered', Path(sys.argv[1]), archive=Path(sys.argv[2]))"
    )
    root = Path(__file__).resolve().parents[3]
    killed = subprocess.run([sys.executable, "-c", program, str(out), str(archive)], cwd=root, check=False)
    assert killed.returncode == 9
    assert not out.exists()
    assert download("filtered", out, archive=archive).image_counts["train"]["cats"] == 3


def test_a_full_disk_is_explained_and_leaves_nothing(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "extract", full)
    with pytest.raises(DataError, match=r"Could not write to .*No space left on device"):
        download("filtered", out, archive=archive_file(tmp_path, FILTERED))
    assert names(tmp_path) == ["manual.zip"]


def test_a_non_empty_folder_is_rejected_before_the_download(server: Server, out: Path) -> None:
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="not empty"):
        download("filtered", out, url=server.url)
    assert server.requested_ranges == []
    assert names(out) == ["mine.txt"]


# Kaggle's own client


def fake_kaggle(folder: Path, body: str) -> None:
    folder.mkdir()
    script = folder / "kaggle"
    script.write_text(f"#!{sys.executable}\nimport pathlib, sys\nargs = sys.argv[1:]\n{body}\n")
    script.chmod(0o755)


def test_kaggle_unpacks_the_inner_archive_and_splits_it(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ready = archive_file(tmp_path, kaggle_zip())
    fake_kaggle(
        tmp_path / "bin",
        "assert args[:5] == ['competitions', 'download', '-c', 'dogs-vs-cats', '-p'], args\n"
        f"(pathlib.Path(args[5]) / 'dogs-vs-cats.zip').write_bytes(pathlib.Path({str(ready)!r}).read_bytes())\n"
        "print('Downloading dogs-vs-cats.zip')",
    )
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    summary = download("kaggle", out, valid_fraction=0.4)
    assert summary.image_counts == {"train": {"cats": 3, "dogs": 3}, "valid": {"cats": 2, "dogs": 2}}
    assert len(names(out)) == 11
    assert all(re.fullmatch(r"(train|valid)/(cats/cat|dogs/dog)\.\d\.jpg|SOURCE\.json", name) for name in names(out))
    assert source_json(out)["competition"] == "dogs-vs-cats"
    assert "Downloading dogs-vs-cats.zip" in capsys.readouterr().err


def test_the_inner_archive_alone_is_accepted(tmp_path: Path, out: Path) -> None:
    train = zip_of({f"train/{c}.{i}.jpg": PHOTO for c in ("cat", "dog") for i in range(5)})
    assert download("kaggle", out, archive=archive_file(tmp_path, train)).image_counts["valid"] == {"cats": 1, "dogs": 1}


def test_a_missing_kaggle_command_is_explained(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"pip install kaggle.*Accept the rules.*kaggle\.json in ~/\.kaggle"):
        download("kaggle", out)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("print('Warning\\r'); sys.exit('403 - Forbidden')", r"failed \(403 - Forbidden\)"),
        ("sys.exit(7)", r"failed \(exit status 7\)"),
        ("pass", r"did not create dogs-vs-cats\.zip"),
    ],
)
def test_a_failing_kaggle_command_is_explained(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, body: str, why: str
) -> None:
    fake_kaggle(tmp_path / "bin", body)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(DataError, match=why + ".*Accept the rules"):
        download("kaggle", out)
    assert not out.exists()


# The command


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


def test_the_command_prints_a_summary_and_the_next_command(
    server: Server, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.run(parse("filtered", str(out), "--url", server.url)) == 0
    printed = capsys.readouterr().out
    assert f"Unpacked 12 photos from {server.url} into {out}." in printed
    assert "train: 3 cats, 3 dogs" in printed
    assert f"sha256 {hashlib.sha256(FILTERED).hexdigest()} (recorded in SOURCE.json" in printed
    assert "the published archive has 3,000 photos" in printed
    assert f"finetune train {out} --backbone efficientnet_lite0" in printed


def test_the_command_mentions_damaged_files_of_the_source(
    tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = archive_file(tmp_path, zip_of(microsoft_members()))
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    command.run(parse("microsoft", str(out), "--archive", str(archive), "--sha256", sha256))
    printed = capsys.readouterr().out
    assert f"sha256 {sha256} (verified)" in printed
    assert "1,738 of its files are damaged" in printed


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("filterd", {}, "Did you mean 'filtered'"),
        ("filtered", {"valid_fraction": 0.0}, r"--valid-fraction must be between 0 and 1, such as 0\.2 \(got 0\.0\)"),
        ("filtered", {"valid_fraction": float("nan")}, r"--valid-fraction must be between 0 and 1.*\(got nan\)"),
        ("filtered", {"sha256": "abc"}, "--sha256 must be 64 hexadecimal digits"),
        ("filtered", {"archive": Path("nowhere.zip")}, r"Could not read the archive nowhere\.zip"),
    ],
)
def test_invalid_options_are_rejected(out: Path, name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        download(name, out, **options)
    assert not out.exists()
