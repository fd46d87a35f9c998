"""`melt-serve verify`: once as its user runs it; then with one thing wrong at a time, which it must see."""

import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from melt_serve import cli
from melt_serve.bundled import LOOPLM, MELT
from melt_serve.checkpoint_path import revision_of
from melt_serve.config import MeltConfig
from melt_serve.verify import certify
from melt_serve.verify.certify import Options, targets
from melt_serve.verify.chats import check_efforts, check_end_marks, check_ends, check_splits
from melt_serve.verify.client import Client
from melt_serve.verify.contract import check_flat_memory, check_wrong_depths, requests, same_answers
from melt_serve.verify.parity import Reference, check_parity
from melt_serve.verify.record import Certificate
from melt_serve.verify.served import Served, served
from melt_serve.verify.start import check_files, check_start
from tests.ouro_files import END_THINK, THINK, THINKING_TEMPLATE, write_ouro
from tests.signals import hear_ctrl_c, still_running

VERIFY = [sys.executable, "-m", "melt_serve.cli", "verify"]
QUICK = Options(MELT, None, None, None, None, None, 128, quick=True, words=())
SAYS = {"\n": (THINK,), THINK: ("Hm",), "Hm": ("so",), "so": (END_THINK,), END_THINK: ("Yes",), "Yes": ("<|im_end|>",)}
"""What the Ouro checkpoint answers to any question."""


def with_config(**changes):
    """The bundled MELT as it would state itself with these changes."""
    (target,) = targets(QUICK)
    config = MeltConfig.from_pretrained(MELT, **changes)
    return replace(target, config=config, words=["--kv-cache-memory-bytes=64M"])  # as the session's server has


@pytest.fixture
def ready(server, tmp_path):
    """The session's server as `verify` sees one; the target may state something else than is served."""
    log = tmp_path / "log"
    log.touch()
    client = Client(server)
    return lambda target: Served(target, client, log, seconds=1.0)


def failed(checks):
    """The names of checks that failed; there must be others that passed, or were not made."""
    return {check.name for check in checks if check.verdict == "FAIL"}


def test_a_machine_that_serves_right_is_certified(tmp_path):
    file = tmp_path / "verified.json"
    run = subprocess.run([*VERIFY, "--quick", "--json", str(file)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    certificate = Certificate.read(file)
    assert certificate.passed and certificate.kind == "cpu" and certificate.versions["torch"]
    assert certificate.checkpoint == "melt-demo" and "--quick" in certificate.command
    assert f"melt-demo@{revision_of(MELT)[:12]}" == certificate.named and certificate.named in run.stdout
    checks = {check.name: check for check in certificate.checks}
    for depth in ("4 loops, the default", "1 loop", "8 loops", "exit threshold 0.7"):
        assert checks[f"as the reference, {depth}"].verdict == checks[f"usage.loops, {depth}"].verdict == "pass"
    # A probability is at most 1 from another: a tolerance near that would admit anything.
    assert all(check.numbers["tolerance"] < 0.5 for check in certificate.checks if "as the reference" in check.name)
    (scarce,) = [check for name, check in checks.items() if "scarce cache" in name]
    assert scarce.verdict == "pass" and scarce.numbers["events"] > 0
    assert checks["from the prefix cache as alone"].numbers["events"] > 0
    assert len(set(checks["KV bytes of final rows, the same at all loops"].numbers["bytes_by_loops"].values())) == 1
    assert checks["answers end"].numbers == {"ended": 2, "asked": 2}
    assert checks["reasoning and answer"].numbers == {"reasoned": 1, "wrong": 0}  # the other answers at once
    assert {"files", "tokens in the cache", "end marks"} <= checks.keys()
    skipped = {check.measured for check in certificate.checks if check.verdict == "skipped"}
    assert skipped == {"nothing to wait for on a CPU", "left out by --quick"}
    assert certificate.counts in run.stdout


def test_other_weights_than_the_references_fail_with_exit_code_1(ready, tmp_path, monkeypatch, capsys):
    other = tmp_path / "melt"
    shutil.copytree(MELT, other)
    weights = load_file(other / "model.safetensors")
    weights["model.layers.0.self_attn.kv_gate.input_proj.bias"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})

    @contextmanager
    def already_served(target, progress):
        yield ready(target)

    monkeypatch.setattr(certify, "served", already_served)
    monkeypatch.setattr(certify, "check_contract", lambda server, tolerance: iter(()))  # takes a scarcer cache
    file = tmp_path / "verified.json"
    assert cli.main(["verify", "--quick", "--reference", str(other), "--json", str(file)]) == 1
    checks = Certificate.read(file).checks
    assert failed(checks) >= {"as the reference, 4 loops, the default", "as the reference, 8 loops"}
    assert "as the checkpoint states" not in failed(checks) and "wrong depths refused" not in failed(checks)
    shown = capsys.readouterr().out
    assert "FAIL    MELT, token, as the reference, 8 loops: " in shown


def test_another_default_depth_is_seen(ready):
    server = ready(with_config(total_ut_steps=2))
    assert failed(check_start(server)) == {"as the checkpoint states"}
    reference = Reference.load(MELT, "token", server.info["dtype"])
    reference.exact.config.total_ut_steps = reference.rounded.config.total_ut_steps = 2
    wrong = failed(check_parity(server, reference))
    default = "2 loops, the default"
    assert {f"as the reference, {default}", f"usage.loops, {default}"} <= wrong
    assert not wrong & {
        f"{what}, {depth}" for what in ("as the reference", "usage.loops") for depth in ("1 loop", "8 loops")
    }
    efforts = check_efforts(server, None, 1.0)
    assert efforts.verdict == "FAIL" and "medium ran 4.0, not 2" in efforts.measured


def test_more_loops_than_the_checkpoint_has_must_be_refused(ready):
    assert check_wrong_depths(ready(with_config())).verdict == "pass"
    answered = check_wrong_depths(ready(with_config(max_loops=4)))
    assert answered.verdict == "FAIL" and "{'loops': 5} was answered" in answered.measured


def test_rows_of_another_size_are_seen(ready):
    server = ready(with_config())
    server.info["kv_bytes_per_token"] //= 2
    assert failed(check_start(server)) == {"KV bytes a token"}
    assert check_flat_memory(server).verdict == "FAIL"


def test_a_cache_of_another_size_is_seen(ready):
    server = ready(with_config())
    assert not failed(check_start(server))
    server.info["kv_capacity_tokens"] //= 2
    assert failed(check_start(server)) == {"tokens in the cache"}


def test_a_cache_that_is_not_scarce_proves_nothing_of_preemption(ready):
    server = ready(replace(with_config(), quick=True))
    few = requests(server)[:3]
    alone = [server.client.complete(asked, f"alone {number}") for number, asked in enumerate(few)]
    together = server.client.complete_at_once(few, "together")
    assert same_answers("scene", alone, together, 0.05, 3, "preemptions").verdict == "pass"
    assert same_answers("scene", alone, together, 0.05, 0, "preemptions").verdict == "FAIL"
    assert same_answers("scene", alone, together[::-1], 0.05).verdict == "FAIL"


@pytest.fixture(scope="module")
def ouro(tmp_path_factory):
    """Files as Ouro's are published, whose layers and loops move probabilities a little and no answer."""
    folder = write_ouro(tmp_path_factory.mktemp("ouro") / "Ouro-tiny-Thinking", SAYS, THINKING_TEMPLATE)
    weights, random = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if name.endswith("layernorm_2.weight"):
            weight.fill_(0.02)
        elif "_proj" in name or "exit_gate" in name:
            weight.copy_(0.1 * torch.randn(weight.shape, generator=random))
    weights["lm_head.weight"] /= 12
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    text = "Why is it so\nYes so it is\nwell Hm user Why so\n" * 16
    words = ("--dtype=float32",)
    (target,) = targets(Options(folder, None, None, None, text, 20, 64, quick=True, words=words))
    with served(target, lambda seconds: None) as server:
        yield server


def test_an_ouro_is_qualified_by_its_own_checks(ouro):
    checks = {check.name: check for check in certify.checks_of_running(ouro, ouro.target.folder)}
    assert not failed(checks.values())
    at_default = checks["as the reference, 4 loops, the default"]
    assert at_default.numbers["same_tokens"] == at_default.numbers["tokens"] == 20 * ouro.target.generated
    assert {"as the reference, 1 loop", "usage.loops, exit threshold 0.7", "wrong depths refused"} <= checks.keys()
    assert checks["end marks"].measured == "<|endoftext|>, <|im_end|>"
    asked = len(ouro.target.questions)
    assert checks["answers end"].numbers == {"ended": asked, "asked": asked}
    assert checks["reasoning and answer"].numbers == {"reasoned": asked, "wrong": 0}
    held = checks["KV bytes of final rows, as planned at the most loops"]
    assert held.verdict == checks["reasoning_effort"].verdict == checks["tokens in the cache"].verdict == "pass"


def test_answers_that_go_on_after_an_end_mark_are_seen(ouro):
    ended = ouro.client.chat("Why", 8)
    on = replace(ended, tokens=[*ended.tokens, 7], ended="length")
    marks = ended.tokens[-1:]
    assert check_ends([ended, on], marks, 8).verdict == "FAIL"
    assert check_ends([ended], marks, 8).verdict == "pass"
    cut = check_ends([replace(on, tokens=[7, 7])], marks, 8)
    assert cut.verdict == "skipped" and "raise --answer-tokens" in cut.measured


def test_an_end_mark_that_the_server_does_not_heed_is_seen(ouro):
    tokenizer = copy(ouro.target.tokenizer)
    tokenizer.eos_token = "well"
    found = check_end_marks(replace(ouro, target=replace(ouro.target, tokenizer=tokenizer)))
    assert found.verdict == "FAIL" and found.measured == "goes on after well"


def test_reasoning_that_is_not_apart_is_seen(ouro):
    right = ouro.client.chat("Why", 8)
    tokenizer = ouro.target.tokenizer
    assert (right.reasoning.strip(), right.content.strip()) == ("Hm so", "Yes")
    glued = replace(right, reasoning=None, content="Hm so Yes")
    tagged = replace(right, content="</think> Yes")
    for wrong in (glued, tagged):
        assert check_splits([right, wrong], tokenizer).measured == "1 of 2 not split at their tags"
    assert check_splits([right], tokenizer).verdict == "pass"


def test_an_effort_that_changes_the_prompt_is_seen(ouro, monkeypatch):
    class Client:
        def chat(self, text, tokens, effort, logprobs):
            return ouro.client.chat(text + " so" * (effort == "max"), tokens, effort, logprobs=logprobs)

    found = check_efforts(replace(ouro, client=Client()), None, 1.0)
    assert found.verdict == "FAIL" and found.measured.startswith("prompts of ")


def test_files_that_are_not_whole_are_seen(ouro, tmp_path):
    shutil.copytree(ouro.target.folder, tmp_path / "ouro")
    (tmp_path / "ouro" / "SHA256SUMS").write_text(f"{'0' * 64}  model.safetensors\n")
    assert check_files(ouro.target.folder).verdict == "pass"
    found = check_files(tmp_path / "ouro")
    assert found.verdict == "FAIL" and "is not as it was written" in found.measured


def test_revisions_tell_checkpoints_apart(ouro, tmp_path):
    other = tmp_path / "models--acme--Ouro" / "snapshots" / "0123abcd"
    shutil.copytree(ouro.target.folder, other)
    assert revision_of(other) == "0123abcd"
    copied = shutil.copytree(other, tmp_path / "copied")
    assert revision_of(copied) == revision_of(ouro.target.folder)
    (copied / "config.json").write_text((copied / "config.json").read_text() + " ")
    assert revision_of(copied) != revision_of(ouro.target.folder)


def test_a_server_that_does_not_start_fails(capsys):
    assert cli.main(["verify", "--quick", "--", "--max-body-bytes=0"]) == 1
    shown = capsys.readouterr().out
    assert "--max-body-bytes (MELT_MAX_BODY_BYTES) must be a positive number" in shown
    assert "1 passed, 1 failed" in shown  # the files are whole


def test_ctrl_c_stops_the_server_and_says_how_far_it_came():
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*VERIFY, "--quick"], **pipes, preexec_fn=hear_ctrl_c)
    children: set[psutil.Process] = set()
    deadline = time.monotonic() + 120
    while not children:
        assert process.poll() is None and time.monotonic() < deadline
        with suppress(psutil.NoSuchProcess):
            children = set(psutil.Process(process.pid).children(recursive=True))
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate()
    assert process.returncode == 130 and "Traceback" not in errors
    assert "Stopped before the end: 1 checks were made" in output
    assert not still_running(list(children))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["./nowhere"], "nowhere does not exist"),
        (["--answer-tokens", "9000"], "--answer-tokens=9000 must be at most 8192"),
        ([str(LOOPLM), "--modes", "token"], "is a LoopLM: --modes and --looplm go with a MELT"),
        (["--looplm", str(MELT)], "is a MELT: name the LoopLM that it came from"),
        (["--text", "./nowhere.txt"], "--text nowhere.txt: "),
        (["--text", __file__.replace("test_verify", "__init__")], "--text has"),
        (["--json", "./nowhere/file.json"], "nowhere is not a folder"),
        (["--report", __file__], "is no file that `melt-serve verify --json` wrote"),
        (["--report", "./nowhere.json"], "nowhere.json: No such file"),
    ],
)
def test_what_cannot_be_verified_is_one_line_at_once(words, says, capsys):
    assert cli.main(["verify", *words]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_a_report_is_the_table_in_the_documents(capsys):
    """Of GPUs in the README, of all machines beside the files."""
    root = Path(__file__).parents[2]
    files = sorted((root / "docs" / "results" / "verify").glob("*.json"))
    page = (root / "docs" / "results" / "README.md").read_text()
    assert ("No file is here yet." in page) == (not files)
    if files:
        assert cli.main(["verify", "--report", *map(str, files)]) == 0
        assert capsys.readouterr().out in page
    gpus = [path for path in files if json.loads(path.read_text())["kind"] == "cuda"]
    if gpus:
        assert cli.main(["verify", "--report", *map(str, gpus)]) == 0
        assert capsys.readouterr().out in (root / "README.md").read_text()
    else:
        assert "Nobody has verified a GPU yet" in (root / "README.md").read_text()
