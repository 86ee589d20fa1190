"""The doctor against machines, packages and models that are really broken."""

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from support.trajectory_server import ServerProcess

from atropos_verl.assets import demo_model_path
from atropos_verl.cli import main
from atropos_verl.config.model_checks import Finding, check_model, check_usable
from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import ConfigError
from atropos_verl.launch import doctor

GIB = 1 << 30


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("ATROPOS_")]:
        monkeypatch.delenv(name)


@contextlib.contextmanager
def listening() -> Iterator[int]:
    """A port of this machine that is taken, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield taken.getsockname()[1]


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Distributions that are found before those installed."""
    versions = {"verl": "0.8.0", "torch": "2.13.0+cpu", "TransferQueue": "0.1.10"}
    for name, version in versions.items():
        directory = tmp_path / f"{name}-{version}.dist-info"
        directory.mkdir()
        (directory / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("site")
@pytest.mark.parametrize(
    ("text", "backend", "status", "found"),
    [
        ("verl==0.9.1", "local", "missing", "0.8.0, ==0.9.1 is needed"),
        ("torch>=2.11", "local", "ok", "2.13.0+cpu"),
        ("no-such-package==0.4.0", "local", "missing", "not installed, ==0.4.0 is needed"),
        ("TransferQueue==0.1.11", "local", "warning", "0.1.10, ==0.1.11 is needed"),
        ("TransferQueue==0.1.11", "ray", "missing", "0.1.10, ==0.1.11 is needed"),
    ],
)
def test_packages_are_compared_with_the_requirements(text: str, backend: str, status: str, found: str) -> None:
    (finding,) = doctor.check_packages([Requirement(text)], backend=backend)
    assert (finding.status, finding.found) == (status, found)


def test_gpus_are_those_of_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\necho "NVIDIA H100, 80000"\necho "NVIDIA H100, 1024"\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpus = doctor.list_gpus()
    assert gpus == [doctor.Gpu("NVIDIA H100", 80000 << 20), doctor.Gpu("NVIDIA H100", 1 << 30)]
    assert doctor.check_gpus(gpus, device="cuda", needed=2).status == "ok"
    assert "least free memory 1 GiB" in doctor.check_gpus(gpus, device="cuda", needed=2).found
    assert doctor.check_gpus(gpus, device="auto", needed=8).status == "missing"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert doctor.list_gpus() == gpus[1:]
    lacking = doctor.check_gpus(doctor.list_gpus(), device="cuda", needed=8)
    assert (lacking.status, lacking.found.endswith("the configuration needs 8")) == ("missing", True)
    smi.write_text("#!/bin/sh\necho 'driver mismatch' >&2\nexit 9\n")
    assert doctor.list_gpus() is None
    # Without GPUs only cuda is missing.
    found = [doctor.check_gpus(None, device=device, needed=1).status for device in ("cuda", "auto", "cpu")]
    assert found == ["missing", "ok", "ok"]


def test_shared_memory_and_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=64 << 20))
    assert doctor.check_shared_memory(300_000_000).status == "missing"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=8 * GIB))
    assert doctor.check_shared_memory().status == "ok"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100 * GIB))
    # 8 GiB of weights: a checkpoint is 24, and two kept plus one being written are 72
    found = [disk(tmp_path, model_bytes=8 * GIB, checkpoints=kept)["disk"].status for kept in (2, 4)]
    assert found == ["ok", "missing"]
    assert doctor.check_shared_memory(place=f"{tmp_path}/none").status == "warning", "a traceback, before"


def disk(path: Path, **given: int) -> dict[str, Finding]:
    return by_name(doctor.check_disk(path, **{"model_bytes": 0, "checkpoints": 1, **given}))


def test_a_run_directory_that_cannot_be_written(tmp_path: Path) -> None:
    """By its mount, since root may write whatever its mode says; no file is left behind where it can."""
    assert disk(tmp_path / "a" / "b")["run directory"].status == "ok"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    found = disk(tmp_path / "file" / "run")["run directory"]
    assert (found.status, found.found) == ("missing", f"{tmp_path / 'file'} is a file")
    found = disk(Path("/proc/run"))["run directory"]
    assert (found.status, found.found.startswith("cannot write to /proc: ")) == ("missing", True)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_model_path(), tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def judged(model_dir: Path, **settings: Any) -> dict[str, tuple[str, str]]:
    findings = check_model(RunConfig.from_mapping(settings), model_dir)
    return {finding.name: (finding.status, finding.found) for finding in findings}


def test_a_tokenizer_with_more_ids_than_the_model_embeds(model_dir: Path) -> None:
    assert judged(model_dir)["tokenizer"] == ("ok", "261 ids, 261 embedded")
    assert {status for status, _ in judged(model_dir).values()} == {"ok"}
    edit(model_dir / "config.json", vocab_size=260)
    found = ("missing", f"the tokenizer of {model_dir} has 261 ids, the model embeds 260")
    assert judged(model_dir)["tokenizer"] == found
    with pytest.raises(ConfigError, match=r"model\.path: .*261 ids, the model embeds 260"):
        check_usable(RunConfig(), model_dir)
    edit(model_dir / "config.json", vocab_size=512)  # rows to spare are common
    check_usable(RunConfig(), model_dir)
    (model_dir / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model.path: no .safetensors or .bin file in"):
        check_usable(RunConfig(), model_dir)


@pytest.mark.parametrize(
    ("words", "key"),
    [(["launch"], "model.path"), (["train"], "model.path"), (["train", "backend=ray"], "actor_rollout_ref.model.path")],
)
def test_a_run_with_the_wrong_tokenizer_is_refused(
    words: list[str], key: str, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(model_dir / "config.json", vocab_size=100)
    assert main([*words, f"{key}={model_dir}", f"run_dir={tmp_path / 'run'}"]) == 2
    assert f"CONFIGURATION ERROR: {key}: the tokenizer of" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_files_context_and_class_are_looked_at(model_dir: Path) -> None:
    edit(model_dir / "tokenizer_config.json", tokenizer_class="TokenizersBackend")
    (model_dir / "chat_template.jinja").unlink()
    (model_dir / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    (model_dir / "model-1.safetensors").write_bytes(b"x")
    found = judged(model_dir, data={"max_prompt_length": 1000}, max_response_length=100)
    assert found["weights"] == ("missing", "1 of 2 files are not there: model-2.safetensors")
    assert found["context"] == ("missing", "sequences of up to 1100 tokens, the model has 1024 positions")
    assert found["tokenizer class"][0] == "ok", "environments get a copy that transformers 4 loads"
    assert found["chat template"][0] == "warning"


def test_an_environment_is_looked_at_by_the_doctor_as_by_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "env.py"
    script.write_text("import no_such_module\n")
    for key in ("env.script", "environments.demo.script"):
        _, answer = run_doctor(f"{key}={script}", capsys=capsys)
        [found] = [finding for finding in answer["findings"] if finding["section"] == "plan"]
        assert (found["name"], found["status"]) == (key, "missing")
        assert f"{script} imports no_such_module, which " in found["found"]
    script.write_text("import atroposlib\n")
    _, answer = run_doctor(f"env.script={script}", capsys=capsys)
    assert "calls no .cli()" in next(found["found"] for found in answer["findings"] if found["name"] == "warning")


def test_an_api_that_does_not_answer_or_wants_a_token(tmp_path: Path) -> None:
    with listening() as port:
        silent = doctor.check_api(f"http://127.0.0.1:{port}", None, timeout=0.3)
        assert silent.status == "missing", "it listens and never answers"
    assert doctor.check_api(f"http://127.0.0.1:{port}", None).status == "missing"
    with ServerProcess(tmp_path, "--token", "right") as server:
        assert doctor.check_api(server.url, "right", timeout=30.0).status == "ok"
        assert "401" in doctor.check_api(server.url, "wrong", timeout=30.0).found


def placed(gpus: int = 8, cores: int = 64, **changes: Any) -> dict[str, str]:
    settings: dict[str, Any] = {
        "trainer": {"nnodes": 1, "n_gpus_per_node": 8, "device": "cuda"},
        "actor_rollout_ref": {"rollout": {"tensor_model_parallel_size": 2, "n": 8}},
        "data": {"train_batch_size": 64},
        "ray_kwargs": {"ray_init": {"address": None}},
    }
    settings = {name: {**value, **changes.get(name, {})} for name, value in settings.items()}
    return {finding.name: finding.status for finding in doctor.check_placement(settings, gpus=gpus, cores=cores)}


def test_placement_groups_that_ray_would_wait_for_for_ever() -> None:
    assert placed() == {"replicas": "ok", "CPUs": "ok", "GPUs": "ok"}
    assert placed(gpus=4)["GPUs"] == "missing"
    assert placed(trainer={"nnodes": 2}) == {"replicas": "ok", "nodes": "missing"}
    attached = {"ray_kwargs": {"ray_init": {"address": "auto"}}}
    assert placed(gpus=0, trainer={"nnodes": 2}, **attached) == {"replicas": "ok", "nodes": "ok"}
    assert placed(actor_rollout_ref={"rollout": {"tensor_model_parallel_size": 3}})["replicas"] == "missing"
    assert placed(data={"train_batch_size": 1}, trainer={"n_gpus_per_node": 6})["replicas"] == "missing"
    # Three CPUs for each of 8 processes, and one each for runner, queue and its storage.
    assert [placed(cores=cores)["CPUs"] for cores in (26, 27)] == ["missing", "ok"]
    cpu = {"device": "cpu", "n_gpus_per_node": 1}
    assert placed(gpus=0, cores=2, trainer=cpu)["CPUs"] == "missing"
    assert placed(gpus=0, cores=2, trainer=cpu, ray_kwargs={"ray_init": {"num_cpus": 6}})["CPUs"] == "ok"
    rollout = {"rollout": {"nnodes": 1, "n_gpus_per_node": 4, "tensor_model_parallel_size": 2, "n": 8}}
    found = placed(gpus=8, cores=27, trainer={"v1": {"trainer_mode": "separate_async"}}, actor_rollout_ref=rollout)
    assert (found["GPUs"], found["CPUs"]) == ("missing", "missing")


def run_doctor(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = main(["doctor", "--json", *words])
    return code, json.loads(capsys.readouterr().out)


def test_the_demo_can_be_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, answer = run_doctor(f"run_dir={tmp_path / 'run'}", capsys=capsys)
    wrong = [finding for finding in answer["findings"] if finding["status"] == "missing"]
    assert (code, answer["ok"], wrong) == (0, True, [])
    assert {finding["section"] for finding in answer["findings"]} == {"plan", "software", "machine", "model"}
    assert not (tmp_path / "run").exists()


def test_everything_that_is_wrong_is_named_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run_dir=/proc/run", "trainer.device=cuda", "trainer_process.nproc=64"]
    with listening() as port:
        code, answer = run_doctor(f"gateway.port={port}", *words, capsys=capsys)
    assert code == 1
    wrong = {finding["name"] for finding in answer["findings"] if finding["status"] == "missing"}
    assert wrong == {"GPUs", "gateway.port", "run directory"}
    assert all(finding["todo"] for finding in answer["findings"] if finding["status"] != "ok")
    code, answer = run_doctor("optim.lrr=1", capsys=capsys)
    assert code == 1
    assert [finding["name"] for finding in answer["findings"]] == ["optim.lrr"]


def test_the_engine_of_the_rollouts_must_be_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    _, answer = run_doctor("--config-name", "ray_sglang", capsys=capsys)
    [engine] = [finding for finding in answer["findings"] if finding["name"] == "sglang"]
    assert engine["status"] == "missing"
    assert "requirements/gpu-sglang.txt" in engine["todo"]


def test_the_table_ends_with_the_verdict_and_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "model.path=/nowhere"]) == 1
    text = capsys.readouterr().out
    assert "missing: model, path: " in text
    assert "  set model.path to a Hugging Face directory" in text
    assert text.rstrip().splitlines()[-1].startswith("this run would fail: ")
