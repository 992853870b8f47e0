"""Compare the service's own gunicorn worker with gunicorn's threaded one, under normal load and at three times the capacity.

    python -m benchmarks.compare_workers BUNDLE PHOTOS [--times 3] [--seconds 3] [--rounds 9]

Both servers run all the time, and each round measures one after the other, in alternating order, while the other is idle:
predictions per second over 16 kept-alive connections, then the goodput at so many times that rate (``benchmarks.overload``).
The medians are printed, and that of the ratios within a round, as a machine's speed drifts.
"""

from __future__ import annotations

import statistics
import sys

from benchmarks.overload import Flood
from benchmarks.serve_speed import CONNECTIONS, ask, make_parser, quiet, read_photos, request_of, serving
from models.artifacts.paths import resolve_bundle

WORKERS = ("tuned", "stock")


def main() -> int:
    parser = make_parser(__doc__, seconds=3.0, rounds=9)
    parser.add_argument("--times", type=float, default=3.0)
    args = parser.parse_args()
    photos = read_photos(parser, args.photos)
    requests, bundle = [request_of(photo) for photo in photos], resolve_bundle(args.bundle)
    rates: dict[str, list[float]] = {name: [] for name in WORKERS}
    goodputs: dict[str, list[float]] = {name: [] for name in WORKERS}
    with serving(bundle, GUNICORN_WORKER="tuned") as tuned, serving(bundle, GUNICORN_WORKER="stock") as stock:
        ports = dict(zip(WORKERS, (tuned, stock), strict=True))

        def measure(name: str) -> tuple[float, float]:
            rate = len(ask(ports[name], photos, CONNECTIONS, args.seconds)) / args.seconds
            statuses, _, _ = Flood(ports[name], requests).run(args.times * rate, args.seconds)
            return rate, statuses["200"] / args.seconds

        for port in ports.values():
            ask(port, photos, CONNECTIONS, 2.0)  # warms up
        for number in range(args.rounds):
            for name in WORKERS if number % 2 else reversed(WORKERS):
                rate, goodput = quiet(lambda name=name: measure(name))  # type: ignore[misc]
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
