"""The ledger's hot paths: recording what was generated (also with its store on disk), looking a batch up, restarting.

Baselines, in the same run and interleaved: for recording, ``tuple`` → list of (id, logprob, version) per token in plain
Python under a dictionary of the prompt; for looking up, comparing each sequence with every remembered one of its prompt
token by token. The store's floor is one ``write`` of the same bytes; ``stored`` ends when its thread has written.
Prints medians and ratios as JSON.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from atropos_verl.provenance.attribution import SequenceQuery, look_up
from atropos_verl.provenance.ledger import Ledger
from atropos_verl.types import Generation

PROMPT = 256


def make(groups: int, size: int, tokens: int, seed: int) -> list[tuple[tuple[int, ...], list[Generation]]]:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(groups):
        prompt = tuple(rng.integers(0, 150_000, PROMPT).tolist())
        generations = [
            Generation(
                token_ids=tuple(rng.integers(0, 150_000, tokens).tolist()),
                logprobs=tuple((-rng.random(tokens)).tolist()),
                finish_reason="stop",
                policy_version_runs=((3, tokens // 2), (4, tokens - tokens // 2)),
            )
            for _ in range(size)
        ]
        made.append((prompt, generations))
    return made


class PlainLedger:
    """The same knowledge in lists and dictionaries."""

    def __init__(self) -> None:
        self.spans: dict[tuple[int, ...], list[list[tuple[int, float, int]]]] = {}

    def record(self, prompt: tuple[int, ...], generations: list[Generation]) -> None:
        for generation in generations:
            versions = [version for version, count in generation.policy_version_runs for _ in range(count)]
            rows = list(zip(generation.token_ids, generation.logprobs, versions, strict=True))
            self.spans.setdefault(prompt, []).append(rows)

    def find(self, tokens: list[int], mask: list[bool]) -> list[tuple[int, float, int]]:
        start = mask.index(True)
        for rows in self.spans.get(tuple(tokens[:start]), []):
            if all(row[0] == token for row, token in zip(rows, tokens[start:], strict=True)):
                return rows
        raise LookupError("not found")


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--groups", type=int, default=32)
    parser.add_argument("--size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dir", help="where the log is kept, for disks other than the temporary directory's")
    options = parser.parse_args()
    count = options.groups * options.size
    names = (
        "record",
        "record_logged",
        "stored",
        "write_alone",
        "record_plain",
        "look_up",
        "look_up_plain",
        "consumed",
        "restart",
    )
    times: dict[str, list[float]] = {name: [] for name in names}
    nbytes = 0
    folder = tempfile.TemporaryDirectory(dir=options.dir)
    for number in range(options.rounds):
        made = make(options.groups, options.size, options.tokens, number)
        ledger, plain = Ledger(), PlainLedger()
        times["record"].append(seconds(lambda m=made, x=ledger: [x.record(p, g) for p, g in m]))
        directory = Path(folder.name) / str(number)
        logged = Ledger()
        logged.persist(directory)
        futures: list[Any] = []
        times["record_logged"].append(
            seconds(lambda m=made, x=logged, f=futures: f.extend(x.record(p, g) for p, g in m))
        )
        times["stored"].append(times["record_logged"][-1] + seconds(lambda f=futures: [w.result() for w in f]))
        on_disk = sum(path.stat().st_size for path in directory.iterdir())
        bodies = [bytes(on_disk // options.groups)] * options.groups
        with (Path(folder.name) / "alone").open("wb", buffering=0) as file:
            times["write_alone"].append(seconds(lambda f=file, b=bodies: [os.write(f.fileno(), body) for body in b]))
        times["record_plain"].append(seconds(lambda m=made, x=plain: [x.record(p, g) for p, g in m]))
        sequences = [(i, p, g) for i, (p, made_here) in enumerate(made) for g in made_here]
        queries = [
            SequenceQuery(
                token_ids=np.array([*p, *g.token_ids]),
                loss_mask=np.arange(PROMPT + options.tokens) >= PROMPT,
                group=i,
            )
            for i, p, g in sequences
        ]
        rows = [(q.token_ids.tolist(), q.loss_mask.tolist()) for q in queries]
        matches: list[Any] = []
        times["look_up"].append(seconds(lambda x=ledger, q=queries, m=matches: m.extend(look_up(x, q))))
        times["look_up_plain"].append(seconds(lambda x=plain, r=rows: [x.find(t, m) for t, m in r]))
        assert all(match.unmatched_spans == 0 for match in matches)
        nbytes = ledger.stats().bytes
        orders = [order for match in matches for order in match.records]
        times["consumed"].append(seconds(lambda x=logged, o=orders: x.consumed(o)))
        logged.close()
        after = Ledger()
        times["restart"].append(seconds(lambda x=after, d=directory: x.persist(d, 4)))
        assert len(after) == count and after.stats().bytes == nbytes
        after.close()
    medians = {name: statistics.median(values) for name, values in times.items()}
    tokens = count * options.tokens
    print(
        json.dumps(
            {
                "sequences": count,
                "generated_tokens": tokens,
                "rounds": options.rounds,
                "seconds": medians,
                "record_microseconds_per_completion": 1e6 * medians["record"] / count,
                "look_up_microseconds_per_sequence": 1e6 * medians["look_up"] / count,
                "log_microseconds_per_completion": 1e6 * (medians["record_logged"] - medians["record"]) / count,
                "stored_microseconds_per_completion": 1e6 * medians["stored"] / count,
                "log_over_record": medians["record_logged"] / medians["record"] - 1,
                "log_over_one_write_of_its_bytes": (medians["record_logged"] - medians["record"])
                / medians["write_alone"],
                "log_bytes_per_generated_token": on_disk / tokens,
                "consumed_microseconds_per_batch": 1e6 * medians["consumed"],
                "restart_microseconds_per_completion": 1e6 * medians["restart"] / count,
                "record_speedup_over_plain_python": medians["record_plain"] / medians["record"],
                "look_up_speedup_over_plain_python": medians["look_up_plain"] / medians["look_up"],
                "bytes_per_generated_token": nbytes / tokens,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
