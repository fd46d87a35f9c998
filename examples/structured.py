"""Answers that a program can read: JSON that obeys a schema, and a call of a tool.

The bundled checkpoint never saw JSON or a tool. The server lets it say nothing else, so the form is right, and what it
fills in means little. A model that learnt tools decides by itself, with tool_choice="auto".

    melt-serve serve                      # in another terminal
    python examples/structured.py
"""

import json
import os

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)
model = client.models.list().data[0].id
messages = [{"role": "user", "content": "Find everybody. Ann is in Rome. Bob is with Ann. Where is Bob?"}]

place = {
    "type": "object",
    "properties": {"place": {"enum": ["Bern", "Oslo", "Rome"]}, "sure": {"type": "boolean"}},
    "required": ["place", "sure"],
    "additionalProperties": False,
}
answer = client.chat.completions.create(
    model=model,
    messages=messages,
    temperature=0,
    max_tokens=200,
    response_format={"type": "json_schema", "json_schema": {"name": "place", "schema": place}},
)
found = json.loads(answer.choices[0].message.content)
print(f"JSON by a schema: {found}")

move = {
    "type": "function",
    "function": {
        "name": "move",
        "description": "Move somebody to a place.",
        "parameters": {
            "type": "object",
            "properties": {"name": {"enum": ["Ann", "Bob"]}, "place": {"enum": ["Bern", "Oslo"]}},
            "required": ["name", "place"],
            "additionalProperties": False,
        },
    },
}
answer = client.chat.completions.create(
    model=model,
    messages=messages,
    temperature=0,
    max_tokens=200,
    tools=[move],
    tool_choice="auto",
    extra_body={
        # Keeps the bundled checkpoint to the form of a call. Leave both out with a model that learnt tools.
        "chat_template_kwargs": {"enable_thinking": False},
        "structured_outputs": {
            "regex": r'<tool_call>\{"name": "move", "arguments": '
            r'\{"name": "(Ann|Bob)", "place": "(Bern|Oslo)"\}\}</tool_call>'
        },
    },
)
for call in answer.choices[0].message.tool_calls:
    print(f"a call of a tool: {call.function.name}, {json.loads(call.function.arguments)}")
