"""Draws reward and held-out scores of a run as an SVG file: ``python tools/run_curve.py RUN_DIR FILE.svg``."""

import sys
from pathlib import Path

from atropos_verl.report.run_report import line_chart, load_run

STYLE = (
    "<style>text{font:11px sans-serif;fill:#666}.grid{stroke:#8884;stroke-width:.6}</style>"
    '<text x="70" y="22" style="fill:#2f6fdb">mean reward of the step</text>'
    '<text x="220" y="22" style="fill:#d9642c">held-out score</text>'
)


def curve(run_dir: Path) -> str:
    """The drawing of ``run_dir``; the held-out scores stand at the steps whose policy they are of."""
    run = load_run(run_dir)
    held_out = dict(run.series("held_out/score"))
    last = run.steps[-1]["step"]
    for step, label in ((0, "before"), (last, "after")):
        if (score := run.summary.get(f"held_out_{label}")) is not None:
            held_out[step] = score
    chart = line_chart({"reward": run.series("reward/mean"), "held-out": sorted(held_out.items())})
    drawing = chart[: chart.index("</svg>") + len("</svg>")]
    head, _, rest = drawing.partition(">")
    return f'{head} xmlns="http://www.w3.org/2000/svg" width="780">{STYLE}{rest}\n'


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    Path(sys.argv[2]).write_text(curve(Path(sys.argv[1])))
