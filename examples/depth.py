"""One question at every depth: with fewer loops the model writes out the steps that it has no loops to think.

melt-serve serve                      # in another terminal
python examples/depth.py
"""

import os

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)
model = client.models.list().data[0].id
question = (
    "Answer at once. Ann is in Rome. Gus is in Bern. Bob is with Ann. Hana is with Gus. Kim is with Bob. "
    "Jack is with Hana. Leo is in Oslo. Mia is with Leo. Where is Jack?"
)
print(question)


def ask(label: str, **depth: object) -> None:
    """Ask at one depth, and print the answer beside the loops that its tokens ran."""
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=12,
        extra_body=depth,
    )
    loops = answer.usage.loops  # a field of melt-serve's: {"mean": 2.5, "max": 4}
    print(f"{label:20} {loops['mean']:5.2f} loops a token   {answer.choices[0].message.content}")


for loops in (2, 3, 4, 8):
    ask(f"loops {loops}", vllm_xargs={"loops": loops})
for effort in ("low", "medium", "high"):
    ask(f"effort {effort}", reasoning_effort=effort)  # OpenAI's own dial
for threshold in (0.9, 0.5):
    ask(f"exit threshold {threshold}", vllm_xargs={"exit_threshold": threshold})  # tokens may leave their loops early
