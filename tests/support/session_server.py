"""A gateway with sessions that can be killed: ``python -m support.session_server DIRECTORY PORT``.

This process has everything imported, and forks one that serves; when that one dies, it forks the next. ``child`` in the
directory holds the pid of the one that serves.
"""

import itertools
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from atropos_verl.gateway.app import GatewayServer, create_app
from atropos_verl.gateway.sessions import SessionStore
from atropos_verl.types import GenerationRequest
from support.sessions import OracleEngine
from support.tiny_model import build_tiny_tokenizer

TOKENIZER = build_tiny_tokenizer()


def reply(request: GenerationRequest, index: int, numbers: Iterator[int] = itertools.count()) -> list[int]:  # noqa: B008
    """A text that no other process and no other request has."""
    text = f"{os.getpid()}.{next(numbers)} " + "x" * random.randrange(30) + "<|im_end|>"
    return list(TOKENIZER.encode(text, add_special_tokens=False))


def serve(directory: Path, port: int) -> None:
    engine = OracleEngine(reply, token_delay=0.001)
    app = create_app(engine, TOKENIZER, model_name="tiny", api_key="K", sessions=SessionStore(directory / "gateway"))
    server = GatewayServer(app, port=port)
    server.start(timeout=60.0)
    while True:
        time.sleep(3600)


def main() -> None:
    directory, port = Path(sys.argv[1]), int(sys.argv[2])
    while os.getppid() != 1:
        child = os.fork()
        if child == 0:
            serve(directory, port)
        (directory / "child.tmp").write_text(str(child))
        (directory / "child.tmp").replace(directory / "child")
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
