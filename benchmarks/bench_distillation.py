"""How many sequences a student needs to reach its teacher's held-out score: by distillation, and by GRPO.

    python benchmarks/bench_distillation.py [--seeds 0,1] [--steps 40] [--every 2] [--top-k 16]

The teacher is the demo model after ``--steps`` steps of GRPO on the demo task. The students begin as the demo model
again, with another seed, 64 sequences a step: ``grpo``; ``repeated`` is GRPO with two passes of four mini-batches over
each batch; ``distilled`` is ``distill.alone=true`` from that teacher on the student's own rollouts, with the same
passes. All are evaluated on the 512 held-out words, every ``--every`` steps, the distilled one every step. ``goal`` is
the teacher's score - 0.03; ``sequences`` are those of the first evaluation that reaches it (null: none did). ``ratio``:
those of ``distilled`` over those of the better GRPO. The bar: ≤ 1/3.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from atropos_verl.assets import demo_model_path

MAIN = Path(__file__).parents[1] / "recipe" / "atropos" / "main_atropos.py"
BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=2)
    parser.add_argument("--top-k", type=int, default=16)
    options = parser.parse_args()
    grpo = (f"steps={options.steps}", "loss.type=grpo")
    with tempfile.TemporaryDirectory(prefix="atropos-verl-distillation-") as directory:
        root = Path(directory)
        for seed in map(int, options.seeds.split(",")):
            taught = _run(root / f"teacher-{seed}", seed, *grpo, f"save_freq={options.steps}")
            goal = taught["held_out_after"] - 0.03
            teacher = _export(root / f"teacher-{seed}", options.steps, root / f"model-{seed}")
            repeated = ("loss.ppo_mini_batches=4", "loss.ppo_epochs=2")
            alone = ("steps=8", "distill.alone=true", f"distill.teacher={teacher}", f"distill.top_k={options.top_k}")
            sides = {
                "grpo": (*grpo, f"eval.every={options.every}"),
                "repeated": (*grpo, *repeated, f"eval.every={options.every}"),
                "distilled": (*alone, *repeated, "eval.every=1"),
            }
            scores = {side: _scores(_run(root / f"{side}-{seed}", seed + 100, *own)) for side, own in sides.items()}
            found = {side: _first(own, goal) for side, own in scores.items()}
            fewest = min((count for side, count in found.items() if side != "distilled" and count), default=None)
            ratio = found["distilled"] / fewest if found["distilled"] and fewest else None
            result = {"seed": seed, "goal": round(goal, 4), "sequences": found, "ratio": ratio, "scores": scores}
            print(json.dumps(result), flush=True)


def _run(run_dir: Path, seed: int, *words: str) -> dict[str, object]:
    own = (f"seed={seed}", f"batch_size={BATCH}", f"run_dir={run_dir}", "eval.before=false", "save_freq=-1")
    subprocess.run([sys.executable, str(MAIN), *own, *words], check=True, stdout=subprocess.DEVNULL)
    return json.loads((run_dir / "summary.json").read_text())


def _scores(summary: dict[str, object]) -> dict[int, float]:
    """Step → held-out score."""
    found = {int(step): score for step, score in summary["held_out_steps"].items()}
    return {**found, summary["steps"]: summary["held_out_after"]}


def _first(scores: dict[int, float], goal: float) -> int | None:
    return next((BATCH * step for step, score in sorted(scores.items()) if score >= goal), None)


def _export(run_dir: Path, step: int, into: Path) -> Path:
    """The weights of a checkpoint as a Hugging Face model directory."""
    [weights] = run_dir.glob(f"checkpoints/global_step_{step}/actor/model_world_size_1_rank_0.pt")
    state = torch.load(weights, map_location="cpu", weights_only=False)
    model = AutoModelForCausalLM.from_pretrained(demo_model_path())
    model.load_state_dict({name: getattr(value, "full_tensor", lambda v=value: v)() for name, value in state.items()})
    model.save_pretrained(into)
    AutoTokenizer.from_pretrained(demo_model_path()).save_pretrained(into)
    return into


if __name__ == "__main__":
    main()
