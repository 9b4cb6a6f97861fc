"""Downloads from a server on this machine."""

import hashlib
import socket

import pytest

from diffusion_lab.data import download
from diffusion_lab.data.download import Remote, fetch

from .helpers import UNREACHABLE, served

DATA = bytes(range(256)) * 20_000
MD5, SHA256 = hashlib.md5(DATA).hexdigest(), hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address of a server of one file, `x.bin`."""
    monkeypatch.setenv("no_proxy", "*")
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "x.bin").write_bytes(DATA)
    with served(tmp_path / "served") as address:
        yield address


def remote(*urls: str, checksum: str = MD5) -> Remote:
    return Remote("x.bin", urls, checksum)


@pytest.mark.parametrize("checksum", [MD5, SHA256], ids=["md5", "sha256"])
def test_a_later_mirror_serves_and_nothing_else_stays(server, tmp_path, checksum):
    folder = tmp_path / "a" / "b"
    mirrors = (UNREACHABLE + "x.bin", server + "none.bin", server + "x.bin")
    fetch(folder, [remote(*mirrors, checksum=checksum)], download=True)
    assert (folder / "x.bin").read_bytes() == DATA
    assert [path.name for path in folder.iterdir()] == ["x.bin"]


@pytest.mark.parametrize("digits", [32, 64])
def test_a_wrong_checksum_is_refused_and_leaves_nothing(server, tmp_path, digits):
    with pytest.raises(ValueError, match=rf"cannot download x\.bin .*checksum {'0' * digits}\)"):
        fetch(tmp_path / "to", [remote(server + "x.bin", checksum="0" * digits)], download=True)
    assert list((tmp_path / "to").iterdir()) == []


@pytest.mark.parametrize("checksum", [MD5, SHA256], ids=["md5", "sha256"])
def test_a_server_that_does_not_answer_times_out(tmp_path, monkeypatch, checksum):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x.bin"
        with pytest.raises(ValueError, match=r"cannot download x\.bin .*timed out"):
            fetch(tmp_path / "to", [remote(url, checksum=checksum)], download=True)
    assert list((tmp_path / "to").iterdir()) == []
    assert socket.getdefaulttimeout() is None


def test_a_folder_that_cannot_be_made_is_refused(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot download x\.bin .*: put x\.bin into .*file/to"):
        fetch(tmp_path / "file" / "to", [remote(server + "x.bin")], download=True)


def test_without_network_one_line_names_folder_and_files(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    other = Remote("y.bin", (), "")
    with pytest.raises(ValueError, match="cannot download") as caught:
        fetch(tmp_path, [remote(UNREACHABLE + "x.bin"), other], download=True)
    line = str(caught.value)
    assert "\n" not in line
    assert f"put x.bin, y.bin into {tmp_path}" in line


def test_download_can_be_forbidden(tmp_path):
    with pytest.raises(
        ValueError, match=f"x.bin missing in {tmp_path}: put the files there, or write data.download=true"
    ):
        fetch(tmp_path, [remote()], download=False)
