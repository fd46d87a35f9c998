"""An answer as it is made: the reasoning first, apart from what is said, and at the end what it took.

melt-serve serve                      # in another terminal
python examples/streaming.py
"""

import os
import time

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)
question = (
    "Find everybody. Ann is in Rome. Bob is with Ann. Eve is in Oslo. Kim is with Bob. Leo is with Kim. "
    "Mia is in Perth. Sam is with Leo. Dan is with Mia. Tom is with Sam. Uma is with Dan. Ian is with Tom. "
    "Zoe is in Bern. Where is Sam?"
)
print(question)

started, said = time.monotonic(), ""
stream = client.chat.completions.create(
    model=client.models.list().data[0].id,
    messages=[{"role": "user", "content": question}],
    temperature=0,
    stream=True,
    stream_options={"include_usage": True},
    reasoning_effort="medium",
)
for chunk in stream:
    if chunk.usage:  # the last chunk has no choices
        usage = chunk.usage
    for choice in chunk.choices:
        for kind, text in (("reasoning", getattr(choice.delta, "reasoning", None)), ("answer", choice.delta.content)):
            if text:
                print("" if kind == said else f"\n{kind:9}  ", text, sep="", end="", flush=True)
                said = kind

seconds = time.monotonic() - started
print(f"\n\n{usage.completion_tokens} tokens in {seconds:.2f} s, {usage.loops['mean']:.2f} loops a token")
