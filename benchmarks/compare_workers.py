"""Compare the service's own gunicorn worker with gunicorn's threaded one, under normal load and at three times the capacity.

    python -m benchmarks.compare_workers BUNDLE PHOTOS [--times 3] [--seconds 3] [--rounds 9]

Both servers run all the time. Each round measures one after the other, in alternating order, while the other one is idle:
predictions per second over 16 kept-alive connections, then the goodput at a multiple of that rate (``benchmarks.overload``).
The medians of the rates and of the ratios within a round are printed, because the speed of a machine drifts.
"""

from __future__ import annotations

import statistics
import sys

from benchmarks.overload import OpenLoopClient
from benchmarks.serve_speed import (
    CONNECTIONS,
    encode_request,
    make_parser,
    measure_undisturbed,
    read_photos,
    run_service,
    send_requests,
)
from models.artifacts.paths import resolve_bundle

WORKERS = ("tuned", "stock")


def main() -> int:
    parser = make_parser(__doc__, seconds=3.0, rounds=9)
    parser.add_argument("--times", type=float, default=3.0)
    args = parser.parse_args()
    photos = read_photos(parser, args.photos)
    requests, bundle = [encode_request(photo) for photo in photos], resolve_bundle(args.bundle)
    rates: dict[str, list[float]] = {name: [] for name in WORKERS}
    goodputs: dict[str, list[float]] = {name: [] for name in WORKERS}
    with run_service(bundle, GUNICORN_WORKER="tuned") as tuned, run_service(bundle, GUNICORN_WORKER="stock") as stock:
        ports = dict(zip(WORKERS, (tuned, stock), strict=True))

        def measure(name: str) -> tuple[float, float]:
            rate = len(send_requests(ports[name], requests, CONNECTIONS, args.seconds)) / args.seconds
            statuses, _, _ = OpenLoopClient(ports[name], requests).run(args.times * rate, args.seconds)
            return rate, statuses["200"] / args.seconds

        for port in ports.values():
            send_requests(port, requests, CONNECTIONS, 2.0)  # warm up
        for number in range(args.rounds):
            for name in WORKERS if number % 2 else reversed(WORKERS):
                rate, goodput = measure_undisturbed(lambda name=name: measure(name))  # type: ignore[misc]
                rates[name].append(rate)
                goodputs[name].append(goodput)
            row = ", ".join(f"{name} {rates[name][-1]:.1f}/s, overloaded {goodputs[name][-1]:.1f}/s" for name in WORKERS)
            print(f"round {number + 1}: {row}", file=sys.stderr, flush=True)
    for title, values in (("normal load", rates), (f"goodput at {args.times:g} times", goodputs)):
        ratios = sorted(a / b for a, b in zip(values["tuned"], values["stock"], strict=True))
        medians = ", ".join(f"{name} {statistics.median(values[name]):.1f}/s" for name in WORKERS)
        print(f"{title:<22}{medians}, ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
