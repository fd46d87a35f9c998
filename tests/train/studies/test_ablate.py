"""Ablations: runs that are done stay done, what is measured is what is served, and the report shows all of it."""

import json
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from melt_serve.modeling import MeltConfig
from melt_serve.modeling.gate import KVGate, fresh_weight_std
from melt_serve.task.evaluate import heldout
from melt_serve.task.tokenizer import prompt_ids
from melt_serve.train.__main__ import main
from melt_serve.train.data.task_batches import encode
from melt_serve.train.results import append_record, read_records
from melt_serve.train.session import Paused, Session
from melt_serve.train.studies.ablate import run_all
from melt_serve.train.studies.ablation_report import write_ablation_report
from melt_serve.train.studies.ablation_run import AblationRunner, answers, divergence, right_share, settings
from melt_serve.train.studies.ablations import (
    COMPRESSED,
    ELEMENTWISE,
    FULL,
    GATES,
    LAST,
    RECIPE,
    SIZES,
    STUDIES,
    WHOLE_SEQUENCE,
    Variant,
)
from melt_serve.train.studies.cheap_gates import CheapGate, LowRank

SIZE = replace(SIZES["small"], steps=(2, 2), batch=2, questions=4)
SQUARE = MeltConfig(hidden_size=24, num_attention_heads=2)


@pytest.fixture(scope="module")
def runner():
    return AblationRunner()


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    records = tmp_path_factory.mktemp("ablate") / "records.jsonl"
    run_all({"gates": (ELEMENTWISE, LAST), "recipe": RECIPE[1:2]}, SIZE, (0, 1), records, Session())
    return records


def test_a_run_that_two_studies_share_is_done_once(done):
    records = read_records(done)
    assert [(record["variant"], record["seed"]) for record in records] == [
        ("elementwise", 0),
        ("last", 0),
        ("elementwise", 1),
        ("last", 1),
    ]
    assert [path.name for path in done.parent.iterdir()] == ["records.jsonl"]
    for record in records:
        assert [(each["mode"], each["chunk_size"]) for each in record["outcomes"]] == [("token", 16), ("chunk", 16)]
        assert all(each["kd"] > 0.01 for each in record["outcomes"])
    kd = [record["outcomes"][0]["kd"] for record in records]
    assert len(set(kd)) == 4


def test_a_run_that_is_done_is_not_repeated(done):
    before = done.read_bytes()
    run_all({"gates": (ELEMENTWISE, LAST)}, SIZE, (0,), done, Session(minutes=0))
    assert done.read_bytes() == before


def test_a_run_of_other_settings_is_another_run(done, tmp_path):
    records = Path(shutil.copy(done, tmp_path))
    with pytest.raises(Paused):
        run_all({"gates": (ELEMENTWISE,)}, replace(SIZE, batch=3), (0,), records, Session(minutes=0))


def test_a_run_by_the_recipe_of_before_is_another_run():
    """What is reported was trained by it, but for the bundled MELT's own gate, which is not trained any further."""
    reported = json.loads((Path(__file__).parents[3] / "docs" / "results" / "ablations.json").read_text())
    known = [record["settings"] for record in reported]
    assert settings(COMPRESSED[0], SIZES["small"], 0) in known
    assert all({record["variant"] for record in reported} & {variant.name} for variant in (FULL, ELEMENTWISE))
    assert all(settings(variant, SIZES["small"], 0) not in known for variant in (FULL, ELEMENTWISE))


def test_a_run_cut_in_sessions_gives_the_record_of_an_unbroken_one(done, tmp_path):
    records, sessions = tmp_path / "records.jsonl", 0
    while sessions < 50:
        try:
            run_all({"gates": (ELEMENTWISE,)}, SIZE, (0,), records, Session(minutes=0.001))
            break
        except Paused:
            sessions += 1
    assert sessions > 0
    assert read_records(records)[0]["outcomes"] == read_records(done)[0]["outcomes"]


def test_the_report_shows_every_run_and_keeps_its_record(done, tmp_path):
    records = read_records(done)
    markdown, plot, numbers = write_ablation_report(tmp_path / "report.md", {"gates": GATES}, SIZE, records)
    assert json.loads(numbers.read_text()) == records and plot.read_text().startswith("<?xml")
    lines = {line.split("|")[1].strip(): line.split("|") for line in markdown.read_text().splitlines() if "|" in line}
    kd = [record["outcomes"][1]["kd"] for record in records if record["variant"] == "last"]
    assert all(path.parent == tmp_path for path in (markdown, plot, numbers))
    assert f"{sum(kd) / 2:.4f} ({min(kd):.4f} to {max(kd):.4f})" in "|".join(lines["`last`"])
    assert "`scalar`" not in lines


@torch.no_grad()
def test_a_reply_counts_as_right_when_greedy_decoding_gives_it_word_for_word(runner):
    """With a student that is right sometimes: the teacher's weights in one large chunk, a loop short."""
    student = runner.student(Variant("whole", "", gate_type="last", chunk_size=WHOLE_SEQUENCE), SIZE, 0).eval()
    asked, tokenizer = heldout(12), runner.tokenizer
    batch = encode(asked, tokenizer)
    for mode in ("token", "chunk"):
        student.config.decode_mode = mode
        greedy = 0
        for question in asked:
            prompt = torch.tensor([prompt_ids(question, tokenizer)])
            expected = tokenizer.encode(question.reply + tokenizer.eos_token)
            output = student.generate(prompt, loops=3, max_new_tokens=len(expected), do_sample=False)
            greedy += output[0, prompt.shape[1] :].tolist() == expected
        given = student.run_batch(
            batch, batch.before_reply, 3, decode_aware="tokens" if mode == "token" else None
        ).logits[-1]
        assert right_share([batch], [given]) == greedy / 12
    assert 0 < greedy < 12


@torch.no_grad()
def test_the_divergence_is_none_from_the_teacher_itself(runner):
    batch = encode(heldout(3), runner.tokenizer)
    wanted = runner.wanted(batch)
    whole = runner.student(Variant("whole", "", gate_type="last", chunk_size=WHOLE_SEQUENCE), SIZE, 0).eval()
    given = answers(whole, batch, "chunk")  # one chunk of the last loops' records is the LoopLM
    assert abs(divergence([wanted], [given])) < 1e-6 < 1e-2 < divergence([wanted], [given.roll(1, -1)])


@pytest.mark.parametrize("rank", [1, 5, 24])
def test_a_low_rank_gate_starts_as_spread_as_the_full_one(rank):
    torch.manual_seed(0)
    config = MeltConfig(hidden_size=512)
    factors = LowRank(config, rank, bias=False)
    product = factors.up @ factors.down
    assert product.std().item() == pytest.approx(fresh_weight_std(config), rel=0.15)
    assert torch.linalg.matrix_rank(product) == rank


@pytest.mark.parametrize(
    "cheap",
    [CheapGate(rank=3), CheapGate(rank=0), CheapGate(blocks=4), CheapGate(blocks=24)],
)
@torch.no_grad()
def test_a_cheap_gate_is_the_full_gate_with_its_matrices_written_out(cheap):
    gate, full, unit = cheap.build(SQUARE), KVGate(SQUARE), torch.eye(24)
    bias = gate.input_proj(torch.zeros(24))
    full.input_proj.weight.copy_((gate.input_proj(unit) - bias).T)
    full.input_proj.bias.copy_(bias)
    full.state_proj.weight.copy_((gate.state_proj(unit) * torch.ones(24, 24)).T)
    n, h = torch.randn(2, 7, 24)
    torch.testing.assert_close(gate(n, h, 2), full(n, h, 2))
    assert torch.equal(gate(n, None, 1), n)


@pytest.mark.parametrize("cheap", [CheapGate(rank=24), CheapGate(blocks=1)])
@torch.no_grad()
def test_a_cheap_gate_that_leaves_nothing_out_is_the_trained_one(cheap):
    trained, (n, h) = KVGate(SQUARE), torch.randn(2, 7, 24)
    torch.testing.assert_close(cheap.approximate(trained, SQUARE)(n, h, 2), trained(n, h, 2))


@torch.no_grad()
def test_a_trained_gate_is_approximated_by_the_nearest_one():
    trained = KVGate(SQUARE)
    weight = trained.state_proj.weight
    low = CheapGate(rank=5).approximate(trained, SQUARE).state_proj
    missed = (low.up @ low.down - weight).square().sum()
    torch.testing.assert_close(missed, torch.linalg.svdvals(weight)[5:].square().sum())
    blocks = CheapGate(blocks=3).approximate(trained, SQUARE).state_proj(torch.eye(24)).T
    torch.testing.assert_close(blocks, torch.block_diag(*(weight[i : i + 8, i : i + 8] for i in (0, 8, 16))))


@pytest.mark.parametrize(("loops", "sharing"), [(1, []), (2, []), (3, []), (4, [3]), (8, [3, 4, 5])])
def test_the_first_half_of_the_gated_loops_shares_the_z_of_loop_two(loops, sharing):
    config = MeltConfig(hidden_size=24, num_attention_heads=2, total_ut_steps=loops)
    gate, h, z = CheapGate(shared=True).build(config), None, {}
    for loop in range(1, loops + 1):
        h = gate(torch.randn(5, 24), h, loop)
        z[loop] = getattr(gate, "z", None)
    assert [loop for loop in range(3, loops + 1) if z[loop] is z[2]] == sharing


@pytest.mark.parametrize("variant", GATES + COMPRESSED, ids=lambda each: each.name)
def test_a_gates_multiply_adds_are_its_matrices_weights_in_every_loop_that_computes_z(runner, variant):
    gate = runner.student(variant, SIZE, 0).model.layers[0].self_attn.kv_gate
    matrices = sum(weight.numel() for key, weight in gate.named_parameters() if not key.endswith("bias"))
    computing = 2 if "shared-half" in variant.name else 3
    assert variant.gate_multiply_adds(192, 4) == matrices * computing


def test_a_gate_can_start_elsewhere_than_at_the_running_mean(runner):
    shares = {}
    for name in ("elementwise", "half-open", "closed"):
        (variant,) = (each for each in STUDIES["paper-gates"] if each.name == name)
        gate = runner.student(variant, SIZE, 0).model.layers[0].self_attn.kv_gate
        shares[name] = gate.keep(*torch.randn(2, 50, 192), 4).mean().item()
    near = {"elementwise": 0.75, "half-open": 0.5, "closed": 0.12}
    assert shares == {name: pytest.approx(share, abs=0.02) for name, share in near.items()}


def test_what_is_not_trained_runs_with_one_seed(tmp_path):
    records = tmp_path / "records.jsonl"
    run_all({"compressed": COMPRESSED[:1]}, replace(SIZE, questions=4), (1, 0), records, Session())
    assert [record["seed"] for record in read_records(records)] == [1]


def test_names_are_unique_within_a_study():
    for study in STUDIES.values():
        assert len({variant.name for variant in study}) == len(study)


def test_a_broken_line_is_named(tmp_path):
    records = tmp_path / "records.jsonl"
    append_record(records, {"variant": "full"})
    records.write_text(records.read_text() + "{\n")
    with pytest.raises(ValueError, match="line 2"):
        read_records(records)


def command(*words):
    return main(["ablate", *words])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["gate"], "no study 'gate'"),
        (["--variants", "x"], "no variant 'x'"),
        (["--size", "x"], "no size 'x'"),
        (["--report", "a.md"], "no run"),
    ],
)
def test_bad_words_end_in_one_line(words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(*words) == 1
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_the_list_says_what_is_done(done, capsys, monkeypatch):
    monkeypatch.setitem(SIZES, "small", SIZE)
    assert command("gates", "--list", "--records", str(done)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines[1:3]] == ["2", "2"]


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, capsys):

    def interrupt():
        while not any(tmp_path.glob("*/losses.jsonl")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    assert command("gates", "--seeds", "0", "--records", str(tmp_path / "records.jsonl")) == 130
    assert "goes on" in capsys.readouterr().err and len(list(tmp_path.glob("*/transition.state.pt"))) == 1
