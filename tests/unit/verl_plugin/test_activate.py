"""Choosing verl's platform, in processes of their own: verl keeps its choice for a process's life."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_PLATFORM = "from verl.utils.device import get_device_name; print(get_device_name())"


def _run(code: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VERL_")}
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)


@pytest.mark.parametrize("first", ["", "import verl.utils.tensordict_utils; "], ids=["verl later", "verl first"])
def test_cpu_is_chosen_whether_or_not_verl_is_there(first: str) -> None:
    done = _run(f"{first}from atropos_verl import verl_plugin; verl_plugin.activate('cpu'); {_PLATFORM}")
    assert done.stdout.split() == ["cpu"], done.stderr[-2000:]


def test_a_choice_made_before_is_refused_by_name() -> None:
    code = (
        "import os; os.environ['VERL_PLATFORM'] = 'nvidia'\n"
        f"{_PLATFORM}\n"
        "from atropos_verl import verl_plugin\n"
        "verl_plugin.activate('cpu')"
    )
    done = _run(code)
    assert done.returncode == 1
    assert "verl has already picked 'cuda'" in done.stderr
