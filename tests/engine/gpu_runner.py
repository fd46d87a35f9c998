"""vLLM's GPU runner (V2) on a CPU: `test_gpu_runner.py` runs these tests, in Triton's interpreter.

Eager only. On a CPU vLLM makes none of the dummy runs of a GPU's start, so tests make them.
"""

import pytest
from vllm import SamplingParams, TokensPrompt
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from tests.engine.engines import distance, engine, everything, generate, prompts, save_melt

LENGTHS = (1, 31, 33, 64, 100)
DEPTHS = (1, 8, 4, 2, 6)
EXITS = (1.0, 0.85, 0.5, 1.0, 0.6)
RIGHT = 1e-4


@pytest.fixture(scope="module", params=["token", "chunk"])
def served(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("melt")
    model = save_melt(path, decode_mode=request.param)
    with engine(path, max_num_batched_tokens=96, max_num_seqs=8) as llm:
        yield llm, model


@pytest.fixture
def llm(served):
    assert served[0].reset_prefix_cache()
    return served[0]


@pytest.fixture
def model(served):
    return served[1]


@pytest.fixture
def runner(llm):
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    assert isinstance(runner, GPUModelRunner)
    return runner


def furthest(model, asked, outputs, depths, exits):
    each = zip(asked, outputs, depths, exits, strict=True)
    return max(distance(model, prompt, output, loops, exit_threshold=q) for prompt, output, loops, q in each)


@pytest.mark.parametrize("exits", [(1.0,) * len(DEPTHS), EXITS], ids=["whole", "exits"])
def test_requests_of_mixed_depths_equal_the_reference(llm, model, exits):
    asked = prompts(*LENGTHS)
    sampling = [
        everything(10, extra_args={"loops": loops, "exit_threshold": q}) for loops, q in zip(DEPTHS, exits, strict=True)
    ]
    for _ in range(2):  # the second time prefixes are found
        outputs = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in asked], sampling, use_tqdm=False)
        assert furthest(model, asked, [output.outputs[0] for output in outputs], DEPTHS, exits) <= RIGHT


@pytest.mark.parametrize("tokens", [1, 8, 96])
def test_dummy_runs_of_a_start_pass_and_leave_answers_right(llm, model, runner, tokens):
    """Warm-up sizes, and the step of an idle data-parallel rank."""
    runner._dummy_run(tokens)
    (prompt,) = prompts(70)
    assert furthest(model, [prompt], generate(llm, [prompt]), [4], [1.0]) <= RIGHT


def test_the_profile_run_of_a_start_passes(runner):
    runner.profile_run()


def test_requests_as_vllm_warms_up_with_them_are_served_at_the_default_depth(llm):
    """They pass no front end: the engine itself gives them a depth."""
    from vllm.v1.engine import EngineCoreRequest

    request = EngineCoreRequest(
        request_id="warm-up",
        prompt_token_ids=prompts(40)[0],
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=3, temperature=0),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    core = llm.llm_engine.engine_core.engine_core
    core.add_request(*core.preprocess_add_request(request))
    generated = []
    while core.scheduler.has_requests():
        outputs, _ = core.step()
        for each in outputs.values():
            generated += [token for output in each.outputs for token in output.new_token_ids]
    assert len(generated) == 3


def test_seeded_requests_repeat_themselves(llm):
    asked = prompts(150)
    first, again, other = (generate(llm, asked, temperature=1.0, seed=seed)[0].token_ids for seed in (7, 7, 8))
    assert first == again != other


def test_usage_tells_the_loops(llm):
    (output,) = llm.generate(
        TokensPrompt(prompt_token_ids=prompts(40)[0]), everything(5, extra_args={"loops": 3}), use_tqdm=False
    )
    assert output.kv_transfer_params["melt_loops_run"] == {3: 5}
