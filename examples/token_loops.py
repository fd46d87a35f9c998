"""What each token of an answer ran: its loops, how sure the exit gate was after each, and its log-probability.

Together with token ids this is what reinforcement learning needs to weigh a rollout, and what a study of depth needs
to see.

    melt-serve serve                      # in another terminal
    python examples/token_loops.py
"""

import os

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)
answer = client.chat.completions.create(
    model=client.models.list().data[0].id,
    messages=[
        {"role": "user", "content": "Find everybody. Ann is in Rome. Bob is with Ann. Kim is with Bob. Where is Kim?"}
    ],
    temperature=0,
    logprobs=True,
    extra_body={"vllm_xargs": {"exit_threshold": 0.5, "return_loops": True}},
)
(choice,) = answer.choices
print(f"{'token':12} {'log p':>8} {'loops':>6}   the exit gate after each loop")
for token, loops, exits in zip(choice.logprobs.content, choice.loops, choice.exit_probabilities, strict=True):
    print(f"{token.token!r:12} {token.logprob:8.4f} {loops:6}   {', '.join(f'{each:.2f}' for each in exits)}")
print(f"\n{answer.usage.completion_tokens} tokens, {answer.usage.loops['mean']:.2f} loops on average")
