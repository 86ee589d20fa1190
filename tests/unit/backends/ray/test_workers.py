"""The saved policy of separate_async is a copy, also where "to the CPU" moves nothing."""

from __future__ import annotations

import torch

from atropos_verl.backends.ray.workers import own_copies


def test_what_was_saved_does_not_change_with_the_weights() -> None:
    model = torch.nn.Linear(2, 2)

    def save(module: torch.nn.Module) -> tuple[dict[str, tuple[torch.Tensor, str]], str]:
        return {name: (p.detach().cpu(), "own spec") for name, p in module.named_parameters()}, "spec"

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state, spec = own_copies(save)(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert spec == "spec"
    assert set(state) == set(before)
    for name, (tensor, own) in state.items():
        assert torch.equal(tensor, before[name])
        assert own == "own spec"
