"""Downloads from a server on this machine."""

import hashlib
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from diffusion_lab.data.download import Remote, fetch

UNREACHABLE = "http://127.0.0.1:9/"  # the discard port
DATA = bytes(range(256)) * 20_000


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address of a server of one file, `x.bin`."""
    monkeypatch.setenv("no_proxy", "*")
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "x.bin").write_bytes(DATA)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "served"))) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}/"
        http.shutdown()
        thread.join()


def remote(*urls: str, md5: str = hashlib.md5(DATA).hexdigest()) -> Remote:
    return Remote("x.bin", urls, md5)


def test_a_later_mirror_serves_and_nothing_else_stays(server, tmp_path):
    folder = tmp_path / "a" / "b"
    fetch(folder, [remote(UNREACHABLE + "x.bin", server + "none.bin", server + "x.bin")], download=True)
    assert (folder / "x.bin").read_bytes() == DATA
    assert [path.name for path in folder.iterdir()] == ["x.bin"]


def test_a_wrong_checksum_is_refused_and_leaves_nothing(server, tmp_path):
    with pytest.raises(ValueError, match=r"cannot download x\.bin .*checksum"):
        fetch(tmp_path / "to", [remote(server + "x.bin", md5="0" * 32)], download=True)
    assert list((tmp_path / "to").iterdir()) == []


def test_without_network_one_line_names_folder_and_files(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    other = Remote("y.bin", (), "")
    with pytest.raises(ValueError, match="cannot download") as caught:
        fetch(tmp_path, [remote(UNREACHABLE + "x.bin"), other], download=True)
    line = str(caught.value)
    assert "\n" not in line
    assert f"put x.bin, y.bin into {tmp_path}" in line


def test_download_can_be_forbidden(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} lacks x.bin: put them there, or write data.download=true"):
        fetch(tmp_path, [remote()], download=False)
