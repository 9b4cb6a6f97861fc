"""The cache of decoded images: keyed, shared, never half-written."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion_lab.data.cache import cache_folders, decoded
from diffusion_lab.data.decode import Decoder, Files

from .helpers import save

MANY = 3000  # images of the builds that are interrupted
DECODER = Decoder((3, 8, 8))
# A background job ignores SIGINT, and so do its children.
ACCEPT_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
BUILD = """
import sys
from pathlib import Path
from diffusion_lab.data.cache import decoded
from diffusion_lab.data.decode import Decoder, Files
print(decoded(Files(Path(sys.argv[1])), Decoder((3, 8, 8)), Path(sys.argv[2])).shape)
"""


@pytest.fixture
def images(tmp_path) -> Path:
    for i in range(5):
        save(tmp_path / "images" / f"{i}.png")
    return tmp_path / "images"


def file_names(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


def test_holds_the_decoded_images_in_order_and_read_only(images, tmp_path):
    files = Files(images)
    array = decoded(files, DECODER, tmp_path / "cache")
    assert isinstance(array, np.memmap)
    assert (array.shape, array.dtype) == ((5, 3, 8, 8), np.uint8)
    assert np.array_equal(array, [DECODER(files.read(name), name) for name in files.names])
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0


def test_is_reused_and_keyed_by_files_and_options(images, tmp_path):
    cache = tmp_path / "cache"

    def build(decoder: Decoder = DECODER) -> set[str]:
        decoded(Files(images), decoder, cache)
        return set(file_names(cache))

    names = build()
    stamp = next(cache.iterdir()).stat().st_mtime_ns
    assert build() == names
    assert next(cache.iterdir()).stat().st_mtime_ns == stamp
    for decoder in (
        Decoder((1, 8, 8)),
        Decoder((3, 8, 4)),
        Decoder((3, 8, 8), filter="box"),
        Decoder((3, 8, 8), resize="exact"),
        Decoder((3, 8, 8), box=6),
        Decoder((3, 8, 8), box=(0, 0, 6, 6)),
        Decoder((3, 8, 8), center=False),
    ):
        assert names < (names := build(decoder))
    os.utime(images / "0.png", ns=(1, 1))
    assert names < (names := build())
    (images / "0.png").rename(images / "9.png")
    assert names < (names := build())
    save(images / "new.png")
    assert names < build()


def test_the_default_is_in_the_folder_of_the_images_and_hidden(images):
    decoded(Files(images), DECODER, *cache_folders(None, images))
    assert len(file_names(images / ".cache")) == 1
    assert len(Files(images).names) == 5


def test_a_folder_that_a_file_names_is_only_read(images, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    folders = cache_folders(str(tmp_path / "named"), images, only_read=True)
    decoded(Files(images), DECODER, *folders)
    assert not (tmp_path / "named").exists()
    (written,) = (tmp_path / "user" / "diffusion_lab").iterdir()
    (tmp_path / "named").mkdir()
    written.rename(tmp_path / "named" / written.name)
    decoded(Files(images), DECODER, *folders)  # that of the run which wrote the file
    assert not list((tmp_path / "user" / "diffusion_lab").iterdir())


def test_a_broken_image_is_named_and_leaves_nothing(images, tmp_path):
    (images / "7.png").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"7\.png cannot be read"):
        decoded(Files(images), DECODER, tmp_path / "cache")
    assert file_names(tmp_path / "cache") == []
    (images / "7.png").unlink()
    assert len(decoded(Files(images), DECODER, tmp_path / "cache")) == 5


def test_a_full_disk_is_refused_beforehand_with_figures(images, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 60_000_000))
    with pytest.raises(ValueError, match=r"images take 0 MiB, but 57 MiB are free: .*data\.source\.cache"):
        decoded(Files(images), DECODER, tmp_path / "cache")
    assert file_names(tmp_path / "cache") == []


def test_a_folder_that_cannot_be_made_is_refused(images, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write .*data\.source\.cache=FOLDER"):
        decoded(Files(images), DECODER, tmp_path / "file" / "cache")


def start(images: Path, cache: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", ACCEPT_CTRL_C + BUILD, str(images), str(cache)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def slow_images(tmp_path) -> Path:
    """Enough images to interrupt the build."""
    source = tmp_path / "slow" / "0000.png"
    source.parent.mkdir()
    Image.effect_noise((200, 200), 50).save(source)
    for i in range(1, MANY):
        os.link(source, source.with_name(f"{i:04d}.png"))
    return source.parent


@pytest.mark.integration
def test_processes_at_once_build_one_and_agree(slow_images, tmp_path):
    builds = [start(slow_images, tmp_path / "cache") for _ in range(3)]
    results = [build.communicate(timeout=60) for build in builds]
    assert [out for out, _ in results] == [f"({MANY}, 3, 8, 8)\n"] * 3
    assert sum("decoding" in err for _, err in results) == 1
    assert len(file_names(tmp_path / "cache")) == 1


@pytest.mark.integration
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_build_leaves_nothing_in_the_way(slow_images, tmp_path, how):
    cache = tmp_path / "cache"
    build = start(slow_images, cache)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in cache.glob(".*.partial")):
        assert build.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    build.send_signal(how)
    build.communicate(timeout=60)
    assert build.returncode != 0
    assert list(cache.glob("*.npy")) == []
    if how == signal.SIGINT:
        assert file_names(cache) == []
    second = start(slow_images, cache)
    assert second.communicate(timeout=60)[0] == f"({MANY}, 3, 8, 8)\n"
    assert [path.suffix for path in cache.iterdir()] == [".npy"]
