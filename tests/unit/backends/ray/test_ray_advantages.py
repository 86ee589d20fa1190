"""The advantages that reach verl's optimiser: those of the local backend, to the last bit, whatever order verl has."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from atropos_verl.backends.ray.transfer import ADVANTAGES, finish_batch, make_rows
from atropos_verl.protocol.wire import decode_batch
from atropos_verl.training.advantages import RunningMoments
from atropos_verl.training.samples import build_samples, collect_samples
from atropos_verl.types import SampleSettings


def batch(seed: int = 0, groups: int = 5) -> bytes:
    """Groups of 1-4 sequences, some with token-level advantages, some zeroed, of two turns."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(groups):
        size = number % 4 + 1
        tokens = [rng.integers(1, 90, int(rng.integers(6, 12))).tolist() for _ in range(size)]
        masks = [[-100, -100, *row[2:4], -100, *row[5:]] for row in tokens]
        advantages = [rng.normal(size=len(row)).tolist() if rng.random() < 0.4 else None for row in tokens]
        overrides = [{"set_advantage_to_zero": bool(rng.random() < 0.3)} for _ in tokens]
        scores = rng.normal(size=size).tolist()
        made.append(
            {"tokens": tokens, "masks": masks, "scores": scores, "advantages": advantages, "overrides": overrides}
        )
    return json.dumps({"batch": made}).encode()


def stored(body: bytes, shuffle: int = 0, padding: int = 2) -> tuple[dict[str, Any], list[str], list[dict[str, Any]]]:
    """Rows as they come back from TransferQueue: in another order, with verl's padding."""
    groups = decode_batch(body)
    report, advantages = collect_samples(groups)
    sizes = {group.group_id: len(group) for group in groups}
    rows = make_rows("slot", report.samples, advantages, served=0, global_steps=1, group_sizes=sizes)
    rows = [rows[i] for i in np.random.default_rng(shuffle).permutation(len(rows))]
    masks = [row.fields["response_mask"] for row in rows] + [torch.zeros(1, dtype=torch.int64)] * padding
    # verl copies the fields of the first row into padding, our own at their full length.
    own = [row.fields[ADVANTAGES] for row in rows] + [rows[0].fields[ADVANTAGES]] * padding
    verls = [torch.full((mask.numel(),), 7.0) for mask in masks]
    columns = {"response_mask": masks, "advantages": verls, ADVANTAGES: own}
    values = {name: torch.nested.as_nested_tensor(column, layout=torch.jagged) for name, column in columns.items()}
    keys = [row.key for row in rows] + [f"pad_{i}_0" for i in range(padding)]
    tags = [row.tag for row in rows] + [{**rows[0].tag, "is_padding": True}] * padding
    return values, keys, tags


@pytest.mark.parametrize("normalization", ["none", "batch", "global"])
@pytest.mark.parametrize("clipping", [None, (-0.7, 0.9)])
def test_they_equal_the_local_backends_exactly(normalization: str, clipping: tuple[float, float] | None) -> None:
    ours, theirs = RunningMoments(), RunningMoments()
    for seed in range(3):  # "global" carries statistics from batch to batch
        body = batch(seed)
        settings = SampleSettings(normalization=normalization, clipping=clipping)
        expected = build_samples(decode_batch(body), settings, running=theirs).samples
        values, keys, tags = stored(body, shuffle=seed)
        finished, _ = finish_batch(
            values, keys, tags, from_data=True, normalization=normalization, clipping=clipping, running=ours
        )
        rows = zip(keys, finished.unbind(), strict=True)
        found = {int(key.rsplit("_", 2)[1]): row for key, row in rows if not key.startswith("pad")}
        assert len(found) == len(expected) > 8
        for index, sample in enumerate(expected):
            start = int(np.argmax(sample.loss_mask))
            want = torch.from_numpy(sample.advantages[start:].astype(np.float32))
            assert torch.equal(found[index], want), (index, found[index], want)
    assert ours.state_dict() == theirs.state_dict()


def test_columnof_padding_are_zero_and_in_no_statistic() -> None:
    settings: dict[str, Any] = {"from_data": True, "normalization": "batch", "clipping": None, "running": None}
    (without, _), (finished, _) = (finish_batch(*stored(batch(1), padding=n), **settings) for n in (0, 5))
    rows = finished.unbind()
    assert all(float(row.abs().sum()) == 0.0 for row in rows[-5:])
    assert all(torch.equal(a, b) for a, b in zip(rows[:-5], without.unbind(), strict=True))


def test_verls_own_estimate_is_kept_but_for_what_the_environment_says() -> None:
    """KL in reward, or another estimator of verl: its advantages, with overrides, zeros and groups of one put right."""
    values, keys, tags = stored(batch(2), padding=0)
    finished, _ = finish_batch(values, keys, tags, from_data=False, normalization="none", clipping=None, running=None)
    kinds = set()
    columns = (nested.unbind() for nested in (finished, values["response_mask"], values[ADVANTAGES]))
    for row, mask, own, tag in zip(*columns, tags, strict=True):
        if tag["advantage_to_zero"] or (tag["group_size"] == 1 and not tag["advantage_replaced"]):
            want, kind = torch.zeros(mask.numel()), "zero"
        elif tag["advantage_replaced"]:
            want, kind = own.float() * mask, "replaced"
        else:
            want, kind = 7.0 * mask, "verl's"
        kinds.add(kind)
        assert torch.equal(row, want.float()), kind
    assert kinds == {"zero", "replaced", "verl's"}
