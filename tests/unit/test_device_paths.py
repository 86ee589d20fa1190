"""No tensor is on the wrong device, and the processor waits for the device only where docs/internals.md says so."""

import json
import subprocess
import sys
from pathlib import Path

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


def test_the_processor_waits_for_the_device_at_these_places() -> None:
    answer = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=900)
    assert answer.returncode == 0, answer.stderr[-3000:]
    found = json.loads(answer.stdout)
    waits = {
        **dict.fromkeys(("training, weighted", "training, clipped ratio"), MICRO_BATCH),
        **dict.fromkeys(("prefill", "prefill behind a stored prefix", "decode", "decode, the same rows"), TOKEN),
        "padded loss": {"nonzero compute_advantage_weighted_sft_loss": 1, "tolist _means": 1},
    }
    copies = {name: {at: n for at, n in found[name].items() if at.startswith("copy to the GPU")} for name in waits}
    assert {name: found[name] for name in waits} == {name: {**waits[name], **copies[name]} for name in waits}
    assert sum(copies["decode, the same rows"].values()) == 3, "tokens, positions and random numbers"
    assert found["probe"]
    assert found["mixed"] == "add: tensors of both devices, [(3,)]"
