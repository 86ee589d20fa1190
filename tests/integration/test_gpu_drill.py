"""The drill for a GPU runs to its end, on the CPU and small."""

import json
import subprocess
import sys
from pathlib import Path

DRILL = Path(__file__).parents[1] / "gpu" / "drill.py"


def test_every_section_of_the_drill_runs_and_its_comparisons_hold(tmp_path: Path) -> None:
    out = tmp_path / "drill.json"
    sections = "loop,sync,engine,prefixes,lm_head,attention"  # not the tests marked gpu, which would be skipped
    command = [sys.executable, str(DRILL), "--device", "cpu", "--tiny", "--out", str(out), "--only", sections]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=240)
    found = json.loads(answer.stdout)
    assert (answer.returncode, found["failed"]) == (0, []), answer.stderr[-2000:]
    assert json.loads(out.read_text()) == found
    loop = found["loop"]
    assert loop["steps"] == 20 and loop["trained"] and loop["canary, largest"] < 1e-3
    assert set(loop["peak memory by phase, MB"]) == {"generate", "sync", "train"}
    assert found["prefixes"]["equal"] and found["prefixes"]["shares"] and found["lm_head"]["as exact as naive"]
    assert found["sync"]["swap, seconds that generation stood still"] is not None
