"""A state that is not as it was written is refused in one line that names the file and the way out."""

import random
import shutil
from zipfile import ZipFile

import pytest
import torch
from torch import nn

from melt_serve.train.loop import states
from melt_serve.train.loop.states import before, load_state, read_state, save_state
from melt_serve.train.session import TrainingError
from melt_serve.train.stages import Stage

STAGE = Stage(steps=9, learning_rate=0.05, warmup=2)


def parts(width=32):
    model = nn.Linear(width, width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=STAGE.learning_rate)
    return model, [optimizer]


@pytest.fixture
def path(tmp_path):
    """Save two states, of steps 1 and 2."""
    model, optimizers = parts()
    model(torch.ones(32)).sum().backward()
    optimizers[0].step()
    for step in (1, 2):
        save_state(tmp_path / "fit.state.pt", STAGE, step, model, optimizers)
    return tmp_path / "fit.state.pt"


def without_a_tensor(path):
    whole = path.with_suffix(".whole")
    shutil.move(path, whole)
    with ZipFile(whole) as source, ZipFile(path, "w") as target:
        for name in source.namelist():
            if not name.endswith("data/0"):
                target.writestr(name, source.read(name))


def rewritten(change):
    """Change what the state says, and save it with checksums that are right."""

    def spoil(path):
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)

    return spoil


DAMAGE = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "cannot be read"),
    "half": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "random": (lambda path: path.write_bytes(random.Random(0).randbytes(9999)), "cannot be read"),
    "a file is missing": (without_a_tensor, "cannot be read"),
    "a part is missing": (rewritten(lambda state: state.pop("optimizers")), "lacks optimizers"),
    "a tensor is missing": (rewritten(lambda state: state["model"].pop("bias")), r"does not fit this model \(.*bias"),
    "a tensor too many": (rewritten(lambda state: state["model"].update(x=torch.ones(1))), "does not fit this model"),
    "another shape": (rewritten(lambda state: state["model"].update(bias=torch.ones(1))), "does not fit this model"),
    "no optimizer": (rewritten(lambda state: state["optimizers"].clear()), "does not fit this model"),
    "a list": (lambda path: torch.save([1], path), "lacks stage"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_state_is_one_line_with_the_way_out(name, path):
    spoil, message = DAMAGE[name]
    spoil(path)
    with pytest.raises(TrainingError, match=message) as refusal:
        load_state(path, STAGE, *parts())
    said = str(refusal.value)
    assert "\n" not in said and said.endswith(f"of step 1, is whole. Go on from there: mv {before(path)} {path}")
    shutil.move(before(path), path)
    assert load_state(path, STAGE, *parts()) == 1


def test_without_a_whole_one_before_it_the_stage_begins_anew(path):
    path.write_bytes(b"?")
    before(path).write_bytes(b"?")
    with pytest.raises(TrainingError, match=f"delete {path} to begin this stage anew"):
        load_state(path, STAGE, *parts())


def test_no_flipped_bit_is_taken(path):
    """Wherever it is, the state is refused, or the bit lies where nothing is read from."""
    content, whole = path.read_bytes(), read_state(path)
    chance = random.Random(1)
    refused = 0
    for position in [chance.randrange(len(content)) for _ in range(200)]:
        spoilt = bytearray(content)
        spoilt[position] ^= 1 << chance.randrange(8)
        path.write_bytes(spoilt)
        try:
            read = read_state(path)
        except TrainingError:
            refused += 1
            continue
        assert read["step"] == whole["step"] and read["stage"] == whole["stage"]
        assert all(torch.equal(read["model"][key], weight) for key, weight in whole["model"].items())
        moments, expected = (state["optimizers"][0]["state"] for state in (read, whole))
        assert all(torch.equal(moments[number][key], expected[number][key]) for number in (0, 1) for key in expected[0])
    assert refused > 150
    tensor = content.index(whole["model"]["weight"].numpy().tobytes())
    spoilt = bytearray(content)
    spoilt[tensor + 40] ^= 1
    path.write_bytes(spoilt)
    with pytest.raises(TrainingError, match="does not match its checksum"):
        read_state(path)
    assert torch.load(path, weights_only=True) is not None, "torch looks at checksums by itself: ours can go"


def test_states_of_before_that_are_whole_go_on(path):
    """They have no state beside them, and the same archive."""
    before(path).unlink()
    assert load_state(path, STAGE, *parts()) == 2


def test_where_there_are_no_links_the_newest_is_kept(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(states.os, "link", refuse)
    for step in (1, 2):
        save_state(tmp_path / "fit.state.pt", STAGE, step, *parts())
    assert load_state(tmp_path / "fit.state.pt", STAGE, *parts()) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["fit.state.pt"]


def test_a_stages_states_are_not_those_of_one_whose_name_begins_alike(tmp_path):
    for stage in ("more-2", "more"):
        state = tmp_path / f"{stage}.state.pt"
        state.touch()
        for step in (1, 2, 3):
            states.keep_for_good(state, step, 2, None)
    kept = sorted(path.name.removesuffix(".state.pt") for path in (tmp_path / "states").iterdir())
    assert kept == ["more-000002", "more-000003", "more-2-000002", "more-2-000003"]
