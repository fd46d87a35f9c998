"""What each generated token ran, where a request asks: its loops and exit probabilities are the reference's."""

import pytest
import torch

from tests.engine.engines import DEPTHS, EXITS, LENGTHS, generate, on, prompts, scheduler_of
from tests.engine.scenes import blocks_of_longest, confined, counted

MODES = on("token", "chunk")


@torch.no_grad()
def judge_told(model, prompt, answer, loops, threshold):
    """Compare what was told of an answer's tokens with the reference; return the loops."""
    tokens = torch.tensor([[*prompt, *answer.token_ids[:-1]]])
    output = model(
        tokens,
        loops=loops,
        exit_threshold=threshold,
        prompt_lengths=torch.tensor([len(prompt)]),
        output_loops=True,
    )
    said = output.exit_probabilities[:, 0, len(prompt) - 1 :].T.tolist()
    ran = output.depths[0, len(prompt) - 1 :].tolist()
    assert [told for told, _ in answer.token_loops] == ran
    for (_, told), expected, own in zip(answer.token_loops, said, ran, strict=True):
        assert told == pytest.approx(expected[:own], abs=1e-5)
    return ran


@MODES
def test_loops_and_exit_probabilities_of_every_token_are_the_references(served):
    llm, model = served
    asked = prompts(*LENGTHS)
    for exits in ((1.0,) * len(asked), EXITS):
        answers = generate(llm, asked, DEPTHS, exits, told=True, max_tokens=12)
        ran = [judge_told(model, *each) for each in zip(asked, answers, DEPTHS, exits, strict=True)]
    assert len({loops for each in ran for loops in each}) >= 4, "exits must come at many loops, or this shows little"
    assert not hasattr(generate(llm, asked[:1])[0], "token_loops")


@MODES
def test_so_they_are_of_requests_that_were_preempted(served):
    llm, model = served
    asked = prompts(*[100] * 4)
    scheduler = scheduler_of(llm)
    with confined(scheduler, blocks=blocks_of_longest(scheduler)), counted(scheduler) as counts:
        answers = generate(llm, asked, 4, 0.7, told=True, max_tokens=60)
    assert counts["preempted"] > 0
    for prompt, answer in zip(asked, answers, strict=True):
        judge_told(model, prompt, answer, 4, 0.7)
