"""Photos are fetched from where a try stopped, checked, unpacked without trust, and never half there."""

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
    """Serves ``body`` at every path, as well or as badly as it is told to, and remembers what it was asked for."""

    body = FILTERED
    ranges = True
    etag: str | None = '"one"'
    drops: list[int]  # how many bytes each of the next answers sends before the connection closes
    statuses: list[int]  # what each of the next answers says instead
    asked: list[str | None]  # the Range of each request
    sent: list[int]  # the bytes of each answer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/pets.zip"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append(wanted)
        body, start = server.body, 0
        fresh = self.headers.get("If-Range") in (None, server.etag)
        if server.statuses:
            self.send_error(server.statuses.pop(0))
            return
        if wanted and server.ranges and fresh:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])  # type: ignore[index]
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
        piece = body[start:]
        if server.drops:
            piece = piece[: server.drops.pop(0)]
        server.sent.append(len(piece))
        self.wfile.write(piece)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(("127.0.0.1", 0), Handler) as running:
        running.drops, running.statuses, running.asked, running.sent = [], [], [], []
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
    path = tmp_path / "by-hand.zip"
    path.write_bytes(content)
    return path


def never_wait(seconds: float) -> None:
    raise AssertionError(f"waited {seconds} s, where the first try should have ended it")


def no_wait(seconds: float) -> None:
    pass


# Layouts


def test_filtered_keeps_its_own_split_and_leaves_strays_out(server: Server, out: Path) -> None:
    summary = download("filtered", out, url=server.url, sleep=never_wait)
    assert summary.image_counts == {"train": {"cats": 3, "dogs": 3}, "valid": {"cats": 3, "dogs": 3}}
    photos = [f"{s}/{c}s/{c}.{i}.jpg" for s in ("train", "valid") for c in ("cat", "dog") for i in range(3)]
    assert names(out) == ["SOURCE.json", *photos]
    assert (out / "valid/dogs/dog.2.jpg").read_bytes() == PHOTO + b"\x02"
    assert [path.name for path in out.parent.iterdir()] == ["pets"]


def test_source_json_says_where_the_photos_are_from(server: Server, out: Path) -> None:
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


def test_a_dropped_connection_goes_on_with_the_missing_bytes_only(server: Server, out: Path) -> None:
    server.drops = [500, 300]
    waits: list[float] = []
    download("filtered", out, url=server.url, sleep=waits.append)
    assert server.asked == [None, "bytes=500-", "bytes=800-"]
    assert sum(server.sent) == len(FILTERED)
    assert waits == [1.0, 1.0]
    assert source_json(out)["sha256"] == hashlib.sha256(FILTERED).hexdigest()


def test_another_run_goes_on_where_a_failed_run_stopped(server: Server, out: Path) -> None:
    server.drops = [700, 0, 0, 0, 0]
    waits: list[float] = []
    with pytest.raises(DataError, match=r"closed after 700 of .* bytes.*run the same command again.*--archive FILE"):
        download("filtered", out, url=server.url, sleep=waits.append)
    assert waits == [1.0, 2.0, 4.0, 8.0]
    assert not out.exists()
    server.asked.clear()
    download("filtered", out, url=server.url)
    assert server.asked == ["bytes=700-"]
    assert len(names(out)) == 13


def test_a_server_without_ranges_starts_again(server: Server, out: Path) -> None:
    server.ranges, server.drops = False, [500]
    download("filtered", out, url=server.url, sleep=no_wait)
    assert server.asked == [None, "bytes=500-"]
    assert server.sent == [500, len(FILTERED)]


def test_a_server_that_never_gets_further_is_given_up(server: Server, out: Path) -> None:
    server.ranges, server.drops = False, [500] * 50
    with pytest.raises(DataError, match="closed after 500"):
        download("filtered", out, url=server.url, sleep=no_wait)
    assert len(server.asked) == 5


def test_a_file_that_changed_on_the_server_starts_again(server: Server, out: Path, tmp_path: Path) -> None:
    server.drops = [500, 0, 0, 0, 0]
    with pytest.raises(DataError):
        download("filtered", out, url=server.url, cache_dir=tmp_path / "cache", sleep=no_wait)
    server.body, server.etag = zip_of(filtered_members(4)), '"two"'
    summary = download("filtered", out, url=server.url, cache_dir=tmp_path / "cache", sleep=never_wait)
    assert summary.sha256 == hashlib.sha256(server.body).hexdigest()
    assert summary.image_counts["train"]["cats"] == 4


def test_without_an_etag_another_length_tells_that_the_file_changed(server: Server, out: Path) -> None:
    server.etag, server.drops = None, [500, 0, 0, 0, 0]
    with pytest.raises(DataError):
        download("filtered", out, url=server.url, sleep=no_wait)
    server.body = zip_of(filtered_members(4))
    assert download("filtered", out, url=server.url, sleep=no_wait).image_counts["train"]["cats"] == 4


def test_a_part_that_is_whole_already_is_taken(server: Server, out: Path) -> None:
    server.drops = [len(FILTERED) - 1, 0, 0, 0, 0]
    with pytest.raises(DataError):
        download("filtered", out, url=server.url, sleep=no_wait)
    (part,) = out.parent.rglob("*.part")
    part.write_bytes(FILTERED)
    server.asked.clear()
    download("filtered", out, url=server.url, sleep=never_wait)
    assert server.asked == [f"bytes={len(FILTERED)}-"]


def test_a_part_that_is_too_long_is_thrown_away(server: Server, out: Path) -> None:
    server.drops = [500, 0, 0, 0, 0]
    with pytest.raises(DataError):
        download("filtered", out, url=server.url, sleep=no_wait)
    (part,) = out.parent.rglob("*.part")
    part.write_bytes(bytes(len(FILTERED) + 10))
    server.asked.clear()
    download("filtered", out, url=server.url, sleep=no_wait)
    assert server.asked == [f"bytes={len(FILTERED) + 10}-", None]


def test_a_busy_server_is_asked_again(server: Server, out: Path) -> None:
    server.statuses = [503, 429]
    download("filtered", out, url=server.url, sleep=no_wait)
    assert len(server.asked) == 3


def test_a_missing_page_ends_at_once_with_what_to_do(server: Server, out: Path) -> None:
    server.statuses = [404]
    with pytest.raises(DataError, match=r"404 Not Found for http://.*--archive FILE"):
        download("filtered", out, url=server.url, sleep=never_wait)
    assert list(out.parent.iterdir()) == []


def test_a_network_that_cannot_be_reached_says_what_to_do(server: Server, out: Path) -> None:
    closed = server.url
    server.shutdown()
    server.server_close()
    with pytest.raises(DataError, match=r"Could not download http://.*refused.*in a browser and pass --archive FILE"):
        download("filtered", out, url=closed, sleep=no_wait)


@pytest.mark.parametrize("url", ["pets.zip", "file:///etc/hosts", "https://", "http://[half", "http://a b/", "http://a:x/"])
def test_what_is_no_address_is_refused(out: Path, url: str) -> None:
    with pytest.raises(DataError, match="is not an address to download from"):
        download("filtered", out, url=url, sleep=never_wait)


def test_wrong_bytes_are_deleted_and_asked_for_again(server: Server, out: Path, tmp_path: Path) -> None:
    right = hashlib.sha256(FILTERED).hexdigest()
    server.body = b"?" * len(FILTERED)
    with pytest.raises(DataError, match=f"where {right} was wanted"):
        download("filtered", out, url=server.url, sha256=right, cache_dir=tmp_path / "cache")
    assert names(tmp_path) == []
    server.body = FILTERED
    assert download("filtered", out, url=server.url, sha256=right, cache_dir=tmp_path / "cache").verified


def test_a_given_cache_keeps_the_archive_and_saves_the_next_download(server: Server, out: Path, tmp_path: Path) -> None:
    download("filtered", out, url=server.url, cache_dir=tmp_path / "cache")
    download("filtered", tmp_path / "again", url=server.url, cache_dir=tmp_path / "cache")
    assert server.asked == [None]
    assert len(names(tmp_path / "cache")) == 1


def test_a_cache_that_cannot_be_written_ends_in_one_sentence(server: Server, out: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match="pick another folder with --cache-dir"):
        download("filtered", out, url=server.url, cache_dir=tmp_path / "cache")


# Archives that are not what they should be


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
def test_a_member_that_leads_elsewhere_is_refused_by_name(tmp_path: Path, out: Path, member: zipfile.ZipInfo | str) -> None:
    name = member if isinstance(member, str) else member.filename
    archive = archive_file(tmp_path, with_member(member, b"/etc/hosts"))
    with pytest.raises(DataError, match=re.escape(f"its member {name!r}")):
        download("filtered", out, archive=archive)
    assert names(tmp_path) == ["by-hand.zip"]


def test_a_member_named_twice_is_refused(tmp_path: Path, out: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        content = with_member("cats_and_dogs_filtered/train/cats/cat.0.jpg")
    with pytest.raises(DataError, match="is there twice"):
        download("filtered", out, archive=archive_file(tmp_path, content))


@pytest.mark.parametrize("limit", [{"max_bytes": 10_000}, {"max_members": 10}])
def test_an_archive_that_unpacks_to_too_much_is_refused(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, limit: dict[str, Any]
) -> None:
    monkeypatch.setitem(SOURCES, "filtered", dataclasses.replace(SOURCES["filtered"], **limit))
    memory = io.BytesIO(FILTERED)
    with zipfile.ZipFile(memory, "a", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("cats_and_dogs_filtered/train/cats/cat.9.jpg", bytes(1_000_000))
    assert len(memory.getvalue()) < 10_000
    with pytest.raises(DataError, match="where at most"):
        download("filtered", out, archive=archive_file(tmp_path, memory.getvalue()))
    assert not out.exists()


def test_a_member_that_hides_its_size_does_not_unpack_to_more(tmp_path: Path, out: Path) -> None:
    memory = io.BytesIO(FILTERED)
    with zipfile.ZipFile(memory, "a", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("cats_and_dogs_filtered/train/cats/cat.9.jpg", bytes(1_000_000))
    lying = memory.getvalue().replace((1_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    with pytest.raises(DataError, match="not a whole zip archive"):
        download("filtered", out, archive=archive_file(tmp_path, lying))
    assert not out.exists()


@pytest.mark.parametrize("content", [b"<html>Sorry</html>", b"", FILTERED[:-30], FILTERED.replace(PHOTO, PHOTO[::-1], 1)])
def test_what_is_no_whole_zip_is_refused(tmp_path: Path, out: Path, content: bytes) -> None:
    with pytest.raises(DataError, match="not a whole zip archive"):
        download("filtered", out, archive=archive_file(tmp_path, content))
    assert names(tmp_path) == ["by-hand.zip"]


def test_a_web_page_in_the_place_of_the_archive_is_not_kept(server: Server, out: Path, tmp_path: Path) -> None:
    server.body = b"<html>Please log in</html>"
    with pytest.raises(DataError, match="not a whole zip archive"):
        download("filtered", out, url=server.url, cache_dir=tmp_path / "cache")
    assert names(tmp_path) == []


def test_another_layout_is_refused(tmp_path: Path, out: Path) -> None:
    archive = archive_file(tmp_path, zip_of(microsoft_members()))
    with pytest.raises(DataError, match="no photos for train/cats, train/dogs, valid/cats, valid/dogs"):
        download("filtered", out, archive=archive)
    few = archive_file(tmp_path, zip_of({"PetImages/Cat/1.jpg": PHOTO, "PetImages/Dog/1.jpg": PHOTO}))
    sha256 = hashlib.sha256(few.read_bytes()).hexdigest()
    with pytest.raises(DataError, match="no photos for train/cats, train/dogs:"):
        download("microsoft", out, archive=few, sha256=sha256)


# Nothing half made


def test_an_interrupted_unpacking_leaves_nothing_but_the_archive(
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
    assert server.asked == [None]


def test_a_kill_in_the_middle_of_unpacking_leaves_no_folder(tmp_path: Path, out: Path) -> None:
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


def test_a_full_disk_ends_in_one_sentence_and_leaves_nothing(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "extract", full)
    with pytest.raises(DataError, match=r"Could not write to .*No space left on device"):
        download("filtered", out, archive=archive_file(tmp_path, FILTERED))
    assert names(tmp_path) == ["by-hand.zip"]


def test_a_folder_with_something_in_it_is_refused_before_any_download(server: Server, out: Path) -> None:
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="not empty"):
        download("filtered", out, url=server.url)
    assert server.asked == []
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


def test_a_train_zip_that_was_downloaded_alone_is_taken_too(tmp_path: Path, out: Path) -> None:
    train = zip_of({f"train/{c}.{i}.jpg": PHOTO for c in ("cat", "dog") for i in range(5)})
    assert download("kaggle", out, archive=archive_file(tmp_path, train)).image_counts["valid"] == {"cats": 1, "dogs": 1}


def test_without_the_kaggle_command_the_message_says_what_to_do(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"pip install kaggle.*accept the rules.*kaggle\.json in ~/\.kaggle"):
        download("kaggle", out)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("print('Warning\\r'); sys.exit('403 - Forbidden')", r"failed \(403 - Forbidden\)"),
        ("sys.exit(7)", r"failed \(exit status 7\)"),
        ("pass", r"left no dogs-vs-cats\.zip"),
    ],
)
def test_a_kaggle_command_that_fails_says_why_and_what_to_do(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, body: str, why: str
) -> None:
    fake_kaggle(tmp_path / "bin", body)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(DataError, match=why + ".*accept the rules"):
        download("kaggle", out)
    assert not out.exists()


# The command


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args(words)


def test_the_command_says_what_arrived_and_what_to_type_next(
    server: Server, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert module.run(parse("filtered", str(out), "--url", server.url)) == 0
    printed = capsys.readouterr().out
    assert f"Unpacked 12 photos from {server.url} into {out}." in printed
    assert "train: 3 cats, 3 dogs" in printed
    assert f"sha256 {hashlib.sha256(FILTERED).hexdigest()} (recorded in SOURCE.json" in printed
    assert "3,000 photos were published" in printed
    assert f"finetune train --data-dir {out} --backbone efficientnet_lite0" in printed


def test_the_command_tells_of_damaged_files_that_were_left_in(
    tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = archive_file(tmp_path, zip_of(microsoft_members()))
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    module.run(parse("microsoft", str(out), "--archive", str(archive), "--sha256", sha256))
    printed = capsys.readouterr().out
    assert f"sha256 {sha256} (as was wanted)" in printed
    assert "1,738 of its files are damaged" in printed


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("filterd", {}, "Did you mean 'filtered'"),
        ("filtered", {"valid_fraction": 0.0}, "--valid-fraction 0.0 is not between 0 and 1"),
        ("filtered", {"valid_fraction": float("nan")}, "--valid-fraction nan"),
        ("filtered", {"sha256": "abc"}, "not 64 hexadecimal digits"),
        ("filtered", {"archive": Path("nowhere.zip")}, r"Could not read the archive nowhere\.zip"),
    ],
)
def test_options_that_cannot_be_are_refused(out: Path, name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        download(name, out, **options)
    assert not out.exists()
