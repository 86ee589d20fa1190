"""``recipe/atropos/slurm/train.sh`` with stand-ins for SLURM's two programs: two nodes are two loopback addresses."""

import os
import signal
import sys
from pathlib import Path

import pytest
from support.runs import REPOSITORY, SMALL, LaunchRun, checkpointed_step
from support.trajectory_server import free_port

SCRIPT = REPOSITORY / "recipe" / "atropos" / "slurm" / "train.sh"
NODES = ("127.0.0.1", "127.0.0.2")

_SCONTROL = '#!/bin/bash\n[ "$1 $2" = "show hostnames" ] || exit 9\ntr , "\\n" <<< "$3"\n'
# Notes where it was to run, then becomes the command, so that signals reach it as srun passes them on.
_SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do [[ "$1" == --nodelist=* ]] && node=${1#--nodelist=}; shift; done
echo "$node $*" >> "$SRUN_LOG"
exec "$@"
"""


class Job(LaunchRun):
    """The script as sbatch would start it, in the repository."""

    def __init__(self, words: list[str], directory: Path, nodes: tuple[str, ...] = NODES) -> None:
        stand_ins = directory / "bin"
        stand_ins.mkdir()
        for name, text in (("scontrol", _SCONTROL), ("srun", _SRUN)):
            (stand_ins / name).write_text(text)
            (stand_ins / name).chmod(0o755)
        self.job_dir = directory / "job"
        env = {
            "PATH": f"{stand_ins}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SRUN_LOG": str(directory / "srun.log"),
            "SLURM_JOB_NODELIST": ",".join(nodes),
            "SLURM_SUBMIT_DIR": str(REPOSITORY),
            "VENV": "/nowhere",
            "RUN": str(self.job_dir),
            "TRAIN_CONFIG": "local_demo",
            "ENV_CONFIG": "local_demo",
            "API_PORT": str(free_port()),
            "GATEWAY_PORT": str(free_port()),
        }
        super().__init__(words, run_dir=self.job_dir / "train", env=env, cwd=directory)
        self.command = ["bash", str(SCRIPT), *words]
        self.srun_log = directory / "srun.log"


@pytest.mark.slow
def test_a_job_of_two_nodes_trains_and_saves_when_its_time_is_up(tmp_path: Path) -> None:
    words = [*SMALL, "steps=1000", "save_freq=1000"]
    with Job(words, tmp_path) as job:
        job.wait_for_trained(2)
        keys = [(job.job_dir / name).read_text() for name in ("gateway_key", "api_token")]
        commands = "\n".join(job.living())
        job.popen.send_signal(signal.SIGTERM)
        job.must_end(130)
        assert checkpointed_step(job.job_dir / "train") == job.trained() >= 2
        started = {line.split(" ")[0]: line for line in job.srun_log.read_text().splitlines()}
    assert sorted(started) == list(NODES)
    assert "only=[api,trainer]" in started["127.0.0.1"]
    assert "only=[environments]" in started["127.0.0.2"]
    assert all(len(key) == 48 for key in keys)
    for program in ("serve-api", "spell_backward.py serve", "launch_atropos_verl.py"):
        assert program in commands
    assert not any(key in commands for key in keys)
    assert oct((job.job_dir / "gateway_key").stat().st_mode & 0o777) == "0o600"


def test_a_job_of_one_node_is_refused(tmp_path: Path) -> None:
    with Job([], tmp_path, nodes=NODES[:1]) as job:
        job.must_end(2)
        assert "this job has one node; give it two" in job.stderr
