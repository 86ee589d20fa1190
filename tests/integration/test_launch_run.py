"""Launches: with keys and scores, every form of environment, and through SLURM's script."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.runs import REPOSITORY, SMALL, LaunchRun, checkpointed_step, summary_of

from atropos_verl.http_thread import environment_token
from atropos_verl.launch.probes import free_port

pytestmark = pytest.mark.slow

TOKEN = "a-token-of-the-trajectory-api"
OTHER = "import sys, time\nif 'evaluate' in sys.argv:\n    sys.exit(7)\ntime.sleep(1000)\n"
"""An environment that sends nothing, and whose evaluation fails."""


def test_keys_are_in_private_files_alone_and_the_policy_is_evaluated(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(OTHER)
    words = [*SMALL, "eval.before=true", "eval.after=true", "eval.every=2", "steps=3", "save_freq=3"]
    words.append(f"environments.other={{script: {tmp_path}/other.py, startup_timeout: 1000}}")
    commands: set[str] = set()
    with LaunchRun(words, run_dir=tmp_path / "run", env={"ATROPOS_API_TOKEN": TOKEN}) as run:
        run.wait_until(lambda: commands.update(run.living()) or run.popen.poll() is not None, "the end of the run")
        run.must_end(0)
    assert [line["step"] for line in run.metrics()] == [1, 2, 3], "an unmodified environment works with a protected API"

    launch, seen = run.run_dir / "launch", "\n".join(commands)
    trainer, demo = (yaml.safe_load((launch / f"{name}.yaml").read_text()) for name in ("trainer", "demo"))
    keys = (trainer["gateway"]["api_key"], TOKEN, environment_token(TOKEN))
    assert len(keys[0]) >= 24
    for program in ("launch_atropos_verl.py", "serve-api", "spell_backward.py serve", "evaluate", " train ", "reaper"):
        assert program in seen
    assert not any(key in seen for key in keys)
    files = [path for path in run.run_dir.rglob("*") if path.is_file()]
    told = [path for path in files if any(key.encode() in path.read_bytes() for key in keys)]
    assert {path.parent for path in told} == {launch} and len(told) >= 4
    private = [*launch.iterdir(), run.run_dir / "plan.json", *(run.run_dir / "logs").glob("*.1.log")]
    assert {oct(path.stat().st_mode & 0o777) for path in private} == {"0o600"}
    assert demo["env"]["rollout_server_url"].startswith(f"http://run:{environment_token(TOKEN)}@127.0.0.1:")

    def read(name: str) -> Any:
        return json.loads((run.run_dir / "eval" / name).read_text())

    summary, progress = summary_of(run.run_dir), read("progress.json")
    results = (read(f"{label}/demo/metrics.json")["results"]["all"] for label in ("before", "step_2", "after"))
    before, between, after = (result["eval/mean_reward"] for result in results)
    assert progress["running"] is None
    assert progress["scores"]["before"] == {"demo": pytest.approx(before), "other": None}
    assert progress["scores"]["after"] == {"demo": pytest.approx(after), "other": None}
    figures = [summary["held_out_before"], summary["held_out_steps"]["2"], summary["held_out_after"]]
    assert figures == pytest.approx([before, between, after])
    for when, score in (("before training", before), ("at step 2", between), ("after training", after)):
        assert f"held-out mean reward {when}: demo {score:.3f}, other unknown" in run.stdout
    lines = [line for line in run.metrics() if "held_out/step" in line]
    assert [(line["step"], line["held_out/step"]) for line in lines] == [(1, 0), (3, 2)]
    assert lines[1]["held_out/demo/score"] == lines[1]["held_out/score"] == pytest.approx(between)
    assert f"held-out {before:.3f} → {after:.3f}" in run.stdout
    assert 0.1 < before < 0.6, "the demo model before training, sampled: 0.29 is documented"


SCRIPT = f"""
import sys
import yaml
sys.modules.setdefault("torch", None)
sys.path.insert(0, {str(REPOSITORY / "examples" / "environments")!r})
from atroposlib.envs.server_handling.server_baseline import APIServerConfig, ServerBaseline
from spell_backward import SpellBackwardEnv

class Env(SpellBackwardEnv):
    @classmethod
    def config_init(cls):
        return super().config_init()[0], SERVERS

if __name__ == "__main__":
    Env.cli()
"""
ELSEWHERE = 'APIServerConfig(base_url="http://127.0.0.1:9/v1", model_name="x", api_key="x", server_type="vllm")'
KINDS = {
    "several": f"[{ELSEWHERE}, {ELSEWHERE}]",
    "bare": ELSEWHERE,
    "baseline": "ServerBaseline()",
    "reads_config": (
        "[APIServerConfig(**server) "
        'for server in yaml.safe_load(open(sys.argv[sys.argv.index("--config") + 1]))["openai"]]'
    ),
}


def test_every_form_of_config_init_sends_groups_that_are_trained(tmp_path: Path) -> None:
    for name, servers in KINDS.items():
        (tmp_path / f"{name}.py").write_text(SCRIPT.replace("SERVERS", servers))
    listed = ", ".join(f"{name}: {{script: {tmp_path}/{name}.py}}" for name in KINDS)

    def all_have_sent() -> bool:
        rows = (run.state().get("api") or {}).get("environments") or []
        return {row["name"].rsplit("_", 1)[0] for row in rows if row["groups"]} == set(KINDS)

    words = [*SMALL, f"environments={{{listed}}}", "steps=1000", "save_freq=-1"]
    with LaunchRun(words, run_dir=tmp_path / "run") as run:
        run.wait_until(all_have_sent, "groups of every environment")
        run.wait_for_trained(3)
        assert [run.service(name)["restarts"] for name in KINDS] == [0] * len(KINDS)


NODES = ("127.0.0.1", "127.0.0.2")
# srun's notes where it was to run, then becomes the command, so that signals reach it as srun passes them on.
STAND_INS = {
    "scontrol": '#!/bin/bash\n[ "$1 $2" = "show hostnames" ] || exit 9\ntr , "\\n" <<< "$3"\n',
    "srun": """#!/bin/bash
while [[ "$1" == --* ]]; do [[ "$1" == --nodelist=* ]] && node=${1#--nodelist=}; shift; done
echo "$node $*" >> "$SRUN_LOG"
exec "$@"
""",
}


def job_of(directory: Path, nodes: tuple[str, ...], *words: str) -> LaunchRun:
    """The script as sbatch would start it, in ``directory``."""
    for name, text in STAND_INS.items():
        (directory / name).write_text(text)
        (directory / name).chmod(0o755)
    env = {
        "PATH": f"{directory}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SRUN_LOG": str(directory / "srun.log"),
        "SLURM_JOB_NODELIST": ",".join(nodes),
        "SLURM_SUBMIT_DIR": str(REPOSITORY),
        "VENV": "/nowhere",
        "RUN": str(directory / "job"),
        "TRAIN_CONFIG": "local_demo",
        "ENV_CONFIG": "local_demo",
        "API_PORT": str(free_port()),
        "GATEWAY_PORT": str(free_port()),
    }
    job = LaunchRun(words, run_dir=directory / "job" / "train", env=env, cwd=directory)
    job.command = ["bash", str(REPOSITORY / "recipe" / "atropos" / "slurm" / "train.sh"), *words]
    return job


def test_a_job_of_two_nodes_saves_when_its_time_is_up(tmp_path: Path) -> None:
    with job_of(tmp_path, NODES, *SMALL, "steps=1000", "save_freq=1000") as job:
        job.wait_for_trained(2)
        files = [tmp_path / "job" / name for name in ("gateway_key", "api_token")]
        keys = [file.read_text() for file in files]
        commands = "\n".join(job.living())
        job.popen.send_signal(signal.SIGTERM)
        job.must_end(130)
        assert checkpointed_step(tmp_path / "job" / "train") == job.trained() >= 2
    started = {line.split(" ")[0]: line for line in (tmp_path / "srun.log").read_text().splitlines()}
    assert sorted(started) == list(NODES)
    assert "only=[api,trainer]" in started["127.0.0.1"]
    assert "only=[environments]" in started["127.0.0.2"]
    for program in ("serve-api", "spell_backward.py serve", "launch_atropos_verl.py"):
        assert program in commands
    assert all(len(key) == 48 and key not in commands for key in keys)
    assert oct(files[0].stat().st_mode & 0o777) == "0o600"


def test_a_job_of_one_node_is_refused(tmp_path: Path) -> None:
    with job_of(tmp_path, NODES[:1]) as job:
        job.must_end(2)
        assert "this job has one node; give it two" in job.stderr
