"""Which rows the LM head is asked for: masks over the whole sequence, and verl V1's over the response only."""

from __future__ import annotations

import torch

from atropos_verl import verl_plugin

verl_plugin.activate("cpu")

from atropos_verl.verl_plugin.engines import _head_request  # noqa: E402 - verl picks its platform at import


def nested(*rows: list[int]) -> torch.Tensor:
    return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)


def test_a_mask_of_the_response_is_the_end_of_the_sequence() -> None:
    ids = nested([5, 6, 7, 8], [1, 2, 3], [4, 4, 4, 4, 4])
    whole = _head_request(ids, nested([0, 0, 1, 1], [0, 1, 0], [0, 0, 0, 0, 0]), torch.ones(3), row_length=None)
    response = _head_request(ids, nested([1, 1], [1, 0], [0]), torch.ones(3), row_length=None)
    assert whole.labels.tolist() == response.labels.tolist() == [7, 8, 2]
    assert whole.rows.tolist() == response.rows.tolist() == [1, 2, 4]
