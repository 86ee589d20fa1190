"""What sessions cost: agents with many turns, against the same prompts and completions of the engine alone.

    python benchmarks/bench_sessions.py [--model smollm2-135m] [--sessions 64] [--turns 20] [--tokens 16] [--rounds 1]

Each round, interleaved: the engine alone, the gateway without sessions, and the gateway with sessions (on disk). Agents
are threads of another process, as they are in a run, on an HTTP client of the standard library: what is measured is the
gateway. All decode greedily, so that every side computes the same tokens. ``cpu``: the same in processor time of this
process. Then the memory of an open session, by ``tracemalloc``. Prints medians in seconds and ratios as JSON.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the training command; read when torch is imported

import argparse
import asyncio
import gc
import itertools
import json
import multiprocessing
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from atropos_verl.assets import SMOLLM2, demo_model_path, smollm2_path
from atropos_verl.gateway.app import GatewayServer, create_app
from atropos_verl.gateway.sessions import SessionStore
from atropos_verl.types import GenerationRequest

QUESTION = "What is {} plus {}?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"Hugging Face directory, or {SMOLLM2}; default: the demo model")
    parser.add_argument("--sessions", type=int, default=64)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=16, help="of each completion")
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()

    from transformers import AutoTokenizer

    from atropos_verl.engine.embedded import TransformersEngine

    path = smollm2_path() if options.model == SMOLLM2 else Path(options.model or demo_model_path())
    tokenizer = AutoTokenizer.from_pretrained(str(path))
    seconds: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    with (
        tempfile.TemporaryDirectory() as directory,
        TransformersEngine.from_pretrained(path, max_running=options.sessions, max_context_len=2048) as engine,
    ):
        store = SessionStore(Path(directory))
        app = create_app(engine, tokenizer, model_name="m", sessions=store)
        with GatewayServer(app) as server, multiprocessing.get_context("spawn").Pool(1) as agents:
            host = server.url.removeprefix("http://")
            sides: dict[str, Callable[[range], object]] = {
                "engine": lambda numbers: asyncio.run(talk_to_engine(engine, tokenizer, numbers, options)),
                "gateway": lambda numbers: agents.apply(everybody, (host, numbers, options, False)),
                "sessions": lambda numbers: agents.apply(everybody, (host, numbers, options, True)),
            }
            # Numbers of four digits: the engine has computed none of the prompts before.
            firsts = itertools.count(1000, options.sessions)
            for name, side in [("warm", sides["sessions"]), *[*sides.items()] * options.rounds]:
                first = next(firsts)
                began, cpu_began = time.perf_counter(), time.process_time()
                side(range(first, first + (2 if name == "warm" else options.sessions)))
                seconds.setdefault(name, []).append(time.perf_counter() - began)
                cpu.setdefault(name, []).append(time.process_time() - cpu_began)
        store.close()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    used = {name: statistics.median(values) for name, values in cpu.items()}
    ratios = {f"{name}_to_engine": medians[name] / medians["engine"] for name in ("gateway", "sessions")}
    ratios |= {f"{name}_to_engine_cpu": used[name] / used["engine"] for name in ("gateway", "sessions")}
    turn_ms = 1000 * (used["sessions"] - used["engine"]) / (options.sessions * options.turns)
    figures = {"seconds": seconds, "medians": medians, "cpu_medians": used, **ratios, "cpu_ms_per_turn": turn_ms}
    print(json.dumps({**vars(options), **figures}, indent=2))
    print(json.dumps({"opened": memory(options.turns, 1000), "short_turns": memory(1000, 20, count=20)}, indent=2))


def everybody(host: str, numbers: range, options: Any, recorded: bool) -> None:
    """All agents, in their process."""
    with ThreadPoolExecutor(len(numbers)) as pool:
        list(pool.map(partial(talk, host, options, recorded), numbers))


def talk(host: str, options: Any, recorded: bool, number: int) -> None:
    """One agent."""
    connection, path = HTTPConnection(host, timeout=3600), "/v1/chat/completions"

    def post(path: str, body: dict[str, Any]) -> Any:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        assert answer.status == 200, text
        return json.loads(text)

    if recorded:
        opened = post("/sessions", {"group": "g"})
        path = f"/s/{opened['id']}{path}"
    messages: list[dict[str, str]] = []
    for turn in range(options.turns):
        messages.append({"role": "user", "content": question(number, turn)})
        body = {"messages": messages, "max_tokens": options.tokens, "temperature": 0, "ignore_eos": True}
        messages.append(post(path, body)["choices"][0]["message"])
    if recorded:
        post(f"/sessions/{opened['id']}/reward", {"reward": 1})


async def talk_to_engine(engine: Any, tokenizer: Any, numbers: range, options: Any) -> None:
    await asyncio.gather(*(talk_to_engine_of(engine, tokenizer, number, options) for number in numbers))


async def talk_to_engine_of(engine: Any, tokenizer: Any, number: int, options: Any) -> None:
    """The same prompts by hand: what was sampled, the end of the turn, and the next question."""
    ids: list[int] = []
    for turn in range(options.turns):
        end = "<|im_end|>\n" if turn else ""
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question(number, turn)}], tokenize=False, add_generation_prompt=True
        )
        # Some templates begin with a system message of their own.
        text = end + (text[text.rindex("<|im_start|>user") :] if turn else text)
        ids += tokenizer.encode(text, add_special_tokens=False)
        request = GenerationRequest(
            prompt_token_ids=tuple(ids), max_tokens=options.tokens, temperature=0.0, ignore_eos=True
        )
        [generation] = await engine.agenerate(request)
        ids += generation.token_ids


def question(number: int, turn: int) -> str:
    return QUESTION.format(number, turn)


def memory(turns: int, tokens: int, count: int = 200) -> dict[str, float]:
    """Bytes of an open session with ``turns`` turns of ``tokens`` each, half of them sampled, and the bound."""
    import secrets

    import numpy as np

    from atropos_verl.gateway.lineages import StoredTurn
    from atropos_verl.gateway.sessions import Opening, Session, SessionRecord

    def opened() -> Session:
        about: dict[str, Any] = {"opening": Opening(group="g"), "created": 0.0}
        session = Session(0, SessionRecord(id=secrets.token_hex(12), secret=secrets.token_urlsafe(24), **about))
        for number in range(turns):
            ids = np.random.default_rng(number).integers(0, 50_000, tokens // 2).astype("<i4").tobytes()
            place: dict[str, Any] = {"parent": number - 1 if number else None, "messages": 2 * number + 2}
            text: dict[str, Any] = {"characters": 4000 * (number + 1), "text_hash": secrets.randbits(62)}
            made: dict[str, Any] = {"sampled": bytes(bytearray(ids)), "logprobs": b"", "runs": ((3, tokens // 2),)}
            ends: dict[str, Any] = {"finish_reason": "stop", "has_end": True, "constrained": False, "reason": None}
            asked: dict[str, Any] = {"request": secrets.token_hex(12), "digest": secrets.token_bytes(16)}
            asked["idempotency_key"] = None
            turn = StoredTurn(prompt=ids, key=secrets.randbits(62), said=(), **place, **text, **made, **ends, **asked)
            session.tree.add(turn, 1)
        return session

    gc.collect()
    tracemalloc.start()
    sessions = [opened() for _ in range(count)]
    used = tracemalloc.get_traced_memory()[0] / count
    tracemalloc.stop()
    assert len(sessions) == count
    return {"turns": turns, "tokens": tokens * turns, "bytes": used, "bound": 65536 + 12 * tokens * turns}


if __name__ == "__main__":
    main()
