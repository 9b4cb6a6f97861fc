"""Files are replaced whole, or not at all; .npz files are read without unpickling; bars are shown on request."""

import shutil
from collections import namedtuple

import numpy as np
import pytest

from diffusion_lab.errors import ConfigError
from diffusion_lab.io import claimed, progress, read_npz, refuse_filled, replacing, require_space, write_file


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
    with pytest.raises(ConfigError, match=r"three files take 150 MiB, and 200 MiB are free: make room, or write out="):
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
