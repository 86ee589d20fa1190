"""Linear layers with packed weights against torch's, as the engine's decode step and prefill use them.

    python benchmarks/bench_linear.py [--rows 1 8 64 512] [--shapes 576x576 1536x576 576x1536]

Weights of ``--megabytes`` in all are used in turn, so that they come from memory as those of a model do. One thread.
Prints one line per size: median microseconds of processor time of both sides (in turn), and the ratio.
"""

import argparse
import statistics
import time

import torch

from atropos_verl.engine.weights import pack_linear_layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--shapes", nargs="+", default=["128x128", "384x128", "576x576", "1536x576", "576x1536"])
    parser.add_argument("--megabytes", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("dtype        rows  out x in      torch µs  packed µs  ratio")
    for dtype in (torch.float32, torch.bfloat16):
        for outputs, inputs in (map(int, shape.split("x")) for shape in options.shapes):
            count = max(2, options.megabytes * 2**20 // (outputs * inputs * dtype.itemsize))
            plain = [torch.nn.Linear(inputs, outputs, bias=False, dtype=dtype) for _ in range(min(count, 64))]
            packed = [torch.nn.Linear(inputs, outputs, bias=False, dtype=dtype) for _ in plain]
            pack_linear_layers(torch.nn.Sequential(*packed))
            for rows in options.rows:
                x = torch.randn(rows, inputs).to(dtype)
                first, second = measure([plain, packed], x, options.repeats)
                print(
                    f"{dtype!s:14} {rows:4}  {outputs:5} x {inputs:5} {first:9.1f} {second:9.1f} {first / second:7.2f}"
                )


@torch.inference_mode()
def measure(sides: list[list[torch.nn.Linear]], x: torch.Tensor, repeats: int) -> list[float]:
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(repeats + 1):
        for side, layers in zip(times, sides, strict=True):
            started = time.process_time()
            for layer in layers:
                layer(x)
            side.append((time.process_time() - started) / len(layers) * 1e6)
    return [statistics.median(side[1:]) for side in times]


if __name__ == "__main__":
    main()
