"""Training the demo checkpoint: it learns, it repeats itself, and what is bundled works."""

import subprocess
import sys
from dataclasses import replace
from itertools import islice

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from melt_serve.modeling import MeltForCausalLM
from melt_serve.train.__main__ import BUNDLED
from melt_serve.train.direct import IGNORED, Recipe, accuracy, encode, loss_at_every_loop, make_checkpoint, train
from melt_serve.train.tasks import questions
from melt_serve.train.tokenizer import build_tokenizer

SHORT = Recipe(warm_steps=12, melt_steps=6, batch=4, warmup=2)


@pytest.fixture(scope="module")
def bundled():
    return AutoModelForCausalLM.from_pretrained(BUNDLED).eval(), AutoTokenizer.from_pretrained(BUNDLED)


def test_a_short_run_lowers_the_loss_and_repeats_itself_bit_by_bit():
    first, _, losses = train(SHORT)
    second, _, again = train(SHORT)
    other, _, _ = train(replace(SHORT, seed=1))
    assert losses == again and len(losses) == 18
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    state, same = first.state_dict(), second.state_dict()
    assert all(torch.equal(state[key], same[key]) for key in state)
    assert not torch.equal(state["lm_head.weight"], other.state_dict()["lm_head.weight"])


def test_the_loss_is_on_the_reply_and_its_end_only():
    tokenizer = build_tokenizer()
    batch = encode(list(islice(questions("train", 0), 3)), tokenizer)
    for question, labels, start in zip(questions("train", 0), batch.labels, batch.prompt_lengths, strict=False):
        supervised = labels[labels != IGNORED]
        assert tokenizer.decode(supervised) == question.reply + tokenizer.eos_token
        assert (labels[:start] == IGNORED).all() and labels[start] != IGNORED


def test_decode_aware_batches_see_other_rows(bundled):
    model, tokenizer = bundled
    batch = encode(list(islice(questions("heldout", 0), 8)), tokenizer)
    with torch.no_grad():
        on_grid, as_decoded = (loss_at_every_loop(model, batch, 4, aware).item() for aware in (False, True))
    assert on_grid != as_decoded


def test_the_bundled_checkpoint_answers_held_out_questions(bundled):
    model, tokenizer = bundled
    assert accuracy(model, tokenizer, 100) >= 0.95


def test_the_bundled_checkpoint_is_small_and_whole():
    files = {path.name: path.stat().st_size for path in BUNDLED.iterdir()}
    assert sum(files.values()) < 8 << 20
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"} <= set(files)


def test_a_checkpoint_is_written_whole_with_its_card(tmp_path):
    target = tmp_path / "made"
    scores = make_checkpoint(target, replace(SHORT, warm_steps=2, melt_steps=1), evaluated=4)
    assert set(scores) == {1, 2, 4}
    assert isinstance(AutoModelForCausalLM.from_pretrained(target), MeltForCausalLM)
    assert "4 held-out questions" in (target / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_help_names_the_command_and_bad_words_are_one_error():
    run = [sys.executable, "-m", "melt_serve.train"]
    assert "demo" in subprocess.run([*run, "--help"], capture_output=True, text=True, check=True).stdout
    wrong = subprocess.run([*run, "demo", "--seed", "x"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr
