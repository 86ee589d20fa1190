"""Five real training steps end to end, as a script (table, exit code) and under pytest.

python recipe/atropos/test_full_e2e_training.py
pytest recipe/atropos/test_full_e2e_training.py
"""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

_TESTS = Path(__file__).resolve().parents[2] / "tests"
if not (_TESTS / "support" / "end_to_end.py").is_file():
    _TEXT = "the servers of this test are in a checkout of atropos-verl; run it there"
    raise pytest.skip.Exception(_TEXT, allow_module_level=True) if __name__ != "__main__" else SystemExit(_TEXT)
sys.path.insert(0, str(_TESTS))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see launch/train.py

from support.end_to_end import EndToEnd  # noqa: E402

_NAMES = [name for name in vars(EndToEnd) if name.startswith("check_")]


@pytest.fixture(scope="module")
def system() -> Iterator[EndToEnd]:
    with EndToEnd() as running:
        yield running


@pytest.mark.parametrize("name", _NAMES)
def test_end_to_end(system: EndToEnd, name: str) -> None:
    assert getattr(system, name)()


def main() -> int:
    """Run every check and print a table; 1 if one failed."""
    started = time.perf_counter()
    print("starting the trajectory API and the trainer, taking five steps ...", flush=True)
    failures = 0
    with EndToEnd() as system:
        for name in _NAMES:
            try:
                verdict, text = "ok", getattr(system, name)()
            except AssertionError as error:
                verdict, text = "FAILED", str(error) or "assertion failed"
                failures += 1
            print(f"{verdict:<7} {name.removeprefix('check_').replace('_', ' '):<34} {text}", flush=True)
    total = len(_NAMES)
    print(f"\n{total - failures} of {total} checks passed in {time.perf_counter() - started:.1f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
