"""Compare the service with LitServe, mosec and plain Flask, which run the same network in PyTorch.

    python -m benchmarks.compare_servers PHOTOS --peers-python ENV/bin/python [--network efficientnet_lite0|vgg16]
        [--bundle BUNDLE] [--peers litserve litserve-workers mosec flask] [--rounds 3] [--seconds 8] [--connections 8]

The other servers run in an environment of their own: `python3 -m venv ENV`, then
`ENV/bin/pip install -r benchmarks/compare_servers/requirements.txt`. `--peers` without a name measures the service alone.

The servers take turns in each round, and only one runs at a time. Each is started, warmed up for 2 s and loaded for
``--seconds`` over connections that send their next request when they have received a response. A measurement during which the
host of a virtual machine took much processor time is repeated. Each response is compared with the label of the network in
float32. The medians of the rounds are printed, and the ratios within a round with their range, because the speed of a machine
drifts. Memory is the proportional set size of all processes of a server. Client and server share the processors.

Without ``--bundle``, EfficientNet-Lite0 is the included classifier. VGG16 gets random weights, because its own are a large
download and do not affect the speed. Its bundle is made once, in the folder ``--work``, which takes minutes.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.compare_servers.servers import CPUS, PEERS, Server, missing_packages, running, service
from benchmarks.serve_speed import find_photos, measure_undisturbed, send_requests
from benchmarks.soak import memory_mib
from models.artifacts.bundle import open_bundle
from models.runtime.processor import instruction_sets, processor_name
from service.settings import SHIPPED_BUNDLE

SERVICE = "service"
WARM_UP_S = 2.0
NETWORKS = ("efficientnet_lite0", "vgg16")
REQUIREMENTS = "benchmarks/compare_servers/requirements.txt"
FEATURES = {
    "AMX": ("amx_int8", "amx_bf16"),
    "bfloat16": ("avx512_bf16", "amx_bf16", "bf16"),
    "VNNI": ("avx512_vnni", "avx_vnni"),
}


@dataclass(frozen=True)
class Measurement:
    """The results of one server in one round. ``wrong`` counts responses with another label than in float32."""

    rate: float
    p50_ms: float
    p99_ms: float
    memory_mib: float
    start_s: float
    responses: int
    wrong: int


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder with .jpg files in folders of their classes")
    parser.add_argument("--network", choices=NETWORKS, default=NETWORKS[0])
    parser.add_argument("--bundle", type=Path, help="a bundle of your own instead of --network")
    parser.add_argument(
        "--peers", nargs="*", choices=PEERS, default=list(PEERS), metavar="PEER", help=f"any of {', '.join(PEERS)}"
    )
    parser.add_argument("--peers-python", default=sys.executable, help="the Python of the other servers (default: this one)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--work", type=Path, default=Path("runs/compare-servers"), help="keeps the bundle with random weights")
    args = parser.parse_args(argv)
    if min(args.rounds, args.connections, args.seconds) <= 0:
        parser.error("--rounds, --connections and --seconds must be positive")
    paths = find_photos(parser, args.photos)
    peers = {name: PEERS[name] for name in args.peers}
    if missing := missing_packages(args.peers_python, list(peers.values())):
        parser.error(
            f"{args.peers_python} lacks the packages {', '.join(missing)}. Install the other servers into an environment with "
            f"`python3 -m venv ENV` and `ENV/bin/pip install -r {REQUIREMENTS}`, and add --peers-python ENV/bin/python"
        )
    from benchmarks.compare_servers import network  # takes seconds

    if args.bundle:
        bundle = open_bundle(args.bundle)
    elif args.network == NETWORKS[0]:
        bundle = open_bundle(SHIPPED_BUNDLE)
    else:
        bundle = network.train_with_random_weights(args.network, paths, args.work)
    photos = [path.read_bytes() for path in paths]
    expected = network.expected_labels(bundle, photos)
    with tempfile.TemporaryDirectory(prefix="compare-servers-") as folder:
        exported = Path(folder) / "network"
        if peers:
            network.export_network(bundle, exported)

        def measure(name: str) -> Measurement:
            server, python = (peers[name], args.peers_python) if name in peers else (service(bundle.path), sys.executable)
            return measure_server(
                server, python, exported, photos, expected, connections=args.connections, seconds=args.seconds
            )

        results = run_rounds([SERVICE, *peers], measure, rounds=args.rounds)
    rounds = f"{args.rounds} round{'s' if args.rounds > 1 else ''} of {args.seconds:g} s"
    print(f"{processor()}\n{bundle.backbone}, {args.connections} connections, {rounds}")
    print("\n".join(format_table(results)))
    return 0


def measure_server(
    server: Server,
    python: str,
    network: Path,
    photos: Sequence[bytes],
    expected: Sequence[str],
    *,
    connections: int,
    seconds: float,
) -> Measurement:
    """Start a server, send requests over several connections, and end it. The arguments are those of ``main``."""
    requests = [server.encode(photo) for photo in photos]
    with running(server, python, network=network, request=requests[0]) as process:
        send_requests(process.port, requests, connections, min(WARM_UP_S, seconds))

        def load() -> tuple[list[float], list[tuple[int, bytes]]]:
            responses: list[tuple[int, bytes]] = []
            times_ms = send_requests(
                process.port, requests, connections, seconds, on_response=lambda *response: responses.append(response)
            )
            return sorted(times_ms), responses

        times_ms, responses = measure_undisturbed(load)
        memory = memory_mib(process.pid)
    return Measurement(
        rate=len(times_ms) / seconds,
        p50_ms=statistics.median(times_ms),
        p99_ms=times_ms[int(len(times_ms) * 0.99)],
        memory_mib=memory,
        start_s=process.start_s,
        responses=len(responses),
        wrong=sum(label(body) != expected[number] for number, body in responses),
    )


def label(response: bytes) -> str:
    """Return the label in a response of the service or of another server."""
    document = json.loads(response.partition(b"\r\n\r\n")[2])
    return str((document["predictions"][0] if "predictions" in document else document)["label"])


def run_rounds(names: Sequence[str], measure: Callable[[str], Measurement], *, rounds: int) -> dict[str, list[Measurement]]:
    """Measure each server once per round, in alternating order."""
    results: dict[str, list[Measurement]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            row = measure(name)
            results[name].append(row)
            print(
                f"round {number + 1}: {name:<17}{row.rate:7.1f}/s, p50 {row.p50_ms:.0f} ms, p99 {row.p99_ms:.0f} ms, "
                f"{row.memory_mib:.0f} MiB, first response after {row.start_s:.1f} s, {row.wrong} wrong",
                file=sys.stderr,
                flush=True,
            )
    return results


def format_table(results: Mapping[str, Sequence[Measurement]]) -> list[str]:
    """Format the medians of each server, and how it compares with the service within a round."""
    lines = [f"{'':<20}{'requests/s':>11}{'p50 ms':>9}{'p99 ms':>9}{'MiB':>8}{'start s':>9}{'wrong':>15}"]
    for name, rows in results.items():
        rate, p50, p99, memory, start = (
            statistics.median(getattr(row, field) for row in rows)
            for field in ("rate", "p50_ms", "p99_ms", "memory_mib", "start_s")
        )
        wrong = f"{sum(row.wrong for row in rows):,} of {sum(row.responses for row in rows):,}"
        lines.append(f"{_title(name):<20}{rate:11.1f}{p50:9.0f}{p99:9.0f}{memory:8.0f}{start:9.1f}{wrong:>15}")
    own = results[SERVICE]
    if len(results) > 1:
        lines += ["", f"{'compared with':<20}{'requests/s':>24}{'p99':>24}{'memory':>24}"]
    for name, rows in results.items():
        if name != SERVICE:
            ratios = [
                _ratio([getattr(mine, field) / getattr(its, field) for mine, its in zip(own, rows, strict=True)])
                for field in ("rate", "p99_ms", "memory_mib")
            ]
            lines.append(f"{_title(name):<20}" + "".join(f"{text:>24}" for text in ratios))
    return lines


def _title(name: str) -> str:
    return PEERS[name].title if name in PEERS else "this project"


def _ratio(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def processor() -> str:
    """Describe the processor and the instruction sets that decide how fast a network is."""
    own = set(instruction_sets())
    features = ", ".join(f"{'with' if own & set(flags) else 'without'} {name}" for name, flags in FEATURES.items())
    return f"{processor_name()}, {CPUS} CPUs, {features} ({' '.join(instruction_sets()) or 'no list'})"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends the running server as well
    sys.exit(main())
