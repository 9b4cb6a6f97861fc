"""Files are replaced whole, or not at all; .npz files are read without unpickling; bars are shown on request."""

import shutil
import subprocess
import sys
from collections import namedtuple

import numpy as np
import pytest

from diffusion_lab.errors import ConfigError
from diffusion_lab.io import (
    _cleaned,
    claimed,
    claimed_folder,
    progress,
    read_npz,
    refuse_filled,
    remove_partials,
    replacing,
    require_space,
    write_file,
    write_new_file,
)


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_file(path, "one")
    write_file(path, b"two")
    assert path.read_text() == "two"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_a_failure_keeps_the_file_before_and_leaves_nothing(tmp_path):
    path = tmp_path / "a.txt"
    write_file(path, "before")

    def fail() -> None:
        with replacing(path) as partial:
            partial.write_text("half")
            assert partial.parent == path.parent  # one file system, so that the rename is atomic
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_write_removes_the_partial_files_of_killed_processes_alone(tmp_path):
    """A file that a living process writes is locked."""
    code = "import os, sys; from pathlib import Path; from diffusion_lab.io import replacing\n"
    code += (
        "with replacing(Path(sys.argv[1])): print('writing', flush=True); sys.stdin.read(1); os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "other.txt")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        (partial,) = tmp_path.iterdir()
        download = partial.with_name(f"{partial.name}.0f1e2d3c.partial")  # torch.hub's own temporary name
        download.write_text("half")
        remove_partials(tmp_path)
        assert partial.is_file()
        writer.communicate("x")
    _cleaned.clear()
    write_file(tmp_path / "a.txt", "whole")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_new_file_is_written_once(tmp_path):
    path = tmp_path / "a.txt"
    write_new_file(path, b"one")
    with pytest.raises(ConfigError, match="just written by another process"):
        write_new_file(path, b"two")
    assert path.read_bytes() == b"one"
    write_new_file(path, b"three", overwrite=True)
    assert path.read_bytes() == b"three"


def test_a_folder_is_claimed_once_and_left_as_it_was_if_nothing_is_written(tmp_path):
    def fail(folder, overwrite=False) -> None:
        with claimed_folder(folder, "out", "n: 1", overwrite):
            raise KeyboardInterrupt

    folder = tmp_path / "new" / "folder"
    with pytest.raises(KeyboardInterrupt):
        fail(folder)
    assert list(tmp_path.iterdir()) == []
    with claimed_folder(folder, "out", "n: 1"):
        (folder / "result").write_text("")
        with pytest.raises(ConfigError, match="just created by another run: retry, or write another out="):
            fail(folder)
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "result"}
    with pytest.raises(KeyboardInterrupt):
        fail(folder, overwrite=True)
    assert (folder / "config.yaml").read_text() == "n: 1"
    with claimed_folder(folder, "out", "n: 2", overwrite=True):
        pass
    assert (folder / "config.yaml").read_text() == "n: 2"


def test_a_claim_is_made_once(tmp_path):
    path = tmp_path / "sub" / "a.npy"
    with claimed(path) as file:
        assert file is not None
        file.write(b"content")
    assert path.read_bytes() == b"content"
    with claimed(path) as file:
        assert file is None
    assert [p.name for p in path.parent.iterdir()] == ["a.npy"]


def test_space_is_required_of_the_nearest_folder_that_exists(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or usage(10**9, 0, 200 << 20))
    require_space(tmp_path / "not" / "yet", 100 << 20, "three files", "write out=")
    with pytest.raises(
        ConfigError, match=r"three files take 150 MiB, but 200 MiB are free: free disk space, or write out="
    ):
        require_space(tmp_path / "not" / "yet", 150 << 20, "three files", "write out=")  # 64 MiB stay free
    assert asked == [tmp_path, tmp_path]


def test_filled_folders_are_refused(tmp_path):
    refuse_filled(tmp_path / "none", "out", overwrite=False)
    refuse_filled(tmp_path, "out", overwrite=False)
    (tmp_path / "x").write_text("")
    refuse_filled(tmp_path, "out", overwrite=True)
    with pytest.raises(ConfigError, match="overwrite=true, or another out="):
        refuse_filled(tmp_path, "out", overwrite=False)
    with pytest.raises(ConfigError, match="is a file"):
        refuse_filled(tmp_path / "x", "out", overwrite=True)


def test_npz_files_are_read_without_unpickling(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, np.arange(3), mu=np.eye(2))
    assert {name: array.shape for name, array in read_npz(path).items()} == {"arr_0": (3,), "mu": (2, 2)}
    assert list(read_npz(path, names=("mu", "sigma"))) == ["mu"]
    np.savez(path, np.array([print], dtype=object))
    with pytest.raises(ConfigError, match=r"latents=.*a\.npz cannot be read as an \.npz of plain arrays"):
        read_npz(path, "latents")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_npz(tmp_path / "none.npz")


def test_a_bar_is_shown_on_request(capsys):
    assert list(progress(range(3), "counting", "step", show=False)) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    assert list(progress(range(3), "counting", "step")) == [0, 1, 2]
    assert "counting" in capsys.readouterr().err
