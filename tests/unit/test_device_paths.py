"""No tensor is on the wrong device, and the processor waits for the device only where docs/internals.md says so."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "support" / "lookalike.py"
MICRO_BATCH = {
    "nonzero _head_request": 1,
    "unique_dim _head_request": 1,
    "_local_scalar_dense find_packed_sequence_indices": 1,
    "_local_scalar_dense _per_sequence": 1,  # with off_policy.importance=sequence only
    "tolist _means": 1,
    "_local_scalar_dense __call__": 1,
}
TOKEN = {"tolist _sample_and_push": 1}


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, int]]:
    answer = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=200, check=False)
    assert answer.returncode == 0, answer.stderr[-3000:]
    return json.loads(answer.stdout)  # type: ignore[no-any-return]


def _waits(where: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in where.items() if not name.startswith("copy to the GPU")}


@pytest.mark.parametrize("name", ["training, weighted", "training, clipped ratio"])
def test_a_micro_batch_waits_for_the_device_at_these_places(found: dict[str, dict[str, int]], name: str) -> None:
    assert _waits(found[name]) == MICRO_BATCH


def test_a_token_of_the_engine_takes_one_wait_and_so_does_a_prefill(found: dict[str, dict[str, int]]) -> None:
    for name in ("prefill", "prefill behind a stored prefix", "decode", "decode, the same rows"):
        assert _waits(found[name]) == TOKEN, name
    assert sum(found["decode, the same rows"].values()) == 4  # tokens, positions and random numbers go to the device


def test_the_probe_and_the_padded_loss_run_on_one_device(found: dict[str, dict[str, int]]) -> None:
    padded = {"nonzero compute_advantage_weighted_sft_loss": 1, "tolist _means": 1}
    assert _waits(found["padded loss"]) == padded
    assert found["probe"]


def test_tensors_of_two_devices_are_refused(found: dict[str, str]) -> None:
    assert found["mixed"] == "add: tensors of both devices, [(3,)]"
