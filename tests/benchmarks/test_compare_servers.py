"""The comparison with other servers checks its arguments, runs the network of a bundle in PyTorch, and prints a table."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.compare_servers import __main__ as compare
from benchmarks.compare_servers.__main__ import Measurement
from benchmarks.compare_servers.servers import PEERS, Server, service
from tests.helpers import tiny_network


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "error: --rounds, --connections and --seconds must be positive\n"),
        (["--seconds", "-1"], "error: --rounds, --connections and --seconds must be positive\n"),
        (["--peers", "apache"], "error: argument --peers: invalid choice: 'apache'"),
        (["--network", "lenet"], "error: argument --network: invalid choice: 'lenet'"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        compare.main([str(tmp_path), *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_photos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path)])
    assert f"error: no .jpg below {tmp_path}\n" in capsys.readouterr().err


def test_missing_peers_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photo.jpg").touch()
    monkeypatch.setitem(PEERS, "mosec", Server("mosec", lambda port: [], ("json", "no_such_package")))
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path), "--peers", "mosec"])
    assert (
        f"error: {sys.executable} lacks the packages no_such_package. Install the other servers into an environment with "
        "`python3 -m venv ENV` and `ENV/bin/pip install -r benchmarks/compare_servers/requirements.txt`, and add "
        "--peers-python ENV/bin/python\n"
    ) in capsys.readouterr().err


def test_requests_are_forms_or_plain_images() -> None:
    form, plain = service(Path()).encode(b"image"), PEERS["mosec"].encode(b"image")
    assert form.startswith(b"POST /predict?abstain=0 HTTP/1.1\r\n")
    assert b"\r\n\r\nimage\r\n--" in form
    assert plain.startswith(b"POST /inference HTTP/1.1\r\n")
    assert plain.endswith(b"Content-Type: image/jpeg\r\nContent-Length: 5\r\n\r\nimage")


def test_the_table_has_medians_and_ratios_within_a_round() -> None:
    def row(rate: float, p99_ms: float, memory_mib: float, wrong: int) -> Measurement:
        return Measurement(rate, p99_ms / 2, p99_ms, memory_mib, 1.5, 1000, wrong)

    results = {
        "service": [row(100, 40, 200, 0), row(80, 60, 202, 1), row(90, 50, 201, 0)],
        "mosec": [row(20, 80, 402, 0), row(40, 60, 404, 0), row(30, 100, 402, 0)],
    }
    assert compare.format_table(results) == [
        "                     requests/s   p50 ms   p99 ms     MiB  start s          wrong",
        "this project               90.0       25       50     201      1.5     1 of 3,000",
        "mosec                      30.0       40       80     402      1.5     0 of 3,000",
        "",
        "compared with                     requests/s                     p99                  memory",
        "mosec                    3.00 (2.00 to 5.00)     0.50 (0.50 to 1.00)     0.50 (0.50 to 0.50)",
    ]


def test_servers_alternate(capsys: pytest.CaptureFixture[str]) -> None:
    order: list[str] = []

    def measure(name: str) -> Measurement:
        order.append(name)
        return Measurement(1, 1, 1, 1, 1, 1, 0)

    results = compare.run_rounds(["service", "flask"], measure, rounds=2)
    assert order == ["service", "flask", "flask", "service"]
    assert [len(rows) for rows in results.values()] == [2, 2]
    assert capsys.readouterr().err.count("round 2: ") == 2


@pytest.mark.slow
def test_the_service_and_flask_agree(tiny_bundle: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"--bundle": tiny_bundle.path, "--peers": "flask", "--rounds": 1, "--seconds": 0.5, "--connections": 2}
    with tiny_network.registered():
        code = compare.main([str(tiny_bundle.data), *(str(word) for option in options.items() for word in option)])
    assert code == 0
    output = capsys.readouterr().out.splitlines()
    assert output[1] == "tiny, 2 connections, 1 round of 0.5 s"
    rows = {line[:20].strip(): line[20:].split() for line in output if " of " in line[60:]}
    assert rows.keys() == {"this project", "Flask and gunicorn"}
    for rate, *_, wrong, _, responses in rows.values():
        assert float(rate) > 0
        assert (int(wrong), int(responses) > 0) == (0, True)
