"""LoRA adapters in PEFT's format, on every linear layer: the engine equals the reference with the adapter merged in."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from vllm import TokensPrompt
from vllm.lora.request import LoRARequest

from tests.engine.engines import distance, engine, everything, prompts, save_looplm, save_melt

EVERY_LAYER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
THE_GATE = ("kv_gate.input_proj", "kv_gate.state_proj")
RANK = 8
FLOAT32 = 1e-4


def save_adapter(path, model, targets, seed=0):
    """A random adapter of the targets' layers at `path`; gives the model with it merged in."""
    generator, merged, tensors = torch.Generator().manual_seed(seed), copy.deepcopy(model), {}
    for name, weight in merged.named_parameters():
        module = name.removesuffix(".weight")
        if module.endswith(targets) and name.endswith(".weight"):
            a = 0.2 * torch.randn(RANK, weight.shape[1], generator=generator)
            b = 0.2 * torch.randn(weight.shape[0], RANK, generator=generator)
            tensors[f"base_model.model.{module}.lora_A.weight"] = a
            tensors[f"base_model.model.{module}.lora_B.weight"] = b
            weight.data += 0.5 * b @ a
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    names = sorted({module.rpartition(".")[2] for module in targets})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK // 2, "target_modules": names, "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return merged


def ask(llm, asked, adapters, depths=None):
    """Each prompt with its adapter, or with none, in one batch."""
    tokens = [TokensPrompt(prompt_token_ids=prompt) for prompt in asked]
    sampling = [everything(8, extra_args=depth) for depth in depths or [{}] * len(asked)]
    return [o.outputs[0] for o in llm.generate(tokens, sampling, use_tqdm=False, lora_request=adapters)]


def check(path, model, targets, **options):
    """Two adapters and none, mixed in a batch, twice so that the second time prefixes are found."""
    merged = [save_adapter(path / f"adapter-{i}", model, targets, seed=i) for i in range(2)]
    requests = [LoRARequest(f"adapter-{i}", i + 1, str(path / f"adapter-{i}")) for i in range(2)]
    asked = prompts(5, 70, 33)
    for prompt in asked:
        prompt[:30] = asked[1][:30]
    with engine(path / "model", enable_lora=True, max_loras=2, max_lora_rank=RANK, **options) as llm:
        for _ in range(2):
            for adapters in (requests[0], None, requests[1]), (None, requests[1], requests[0]):
                expected = [model if a is None else merged[a.lora_int_id - 1] for a in adapters]
                for prompt, output, reference in zip(asked, ask(llm, asked, list(adapters)), expected, strict=True):
                    assert distance(reference, prompt, output, loops=4) <= FLOAT32


@pytest.mark.parametrize("mode", ["token", "chunk"])
@pytest.mark.parametrize("targets", [EVERY_LAYER + THE_GATE, THE_GATE], ids=["all", "gate"])
def test_an_adapter_equals_the_reference_with_it_merged_in(tmp_path, mode, targets):
    check(tmp_path, save_melt(tmp_path / "model", decode_mode=mode), targets)


@pytest.mark.parametrize("mode", ["token", "chunk"])
def test_adapters_stay_with_their_requests_when_others_leave_the_step(tmp_path, mode):
    """Requests of other depths and other adapters, side by side."""
    model = save_melt(tmp_path / "model", decode_mode=mode)
    merged = [save_adapter(tmp_path / f"adapter-{i}", model, EVERY_LAYER + THE_GATE, seed=i) for i in range(2)]
    first, second = (LoRARequest(f"adapter-{i}", i + 1, str(tmp_path / f"adapter-{i}")) for i in range(2))
    asked, adapters = prompts(5, 70, 33, 40, 64), [first, None, second, first, None]
    depths = [{"loops": loops, "exit_threshold": q} for loops, q in ((1, 1), (4, 1), (8, 0.8), (3, 0.6), (8, 0.9))]
    with engine(tmp_path / "model", enable_lora=True, max_loras=2, max_lora_rank=RANK) as llm:
        for _ in range(2):
            outputs = ask(llm, asked, adapters, depths)
            for prompt, output, adapter, depth in zip(asked, outputs, adapters, depths, strict=True):
                reference = model if adapter is None else merged[adapter.lora_int_id - 1]
                assert distance(reference, prompt, output, **depth) <= FLOAT32


def test_on_a_looplm_too(tmp_path):
    check(tmp_path, save_looplm(tmp_path / "model"), EVERY_LAYER)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_on_two_ranks(tmp_path, kv_heads, monkeypatch):
    """With one KV head, both ranks hold it."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    model = save_melt(tmp_path / "model", num_key_value_heads=kv_heads)
    two_ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    check(tmp_path, model, EVERY_LAYER + THE_GATE, **two_ranks)


def test_compiled(tmp_path):
    check(tmp_path, save_melt(tmp_path / "model", num_hidden_layers=1), EVERY_LAYER + THE_GATE, enforce_eager=False)


def test_an_adapter_of_something_else_is_refused_and_the_engine_lives_on(tmp_path):
    model = save_melt(tmp_path / "model")
    save_adapter(tmp_path / "adapter", model, ("lm_head",))
    (prompt,) = prompts(40)
    with engine(tmp_path / "model", enable_lora=True, max_lora_rank=RANK) as llm:
        with pytest.raises(ValueError, match="lm_head"):
            llm.llm_engine.add_lora(LoRARequest("other", 1, str(tmp_path / "adapter")))
        assert distance(model, prompt, ask(llm, [prompt], None)[0], loops=4) <= FLOAT32
