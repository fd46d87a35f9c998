"""Merged matmuls give the answers of the reference, and no weight is there twice."""

from types import SimpleNamespace

import pytest
from vllm import envs

from melt_serve.engine.merge import may_merge
from tests.engine.engines import (
    ADAPTERS,
    DEPTHS,
    EXITS,
    LENGTHS,
    RIGHT,
    distance,
    engine,
    generate,
    keep_weights,
    on,
    prompts,
    save_melt,
)


def backbone(llm):
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model().model


def merged_weights(melt):
    all_of_them = [melt.merged_state, *(layer.self_attn.merged_input for layer in melt.layers)]
    return [each for each in all_of_them if each is not None]


def distance_of_a_batch(llm, model):
    asked = prompts(*LENGTHS)
    return distance(model, asked, generate(llm, asked, DEPTHS, EXITS, max_tokens=12), DEPTHS, EXITS)


@pytest.mark.parametrize(
    "overrides",
    [{}, {"decode_mode": "chunk", "kv_gate_rank": 8}, {"kv_gate_type": "scalar", "kv_gate_initial_state": "zeros"}],
    ids=["whole", "of-low-rank", "scalar-from-zero"],
)
def test_merged_weights_equal_the_reference_also_when_loaded_again(tmp_path, monkeypatch, overrides):
    keep_weights(monkeypatch)
    model = save_melt(tmp_path, **overrides)
    with engine(tmp_path) as llm:
        melt = backbone(llm)
        merged = merged_weights(melt)
        places = [each.data_ptr() for each in merged]
        assert len(places) == (1 if overrides.get("kv_gate_type") == "scalar" else 3)
        for layer in melt.layers:
            attention = layer.self_attn
            if attention.merged_input is not None:
                assert attention.q_proj.weight.data_ptr() == attention.merged_input.data_ptr()
            state = attention.kv_gate.reads_state.weight
            assert state.untyped_storage().data_ptr() == melt.merged_state.data_ptr()
        assert distance_of_a_batch(llm, model) <= RIGHT
        for each in merged:
            each.zero_()
        llm.collective_rpc("reload_weights")
        assert llm.reset_prefix_cache()
        assert distance_of_a_batch(llm, model) <= RIGHT
        assert [each.data_ptr() for each in merged_weights(melt)] == places


def test_merged_weights_equal_the_reference_compiled(tmp_path, monkeypatch):
    keep_weights(monkeypatch)
    model = save_melt(tmp_path, num_hidden_layers=1)
    with engine(tmp_path, enforce_eager=False) as llm:
        assert backbone(llm).merged_state is not None
        assert distance_of_a_batch(llm, model) <= RIGHT


@on("token")
def test_packed_weights_stay_apart(served):
    assert not merged_weights(backbone(served.llm))


def test_weights_with_adapters_stay_apart(tmp_path, monkeypatch):
    keep_weights(monkeypatch)
    model = save_melt(tmp_path, num_hidden_layers=1)
    with engine(tmp_path, **ADAPTERS) as llm:
        assert backbone(llm).merged_state is None
        assert distance(model, prompts(40), generate(llm, prompts(40))) <= RIGHT


@pytest.mark.parametrize("refused", ["lora", "uva", "prefetch", "invariant"])
def test_what_stands_between_a_layer_and_its_weight_keeps_them_apart(monkeypatch, refused):
    config = SimpleNamespace(
        lora_config=object() if refused == "lora" else None,
        offload_config=SimpleNamespace(
            uva=SimpleNamespace(cpu_offload_gb=int(refused == "uva")),
            prefetch=SimpleNamespace(offload_group_size=int(refused == "prefetch")),
        ),
    )
    monkeypatch.setattr(envs, "VLLM_BATCH_INVARIANT", refused == "invariant", raising=False)
    assert not may_merge(config)
    monkeypatch.setattr(envs, "VLLM_BATCH_INVARIANT", False, raising=False)
    config.lora_config, config.offload_config.uva.cpu_offload_gb = None, 0
    config.offload_config.prefetch.offload_group_size = 0
    assert may_merge(config)
