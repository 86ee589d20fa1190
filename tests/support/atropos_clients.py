"""atroposlib's own clients of an inference server, pointed at a gateway."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

HI = [{"role": "user", "content": "hi"}]
HI_PROMPT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
"""The tiny tokenizer's template applied to ``HI``."""


@asynccontextmanager
async def server_manager(kind: str, url: str, model_dir: Path, *, api_key: str = "none") -> AsyncIterator[Any]:
    """A ``ServerManager`` with one server of ``kind`` at the gateway ``url``; its health check ends with it."""
    from atroposlib.envs.server_handling.server_baseline import APIServerConfig
    from atroposlib.envs.server_handling.server_manager import ServerManager

    named = {"server_type": kind, "base_url": url if kind == "trl" else f"{url}/v1", "model_name": str(model_dir)}
    manager = ServerManager([APIServerConfig(**named, api_key=api_key, timeout=30)])
    try:
        yield manager
    finally:
        task = manager.servers[0].check_task
        if task is not None:
            task.cancel()
            await asyncio.wait({task}, timeout=5.0)


@asynccontextmanager
async def managed_server(
    kind: str, url: str, model_dir: Path, tokenizer: Any, *, api_key: str = "none"
) -> AsyncIterator[Any]:
    """A ``ManagedServer`` of such a manager: it keeps tokens, masks and logprobs of what is asked through it."""
    async with (
        server_manager(kind, url, model_dir, api_key=api_key) as manager,
        manager.managed_server(tokenizer=tokenizer) as managed,
    ):
        yield managed
