"""What ``eval.every`` costs a run with ``mode=overlap``, against the same run without it.

    python benchmarks/bench_evaluation.py [--seeds 0,1,2] [--steps 84] [--every 40] [--latency 0.344]

Both sides run in turn, as in ``bench_overlap.py``, whose figures these are. A copy of the engine answers the 512
questions of an evaluation while training goes on. ``token_share`` is the evaluations' share of all tokens that were
generated; ``loss`` is the part of the groups per second that they cost, the median over seeds; ``bound`` is
``token_share`` + 0.05.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from bench_overlap import _run
from transformers import AutoTokenizer

from atropos_verl.assets import demo_model_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=84)
    parser.add_argument("--every", type=int, default=40)
    parser.add_argument("--skip", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--latency", type=float, default=0.344)
    parser.add_argument("words", nargs="*", help="further key=value words for both sides")
    options = parser.parse_args()
    options.no_eval = True
    sides = {"without": ("mode=overlap",), "evaluated": ("mode=overlap", f"eval.every={options.every}")}
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    shares = []
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    with tempfile.TemporaryDirectory(prefix="atropos-verl-evaluation-") as directory:
        for number, seed in enumerate(options.seeds.split(",")):
            for side in sides if number % 2 == 0 else reversed(sides):
                run_dir = Path(directory) / f"{side}-{seed}"
                found = _run(options, run_dir, sides[side], int(seed), options.latency, options.steps)
                sys.stderr.write(f"seed {seed} {side}: {json.dumps(found)}\n")
                speeds[side].append(found["groups_per_second"])
                if side == "evaluated":
                    shares.append(_token_share(run_dir, tokenizer))
    losses = [1 - b / a for a, b in zip(*speeds.values(), strict=True)]
    result = {
        "groups_per_second": {side: statistics.median(found) for side, found in speeds.items()},
        "losses": [round(loss, 3) for loss in losses],
        "loss": round(statistics.median(losses), 3),
        "token_share": round(statistics.median(shares), 3),
        "bound": round(statistics.median(shares) + 0.05, 3),
    }
    print(json.dumps(result, indent=2))


def _token_share(run_dir: Path, tokenizer: object) -> float:
    answers = [
        json.loads(line)["answer"]
        for path in run_dir.glob("eval/step_*/samples.jsonl")
        for line in path.read_text().splitlines()
    ]
    evaluated = sum(len(ids) + 1 for ids in tokenizer(answers)["input_ids"])  # type: ignore[operator]
    trained = sum(json.loads(line)["data/trained_tokens"] for line in (run_dir / "metrics.jsonl").open())
    return float(evaluated / (evaluated + trained))


if __name__ == "__main__":
    main()
