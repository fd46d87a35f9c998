"""Post-training in one script: a LoopLM becomes a MELT by the paper's two phases, and is checked as a server would.

A handful of steps, to see the parts; the MELT that comes out answers nothing yet. For a model of your own put more of
everything into the recipe: docs/training.md explains it. No server, no GPU, some seconds.

    python examples/post_train.py [FOLDER]
"""

import json
import sys
from itertools import islice
from pathlib import Path

from melt_serve import cli
from melt_serve.bundled import LOOPLM
from melt_serve.task.who_is_where import questions

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/example")
folder.mkdir(parents=True, exist_ok=True)

# What it learns from: chats, one a line.
chats = [
    [{"role": "user", "content": question.prompt}, {"role": "assistant", "content": question.reply}]
    for question in islice(questions("train", seed=0), 64)
]
data = folder / "chats.jsonl"
data.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))

# The recipe: the teacher, and a stage for each phase. First its rows go over from the LoopLM's to the MELT's, then its
# attention outputs are aligned with the teacher's.
recipe = folder / "recipe.toml"
recipe.write_text(f"""\
kind = "post-training"
teacher = {json.dumps(str(LOOPLM))}
output = {json.dumps(str(folder / "melt"))}
data.files = {json.dumps(str(data))}
chunk_size = 32
sequence_length = 256
batch_tokens = 512
micro_batch = 2
dtype = "float32"
report_to = []

[transition]
steps = 4
learning_rate = 3e-4
warmup = 1
interpolate = true
loops = [2, 3, 4]

[alignment]
steps = 4
learning_rate = 3e-4
warmup = 1
loops = [2, 3, 4]
alignment = 10.0
""")

# The same as `melt-serve train run RECIPE --run FOLDER` and `melt-serve convert --check FOLDER` in a terminal.
failed = cli.main(["train", "run", str(recipe), "--run", str(folder / "run"), "--resume"])
if failed := failed or cli.main(["convert", "--check", str(folder / "melt")]):
    sys.exit(failed)
# The transition's loss rises on the way: the rows become the MELT's, which its gates must learn to make.
for line in (folder / "run" / "losses.jsonl").read_text().splitlines():
    step = json.loads(line)
    print(f"{step['stage']:12} step {step['step'] + 1}   loss {step['loss']:.3f}")
print(f"serve it: melt-serve serve {folder / 'melt'}")
