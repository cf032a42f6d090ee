"""`make gpu`: the tests, then the measurements in what is left of ten minutes."""

from __future__ import annotations

import subprocess
import sys
import time

from tests.gpu import HERE, NO_CUDA

SECONDS, LAST_CASE = 600, 60  # a case that has begun is not cut off


def main() -> int:
    """Return the first exit code that is not 0; 5, as for any missing device, without CUDA."""
    if not HERE:
        print(f"nothing was tested or measured: {NO_CUDA}")
        return 5
    start = time.perf_counter()
    tests = [sys.executable, "-m", "pytest", "-rs", "--durations=5", "tests/gpu"]
    try:
        code = subprocess.run(tests, check=False, timeout=SECONDS / 2).returncode
    except subprocess.TimeoutExpired:
        print(f"the tests took more than {SECONDS // 2} s and were stopped")
        code = 1
    left = SECONDS - LAST_CASE - (time.perf_counter() - start)
    bench = [sys.executable, "-m", "tests.gpu.bench", "--seconds", str(left)]
    measured = subprocess.run(bench, check=False).returncode  # GPUs are rare: also after a failure
    return code or measured


if __name__ == "__main__":
    sys.exit(main())
