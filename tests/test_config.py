"""Configurations: what loads, what is refused, and the memory they imply."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM

from melt_serve import cli
from melt_serve.checkpoint_config import load_config
from melt_serve.checkpoint_path import CheckpointError
from melt_serve.config import (
    AT_LEAST_ONE,
    LoopLMConfig,
    MeltConfig,
    chunk_end,
    chunk_start,
    kv_bytes_per_token,
    on_grid,
    sharing_unit,
    weight_shapes,
)
from melt_serve.modeling import MeltForCausalLM, OuroForCausalLM
from tests.ouro_files import PUBLISHED_OURO
from tests.tiny_models import SHAPE, tiny_looplm, tiny_melt, tokens

GATES = [(kind, None) for kind in ("elementwise", "scalar", "mean", "ema", "last")] + [("elementwise", 3)]
"""Types, each with a rank."""


@pytest.mark.parametrize("config", [LoopLMConfig(), MeltConfig()], ids=["LoopLM", "MELT"])
def test_defaults_are_ouro_1_4b(config):
    assert (config.num_key_value_heads, config.head_dim, config.total_ut_steps) == (16, 128, 4)
    parameters = sum(1 if not shape else shape[0] * (shape[1:] or (1,))[0] for _, shape in weight_shapes(config))
    assert parameters == pytest.approx(1.43e9 if config.model_type == "ouro" else 1.64e9, rel=0.01)


def test_kv_bytes_are_those_of_the_published_shapes():
    assert kv_bytes_per_token(LoopLMConfig(), bytes_per_value=2) == 786_432
    assert kv_bytes_per_token(MeltConfig(), bytes_per_value=2) == 196_608
    assert kv_bytes_per_token(MeltConfig(), bytes_per_value=1) == 98_304


def test_kv_bytes_grow_with_the_loops_of_a_looplm_only():
    assert kv_bytes_per_token(LoopLMConfig(), 2, loops=8) == 2 * 786_432
    for loops in (1, 4, 16):
        assert kv_bytes_per_token(MeltConfig(total_ut_steps=loops), 2, loops=loops) == 196_608


def test_kv_bytes_count_kv_heads_not_query_heads():
    assert kv_bytes_per_token(MeltConfig(num_key_value_heads=4), 2) == 196_608 // 4


def test_chunks_and_blocks_end_together_at_their_least_common_multiple():
    assert sharing_unit(500, 16) == 2000
    assert sharing_unit(512, 16) == 512


def test_a_published_ouro_config_loads_as_it_is(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED_OURO))
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is LoopLMConfig
    assert config.rope_base == 500_000.0
    assert (config.head_dim, config.eos_token_id, config.total_ut_steps) == (128, 0, 4)


def test_rope_base_comes_from_rope_parameters_too():
    assert LoopLMConfig(rope_parameters={"rope_type": "default", "rope_theta": 7.0}).rope_base == 7.0
    assert LoopLMConfig().rope_base == 1_000_000.0


def test_rope_stated_twice_is_refused():
    with pytest.raises(ValueError, match=r"rope_theta is stated twice, as 10000\.0 and as 1000000\.0"):
        LoopLMConfig(rope_theta=1e4, rope_parameters={"rope_type": "default", "rope_theta": 1e6})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "only 'default' rotary embeddings"),
        ({"use_sliding_window": True}, "sliding-window attention is not supported"),
        ({"model_type": "llama"}, "is a 'llama' model, not a looped one"),
    ],
)
def test_a_folder_whose_config_is_not_ours_is_one_line_everywhere(tmp_path, capsys, changes, message):
    (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED_OURO, **changes}))
    with pytest.raises(CheckpointError, match=message):
        load_config(tmp_path)
    data = ["train", "data", str(tmp_path / "config.json"), "--checkpoint", str(tmp_path)]
    for words in (["plan", str(tmp_path)], ["eval", str(tmp_path), "--questions", "1"], data):
        assert cli.main(words) != 0
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1 and "Traceback" not in said


def test_a_name_that_can_be_no_name_on_the_hub_is_not_looked_for_there():
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        load_config(Path("nowhere"))


def test_rope_base_changes_the_answer():
    prompt = tokens(1, 8)
    answers = [tiny_looplm(rope_theta=theta)(prompt).logits for theta in (100.0, 1e6)]
    assert (answers[0] - answers[1]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        *((field, value, rf"{field} must be at least 1, not {value}") for field in AT_LEAST_ONE for value in (0, -2)),
        ("num_key_value_heads", 3, r"num_attention_heads=16 is not a multiple of num_key_value_heads=3"),
        ("hidden_act", "gelu", r"hidden_act='gelu'.*must be 'silu'"),
        ("use_sliding_window", True, r"sliding-window attention is not supported"),
        ("attention_dropout", 0.1, r"attention_dropout=0\.1: attention dropout is not supported"),
        ("rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, r"rope_type='linear'"),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5"),
        ("rope_scaling", {"type": "linear", "factor": 2.0}, r"rope_type='linear'"),
        ("rope_theta", 0.0, r"rope_theta must be a positive number, not 0\.0"),
        ("rope_theta", "x", r"rope_theta must be a positive number, not 'x'"),
        ("head_dim", 15, r"even rotary dimension.*head_dim.*15"),
        ("layer_types", ["sliding_attention"] * 24, r"only 'full_attention' is supported"),
        ("hidden_size", "wide", r"hidden_size"),
        ("max_loops", 3, r"total_ut_steps=4 is outside 1\.\.max_loops=3"),
        ("effort_loops", {"great": 1}, r"effort_loops: 'great' is none of none, minimal, low"),
        ("effort_loops", {"low": 5}, r"effort_loops: low=5 is outside 1\.\.max_loops=4"),
        ("early_exit_threshold", 0.0, r"early_exit_threshold=0\.0 must be above 0 and at most 1"),
        ("early_exit_step", 2, r"early_exit_step=2 is not supported: state the loops to run as total_ut_steps"),
        ("vocab_size", 1.5, r"vocab_size"),
    ],
)
@pytest.mark.parametrize("config_class", [LoopLMConfig, MeltConfig])
def test_a_bad_field_is_refused_by_name(config_class, field, value, message):
    with pytest.raises(StrictDataclassError, match=message):
        config_class(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("chunk_size", 0, r"chunk_size must be at least 1, not 0"),
        ("chunk_size", "64", r"chunk_size"),
        ("kv_gate_type", "fancy", r"kv_gate_type.*elementwise"),
        ("kv_gate_initial_state", "ones", r"kv_gate_initial_state.*zeros"),
        ("kv_gate_rank", 0, r"kv_gate_rank=0 is outside 1\.\."),
        ("kv_gate_rank", 4096, r"kv_gate_rank=4096 is outside 1\.\."),
        ("decode_mode", "beam", r"decode_mode.*chunk"),
    ],
)
def test_a_bad_melt_field_is_refused_by_name(field, value, message):
    with pytest.raises(StrictDataclassError, match=f"(?s){message}"):
        MeltConfig(**{field: value})


def test_only_an_elementwise_gate_has_a_rank():
    with pytest.raises(StrictDataclassError, match=r"(?s)kv_gate_rank=8: only an elementwise gate has a rank"):
        MeltConfig(kv_gate_type="scalar", kv_gate_rank=8)


def test_max_loops_is_the_default_loops_unless_said():
    assert MeltConfig(total_ut_steps=6).max_loops == 6
    assert MeltConfig(total_ut_steps=6, max_loops=9).max_loops == 9
    assert LoopLMConfig(total_ut_steps=6).most_loops == 6
    assert LoopLMConfig(total_ut_steps=6, max_loops=9).most_loops == 9


def test_efforts_are_shares_of_the_default_loops_unless_said():
    efforts = MeltConfig(total_ut_steps=4, max_loops=8).loops_by_effort
    assert efforts == {"none": 1, "minimal": 1, "low": 2, "medium": 4, "high": 6, "xhigh": 8, "max": 8}
    assert set(MeltConfig(total_ut_steps=1).loops_by_effort.values()) == {1}
    assert MeltConfig(effort_loops={"low": 3}).loops_by_effort == MeltConfig().loops_by_effort | {"low": 3}


def test_a_looplm_survives_saving_and_loading(tmp_path):
    model = tiny_looplm()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["model_type"], saved["architectures"]) == ("ouro", ["OuroForCausalLM"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is OuroForCausalLM
    torch.testing.assert_close(loaded(tokens(1, 9)).logits, model(tokens(1, 9)).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("gate_type", "rank"), GATES)
def test_a_melt_survives_saving_and_loading(gate_type, rank, tmp_path):
    gate = {"kv_gate_type": gate_type, "kv_gate_rank": rank, "kv_gate_initial_state": "zeros"}
    model = tiny_melt(**gate, decode_mode="chunk", chunk_size=3)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["model_type"], saved["architectures"]) == ("melt", ["MeltForCausalLM"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is MeltForCausalLM
    for field in (*gate, "decode_mode", "chunk_size", "max_loops", "total_ut_steps"):
        assert getattr(loaded.config, field) == getattr(model.config, field)
    torch.testing.assert_close(loaded(tokens(1, 9)).logits, model(tokens(1, 9)).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("max_loops", [1, 2, 8])
@pytest.mark.parametrize("gate", [{}, {"kv_gate_type": "scalar"}, {"kv_gate_rank": 3}], ids=str)
def test_a_melt_with_a_bias_a_loop_survives_saving_and_loading(gate, max_loops, tmp_path):
    loops = {"total_ut_steps": min(max_loops, 4), "max_loops": max_loops}
    model = tiny_melt(**gate, **loops, kv_gate_bias="loop")
    assert dict(weight_shapes(model.config)) == {key: tuple(each.shape) for key, each in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.kv_gate_bias == "loop"
    torch.testing.assert_close(loaded(tokens(1, 9)).logits, model(tokens(1, 9)).logits, atol=1e-4, rtol=0)


def test_a_bias_a_loop_needs_a_gate_that_learns_and_skips_loop_one():
    for gate, says in (
        ({"kv_gate_type": "mean"}, "'mean' learns no bias"),
        ({"kv_gate_initial_state": "zeros"}, "must be 'input', not 'zeros'"),
        ({"max_loops": 1, "total_ut_steps": 1, "kv_gate_type": "last"}, "'last' learns no bias"),
    ):
        with pytest.raises(StrictDataclassError, match=rf"(?s)kv_gate_bias='loop'.*{says}"):
            MeltConfig(**gate, kv_gate_bias="loop")


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 1, "head_dim": 24}])
@pytest.mark.parametrize(("gate_type", "rank"), [(None, None), *GATES])
def test_weight_shapes_are_those_of_the_saved_model(gate_type, rank, overrides):
    if gate_type is None:
        model = OuroForCausalLM(LoopLMConfig(**SHAPE | overrides))
    else:
        model = MeltForCausalLM(MeltConfig(**SHAPE | overrides, kv_gate_type=gate_type, kv_gate_rank=rank))
    shapes = {key: tuple(weight.shape) for key, weight in model.state_dict().items()}
    if overrides.get("tie_word_embeddings"):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        del shapes["lm_head.weight"]
    assert dict(weight_shapes(model.config)) == shapes


@pytest.mark.parametrize("chunk_size", [1, 5, 32])
def test_positions_and_lengths_meet_the_chunk_grid(chunk_size):
    for position in range(3 * chunk_size):
        start, end = chunk_start(position, chunk_size), chunk_end(position, chunk_size)
        assert start % chunk_size == 0 and end - start == chunk_size and start <= position < end
        assert on_grid(position, chunk_size) == (start if position == start else end)
    positions = torch.arange(3 * chunk_size)
    assert chunk_end(positions, chunk_size).tolist() == [chunk_end(p, chunk_size) for p in positions.tolist()]
