"""Counting right answers: by the reference model, and on the command line. A server is asked in tests/api."""

import json
from dataclasses import fields
from itertools import islice

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from melt_serve import cli
from melt_serve.bundled import LOOPLM, MELT
from melt_serve.checkpoint_path import CheckpointError
from melt_serve.task.evaluate import (
    EvaluationError,
    Score,
    answers,
    evaluate_checkpoints,
    evaluate_server,
    heldout,
    longest_reply,
    table,
)
from melt_serve.task.tokenizer import build_tokenizer
from melt_serve.task.who_is_where import SENTENCES, questions
from tests.ouro_files import write_ouro


def test_the_score_is_the_share_of_right_answers():
    """Counted once more, one question at a time, at a depth where not all are right."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MELT).eval(), AutoTokenizer.from_pretrained(MELT)
    asked = heldout(12)
    for mode in ("token", "chunk"):
        model.config.decode_mode = mode
        for loops in (2, 4):
            right = sum(
                question.check(answers(model, tokenizer, [question], loops=loops)[0].answer) for question in asked
            )
            (scored,) = evaluate_checkpoints([MELT], 12, [loops], [mode])
            assert scored == Score(MELT.name, loops, 32, mode, 1.0, loops, 12, right / 12)


def test_the_bundled_checkpoints_are_scored_by_default_at_their_own_depth():
    teacher, student = evaluate_checkpoints([], 50)
    assert (teacher.checkpoint, teacher.loops, teacher.decode_mode) == (LOOPLM.name, 4, None)
    assert (student.checkpoint, student.loops, student.decode_mode) == (MELT.name, 4, "token")
    assert teacher.accuracy >= 0.9 and student.accuracy >= 0.9


def test_files_as_ouros_are_published_are_evaluated(tmp_path):
    """They name no token for padding, end a turn with another mark than the tokenizer's, and their tags are special."""
    folder = write_ouro(
        tmp_path, {"\n": ["<think>"], "<think>": ["Hm"], "Hm": ["</think>"], "</think>": ["Yes"], "Yes": ["<|im_end|>"]}
    )
    (score,) = evaluate_checkpoints([folder], 3)
    assert (score.questions, score.accuracy) == (3, 0)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    (reply,) = answers(model, tokenizer, heldout(1), loops=4)
    assert reply.answer.strip() == "Yes"


def test_no_right_reply_is_cut_off():
    """The deepest chain there can be has a name, which is a token, for every sentence."""
    tokenizer = build_tokenizer()
    for question in islice(questions("heldout", 1, kinds=["aloud"]), 200):
        deepest = len(tokenizer.encode(question.reply)) + SENTENCES - (len(question.steps) - 1)
        assert deepest + 1 == longest_reply(tokenizer)


def test_more_loops_than_a_melt_may_run_are_refused_before_anything_runs():
    with pytest.raises(EvaluationError, match=r"melt-demo runs at most max_loops=8 loops, not 9"):
        evaluate_checkpoints([LOOPLM, MELT], 10**9, [1, 9])


def test_a_model_of_another_kind_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="is a 'llama' model"):
        evaluate_checkpoints([tmp_path], 1)


def test_a_server_that_is_not_there_is_one_error():
    with pytest.raises(EvaluationError, match=r"http://127\.0\.0\.1:9/v1"):
        evaluate_server("http://127.0.0.1:9/v1", 1)


def test_a_contrast_is_scored_at_each_depth_and_weight():
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MELT).eval(), AutoTokenizer.from_pretrained(MELT)
    asked = heldout(12)
    scores = evaluate_checkpoints([MELT], 12, [2, 3], contrasts=[0, 4])
    assert [(score.loops, score.contrast) for score in scores] == [(2, 0), (2, 4), (3, 0), (3, 4)]
    replies = answers(model, tokenizer, asked, loops=3, contrast=4.0, contrast_loop=1)
    right = sum(question.check(reply.answer) for question, reply in zip(asked, replies, strict=True))
    assert scores[3].accuracy == right / 12
    with pytest.raises(EvaluationError, match=r"2 loops or more, not 1"):
        evaluate_checkpoints([LOOPLM], 10**9, [4, 1], contrasts=[0, 1])


def test_the_table_lines_up():
    text = table(
        [Score("a", 4, None, None, None, 4, 1000, 0.9514), Score("melt-demo", 4, 32, "token", 0.5, 2.1, 1000, 1.0)]
    )
    assert len({len(line) for line in text.splitlines()}) == 1
    assert "95.1%" in text and "100.0%" in text and "1,000" in text


def test_eval_prints_a_table_and_a_line_of_json(capsys):
    assert (
        cli.main(["eval", str(MELT), "--loops", "1,4", "--decode-mode", "token,chunk", "--questions", "5", "--json"])
        == 0
    )
    *_, last = (output := capsys.readouterr().out).splitlines()
    rows = json.loads(last)["results"]
    assert [(row["loops"], row["decode_mode"]) for row in rows] == [
        (1, "token"),
        (4, "token"),
        (1, "chunk"),
        (4, "chunk"),
    ]
    assert set(rows[0]) == {field.name for field in fields(Score)}
    assert output.startswith("checkpoint")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--loops", "0"], "not a whole number"),
        (["--questions", "-3"], "not a whole number"),
        (["--decode-mode", "fast"], "'fast' is neither"),
        (["--exit-threshold", "0.5,0"], "'0.5,0' is not numbers above 0"),
        (["--exit-threshold", "often"], "'often' is not numbers above 0"),
        (["--contrast", "1,-1"], "'1,-1' is not numbers from 0"),
        (["--contrast", "inf"], "'inf' is not numbers from 0"),
    ],
)
def test_wrong_words_are_usage_errors(words, says, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["eval", *words])
    assert says in capsys.readouterr().err


def test_a_missing_checkpoint_is_one_line(tmp_path, capsys):
    assert cli.main(["eval", str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert "nowhere" in error and error.count("\n") == 1


def test_a_server_takes_no_depth(capsys):
    assert cli.main(["eval", "--server", "http://x", "--loops", "4"]) == 2
    assert "--server goes with" in capsys.readouterr().err


def test_answers_do_not_depend_on_the_batch():
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MELT).eval(), AutoTokenizer.from_pretrained(MELT)
    asked = heldout(6)
    with torch.inference_mode():
        assert answers(model, tokenizer, asked, loops=4) == [
            answers(model, tokenizer, [one], loops=4)[0] for one in asked
        ]
