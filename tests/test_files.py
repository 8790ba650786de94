"""Files that are there as a whole or not at all, and what commands say where they cannot write."""

import csv
import errno
import os
from functools import partial

import pytest
import torch

from evkernels import files
from evkernels.arguments import InputError, cannot_write, output_folder


def full(file, save=lambda file: None):
    """A disk that is full after what `save` writes."""

    class Full:
        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def flush(self):
            pass

    file.write(b"half")
    save(Full())


def test_appears_whole_and_replaces(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "Größe\n")
    assert path.read_text(encoding="utf-8") == "Größe\n"
    files.write(path, partial(torch.save, torch.arange(3)))
    assert torch.load(path).tolist() == [0, 1, 2]
    files.write_rows(tmp_path / "b.csv", [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}])
    with open(tmp_path / "b.csv", newline="") as file:
        assert list(csv.reader(file)) == [["step", "loss"], ["1", "0.5"], ["2", "0.25"]]
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "b.csv"]


@pytest.mark.parametrize("save", [lambda file: file.write(b"x"), partial(torch.save, torch.zeros(100_000))])
def test_what_cannot_be_written_leaves_the_old_file(tmp_path, save):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(OSError, match="No space left") as raised:
        files.write(path, partial(full, save=save))
    assert raised.value.filename == str(path)
    assert os.listdir(tmp_path) == ["a"]
    assert path.read_text() == "old"
    with pytest.raises(OSError, match="Not a directory") as raised:
        files.write(path / "b", save)
    assert raised.value.filename == str(path / "b")


def test_other_errors_pass(tmp_path):
    def fails(file):
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        files.write(tmp_path / "a", fails)
    assert not os.listdir(tmp_path)


def test_what_is_said(tmp_path):
    output_folder(tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a" / "b") == []
    (tmp_path / "file").write_text("")
    for out, reason in ((tmp_path / "file", "it is a file"), (tmp_path / "file" / "a", "Not a directory")):
        with pytest.raises(InputError, match=f"^--out {out}: cannot be written to: {reason}$"):
            output_folder(out)
    error = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "a" / "b.pt"))
    assert cannot_write(tmp_path, error) == f"--out {tmp_path}: cannot be written to: No space left on device (a/b.pt)"
    assert cannot_write(tmp_path / "c", error) == f"{tmp_path / 'a' / 'b.pt'}: No space left on device"
