"""verl's data loaders, where there is no dataset: environments choose the prompts."""

from __future__ import annotations

from typing import Any

from torchdata.stateful_dataloader import StatefulDataLoader
from verl.trainer.ppo.utils import create_rl_dataset
from verl.utils.dataset.rl_dataset import collate_fn

__all__ = ["NoPrompts", "prompt_loader"]


class NoPrompts:
    """In the place of verl's training set and its loader: empty, without state."""

    def __len__(self) -> int:
        return 0

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state


def prompt_loader(config: Any, tokenizer: Any, processor: Any) -> tuple[Any, Any]:
    """verl's validation set and loader from ``data.val_files``; two ``NoPrompts`` where none is given."""
    data = config.data
    if not data.val_files:
        return NoPrompts(), NoPrompts()
    dataset = create_rl_dataset(
        data.val_files, data, tokenizer, processor, is_train=False, max_samples=data.get("val_max_samples", -1)
    )
    loader = StatefulDataLoader(
        dataset=dataset,
        batch_size=data.val_batch_size or len(dataset),
        num_workers=data.dataloader_num_workers,
        shuffle=data.get("validation_shuffle", True),
        drop_last=False,
        collate_fn=collate_fn,
    )
    return dataset, loader
