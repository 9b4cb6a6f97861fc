"""Files from somebody else, in every format that the product reads: refused in one line, or read right.

Of each format some hundred files are made: truncated, flipped bits, other types and shapes, bombs, pipes, links, names with
escape sequences. Nothing else than a ConfigError is raised, nothing is run or written, memory and time are bounded.
"""

import csv
import gzip
import io
import json
import pickle
import shutil
import sys
import tarfile
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from command import TINY, code, command
from data.test_sources import ARCHIVE, FOLDER, write_celeba, write_cifar, write_mnist
from PIL import Image
from safetensors.torch import save as safetensors
from torch import nn

from diffusion_lab import checkpoint as checkpoints
from diffusion_lab.checkpoint import fits, load_checkpoint
from diffusion_lab.checkpoint.archive import digest
from diffusion_lab.checkpoint.build import data_module, overridden
from diffusion_lab.checkpoint.classifiers import load_classifier, pack_classifier
from diffusion_lab.checkpoint.guidance import guided
from diffusion_lab.commands.sample.latents import load_latents
from diffusion_lab.commands.train.initialize import initialize
from diffusion_lab.data.cache import decoded
from diffusion_lab.data.decode import Decoder, Files
from diffusion_lab.data.image_set import ImageSet
from diffusion_lab.data.inputs import read_condition
from diffusion_lab.data.sources import CIFAR10, MNIST, CelebA, ImageFolder
from diffusion_lab.errors import ConfigError
from diffusion_lab.metrics import extractors, reference
from diffusion_lab.metrics.extractors import ModuleExtractor
from diffusion_lab.models import VarianceHead
from diffusion_lab.models.classifier import Classifier
from diffusion_lab.reporting import print_report, write_report
from faults import hostile
from faults.hostile import ESCAPES, Trial, altered, archives, arrays, damaged, replaced, saved

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::ResourceWarning")

EVIL = "evil_module"
SCHEDULE = {"_target_": "diffusion_lab.schedules.Cosine", "steps": 10}
# What a file may not run: programs, functions of this package, other packages' classes, modules in the working folder.
TARGETS = (
    *("os.system", "subprocess.run", "builtins.eval", "torch.utils.collect_env.run", "torch.hub.load", "torch.load"),
    *(
        "torch.nn.Linear",
        "pytorch_lightning.callbacks.ModelCheckpoint",
        "diffusion_lab.cli.main",
        "diffusion_lab.io.os.system",
    ),
    *("diffusion_lab.io.write_file", "diffusion_lab.metrics.extractors.inception", f"{EVIL}.Evil", ESCAPES, "", "a..b"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("hostile") / "run"
    assert code("train", [*TINY, "callbacks.ema.decay=0.9", "trainer.max_steps=2", f"hydra.run.dir={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def good(run):
    """The content of its checkpoint."""
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(params=[pytest.param(24, id="some"), pytest.param(1, id="all", marks=pytest.mark.integration)])
def trial(request, whole):
    """A trial of few files, quick enough for every commit, or of all."""
    whole.every = request.param
    return whole


@pytest.fixture
def whole(tmp_path, monkeypatch):
    """A trial in an empty folder, with a module that leaves a mark when it is imported."""
    for name in ("home", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.syspath_prepend(str(tmp_path / "work"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "work" / f"{EVIL}.py").write_text(
        "import pathlib\npathlib.Path('was-here').touch()\nclass Evil: pass\n"
    )
    return Trial(tmp_path)


def files_of(content: dict[str, Any], trial: Trial) -> hostile.Cases:
    """Every kind of hostile torch archive: damaged, replaced, with other values."""
    path = trial.folder / "good"
    saved(content, path)
    good = path.read_bytes()
    path.unlink()
    wrong = {name: (lambda p, c=c: saved(c, p)) for name, c in altered(content)}
    return damaged(good) | replaced() | archives(content, trial.folder / "was-here") | wrong


# checkpoints ----------------------------------------------------------------------------------------------------------------


def opened(path: Path) -> checkpoints.Run:
    """Read a checkpoint as the commands do: network, sampler, condition, variance and data."""
    run = load_checkpoint(path)
    run.sampler().check(run.denoiser)
    _ = run.condition, run.shape, run.num_classes
    fits.variance_for(None, run)
    data_module(*overridden(run.config["data"], {})[:1], (), set())
    return run


def same(network: nn.Module, other: nn.Module) -> bool:
    """Whether two networks have equal weights."""
    a, b = network.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_checkpoints(trial, good, run):
    right, path = opened(run), trial.folder / "work" / "last.ckpt"
    cases = files_of(good, trial)
    trial.every *= 1 + (trial.every > 1)  # the slowest format, half a second a file
    config = good["config"]
    for group in ("model", "schedule", "objective", "clip", "condition", "sampler", "variance", "data"):
        for name, changed in altered({group: config[group]}):
            cases[f"config: {name}"] = lambda p, c=changed: saved({**good, "config": {**config, **c}}, p)
        for target in TARGETS:
            node = {**config[group], "_target_": target}
            cases[f"{group} is {target!r}"] = lambda p, g=group, n=node: saved({**good, "config": {**config, g: n}}, p)
        others = [config[g]["_target_"] for g in ("schedule", "sampler", "data", "trainer", "optimizer")]
        for target in [t for t in others if t != config[group]["_target_"]]:
            cases[f"{group} is {target}"] = lambda p, g=group, t=target: saved(
                {**good, "config": {**config, g: {"_target_": t}}}, p
            )
    for key, value in (
        ("width", 10**7),
        ("width", 1 << 40),
        ("blocks", 10**9),
        ("multipliers", [1] * 1000),
        ("heads", 10**9),
    ):
        cases[f"model.{key}={str(value)[:20]}"] = lambda p, k=key, v=value: saved(
            {**good, "config": {**config, "model": {**config["model"], k: v}}}, p
        )
    weights = good["ema"]["0.9"]
    first = next(iter(weights))
    for name, tensor in (
        ("float64", weights[first].double()),
        ("another shape", weights[first][None]),
        ("no numbers", torch.zeros(0)),
    ):
        cases[f"a weight of {name}"] = lambda p, t=tensor: saved({**good, "ema": {"0.9": {**weights, first: t}}}, p)
    cases["no averages"] = lambda p: saved({**good, "ema": {}, "state_dict": {}}, p)
    cases["names with escapes"] = lambda p: saved({**good, "ema": {"0.9": {ESCAPES: weights[first]}}}, p)
    trial.read(
        "checkpoint",
        path,
        cases,
        lambda: opened(path),
        lambda r: same(right.denoiser.network, r.denoiser.network) or True,
    )
    trial.verify()
    assert trial.refused > 0.6 * trial.count


def test_every_flipped_bit_of_a_checkpoint_is_found_or_harmless(trial, good, run):
    """Damage is no other content: what is accepted is equal in every value."""
    path, right = trial.folder / "work" / "last.ckpt", digest(good)
    content = (run / "checkpoints" / "last.ckpt").read_bytes()
    cases = damaged(content, seed=1, flips=1500 if hostile.FULL else 60)
    trial.read("checkpoint", path, cases, lambda: checkpoints.read(path), lambda c: digest(c) == right)
    trial.verify()


def test_a_checkpoint_without_a_hash_is_read_with_a_line(whole, good, capfd):
    path = whole.folder / "work" / "old.ckpt"
    saved({k: v for k, v in good.items() if k != "sha256"}, path, seal=False)
    assert load_checkpoint(path).step == 2
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if "has no hash" in line] == lines[:1]
    load_checkpoint(path)
    assert capfd.readouterr().err == ""
    changed = bytearray(path.read_bytes())
    place = bytes(changed).rindex(next(iter(good["state_dict"].values())).numpy().tobytes()[:64])
    changed[place] ^= 1
    path.write_bytes(bytes(changed))
    with pytest.raises(ConfigError, match=r"the checksum of .* differs"):
        load_checkpoint(path)


def test_run_folders(trial, good, run):
    """A run folder with anything in place of its files is one without them."""
    folder = trial.folder / "work" / "run"
    for name in ("last.ckpt", "best.ckpt"):
        path = folder / "checkpoints" / name
        trial.read(
            f"run folder with {name}",
            path,
            replaced() | damaged(path.name.encode(), flips=0),
            lambda: opened(folder),
            bool,
        )
    trial.verify()
    assert trial.refused == trial.count


def test_exports(trial, good, run):
    content = checkpoints.read(run / "checkpoints" / "last.ckpt")
    name, tensors = checkpoints.select(content, "ema")
    written = checkpoints.exported(content, name, {k: v.contiguous() for k, v in tensors.items()})
    path, right = trial.folder / "work" / "run.safetensors", opened(run)
    path.write_bytes(written)
    stored = checkpoints.metadata(path)
    path.unlink()
    ordered = {k: tensors[k].contiguous() for k in sorted(tensors)}

    def export(stored: Any, tensors: Any = ordered, hashed: bool = True) -> hostile.Write:
        if hashed and isinstance(stored, dict):
            plain = {k: v for k, v in stored.items() if k != "sha256"}
            stored = {**plain, "sha256": digest({**plain, "tensors": dict(sorted(tensors.items()))})}
        text = stored if isinstance(stored, str) else json.dumps(stored)
        return lambda p: p.write_bytes(safetensors(tensors, metadata={"diffusion_lab": text}))

    cases = damaged(written) | replaced()
    cases |= {f"metadata: {what}": export(changed) for what, changed in altered(stored)}
    cases |= {f"metadata is {what}": export(wrong) for what, wrong in hostile.WRONG.items()}
    cases |= {"metadata is nested": export("[" * 100_000), "metadata is cut": export(json.dumps(stored)[:-40])}
    for target in TARGETS:
        changed = {**stored, "config": {**stored["config"], "model": {"_target_": target}}}
        cases[f"model is {target!r}"] = export(changed)
    cases["a weight missing"] = export(stored, dict(list(ordered.items())[1:]))
    cases["a weight too many"] = export(stored, {**ordered, ESCAPES: torch.zeros(1)})
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    cases["a declared terabyte"] = lambda p: p.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    cases["a header of 10^18 bytes"] = lambda p: p.write_bytes((10**18).to_bytes(8, "little") + header)
    trial.read("export", path, cases, lambda: opened(path), lambda r: same(r.denoiser.network, right.denoiser.network))
    network = right.denoiser.network
    trial.read("init", path, cases, lambda: initialize(network, str(path)), bool)
    trial.verify()


def test_classifiers(trial, run, monkeypatch):
    network = Classifier(channels=1, num_classes=10, width=8, features=4, time="sinusoidal")
    data = {"name": "digits", "shape": [1, 8, 8], "classes": 10, "class_names": [str(i) for i in range(10)]}
    config = {
        "data": data,
        "model": {"channels": 1, "num_classes": 10, "width": 8, "features": 4, "time": "sinusoidal"},
        "schedule": SCHEDULE,
        "recipe": {},
    }
    written = pack_classifier(network, config, 0.5, {"0…1": 0.5})
    path = trial.folder / "work" / "classifier.pt"
    content = torch.load(io.BytesIO(written), weights_only=True)
    cases = files_of(content, trial)
    for group in ("data", "model", "schedule"):
        for name, changed in altered({group: config[group]}, depth=2):
            cases[f"config: {name}"] = lambda p, c=changed: saved({**content, "config": {**config, **c}}, p)
    for target in (*TARGETS, "pytorch_lightning.Trainer"):
        cases[f"schedule is {target!r}"] = lambda p, t=target: saved(
            {**content, "config": {**config, "schedule": {"_target_": t, "command": "touch was-here"}}}, p
        )
    for key, value in (("width", 10**7), ("num_classes", 1 << 40), ("features", 10**9)):
        cases[f"model.{key}={value}"] = lambda p, k=key, v=value: saved(
            {**content, "config": {**config, "model": {**config["model"], k: v}}}, p
        )
    sampled = load_checkpoint(run)
    node = {"_target_": "diffusion_lab.guidance.ClassifierGuidance", "ckpt": str(path), "scale": 1.0}

    def read() -> Any:
        guided(node, sampled).sample(1, seed=0)
        return load_classifier(path)

    trial.read("classifier", path, cases, read, lambda c: same(c.network, network))
    trial.verify()


@pytest.mark.parametrize("kind", ["analytic", "npr"])
def test_fits(trial, run, kind):
    folder = trial.folder / "work" / "run"
    folder.mkdir()
    shutil.copy(run / "checkpoints" / "last.ckpt", folder / "last.ckpt")
    sampled = load_checkpoint(folder)
    times = torch.linspace(0.01, 1, 10, dtype=torch.float64)
    fit: dict[str, Any] = {"times": times, "moments": torch.linspace(0.5, 0.9, 10, dtype=torch.float64)}
    if kind != "analytic":
        fit = {"head": VarianceHead(sampled.denoiser.network, kind).head.state_dict()}
    path = fits.write(sampled, kind, fit)
    content = torch.load(path, weights_only=True)
    path.unlink()
    cases = files_of(content, trial)
    for name in (n for n in fit if n != "head"):
        for what, wrong in {
            "NaN": times * torch.nan,
            "short": times[:3],
            "a matrix": times[None],
            "whole": times.long(),
        }.items():
            cases[f"{name} is {what}"] = lambda p, n=name, w=wrong: saved({**content, n: w}, p)
    node = {"_target_": f"diffusion_lab.variances.{'Analytic' if kind == 'analytic' else 'NPR'}"}
    trial.read("fit", path, cases, lambda: fits.variance_for(node, sampled), bool)
    trial.verify()


def test_feature_extractors(trial):
    """Inception is a published file, whose checksum is compared before it is opened."""
    path = trial.folder / "work" / "inception.pth"
    cases = archives({}, trial.folder / "was-here") | replaced() | damaged(b"PK" + bytes(1000), flips=3)
    trial.read("extractor", path, cases, lambda: extractors.inception(str(path), download=False), bool)
    trial.verify()
    assert trial.refused == trial.count


# arrays and images ----------------------------------------------------------------------------------------------------------

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), np.uint8)
IMAGES = {"arr_0": PIXELS, "arr_1": np.arange(6) % 3}


def binary(good: bytes) -> hostile.Cases:
    return damaged(good) | replaced()


def test_arrays_of_images(trial):
    path = trial.folder / "work" / "images.npz"
    cases = arrays(IMAGES) | binary(hostile._npz(IMAGES))
    trial.read(
        "images", path, cases, lambda: ImageSet(path, (1, 8, 8)).block(range(2)), lambda x: x.shape == (2, 1, 8, 8)
    )
    trial.read(
        "data set",
        path,
        cases,
        lambda: ImageFolder().load(path, (1, 8, 8), download=False),
        lambda d: len(d.examples) > 0,
    )
    parts = {
        "train_images": PIXELS,
        "train_labels": IMAGES["arr_1"],
        "test_images": PIXELS,
        "test_labels": IMAGES["arr_1"],
    }
    trial.read(
        "data set in parts", path, arrays(parts), lambda: ImageFolder().load(path, (1, 8, 8), download=False), bool
    )
    condition = types.SimpleNamespace(of_data=True)
    trial.read("condition", path, cases, lambda: read_condition(str(path), (1, 8, 8), condition), lambda _: True)
    trial.verify()


def test_latents(trial, run):
    sampled = load_checkpoint(run)
    good = {
        "arr_0": np.zeros((2, 1, 8, 8), np.float32),
        "t": np.array(1.0),
        "seed": np.array(0, np.uint64),
        "schedule": np.array("{}"),
        "ckpt": np.array(f"a; {ESCAPES}"),
        "weights": np.array(fits.fingerprint(sampled)),
        "condition_label": np.arange(2),
    }
    path = trial.folder / "work" / "latents.npz"
    cases = arrays(good) | binary(hostile._npz(good))
    context = types.SimpleNamespace(run=sampled)
    trial.read("latents", path, cases, lambda: load_latents(context, path), lambda r: r[0].shape == (2, 1, 8, 8))
    trial.verify()


def test_reference_statistics(trial):
    extractor = ModuleExtractor(nn.Flatten(), (1, 2, 2))
    good = {"mu": np.zeros(4), "sigma": np.eye(4), "n": np.array(10), "key": np.array(json.dumps({"data": ESCAPES}))}
    path = trial.folder / "work" / "moments.npz"
    cases = arrays(good) | binary(hostile._npz(good))
    for name, text in {
        "nested": "[" * 100_000,
        "no JSON": "{",
        "a list": "[1]",
        "another": json.dumps({"data": "x"}),
    }.items():
        cases[f"key is {name}"] = lambda p, t=text: p.write_bytes(hostile._npz({**good, "key": np.array(t)}))
    trial.read(
        "moments",
        path,
        cases,
        lambda: reference.read(path, extractor, {"data": ESCAPES}),
        lambda r: r.moments.mean.shape == (4,),
    )
    trial.verify()


def test_caches(trial):
    """Decoded images, and features of real images: memory maps, or read whole."""
    images, work = trial.folder / "work" / "images", trial.folder / "work"
    images.mkdir()
    for i in range(3):
        Image.fromarray(PIXELS[i, ..., 0]).save(images / f"{i}.png")
    files, decoder, cache = Files(images), Decoder((1, 8, 8)), work / "cache"
    right = np.array(decoded(files, decoder, cache))
    (path,) = cache.iterdir()
    others = {
        "rank": right[0],
        "count": right[:2],
        "dtype": right.astype(np.int16),
        "objects": np.array([print], dtype=object),
    }

    def cases(good: np.ndarray, others: dict[str, np.ndarray]) -> hostile.Cases:
        made = {k: v for k, v in replaced().items() if k != "a folder"} | damaged(hostile.npy(good), flips=0)
        made |= {f"another {k}": (lambda p, v=v: p.write_bytes(hostile.npy(v))) for k, v in others.items()}
        for rows in (10**12, 10**30, -1):
            made[f"{rows} rows"] = lambda p, n=rows: p.write_bytes(hostile.npy(good, (n, *good.shape[1:])))
        # A missing file is made anew.
        return {k: v for k, v in made.items() if k not in ("a dangling link", "a link to itself")}

    trial.read(
        "image cache",
        path,
        cases(right, others),
        lambda: decoded(files, decoder, cache),
        lambda a: a.shape == right.shape,
    )

    extractor = ModuleExtractor(nn.Flatten(), (1, 8, 8))
    reals = np.ascontiguousarray(PIXELS.transpose(0, 3, 1, 2))
    key = reference.key_of(reals, {}, "train", extractor)
    made = reference.reference(reals, key, extractor, work, features=True)
    assert made.features is not None
    path = next(work.glob("*-features.npy"))
    table = np.array(made.features)
    others = {
        "rank": table[0],
        "count": table[:2],
        "dtype": table.astype(np.int16),
        "objects": np.array([print], dtype=object),
    }
    others |= {"NaN": table * np.nan}
    trial.read(
        "features",
        path,
        cases(table, others),
        lambda: reference.reference(reals, key, extractor, work, features=True),
        bool,
    )
    trial.verify()


@pytest.mark.parametrize("source", [MNIST(), CIFAR10(), CelebA()], ids=["MNIST", "CIFAR10", "CelebA"])
def test_published_data_sets(trial, source, tmp_path_factory):
    """Any of their files, in the layouts that are read."""
    root = trial.folder / "work" / "root"
    {MNIST: write_mnist, CIFAR10: write_cifar, CelebA: write_celeba}[type(source)](root)
    if isinstance(source, CIFAR10):
        with tarfile.open(root / ARCHIVE, "w:gz") as tar:
            tar.add(root / FOLDER, FOLDER)
    if isinstance(source, CelebA):
        source = CelebA(cache=str(tmp_path_factory.mktemp("cache")))
    shape = (3, 8, 8)
    right = [e.shape for e in (source.load(root, shape, download=False).examples.images,)]
    files = sorted(p for p in root.rglob("*") if p.is_file() and ".cache" not in p.parts)
    for path in files:
        kept, cases = path.read_bytes(), {}
        if path.suffix == ".gz":
            cases["a gzip bomb"] = lambda p: p.write_bytes(gzip.compress(bytes(200 << 20), 1))
        if path.name == ARCHIVE:
            (root / FOLDER).rename(root / "away")
        if path.parent.name == FOLDER:
            kinds = {
                "a payload": hostile.Runs(trial.folder / "was-here"),
                "a terabyte": hostile.Allocates(),
                **hostile.WRONG,
            }
            kinds |= {
                "a tall array": Array((1 << 40,)),
                "an array of floats": {"data": np.zeros(6144), "labels": [0, 1]},
            }
            kinds |= {"other labels": {"data": np.zeros((2, 3072), np.uint8), "labels": [99, -1]}}
            cases |= {k: (lambda p, v=v: p.write_bytes(pickle.dumps(v, 2))) for k, v in kinds.items()}
            cases["a memo of 2^31"] = lambda p: p.write_bytes(b"\x80\x02Nr\xff\xff\xff\x7f.")
        if path.suffix == ".txt":
            texts = {
                "words": b"2\na b\n1.jpg x y\n",
                "bytes": b"\xff\xfe" * 50,
                "ragged": b"2\na b\n1.jpg 1 1\n2.jpg 1\n",
            }
            cases |= {k: (lambda p, v=v: p.write_bytes(v)) for k, v in texts.items()}
        cases |= damaged(kept, flips=4) | {k: v for k, v in replaced().items() if k != "a folder"}
        trial.read(
            path.name,
            path,
            cases,
            lambda: source.load(root, shape, download=False),
            lambda d: [d.examples.images.shape] == right,
        )
        path.write_bytes(kept)
    trial.verify()


class Array:
    """A pickle that calls numpy.ndarray with a shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def __reduce__(self) -> Any:
        return (np.ndarray, (self.shape,))


def png(size: tuple[int, int] = (8, 8), mode: str = "L") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, format="PNG")
    return file.getvalue()


def declared(width: int, height: int) -> bytes:
    """A PNG whose header declares another size, with the right checksum."""
    data = bytearray(png())
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes(data[24:29])
    data[12:33] = header + zipfile.crc32(header).to_bytes(4, "big")  # type: ignore[attr-defined]
    return bytes(data)


def images_that_are_none() -> hostile.Cases:
    def content(data: bytes) -> hostile.Write:
        return lambda p: p.write_bytes(data)

    post_script = (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(was-here) (w) file closefile\n%%EOF\n"
    )
    tiff, gif = io.BytesIO(), io.BytesIO()
    Image.new("F", (8, 8)).save(tiff, format="TIFF")
    Image.new("P", (8, 8)).save(gif, format="GIF")
    cases = binary(png())
    cases |= {
        "PostScript": content(post_script),
        "floats": content(tiff.getvalue()),
        "a GIF cut": content(gif.getvalue()[:30]),
    }
    cases |= {
        "10^9 × 10^9 pixels": content(declared(10**9, 10**9)),
        "20,000 × 20,000 pixels": content(declared(20_000, 20_000)),
    }
    cases |= {
        "a long line": content(png((1, 60_000))),
        "one pixel": content(png((1, 1))),
        "SVG": content(b"<svg></svg>"),
    }
    return cases


def test_folders_and_archives_of_images(trial):
    work = trial.folder / "work"
    folder = work / "images"
    folder.mkdir()
    (folder / "0.png").write_bytes(png())
    decoder = Decoder((1, 8, 8))

    def read(path: Path) -> list[np.ndarray]:
        files = Files(path)
        return [decoder(files.read(name), name) for name in files.names]

    one = folder / f"1{ESCAPES}\n.png"
    trial.read(
        "image of a folder", one, images_that_are_none(), lambda: read(folder), lambda a: a[0].shape == (1, 8, 8)
    )
    path = work / "image.png"
    trial.read(
        "image",
        path,
        images_that_are_none(),
        lambda: ImageSet(path, (1, 8, 8), minimum=1).block(range(1)),
        lambda a: a.shape == (1, 1, 8, 8),
    )

    def links(*pairs: tuple[str, str]) -> hostile.Write:
        def write(path: Path) -> None:
            (folder / "sub" / "a").mkdir(parents=True, exist_ok=True)
            for name, target in pairs:
                (folder / name).unlink(missing_ok=True)
                (folder / name).symlink_to(target)

        return write

    def deep(path: Path) -> None:
        (folder / "/".join(["d"] * 1500)).mkdir(parents=True)

    loops = {
        "a loop": links(("sub/up", "..")),
        "two loops": links(("sub/up", ".."), ("sub/again", "../sub")),
        "a folder twice": links(("sub/b", "a"), ("sub/c", "a")),
        "a dangling link": links(("sub/x.png", "nowhere")),
        "a link to itself": links(("sub/x.png", "x.png")),
        "a folder of links to itself": links(("sub/x", "x")),
    }
    for name, write in loops.items():
        trial.read("folder", work / "unused", {name: write}, lambda: read(folder), lambda a: len(a) == 1)
        shutil.rmtree(folder / "sub", ignore_errors=True)

    def archive(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", method) as new:
            for name, data in members.items():
                new.writestr(name, data)
        return file.getvalue()

    members = {"a/0.png": png(), "../../up.png": png(), "/abs.png": png(), f"b/{ESCAPES}.png": png()}
    cases = damaged(archive(members)) | {k: v for k, v in replaced().items() if k != "a folder"}
    cases["a member of 1 GiB"] = lambda p: p.write_bytes(archive({"a.png": bytes(1 << 28), "b.png": bytes(1 << 28)}))
    for method, name in ((zipfile.ZIP_LZMA, "LZMA"), (zipfile.ZIP_BZIP2, "bzip2")):
        cases |= {f"{name}, {k}": v for k, v in damaged(archive(members, method), flips=4).items()}
    cases["an encrypted member"] = lambda p: p.write_bytes(
        archive(members).replace(b"PK\x01\x02\x14\x03\x14\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01\x00")
    )
    path = work / "images.zip"
    trial.read("archive", path, cases, lambda: read(path), lambda a: all(x.shape == (1, 8, 8) for x in a))
    trial.verify()


# reports --------------------------------------------------------------------------------------------------------------------


def table(rows: list[list[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def test_reports(trial, run, capsys):
    """Any file of a run or sweep folder: the page is written and leaves the folder out, or shows it."""
    folder, out = trial.folder / "work" / f"sweep{ESCAPES}", trial.folder / "report.html"
    for name in ("0", "1"):
        shutil.copytree(run, folder / name, ignore=shutil.ignore_patterns("checkpoints"))
    (folder / "0" / "samples").mkdir(exist_ok=True)
    config, metrics = (folder / "0" / "config.yaml").read_bytes(), (folder / "0" / "metrics.csv").read_bytes()
    row = {
        "sampler": "ddim",
        "steps": 5,
        "nfe": 5,
        "n": 10,
        "seed": 0,
        "split": "train",
        "weights": "raw",
        "extractor": "classifier",
        "metrics": {"fid": 1.0},
        "spread": {"fid": 0.1},
        "seconds": 1.0,
        "protocol": {"fid": "x"},
        "processes": 1,
        "batch_size": 5,
        "checkpoint": {"path": "a"},
        "data": {"name": "Digits", "shape": [1, 8, 8]},
        "references": {"c": {"weights": "a", "n": 3}},
    }
    plain = yaml.safe_load(config)
    yaml_cases = {
        "laughs": b"a: &a [x,x]\n"
        + b"".join(b"%c: &%c [*%c,*%c]\n" % (98 + i, 98 + i, 97 + i, 97 + i) for i in range(24)),
        "nested": b"[" * 5000,
        "a tag": b"a: !!python/object/apply:os.system ['touch was-here']\n",
        "a merge": b"a: &a {b: 1}\nc: {<<: *a}\n",
        "a date": b"a: 2020-01-01\n2020-01-01: b\n1: 2\nnull: 3\n",
        **{name: yaml.safe_dump(changed).encode() for name, changed in altered(plain)},
    }
    rows = {
        "a long field": b"step,train/loss\n1," + b"1" * 200_000 + b"\n",
        "10^9 columns": b"step,train/loss\n1," + b"," * 1_000_000 + b"\n",
        "escapes": table([["step", "train/loss", ESCAPES], [1, 0.5, 1]]),
        "numbers": table([["step", "train/loss"], [1e300, "inf"], ["nan", 1], [-5, "1e999"], [10**40, 1]]),
        "two steps": table([["step", "step", "train/loss", "train/loss"], [1, 2, 3, 4]]),
        "a quote": b'step,train/loss\n"1,2\n',
    }
    results = {
        **{name: json.dumps([changed]).encode() for name, changed in altered(row, depth=2)},
        **{f"a row of {name}": json.dumps([wrong]).encode() for name, wrong in hostile.WRONG.items()},
        "nested": b"[" * 100_000,
        "a null byte": json.dumps([{**row, "checkpoint": {"path": "a\0b"}}]).encode(),
        "a long path": json.dumps([{**row, "checkpoint": {"path": "a/" * 5000}}]).encode(),
    }
    outcomes = {
        name: json.dumps(changed).encode()
        for name, changed in altered({"status": "done", "reason": "x", "seconds": 1.0, "overrides": ["a=1"]})
    }
    overrides = {name: yaml.safe_dump(wrong).encode() for name, wrong in hostile.WRONG.items()}
    special = {
        "config.yaml": (config, yaml_cases),
        "metrics.csv": (metrics, rows),
        "outcome.json": (b"{}", outcomes),
        ".hydra/overrides.yaml": (b"- a=1\n", overrides),
        ".hydra/hydra.yaml": (
            b"hydra: {}\n",
            {k: yaml.safe_dump({"hydra": v}).encode() for k, v in hostile.WRONG.items()},
        ),
        "samples/step_9.png": (png(), {"a huge size": declared(10**9, 10**9)}),
        "evaluation/metrics.json": (json.dumps([row]).encode(), results),
    }

    def read() -> str:
        print_report(write_report([folder], out))
        page = out.read_text()
        out.unlink()
        return page

    for name, (content, more) in special.items():
        path = folder / "0" / name
        kept = path.read_bytes() if path.exists() else None
        cases = damaged(content, flips=8) | replaced() | {k: (lambda p, v=v: p.write_bytes(v)) for k, v in more.items()}
        trial.read(name, path, cases, read, lambda page: "</html>" in page)
        if kept is not None:
            path.write_bytes(kept)
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err
    assert not any(ord(c) < 32 and c != "\n" for c in printed.out + printed.err)
    trial.verify()


# commands -------------------------------------------------------------------------------------------------------------------


def refuses(name: str, arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """Run a command; return its output, or raise its refusal as a ConfigError."""
    outcome = command(name, arguments, capfd)
    lines = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert outcome.code in (0, 2), outcome.err
    assert "Traceback" not in outcome.err
    printed = outcome.out + outcome.err
    assert all(c.isprintable() or c in "\n\r\t" for c in printed), printed
    if outcome.code == 2:
        assert len(lines) == 1, outcome.err
        raise ConfigError(lines[0].removeprefix("error: "))
    return outcome.out


@pytest.mark.integration
def test_resuming(whole, good, capfd):
    """Whatever a checkpoint holds, resuming it trains or refuses, and writes only into the run folder."""
    path, folder = whole.folder / "work" / "last.ckpt", whole.folder / "work" / "again"
    outside, composed = whole.folder / "outside", good["composed"]
    cases = {name: (lambda p, c=c: saved(c, p)) for name, c in altered(good, {"text": ESCAPES, "a mapping": {"a": 1}})}

    for entry in ("loops", "callbacks"):
        inside = good[entry]
        for name, c in altered(inside, {"text": ESCAPES, "a mapping": {"a": 1}}, depth=2):
            cases[f"{entry}: {name}"] = lambda p, e=entry, c=c: saved({**good, e: c}, p)
    for key, value in (("width", 10**7), ("multipliers", [1] * 500), ("width", 24)):
        model = {**good["composed"]["model"], key: value}
        cases[f"model.{key}={str(value)[:20]}"] = lambda p, m=model: saved(
            {**good, "composed": {**composed, "model": m}}, p
        )

    def with_nodes(**nodes: Any) -> hostile.Write:
        return lambda p: saved({**good, "composed": {**composed, **nodes}}, p)

    callbacks, loggers, data, trainer = (composed[k] for k in ("callbacks", "logger", "data", "trainer"))
    writer = callbacks["checkpoints"]
    for where in (str(outside), "../../outside", "~/outside"):
        cases |= {
            f"_args_ {where}": with_nodes(
                callbacks={**callbacks, "checkpoints": {"_target_": writer["_target_"], "_args_": [where, 1]}}
            ),
            f"folder {where}": with_nodes(callbacks={**callbacks, "checkpoints": {**writer, "folder": where}}),
            f"save_dir {where}": with_nodes(logger={"csv": {**loggers["csv"], "save_dir": where}}),
            f"name {where}": with_nodes(logger={"csv": {**loggers["csv"], "name": where}}),
            f"default_root_dir {where}": with_nodes(
                trainer={**trainer, "default_root_dir": where, "profiler": "simple"}
            ),
            f"root {where}": with_nodes(data={**data, "root": where, "download": True}),
        }
    for target in ("os.system", f"{EVIL}.Evil", "torch.utils.collect_env.run"):
        evil = {"_target_": target, "command": "touch was-here"}
        for group in ("sampler", "model", "trainer", "lr_scheduler", "time_sampler"):
            cases[f"{group} is {target}"] = with_nodes(**{group: evil})
        cases[f"a callback is {target}"] = with_nodes(callbacks={**callbacks, "mine": evil})
        cases[f"a profiler is {target}"] = with_nodes(trainer={**trainer, "profiler": evil})
        for line in (
            f"++trainer.profiler={{_target_: {target}}}",
            f"+callbacks.mine._target_={target}",
            f"hydra.launcher._target_={target}",
        ):
            cases[line] = lambda p, o=line: saved({**good, "overrides": [*good["overrides"], o]}, p)
    cases["hydra.searchpath"] = lambda p: saved({**good, "overrides": ["hydra.searchpath=[pkg://evil_module]"]}, p)

    whole.every = 1 if hostile.FULL else 6  # a second or two each

    def resumed() -> bool:
        # trainer=cpu and callbacks=default name classes on this command line; those of the file stay untrusted.
        arguments = [
            f"ckpt={path}",
            "trainer=cpu",
            "callbacks=default",
            "callbacks.progress=null",
            "callbacks.samples=null",
        ]
        refuses("train", [*arguments, "trainer.max_steps=3", f"hydra.run.dir={folder}"], capfd)
        written = folder / "checkpoints" / "last.ckpt"
        right = torch.load(written, weights_only=True)["global_step"] == 3
        shutil.rmtree(folder)
        return right

    whole.read("resume", path, cases, resumed, bool)
    assert not outside.exists()
    assert not (whole.folder / "work" / "was-here").exists()
    whole.verify()


@pytest.mark.integration
def test_the_data_of_a_checkpoint_is_only_read(whole, run, good, capfd):
    """Decoded images of folders that a checkpoint names go to the user's cache folder, unless this command line names them."""
    images, cache = whole.folder / "images", whole.folder / "cache"
    images.mkdir()
    for i in range(20):
        (images / f"{i}.png").write_bytes(png())
    node = {**good["config"]["data"], "root": str(images), "num_classes": 0, "stratify": False}
    node["source"] = {"_target_": "diffusion_lab.data.sources.ImageFolder", "cache": str(cache)}
    path = whole.folder / "work" / "last.ckpt"
    saved({**good, "config": {**good["config"], "data": node}, "composed": {**good["composed"], "data": node}}, path)
    out = whole.folder / "work" / "out"
    evaluate = [f"ckpt={path}", "metrics=[nll]", "samplers=[ddpm]", "steps=[2]", "n=2", f"out={out}", "overwrite=true"]
    fit = [f"ckpt={path}", "variance=analytic", "n=2", "nodes=4", "overwrite=true", f"hydra.run.dir={out}"]
    train = [f"ckpt={path}", "trainer.max_steps=3", f"hydra.run.dir={whole.folder / 'work' / 'again'}"]
    for name, arguments in (("evaluate", evaluate), ("fit_variance", fit), ("train", train)):
        refuses(name, arguments, capfd)
        assert not cache.exists()
        assert not (images / ".cache").exists()
        assert list((whole.folder / "home" / ".cache" / "diffusion_lab").glob("*.npy"))
    refuses("fit_variance", [*fit, f"+data.source.cache={cache}"], capfd)
    shutil.rmtree(whole.folder / "home")
    refuses("fit_variance", [*fit, f"+data.source.cache={cache}"], capfd)
    assert list(cache.glob("*.npy"))
