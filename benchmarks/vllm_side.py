"""The vLLM side of ``bench_generation.py``; runs in an interpreter that has vLLM, not in this project's.

    PYTHON vllm_side.py MODEL_DIR MAX_RUNNING THREADS DTYPE

Reads loads from standard input, one JSON list of rounds of ``[prompt, tokens]`` a line; answers ``SECONDS x`` to each.
"""

import json
import os
import sys
import time

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# vLLM would bind its threads to cores, on which other processes of this machine may be running.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def main() -> None:
    model, max_running, threads, dtype = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
    os.environ["OMP_NUM_THREADS"] = threads
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model,
        dtype=dtype,
        max_model_len=1024,
        max_num_seqs=max_running,
        enforce_eager=True,
        enable_prefix_caching=True,
    )
    print("READY", flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        for load in json.loads(line):
            prompts = [{"prompt_token_ids": prompt} for prompt, _ in load]
            settings = [SamplingParams(temperature=1.0, max_tokens=n, ignore_eos=True, logprobs=0) for _, n in load]
            answers = llm.generate(prompts, settings, use_tqdm=False)
            assert [len(answer.outputs[0].token_ids) for answer in answers] == [n for _, n in load]
        seconds = time.perf_counter() - started
        print(f"SECONDS {seconds}", flush=True)


if __name__ == "__main__":
    main()
