"""What the files of a run's folder say, and how they appear in it."""

import json

import pytest

from scaletrain.errors import CheckpointError
from scaletrain.files import atomic_file, atomic_write, creating
from scaletrain.workdir import Workdir


def test_lines_that_are_no_records_are_passed_over(tmp_path):
    whole = [{"step": 1, "newest_saved": 1}, {"step": 2, "newest_saved": "x"}]
    others = ["3", "null", "[1]", '{"a": 1}', '{"step": "x"}', "{", ""]
    lines = [json.dumps(whole[0]), *others, json.dumps(whole[1]), '{"step": 3}']
    workdir = Workdir(tmp_path)
    workdir.metrics.write_text("\n".join(lines))  # the last is cut off
    assert workdir.records() == whole
    assert workdir.newest_saved() == 1
    assert Workdir(tmp_path / "none").newest_saved() is None
    workdir.metrics.write_text('{"step": 1, "newest_saved": 0}\n')
    assert workdir.newest_saved() == 0  # an import


def test_folders_that_are_no_steps_are_passed_over(tmp_path):
    workdir = Workdir(tmp_path)
    assert workdir.steps() == []
    for name in ("10", "9", "7.damaged", "8.orbax-checkpoint-tmp", "-1"):
        (workdir.checkpoints / name).mkdir(parents=True)
    assert workdir.steps() == [9, 10]


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_written_completely_or_not_at_all(tmp_path, durable):
    path = tmp_path / "a.json"
    atomic_write(path, b"old", durable=durable)

    def fail():
        with atomic_file(path) as file:
            file.write(b"half of the n")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert path.read_bytes() == b"old"
    atomic_write(path, b"new", durable=durable)
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_when_it_is_complete(tmp_path):
    target = tmp_path / "made"

    def fail():
        with creating("--to=x", target, "exporting") as folder:
            (folder / "half").write_text("half")
            raise OSError("full")

    with pytest.raises(CheckpointError, match="--to=x; it cannot be written: full"):
        fail()
    assert not list(tmp_path.iterdir())
    with creating("--to=x", target, "exporting") as folder:
        (folder / "all").write_text("all")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["all"]
