"""The training loop: it learns, is resumed bit for bit, and ends cleanly when it must."""

import json
import os
import signal
from itertools import pairwise

import pytest
import torch
from torch import nn

from melt_serve.train.loop.trainer import LOG, Run, run_stage, share_of_rate
from melt_serve.train.session import Paused, Session, TrainingError
from melt_serve.train.stages import Stage

STAGE = Stage(steps=9, learning_rate=0.05, warmup=2)


def run(folder, stage=STAGE, session=None, losses=None):
    """Fit a linear map with Muon and AdamW, from the same start at every call; give its weights."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizers = [
        torch.optim.Muon([model.weight], lr=0.05, weight_decay=0.0),
        torch.optim.AdamW([model.bias], lr=stage.learning_rate),
    ]

    def squares(step):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        return {"loss": (model(x) - x.flip(1)).square().mean()}

    folder.mkdir(exist_ok=True)
    run_stage("fit", stage, model, optimizers, losses(model) if losses else squares, Run(folder, session or Session()))
    return model.weight.detach().clone()


def logged(folder):
    lines = map(json.loads, (folder / LOG).read_text().splitlines())
    return [(line["step"], line["loss"], line["gradient_norm"]) for line in lines]


def test_a_run_of_many_sessions_is_the_unbroken_run(tmp_path):
    unbroken = run(tmp_path / "unbroken")
    for _ in range(STAGE.steps):
        with pytest.raises(Paused):
            run(tmp_path / "broken", session=Session(minutes=0))
    assert torch.equal(run(tmp_path / "broken"), unbroken)
    assert logged(tmp_path / "broken") == logged(tmp_path / "unbroken")
    assert [step for step, *_ in logged(tmp_path / "broken")] == list(range(STAGE.steps))
    assert logged(tmp_path / "broken")[-1][1] < logged(tmp_path / "broken")[0][1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_it_interrupts(tmp_path, number):
    def interrupted(model):
        def losses(step):
            if step == 3:
                os.kill(os.getpid(), number)
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            return {"loss": (model(x) - x.flip(1)).square().mean()}

        return losses

    session = Session()
    with pytest.raises(Paused):
        run(tmp_path / "broken", session=session, losses=interrupted)
    assert session.signal == number and len(logged(tmp_path / "broken")) == 4
    assert torch.equal(run(tmp_path / "broken"), run(tmp_path / "unbroken"))
    assert logged(tmp_path / "broken") == logged(tmp_path / "unbroken")


def test_log_lines_after_the_saved_step_are_repeated_not_doubled(tmp_path):
    """As after kill -9: the log is ahead of the state, and its last line is torn."""
    with pytest.raises(Paused):
        run(tmp_path / "run", session=Session(minutes=0))
    with (tmp_path / "run" / LOG).open("a") as log:
        log.write('{"stage": "fit", "step": 1, "loss": 9}\n{"stage": "other", "step": 5}\n{"stage": "fi')
    run(tmp_path / "run")
    lines = (tmp_path / "run" / LOG).read_text().splitlines()
    assert sum('"step": 1,' in line for line in lines) == 1 and sum("other" in line for line in lines) == 1
    assert len(lines) == STAGE.steps + 1


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_saved_state(tmp_path):
    with pytest.raises(Paused):
        run(tmp_path, session=Session(minutes=0))
    before = (tmp_path / "fit.state.pt").read_bytes()
    with pytest.raises(TrainingError, match="gradient of step 1 is not finite"):
        run(tmp_path, losses=lambda model: lambda step: {"loss": model.weight.sum() * float("nan")})
    assert (tmp_path / "fit.state.pt").read_bytes() == before


def test_a_state_of_another_recipe_is_refused_by_name(tmp_path):
    with pytest.raises(Paused):
        run(tmp_path, session=Session(minutes=0))
    with pytest.raises(TrainingError, match="learning_rate differ"):
        run(tmp_path, stage=Stage(steps=9, learning_rate=0.06, warmup=2))


def test_the_rate_rises_holds_and_falls():
    stage = Stage(steps=100, learning_rate=1.0, warmup=10, decay_from=0.5)
    shares = [share_of_rate(stage, step) for step in range(100)]
    assert shares[0] == 0.1 and shares[9:51] == [1.0] * 42
    assert all(later < earlier for earlier, later in pairwise(shares[50:])) and shares[-1] > 0
    assert share_of_rate(Stage(steps=100, learning_rate=1.0, warmup=1, decay_from=1.0), 99) == 1.0
