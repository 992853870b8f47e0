"""Remove files that the service never opens from a virtual environment, to make its image smaller.

    python tools/slim.py /opt/venv

A pattern that matches nothing is an error, so that the list is revised when a package changes. ``tools/smoke.py``, the last
step of the image's build, shows that nothing is missing.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

UNNEEDED = {
    "openvino/libs/libopenvino_intel_[gn]pu_plugin.so": "OpenVINO runs on the CPU only; PyTorch uses GPUs",
    "openvino/libs/libopenvino_auto*_plugin.so": "selects a device; there is only one",
    "openvino/libs/libopenvino_hetero_plugin.so": "splits a network across devices",
    "openvino/libs/cache.json": "kernels of the GPU plugin",
    "openvino/libs/libopenvino_[!io]*_frontend.so.*": "reads formats other than ONNX and OpenVINO IR",
    "openvino/libs/libopenvino_c.so.*": "C API",
    "openvino/include": "C++ headers",
    "openvino/cmake": "for C++ builds",
    "openvino/tools": "the model converter",
    "openvino/frontend/[!o_]*/": "Python modules of the other formats",
    "openvino_telemetry": "sends usage data",
    "numpy/**/tests": "tests",
    "numpy/f2py": "compiles Fortran",
    "numpy/distutils": "builds extensions",
    "numpy/_core/include": "C headers",
    "numpy/**/*.a": "static libraries",
    "numpy/_core/_*tests.*.so": "tests",
    "numpy/_core/_simd.*.so": "tests",
    "numpy/random": "random numbers, which the service takes from Python and databases",
    "sqlalchemy/testing": "tests",
    "sqlalchemy/dialects/m[sy]*sql": "databases other than SQLite and PostgreSQL",
    "sqlalchemy/dialects/oracle": "another database",
    "**/*.pyi": "type stubs",
    "PIL/_imagingft.*.so": "text rendering",
    "pillow.libs/libharfbuzz-*": "text rendering",
    "pillow.libs/libfreetype-*": "text rendering",
}


def slim(site: Path) -> list[str]:
    """Remove all files and folders that match. Returns the patterns without a match."""
    unmatched = []
    for pattern in UNNEEDED:
        matches = sorted(site.glob(pattern))
        if not matches:
            unmatched.append(pattern)
        for path in matches:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    return unmatched


def main() -> int:
    (site,) = Path(sys.argv[1]).glob("lib/python3*/site-packages")
    before = _size_mb(site)
    if unmatched := slim(site):
        print(f"slim: nothing matches {', '.join(unmatched)}. Update the patterns in {__file__}.", file=sys.stderr)
        return 2
    print(f"slim: reduced {before:.0f} MB to {_size_mb(site):.0f} MB")
    return 0


def _size_mb(folder: Path) -> float:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir()) / 1e6


if __name__ == "__main__":
    sys.exit(main())
