"""The doctor against machines, packages and models that are really broken, and its prediction of memory."""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from support.tiny_model import kept_by_graph
from support.trajectory_server import ServerProcess

from atropos_verl.assets import demo_model_path
from atropos_verl.cli import main
from atropos_verl.config.launch_schema import LaunchConfig
from atropos_verl.config.model_checks import check_model, check_usable
from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import ConfigError
from atropos_verl.launch import doctor
from atropos_verl.launch.doctor import Plan, Shape, longest_micro_batch, peak, predict

Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]
GIB = 1 << 30


def diagnosed(capsys: Capture, *words: str) -> tuple[int, dict[str, dict[str, str]]]:
    code = main(["doctor", "--json", *words])
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] == (code == 0)
    return code, {finding["name"]: finding for finding in answer["findings"]}


def missing(findings: dict[str, dict[str, str]]) -> set[str]:
    assert all(finding["todo"] for finding in findings.values() if finding["status"] != "ok")
    return {name for name, finding in findings.items() if finding["status"] == "missing"}


def test_the_demo_can_be_run(tmp_path: Path, capsys: Capture) -> None:
    code, findings = diagnosed(capsys, f"run_dir={tmp_path / 'run'}")
    assert (code, missing(findings)) == (0, set())
    assert {finding["section"] for finding in findings.values()} == {"plan", "software", "machine", "model"}
    assert not (tmp_path / "run").exists()


def test_all_that_is_wrong_is_named_at_once(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = ["run_dir=/proc/run", "trainer.device=cuda", "trainer_process.nproc=64"]
        code, findings = diagnosed(capsys, f"gateway.port={taken.getsockname()[1]}", *words)
    assert (code, missing(findings)) == (1, {"GPUs", "gateway.port", "run directory"})
    assert missing(diagnosed(capsys, "optim.lrr=1")[1]) == {"optim.lrr"}
    script = tmp_path / "env.py"
    for key in ("env.script", "environments.demo.script"):
        script.write_text("import no_such_module\n")
        found = diagnosed(capsys, f"{key}={script}")[1][key]
        assert (found["section"], found["status"]) == ("plan", "missing")
        assert f"{script} imports no_such_module, which " in found["found"]
    script.write_text("import atroposlib\n")
    assert "calls no .cli()" in diagnosed(capsys, f"env.script={script}")[1]["warning"]["found"]
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    engine = diagnosed(capsys, "--config-name", "ray_sglang")[1]["sglang"]
    assert engine["status"] == "missing" and "requirements/gpu-sglang.txt" in engine["todo"]


def test_the_table_ends_with_the_verdict_and_says_what_to_do(capsys: Capture) -> None:
    assert main(["doctor", "model.path=/nowhere"]) == 1
    text = capsys.readouterr().out
    assert "missing: model, path: " in text
    assert "  set model.path to a Hugging Face directory" in text
    assert text.rstrip().splitlines()[-1].startswith("this run would fail: ")


def test_packages_are_compared_with_the_requirements(tmp_path: Path, monkeypatch: Patch) -> None:
    for name, version in (("verl", "0.8.0"), ("torch", "2.13.0+cpu"), ("TransferQueue", "0.1.10")):
        directory = tmp_path / f"{name}-{version}.dist-info"  # found before those installed
        directory.mkdir()
        (directory / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    for text, backend, status, found in (
        ("verl==0.9.1", "local", "missing", "0.8.0, ==0.9.1 is needed"),
        ("torch>=2.11", "local", "ok", "2.13.0+cpu"),
        ("no-such-package==0.4.0", "local", "missing", "not installed, ==0.4.0 is needed"),
        ("TransferQueue==0.1.11", "local", "warning", "0.1.10, ==0.1.11 is needed"),
        ("TransferQueue==0.1.11", "ray", "missing", "0.1.10, ==0.1.11 is needed"),
    ):
        (finding,) = doctor.check_packages([Requirement(text)], backend=backend)
        assert (finding.status, finding.found) == (status, found)


def test_gpus_are_those_of_nvidia_smi(tmp_path: Path, monkeypatch: Patch) -> None:
    def judged(device: str, needed: int) -> tuple[str, str]:
        finding = doctor.check_gpus(doctor.list_gpus(), device=device, needed=needed)
        return finding.status, finding.found

    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\necho "NVIDIA H100, 80000"\necho "NVIDIA H100, 1024"\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpus = [doctor.Gpu("NVIDIA H100", 80000 << 20), doctor.Gpu("NVIDIA H100", GIB)]
    assert doctor.list_gpus() == gpus
    assert judged("cuda", 2) == ("ok", "2 x NVIDIA H100, least free memory 1 GiB")
    assert judged("auto", 8)[0] == "missing"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert doctor.list_gpus() == gpus[1:]
    status, found = judged("cuda", 8)
    assert status == "missing" and found.endswith("the configuration needs 8")
    smi.write_text("#!/bin/sh\necho 'driver mismatch' >&2\nexit 9\n")
    assert doctor.list_gpus() is None
    assert [judged(device, 1)[0] for device in ("cuda", "auto", "cpu")] == ["missing", "ok", "ok"]


def of_disk(path: Path, model_bytes: int = 0, checkpoints: int = 1) -> list[tuple[str, str]]:
    return [(it.status, it.found) for it in doctor.check_disk(path, model_bytes=model_bytes, checkpoints=checkpoints)]


def test_shared_memory_and_disk(tmp_path: Path, monkeypatch: Patch) -> None:
    def free(size: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size))

    usage = shutil.disk_usage("/")
    free(64 << 20)
    assert doctor.check_shared_memory(300_000_000).status == "missing"
    free(8 * GIB)
    assert doctor.check_shared_memory().status == "ok"
    free(100 * GIB)
    # 8 GiB of weights: a checkpoint is 24, and two kept plus one being written are 72
    assert [of_disk(tmp_path, 8 * GIB, kept)[1][0] for kept in (2, 4)] == ["ok", "missing"]
    assert doctor.check_shared_memory(place=f"{tmp_path}/none").status == "warning"


def test_a_run_directory_that_cannot_be_written(tmp_path: Path) -> None:
    """By its mount, since root may write whatever its mode says; no file is left behind where it can."""
    assert of_disk(tmp_path / "a" / "b")[0][0] == "ok"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    assert of_disk(tmp_path / "file" / "run") == [("missing", f"{tmp_path / 'file'} is a file")]
    [(status, found)] = of_disk(Path("/proc/run"))
    assert (status, found.startswith("cannot write to /proc: ")) == ("missing", True)


def test_an_api_that_does_not_answer_or_wants_a_token(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        assert doctor.check_api(url, None, timeout=0.3).status == "missing"
    assert doctor.check_api(url, None).status == "missing"
    with ServerProcess(tmp_path, "--token", "right") as server:
        assert doctor.check_api(server.url, "right", timeout=30.0).status == "ok"
        assert "401" in doctor.check_api(server.url, "wrong", timeout=30.0).found


SEPARATE = {"trainer": {"v1": {"trainer_mode": "separate_async"}}, "rollout": {"nnodes": 1, "n_gpus_per_node": 4}}
ON_CPU = {"trainer": {"device": "cpu", "n_gpus_per_node": 1}, "rollout": {"tensor_model_parallel_size": 1}}


def test_placement_groups_that_ray_would_wait_for_for_ever() -> None:
    cases: list[tuple[int, int, dict[str, Any], set[str]]] = [
        (8, 64, {}, set()),
        (4, 64, {}, {"GPUs"}),
        (8, 64, {"trainer": {"nnodes": 2}}, {"nodes"}),
        (0, 64, {"trainer": {"nnodes": 2}, "ray": {"address": "auto"}}, set()),
        (8, 64, {"rollout": {"tensor_model_parallel_size": 3}}, {"replicas"}),
        (8, 64, {"rollout": {"n": 1}, "batch": 9}, {"replicas"}),
        # Three CPUs for each of 8 processes, and one each for runner, queue and its storage.
        (8, 26, {}, {"CPUs"}),
        (8, 27, {}, set()),
        (8, 27, SEPARATE, {"CPUs", "GPUs"}),
        (0, 5, ON_CPU, {"CPUs"}),
        (0, 2, {**ON_CPU, "ray": {"num_cpus": 6}}, set()),
    ]
    for gpus, cores, changes, lacking in cases:
        rollout = {"tensor_model_parallel_size": 2, "n": 8, **changes.get("rollout", {})}
        settings = {
            "trainer": {"nnodes": 1, "n_gpus_per_node": 8, "device": "cuda", **changes.get("trainer", {})},
            "actor_rollout_ref": {"rollout": rollout},
            "data": {"train_batch_size": changes.get("batch", 64)},
            "ray_kwargs": {"ray_init": {"address": None, **changes.get("ray", {})}},
        }
        found = doctor.check_placement(settings, gpus=gpus, cores=cores)
        assert {finding.name for finding in found if finding.status == "missing"} == lacking, changes


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


def test_a_wrong_tokenizer_is_refused(model_dir: Path, tmp_path: Path, capsys: Capture) -> None:
    edit(model_dir / "config.json", vocab_size=100)
    for command, key in (("train", ""), ("launch", ""), ("train backend=ray", "actor_rollout_ref.")):
        assert main([*command.split(), f"{key}model.path={model_dir}", f"run_dir={tmp_path / 'run'}"]) == 2
        assert f"CONFIGURATION ERROR: {key}model.path: the tokenizer of" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_files_context_and_class_are_looked_at(model_dir: Path) -> None:
    edit(model_dir / "tokenizer_config.json", tokenizer_class="TokenizersBackend")
    (model_dir / "chat_template.jinja").unlink()
    (model_dir / "model.safetensors").rename(model_dir / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    found = judged(model_dir, data={"max_prompt_length": 1000}, max_response_length=100)
    assert found["weights"] == ("missing", "1 of 2 files are not there: model-2.safetensors")
    assert found["context"] == ("missing", "sequences of up to 1100 tokens, the model has 1024 positions")
    assert found["tokenizer class"][0] == "ok", "environments get a copy that transformers 4 loads"
    assert found["chat template"][0] == "warning"


GB = 10**9
SHAPE = Shape(
    layers=10,
    layer=GB // 10,
    rest=GB // 2,
    head=GB // 2,
    hidden=1000,
    vocabulary=50_000,
    kept_layer=4e4,
    kept_rest=1e4,
    kv=1e4,
    adapters=10_000,
)
"""1.5 billion parameters."""


def total(plan: Plan, phase: str, card: float = 0.0) -> float:
    return sum(predict(SHAPE, plan, card)[phase].values()) - doctor._CODE


def test_a_full_update_counted_by_hand() -> None:
    plan = Plan(tokens=10_000, trained=0.5, compute=4, running=10, context=100)
    kept = 10_000 * (10 * 4e4 + 1e4)
    head = max(5_000 * 50_000 * 4, 4 * GB // 2)  # the logits, or the gradient of the weight
    assert total(plan, "forward and backward") == 4 * 4 * 1.5 * GB + kept + head
    assert total(plan, "optimiser step") == 5 * 4 * 1.5 * GB
    assert total(plan, "rollout") == (3 + 1) * 4 * 1.5 * GB + 2 * 1e4 * 10 * 100
    assert total(plan, "weight sync") == (3 + 1) * 4 * 1.5 * GB + 2 * GB


def test_ranks_checkpointing_lora_offload_and_a_replica() -> None:
    plan = Plan(ranks=4, tokens=1000, trained=0.1, engine_share=0.5)
    gathered = 2 * (0.5 + 0.2) * GB + 4 * 0.1 * GB
    head = 2 * 0.5 * GB
    assert total(plan, "forward and backward") == 4 * 4 * 1.5 * GB / 4 + 1000 * 4.1e5 + head + gathered
    assert total(plan, "rollout", 80e9) == 3 * 1.5 * GB + 40e9
    assert total(replace(plan, offload=True), "rollout", 80e9) == 40e9
    checkpointed = total(replace(plan, checkpointing=True), "forward and backward")
    assert total(plan, "forward and backward") - checkpointed == pytest.approx(1000 * (9 * 4e4 - 10 * 1000 * 2))
    adapters = 32 * 10_000 * 10
    lora = total(replace(plan, lora_rank=32), "optimiser step")
    assert lora == pytest.approx(4 * (1.5 * GB + 5 * adapters) / 4)


def test_what_does_not_fit_says_what_would() -> None:
    plan = Plan(tokens=100_000, trained=0.5, compute=2)
    phase = {found.name: found for found in doctor.check_memory(SHAPE, plan, 60e9, "a card")}
    assert phase["forward and backward"].status == "missing"
    assert phase["optimiser step"].status == "ok"
    longest = longest_micro_batch(SHAPE, plan, 60e9)
    assert phase["forward and backward"].todo == (
        f"one or more of: trainer.max_token_len_per_gpu={longest}; model.enable_gradient_checkpointing=true; "
        "more ranks, or a smaller model"
    )
    assert f"{longest} tokens" in phase["longest micro-batch"].found
    assert peak(predict(SHAPE, replace(plan, tokens=longest), 60e9)) <= 60e9
    assert peak(predict(SHAPE, replace(plan, tokens=longest + 1), 60e9)) > 60e9
    small = doctor.check_memory(SHAPE, plan, 20e9, "a card")
    assert "max_token_len_per_gpu" not in small[1].todo and small[-1].found == "none fits"


def test_the_plan_is_that_of_the_settings() -> None:
    values = {
        "mode": "overlap",
        "model": {"compute_dtype": "bf16", "enable_gradient_checkpointing": True},
        "data": {"max_prompt_length": 300},
        "max_response_length": 100,
        "trainer": {"device": "cpu", "max_token_len_per_gpu": 777},
    }
    sizes = {"tokens": 777, "trained": 0.25, "running": 64, "context": 400}
    expected = Plan(compute=2, checkpointing=True, on_cpu=True, overlap=True, **sizes)
    assert doctor.plan_of(RunConfig.from_mapping(values), LaunchConfig(), {}) == expected
    verl = {
        "trainer": {"nnodes": 2, "n_gpus_per_node": 8},
        "data": {"max_prompt_length": 100, "max_response_length": 300},
        "actor_rollout_ref": {
            "model": {"lora_rank": 16},
            "actor": {"ppo_max_token_len_per_gpu": 4096, "fsdp_config": {"param_offload": True}},
            "rollout": {"gpu_memory_utilization": 0.6},
        },
    }
    expected = Plan(ranks=16, tokens=4096, trained=0.75, lora_rank=16, engine_share=0.6)
    assert doctor.plan_of(RunConfig(), LaunchConfig(), verl) == expected


def test_a_model_is_measured_without_its_weights(model_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from atropos_verl.verl_plugin.engines import install_packed_attention, keep_less
    from atropos_verl.verl_plugin.prefix_forest import joined

    shape = doctor.shape_of(model_path, 4)
    model = AutoModelForCausalLM.from_pretrained(str(model_path), dtype=torch.float32, attn_implementation="sdpa")
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert install_packed_attention(model)
    keep_less(model)
    with kept_by_graph(model) as kept:
        ids, positions = torch.ones(1, 512, dtype=torch.int64), torch.arange(512)[None]
        options = {"packed_row": joined([512]), "use_cache": False, "logits_to_keep": 1}
        output = model(input_ids=ids, position_ids=positions, **options)
    found = sum(kept.values())
    assert output.logits.shape[1] == 1
    assert 512 * (shape.layers * shape.kept_layer + shape.kept_rest) == pytest.approx(found, rel=0.01)


def test_the_doctor_shows_it(capsys: Capture, tmp_path: Path) -> None:
    words = ["--memory", "--gpu-memory", "24", f"run_dir={tmp_path}", "trainer.device=cuda"]
    found = [item for item in diagnosed(capsys, *words)[1].values() if item["section"] == "memory"]
    names = ["rollout", "forward and backward", "optimiser step", "weight sync", "longest micro-batch"]
    assert [item["name"] for item in found] == names
    assert "GB of 24.0 (a card of that size)" in found[0]["found"]


MODEL = os.environ.get("ATROPOS_VERL_MEMORY", "")


@pytest.mark.skipif(not MODEL, reason="ATROPOS_VERL_MEMORY=MODEL runs it (minutes, 6 GB)")
@pytest.mark.parametrize("options", ["", "--token-budget 1024", "--checkpointing", "--bf16"])
def test_the_prediction_is_within_15_percent_of_what_training_takes(options: str) -> None:
    script = Path(__file__).parents[3] / "benchmarks" / "bench_memory.py"
    command = [sys.executable, str(script), "--steps", "2", "--model", MODEL, *options.split()]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(answer.stdout)["predicted"]
    assert 0.85 < found["training"]["predicted / measured"] < 1.15, found
