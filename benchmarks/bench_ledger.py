"""The ledger's hot paths: recording what was generated (also with its store on disk), looking a batch up, restarting.

Baselines, in the same run and interleaved: for recording, ``tuple`` → list of (id, logprob, version) per token in plain
Python under a dictionary of the prompt; for looking up, comparing each sequence with every remembered one of its prompt
token by token. The store's floor is one ``write`` of the same bytes; ``stored`` ends when its thread has written.
``repair`` (with ``--tokenizer``): completions as text that was tokenised anew, looked up by ids alone, and with the
repair that gives them back their ids (the texts of new records are indexed in it). Prints medians and ratios as JSON.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from atropos_verl.provenance.attribution import SequenceQuery, look_up
from atropos_verl.provenance.ledger import Ledger
from atropos_verl.provenance.repair import Repairer
from atropos_verl.token_texts import TokenTexts
from atropos_verl.types import Generation

PROMPT = 256


def make(
    groups: int, size: int, tokens: int, seed: int, vocabulary: Sequence[int] = range(150_000)
) -> list[tuple[tuple[int, ...], list[Generation]]]:
    rng, ids = np.random.default_rng(seed), np.array(vocabulary)
    shares = 1.0 / np.arange(10, len(ids) + 10)  # the lower the id of a BPE token, the more frequent it is (Zipf)
    draw = partial(rng.choice, ids, p=shares / shares.sum())
    made = []
    for _ in range(groups):
        prompt = tuple(draw(PROMPT).tolist())
        generations = [
            Generation(
                token_ids=tuple(draw(tokens).tolist()),
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


class Retokenised:
    """The benchmark of ``repair``: completions of random tokens, none special, each of whole characters."""

    def __init__(self, path: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.texts = TokenTexts(self.tokenizer)
        size = len(self.tokenizer)
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.get_added_vocab().values())
        self.vocabulary = [i for i in range(size) if i not in special and "\ufffd" not in self.texts[i][0]]

    def encode(self, ids: Sequence[int]) -> list[int]:
        return list(self.tokenizer.encode(self.tokenizer.decode(ids), add_special_tokens=False))

    def round(self, options: argparse.Namespace, number: int, times: dict[str, list[float]]) -> None:
        made = make(options.groups, options.size, options.tokens, number, self.vocabulary)
        ledger = Ledger()
        queries, exact = [], []
        for group, (found, generations) in enumerate(made):
            prompt = tuple(self.encode(found))
            ledger.record(prompt, generations)
            for generation in generations:
                for into, ids in ((exact, generation.token_ids), (queries, self.encode(generation.token_ids))):
                    mask = np.arange(len(prompt) + len(ids)) >= len(prompt)
                    row = np.array([*prompt, *ids])
                    into.append(SequenceQuery(token_ids=row, loss_mask=mask, group=group, is_text=True))
        repairer = Repairer(ledger, self.texts)
        times["look_up_exact"].append(processor_seconds(lambda: look_up(ledger, exact)))
        times["look_up_exact_with_repair"].append(processor_seconds(lambda: look_up(ledger, exact, repairer)))
        times["look_up_text"].append(processor_seconds(lambda: look_up(ledger, queries)))
        matches: list[Any] = []
        times["repair_text"].append(processor_seconds(lambda: matches.extend(look_up(ledger, queries, repairer))))
        times["repair_text_again"].append(processor_seconds(lambda: look_up(ledger, queries, repairer)))
        assert all(match.unmatched_spans == 0 and match.repaired_spans == 1 for match in matches)


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def processor_seconds(work: Callable[[], Any]) -> float:
    """Of this thread: what else runs on the machine does not count."""
    started = time.thread_time()
    work()
    return time.thread_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--groups", type=int, default=32)
    parser.add_argument("--size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dir", help="where the log is kept, for disks other than the temporary directory's")
    parser.add_argument("--tokenizer", help="directory of a tokenizer with merges, for the figures of repair")
    options = parser.parse_args()
    retokenised = options.tokenizer and Retokenised(options.tokenizer)
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
        "look_up_exact",
        "look_up_exact_with_repair",
        "look_up_text",
        "repair_text",
        "repair_text_again",
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
            seconds(lambda m=made, x=logged, f=futures: f.extend(x.record(p, g)[0] for p, g in m))
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
        if retokenised:
            retokenised.round(options, number, times)
    medians = {name: statistics.median(values) for name, values in times.items() if values}
    repair = {}
    if retokenised:
        repair = {
            "exact_with_repair_over_without": medians["look_up_exact_with_repair"] / medians["look_up_exact"],
            "repair_over_look_up_of_the_same_text": medians["repair_text"] / medians["look_up_text"],
            "repair_again_over_look_up_of_the_same_text": medians["repair_text_again"] / medians["look_up_text"],
            "repair_over_look_up_of_exact_ids": medians["repair_text"] / medians["look_up_exact"],
            "repair_microseconds_per_sequence": 1e6 * medians["repair_text"] / count,
        }
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
                **repair,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
