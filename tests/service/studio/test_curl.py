"""The commands of docs/studio.md, run with curl: from two folders of pictures to a live model and back, and a zip in pieces."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.settings import SHIPPED_BUNDLE
from tests.helpers.painted_pictures import COPY, Pictures, paint_pictures
from tests.helpers.server import Server, poll, serve
from tests.helpers.system_packages import skip_without

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "studio.md").read_text(encoding="utf-8")
LOOP, ZIP = PAGE.split("\n## The same with curl\n")[1].split("\n## ")[0].split("\n### Send a zip\n")
NEXT_BLOCK = "--- next block ---"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    for program in ("curl", "jq"):
        if not shutil.which(program):
            skip_without(program)
    folder = tmp_path_factory.mktemp("studio")
    settings = {"studio": 1, "studio_dir": folder / "studio", "studio_min_free_mb": 0, "studio_niceness": 0}
    with serve(SHIPPED_BUNDLE, database_url=f"sqlite:///{folder / 'reviews.db'}", **settings) as server:
        yield server


@pytest.fixture
def pictures(tmp_path: Path) -> Pictures:
    return paint_pictures(tmp_path)


def run(section: str, server: Server, folder: Path) -> list[str]:
    """Run the commands of a section in one shell, which ends at the first that fails. Returns the output of each block."""
    blocks = re.findall(r"^```sh\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    script = f"echo '{NEXT_BLOCK}'\n".join(blocks).replace("http://127.0.0.1:8000", server.url)
    (folder / ".curlrc").write_text("fail-with-body\nsilent\nshow-error\n")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env={"PATH": "/usr/local/bin:/usr/bin:/bin", "CURL_HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr}"
    return done.stdout.split(f"{NEXT_BLOCK}\n")


def test_the_loop(server: Server, pictures: Pictures) -> None:
    photo = (pictures.root / "dogs" / "00.jpg").read_bytes()
    (pictures.root / "photo.jpg").write_bytes(photo)
    shipped = server.get("/models").json()["models"][0]["version"]
    added, left_out, trained, corrected, compared, live = run(LOOP, server, pictures.root)

    assert added.count('"photo"') == 2 * pictures.count + 1
    assert f'"{COPY}"' in added
    assert json.loads(left_out)["moved"] == 1
    assert "event: end" in trained
    mistakes = {row["photo"] for row in json.loads((pictures.root / "mistakes.json").read_text())["photos"]}
    assert mistakes >= pictures.mislabeled
    assert json.loads(corrected)["saved"] == len(mistakes)
    first, second = (server.get(f"/studio/jobs/{id_}").json() for id_ in (1, 2))
    assert (first["run"], first["reviews"], second["run"], second["reviews"]) == ("first", 0, "second", len(mistakes))
    assert second["version"] not in (None, first["version"])
    comparison = server.get(f"/compare.json?a={first['version']}&b={second['version']}").json()
    counts = [comparison[outcome] for outcome in ("both_correct", "fixed", "broke", "both_incorrect")]
    assert sum(counts) == 2 * pictures.count // 5
    assert json.loads(compared.splitlines()[-1]) == comparison["summary"]
    versions = re.findall(r'"model":\s*{[^}]*"version":\s*"(\w+)"', live)
    assert versions == [second["version"], shipped]


def test_a_zip_in_pieces(server: Server, pictures: Pictures) -> None:
    server.request("POST", "/studio/datasets", b'{"name": "zipped"}', headers={"Content-Type": "application/json"})
    shutil.make_archive(str(pictures.root / "pets"), "zip", pictures.root, "dogs")
    run(ZIP.replace("/datasets/pets/", "/datasets/zipped/"), server, pictures.root)

    def listing() -> Any:
        found = server.get("/studio/datasets/zipped/files.json").json()
        return found if found["task"]["state"] != "running" else None

    assert poll(listing)["classes"] == {"dogs": pictures.count}
