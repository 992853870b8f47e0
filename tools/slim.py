"""Remove from a virtual environment what the service never opens, so that its image is small.

    python tools/slim.py /opt/venv

Each pattern has its reason. One that matches nothing is an error, so that the list is looked at when a package changes;
``tools/smoke.py``, which the image runs last, shows that nothing is missing.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

UNNEEDED = {
    "openvino/libs/libopenvino_intel_[gn]pu_plugin.so": "the service computes on the CPU; GPUs are PyTorch's",
    "openvino/libs/libopenvino_auto*_plugin.so": "chooses among devices; there is one",
    "openvino/libs/libopenvino_hetero_plugin.so": "spreads a network over devices",
    "openvino/libs/cache.json": "the GPU plugin's table of kernels",
    "openvino/libs/libopenvino_[!io]*_frontend.so.*": "reads other formats than OpenVINO's own and ONNX",
    "openvino/libs/libopenvino_c.so.*": "OpenVINO for C",
    "openvino/include": "C++ headers",
    "openvino/cmake": "for building C++ against it",
    "openvino/tools": "the model converter",
    "openvino/frontend/[!o_]*/": "the other formats' Python side",
    "openvino_telemetry": "reports to OpenVINO's makers",
    "numpy/**/tests": "tests",
    "numpy/f2py": "compiles Fortran",
    "numpy/distutils": "builds extensions",
    "numpy/_core/include": "C headers",
    "numpy/**/*.a": "for linking C against it",
    "numpy/_core/_*tests.*.so": "tests",
    "numpy/_core/_simd.*.so": "tests",
    "numpy/random": "chance, which the service leaves to Python and to databases",
    "sqlalchemy/testing": "tests",
    "sqlalchemy/dialects/m[sy]*sql": "other databases than SQLite and PostgreSQL",
    "sqlalchemy/dialects/oracle": "the same",
    "**/*.pyi": "types, for editors and mypy",
    "PIL/_avif.*.so": "AVIF, which the service does not take",
    "pillow.libs/libavif-*": "the same",
    "PIL/_imagingft.*.so": "letters, which the service does not draw",
    "pillow.libs/libharfbuzz-*": "the same",
    "pillow.libs/libfreetype-*": "the same",
}


def slim(site: Path) -> list[str]:
    """Remove what matches; gives the patterns that matched nothing."""
    missed = []
    for pattern in UNNEEDED:
        found = sorted(site.glob(pattern))
        if not found:
            missed.append(pattern)
        for path in found:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    return missed


def main() -> int:
    (site,) = Path(sys.argv[1]).glob("lib/python3*/site-packages")
    before = _size_mb(site)
    if missed := slim(site):
        print(f"slim: nothing matches {', '.join(missed)}; mend the list in {__file__}.", file=sys.stderr)
        return 2
    print(f"slim: {before:.0f} MB became {_size_mb(site):.0f} MB")
    return 0


def _size_mb(folder: Path) -> float:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir()) / 1e6


if __name__ == "__main__":
    sys.exit(main())
