"""What is written is there whole, or what was there before is."""

import pytest

from melt_serve.train.atomic import replacing


def write(path, text, folder):
    if folder:
        path.mkdir()
        path = path / "inside"
    path.write_text(text)


@pytest.mark.parametrize("folder", [False, True])
def test_what_is_written_takes_the_place_of_what_was_there(tmp_path, folder):
    target = tmp_path / "target"
    for text in ("first", "second"):
        with replacing(target) as part:
            write(part, text, folder)
            assert part.parent == tmp_path and part != target
        assert (target / "inside" if folder else target).read_text() == text
        assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("folder", [False, True])
def test_after_an_error_what_was_there_stays_and_nothing_else(tmp_path, folder):
    target = tmp_path / "target"
    with replacing(target) as part:
        write(part, "first", folder)
    with pytest.raises(KeyboardInterrupt), replacing(target) as part:
        write(part, "half", folder)
        raise KeyboardInterrupt
    assert (target / "inside" if folder else target).read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("folder", [False, True])
def test_what_a_killed_process_left_is_not_in_the_way(tmp_path, folder):
    target = tmp_path / "target"
    with replacing(target) as part:
        write(part, "first", False)
    write(part, "half", folder)
    with replacing(target) as part:
        assert not part.exists()
        write(part, "whole", False)
    assert target.read_text() == "whole" and list(tmp_path.iterdir()) == [target]
