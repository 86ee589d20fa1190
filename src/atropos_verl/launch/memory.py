"""Peak memory of one rank, phase by phase, from the configuration: before anything is loaded.

What the backward keeps is found by running one and two layers of the model on tensors without content and adding up
what autograd saves; the rest is counted. Formulas, and how far they are right: docs/doctor.md.
"""

from bisect import bisect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from atropos_verl.config.launch_schema import LaunchConfig
from atropos_verl.config.model_checks import Finding, finding
from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import ConfigError

_PROBE_TOKENS = 256
_CODE = 2.5e8
"""Bytes of what torch, verl and transformers load when they begin to work: measured on a CPU with two models, where it
was 0.25 to 0.3 GB (``benchmarks/bench_memory.py``). On a card it stands for CUDA's and NCCL's own: not measured."""
_BYTES = {"fp32": 4, "float32": 4, "bf16": 2, "bfloat16": 2, "fp16": 2, "float16": 2}
Phases = dict[str, dict[str, float]]
"""Phase → part → bytes."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A causal language model; ``layer`` and ``rest`` (embedding, head, last norm) in parameters."""

    layers: int
    layer: int
    rest: int
    head: int
    hidden: int
    vocabulary: int
    kept_layer: float
    """Bytes that a layer keeps for the backward, per token."""
    kept_rest: float
    kv: float
    """Bytes of keys and values of all layers, per token."""
    adapters: int = 0
    """Parameters of LoRA adapters on every linear layer of a layer, per unit of rank."""

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.rest


@dataclass(frozen=True, slots=True)
class Plan:
    """What a rank holds. ``tokens``: distinct ones of a micro-batch; ``trained``: share of them that is trained."""

    ranks: int = 1
    tokens: int = 16384
    trained: float = 1.0
    master: int = 4
    """Bytes of a weight, of its gradient, and of each of its moments."""
    compute: int = 2
    checkpointing: bool = False
    lora_rank: int = 0
    offload: bool = False
    """Weights and moments are on the host while rollouts are made."""
    on_cpu: bool = False
    overlap: bool = False
    keeps_engine: bool = False
    """The embedded engine's weights stay while the trainer trains."""
    running: int = 64
    """Sequences that the embedded engine generates together, and their ``context`` in tokens."""
    context: int = 2048
    engine_share: float | None = None
    """Of the card, that a replica of vLLM or SGLang takes; None: the embedded engine."""


def shape_of(model_path: Path, compute: int, *, trust_remote_code: bool = False) -> Shape:
    """Takes seconds: torch, transformers and verl are imported. Raises ``ConfigError`` for what cannot be run so."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoConfig, AutoModelForCausalLM

    from atropos_verl import verl_plugin

    verl_plugin.activate("cpu")
    from atropos_verl.verl_plugin.engines import install_packed_attention
    from atropos_verl.verl_plugin.prefix_forest import joined

    how: dict[str, Any] = {"attn_implementation": "sdpa", "trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(str(model_path), trust_remote_code=trust_remote_code)
    text, dtype = config.get_text_config(decoder=True), {2: torch.bfloat16, 4: torch.float32}[compute]
    layers, kinds = int(text.num_hidden_layers), getattr(text, "layer_types", None)
    found: list[tuple[int, float]] = []
    for count in (1, 2):
        text.num_hidden_layers = count
        if kinds:
            text.layer_types = list(kinds[:count])
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, torch.UntypedStorage] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, **how).eval()
                packed = {"packed_row": joined([_PROBE_TOKENS])} if install_packed_attention(model) else {}
                ids, positions = torch.ones(1, _PROBE_TOKENS, dtype=torch.int64), torch.arange(_PROBE_TOKENS)[None]
                with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                    output = model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1, **packed)
                weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
                size = sum(storage.nbytes() for key, storage in kept.items() if key not in weights)
                found.append((sum(parameter.numel() for parameter in model.parameters()), size / _PROBE_TOKENS))
                del output
        except Exception as error:
            text_of = f"{config.model_type} cannot be run on tensors without content: {error}".splitlines()[0]
            raise ConfigError(text_of[:300], "model.path") from error
    (one, kept_one), (two, kept_two) = found
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not model.get_output_embeddings()]
    hidden, heads = int(text.hidden_size), int(text.num_attention_heads)
    width = int(getattr(text, "head_dim", None) or hidden // heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    return Shape(
        layers=layers,
        layer=two - one,
        rest=2 * one - two,
        head=vocabulary * hidden,
        hidden=hidden,
        vocabulary=vocabulary,
        kept_layer=kept_two - kept_one,
        kept_rest=2 * kept_one - kept_two,
        kv=2.0 * layers * kv_heads * width * compute,
        adapters=sum(part.in_features + part.out_features for part in linear) // 2,
    )


def predict(shape: Shape, plan: Plan, card: float = 0.0) -> Phases:
    """Largest memory of each phase. ``card``: bytes of the card, of which a replica takes its share."""
    from atropos_verl.training.lm_head import KEEP_BYTES

    trainable = plan.lora_rank * shape.adapters * shape.layers if plan.lora_rank else shape.parameters
    frozen = shape.parameters if plan.lora_rank else 0
    weights = plan.master * (trainable + frozen) / plan.ranks
    gradients = plan.master * trainable / plan.ranks
    held = {"code": _CODE, "weights": weights, "moments": 2 * gradients}
    embedded = plan.engine_share is None
    engine = {"engine's weights": float(plan.compute * shape.parameters)} if embedded else {}
    if embedded and plan.on_cpu:  # oneDNN's layout of every matrix is a second copy
        engine["its packed copies"] = plan.compute * (shape.parameters - shape.rest + shape.head)
    running = dict(engine)
    if embedded:
        if plan.overlap:
            running["weights to swap in"] = sum(engine.values())
        running["KV, at most"] = 2 * shape.kv * plan.running * plan.context  # slots, and what is stored of them
    else:
        running["replica"] = (plan.engine_share or 0.0) * card
    beside = running if embedded and plan.overlap else engine if embedded and plan.keeps_engine else {}

    kept = shape.layers * shape.kept_layer + shape.kept_rest
    if plan.checkpointing:  # the input of every layer, and one layer at a time
        kept = shape.layers * shape.hidden * plan.compute + shape.kept_layer + shape.kept_rest
    logits = plan.tokens * plan.trained * shape.vocabulary * plan.compute
    bounds = {key.itemsize: bound for key, bound in KEEP_BYTES.items()}
    train = {
        **held,
        "gradients": gradients,
        "activations": plan.tokens * kept,
        # Its gradient takes the place of what was kept, block by block.
        "LM head": max(min(logits, bounds[plan.compute]), 0 if plan.lora_rank else shape.head * plan.compute),
    }
    if plan.ranks > 1 or plan.compute != plan.master:  # FSDP2: the root, and the layer at hand and the next, gathered
        gathered = plan.compute * (shape.rest + 2 * shape.layer)
        train["gathered layers"] = gathered + (0 if plan.lora_rank else 4 * shape.layer)
    update = {**held, "gradients": gradients}
    if not plan.on_cpu:
        update["AdamW's intermediates"] = gradients
    resting = {"code": _CODE} if plan.offload else held
    return {
        "rollout": {**resting, **running},
        "forward and backward": {**train, **beside},
        "optimiser step": {**update, **beside},
        "weight sync": {**held, **(running if plan.overlap else engine), "one tensor": 4.0 * shape.head},
    }


def peak(phases: Phases) -> float:
    return max(sum(parts.values()) for parts in phases.values())


def longest_micro_batch(shape: Shape, plan: Plan, room: float) -> int:
    """Most tokens of a micro-batch with which everything stays within ``room`` bytes; 0: nothing does."""
    sizes = range(1, 1 << 22)
    return bisect(sizes, room, key=lambda tokens: peak(predict(shape, replace(plan, tokens=tokens), room)))


def plan_of(config: RunConfig, launch: LaunchConfig, verl: Mapping[str, Any]) -> Plan:
    """The plan of a local run, or with verl's own settings (``verl``) of one on Ray."""
    prompt, answer = config.data.max_prompt_length, config.max_response_length
    if not verl:
        model, longest = config.model, config.max_token_len
        return Plan(
            ranks=launch.trainer_process.nproc,
            tokens=config.trainer.max_token_len_per_gpu,
            trained=min(1.0, answer / longest),
            master=_BYTES[model.dtype],
            compute=_BYTES[model.compute_dtype],
            checkpointing=model.enable_gradient_checkpointing,
            on_cpu=config.trainer.device == "cpu",
            overlap=config.is_overlapped,
            keeps_engine=not config.inference.release_weights,
            running=min(config.inference.max_running, config.batch_size),
            context=config.inference.max_context_len or longest,
        )
    actor, rollout, policy = (dict(verl["actor_rollout_ref"].get(name) or {}) for name in ("actor", "rollout", "model"))
    fsdp, trainer = dict(actor.get("fsdp_config") or {}), verl["trainer"]
    lengths = dict(verl.get("data") or {})
    prompt, answer = (int(lengths.get(f"max_{name}_length") or 1024) for name in ("prompt", "response"))
    ulysses = int(actor.get("ulysses_sequence_parallel_size") or 1)
    return Plan(
        ranks=int(trainer.get("nnodes") or 1) * int(trainer.get("n_gpus_per_node") or 1),
        tokens=int(actor.get("ppo_max_token_len_per_gpu") or 16384) // ulysses,
        trained=answer / (prompt + answer),
        master=_BYTES[str(fsdp.get("model_dtype") or "fp32")],
        compute=_BYTES[str(fsdp.get("dtype") or "bfloat16")],
        checkpointing=bool(policy.get("enable_gradient_checkpointing")),
        lora_rank=int(policy.get("lora_rank") or 0),
        offload=bool(fsdp.get("param_offload") and fsdp.get("optimizer_offload")),
        on_cpu=trainer.get("device") == "cpu",
        engine_share=float(rollout.get("gpu_memory_utilization") or 0.5),
    )


def check_memory(shape: Shape, plan: Plan, room: float, place: str) -> list[Finding]:
    """One finding per phase, one of the longest micro-batch. ``room``: bytes that there are; ``place``: where."""
    on_ray, longest = plan.engine_share is not None, longest_micro_batch(shape, plan, room)
    prefix = "actor_rollout_ref." if on_ray else ""
    key = f"{prefix}actor.ppo_max_token_len_per_gpu" if on_ray else "trainer.max_token_len_per_gpu"
    remedies = {  # the least costly first
        f"{key}={longest}": longest > 0,
        f"{prefix}model.enable_gradient_checkpointing=true": not plan.checkpointing,
        "bfloat16 compute": plan.compute == 4 and not plan.on_cpu,
        "mode=sync": plan.overlap,
        "actor.fsdp_config.param_offload=true and optimizer_offload=true": on_ray and not plan.offload,
        "a smaller rollout.gpu_memory_utilization": on_ray,
        "model.lora_rank=32": on_ray and not plan.lora_rank,
        "more ranks, or a smaller model": True,
    }
    todo = f"one or more of: {'; '.join(remedy for remedy, helps in remedies.items() if helps)}"
    findings = []
    for phase, parts in predict(shape, plan, room).items():
        total = sum(parts.values())
        text = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items() if size >= 5e7)
        text = f"{total / 1e9:.1f} GB of {room / 1e9:.1f} ({place}): {text}"
        findings.append(finding("memory", phase, text, missing=todo if total > room else ""))
    text = f"{longest} tokens ({key}, now {plan.tokens})" if longest else "none fits"
    return [*findings, finding("memory", "longest micro-batch", text)]
