"""evaluate.py: what it leaves, that its numbers are those of the images, one process and two, what it refuses."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch
from command import command, composed, evaluated
from PIL import Image

from diffusion_lab import composition
from diffusion_lab.checkpoint import load_checkpoint
from diffusion_lab.commands.evaluate import samplers
from diffusion_lab.commands.evaluate.measure import rows
from diffusion_lab.commands.evaluate.prepare import check_settings
from diffusion_lab.commands.evaluate.prepare import prepare as build_and_check
from diffusion_lab.commands.sample.context import write_samples
from diffusion_lab.commands.train import build
from diffusion_lab.data.pictures import to_uint8
from diffusion_lab.metrics import extractors
from diffusion_lab.metrics.collect import Processes
from diffusion_lab.metrics.frechet import frechet_distance, moments
from diffusion_lab.samplers import DDIM

QUICK = ("batch_size=16", "device=cpu", "n=70", "steps=[2]")


def prepare(settings):
    """What the command checks and builds before it samples."""
    check_settings(settings)
    return build_and_check(settings)


@pytest.fixture
def evaluate(run, cache, tmp_path, capfd):
    """evaluate(*arguments) → (outcome, rows), as a command; of the tiny run unless another is named."""

    def call(*arguments, code=0):
        given = {a.split("=")[0] for a in arguments}
        common = [a for a in (*QUICK, f"cache={cache}", f"ckpt={run}") if a.split("=")[0] not in given]
        return evaluated([*common, *arguments], tmp_path / "out", capfd, code)

    return call


@pytest.fixture
def settings(run, cache, tmp_path):
    """settings(*overrides, key=value) → what the command resolves them to."""

    def call(*overrides, metrics=None, **values):
        chosen = () if metrics is None else (f"metrics=[{','.join(metrics)}]",)
        base = composed("evaluate", *QUICK, *chosen, *overrides)
        resolved = {**base, "cache": str(cache), "ckpt": str(run), "out": str(tmp_path / "out"), **values}
        return {**resolved, "sampler_nodes": samplers.nodes(resolved) if resolved["ckpt"] else {}}

    return call


@pytest.fixture
def measured(settings):
    """measured(*overrides, key=value) → rows, without the command around them."""
    return lambda *overrides, **values: rows(prepare(settings(*overrides, **values)), Processes())


@pytest.fixture(scope="session")
def made(run, tmp_path_factory):
    """What `sample.py ckpt=RUN n=70 sampler.steps=2 batch_size=16` leaves."""
    out = tmp_path_factory.mktemp("made")
    labels = torch.arange(70) % 10
    images = load_checkpoint(run).sample(70, DDIM(2), batch_size=16, condition={"label": labels})
    write_samples(out, images, labels, save_images=True)
    return out


def test_several_samplers_steps_and_metrics_in_one_command(evaluate, run, tmp_path):
    asked = ("metrics=[fd_classifier,prdc]", "extractor=classifier", "samplers=[ddim,ddpm]", "steps=[2,3]")
    outcome, found = evaluate(*asked)
    wanted = [("ddim", 2, 2), ("ddim", 3, 3), ("ddpm", 2, 2), ("ddpm", 3, 3)]
    assert [(r["sampler"], r["steps"], r["nfe"]) for r in found] == wanted
    first = found[0]
    head = {"n": 70, "seed": 0, "split": "train+val", "weights": "ema 0.5", "extractor": "classifier"}
    assert {k: first[k] for k in head} == head
    metrics = first["metrics"]
    names = {
        "fd_classifier",
        "precision",
        "recall",
        "density",
        "coverage",
        "confident_fraction",
        "classes",
        "label_accuracy",
    }
    assert set(metrics) == names
    assert len(metrics["classes"]) == 10
    assert sum(metrics["classes"]) == pytest.approx(metrics["confident_fraction"])
    assert first["checkpoint"]["path"] == str(run / "checkpoints" / "last.ckpt")  # the file, though a folder was named
    assert (first["checkpoint"]["ema_decay"], first["checkpoint"]["step"]) == (0.5, 4)
    assert first["references"]["classifier"]["n"] == 1617
    assert "uint8" in first["protocol"]["images"]
    assert "k = 3" in first["protocol"]["prdc"]
    for word in ("fd_classifier", "coverage", "70 images", "1,617 images", "ema 0.5", "train+val"):
        assert word in outcome.out
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == ["config.yaml", "metrics.csv", "metrics.json", "quality.png"]
    with (out / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["fd_classifier"]) for line in lines] == [r["metrics"]["fd_classifier"] for r in found]
    with Image.open(out / "quality.png") as picture:
        assert min(picture.size) > 400


def test_repeats_are_mean_and_spread_of_their_seeds(measured):
    (row,) = measured(repeats=2, seed=5, n=66)
    alone = [measured(seed=seed, n=66)[0]["metrics"]["fd_classifier"] for seed in (5, 6)]
    assert row["seeds"] == [5, 6]
    assert [found["fd_classifier"] for found in row["each"]] == alone
    assert row["metrics"]["fd_classifier"] == pytest.approx(np.mean(alone))
    assert row["spread"]["fd_classifier"] == pytest.approx(np.std(alone, ddof=1))
    assert alone[0] != alone[1]


@pytest.mark.integration
@pytest.mark.ddp
def test_one_and_two_processes_agree(evaluate, measured, monkeypatch):
    """n divides neither into blocks nor into processes; equal threads, so that images are equal bit for bit."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        asked = ("metrics=[fd_classifier,prdc,kid,is]", "extractor=classifier")
        (one,) = measured(*asked, n=71)
        _, (two,) = evaluate(*asked, "n=71", "devices=2")
    finally:
        torch.set_num_threads(threads)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["metrics"].keys() == one["metrics"].keys() >= {"kid_classifier", "is_classifier", "recall"}
    for name, value in one["metrics"].items():
        assert two["metrics"][name] == pytest.approx(value, rel=1e-6), name
    assert not torch.distributed.is_initialized()


def test_given_images_are_measured_as_the_checkpoint_s_own(measured, made):
    """The images of sample.py, from .npz and from PNG files, have the very numbers of the run that made them."""
    (own,) = measured()
    (npz,) = measured("data=digits", ckpt=None, n=None, images=str(made / "samples.npz"))
    (png,) = measured("data=digits", ckpt=None, n=None, images=str(made / "images"))
    assert (npz["n"], npz["sampler"], npz["nfe"], npz["weights"]) == (70, None, None, None)
    for found in (npz, png):
        assert found["metrics"]["fd_classifier"] == pytest.approx(own["metrics"]["fd_classifier"], rel=1e-12)
        assert found["metrics"]["classes"] == own["metrics"]["classes"]
    assert npz["metrics"]["label_accuracy"] == own["metrics"]["label_accuracy"]  # by the labels that sample.py noted


def test_a_module_of_ones_own_measures(measured, made):
    """Flattened pixels: the distance can be computed from the files."""
    own = {"_target_": "torch.nn.Flatten"}
    images = str(made / "samples.npz")
    (row,) = measured("metrics=[fd,prdc]", "data=digits", ckpt=None, images=images, extractor=own)
    with np.load(images) as file:
        x = torch.from_numpy(file["arr_0"]).reshape(70, 64).double() / 127.5 - 1
    data = build.data(composed("train"))
    data.setup()
    real = torch.from_numpy(np.asarray(data.images("train+val"))).reshape(-1, 64).double() / 127.5 - 1
    assert row["metrics"]["fd_flatten"] == pytest.approx(frechet_distance(moments(x), moments(real)), rel=1e-5)
    assert row["extractor"] == "flatten"
    with pytest.raises(ValueError, match="is needs logits"):
        measured("metrics=[is]", "data=digits", ckpt=None, images=images, extractor=own)


@pytest.mark.integration
def test_every_sampler_of_its_folder_is_known(measured):
    """Also one that chooses its own steps, with options of its own."""
    loose = {"ode": {"rtol": 0.5, "atol": 0.5}}
    names = [name for name in composition.options("sampler") if name != "custom"]
    entries = [loose if name == "ode" else name for name in names]
    found = measured(samplers=entries, steps=[3], n=66, batch_size=66)
    assert [r["sampler"].split("(")[0] for r in found] == names
    assert all(r["nfe"] >= 3 for r in found)
    found = measured(samplers=["ddim", {"ddim": {"eta": 1}}], budget=[2], n=66, batch_size=66)
    assert [(r["sampler"], r["nfe"]) for r in found] == [("ddim", 2), ("ddim(eta=1)", 2)]
    assert found[0]["metrics"]["fd_classifier"] != found[1]["metrics"]["fd_classifier"]


@pytest.mark.integration
def test_likelihoods_stand_beside_the_distances(evaluate, measured, settings, tmp_path):
    """The bound of chains with noise, the density of the ODE; a deterministic chain has neither, and alone it is refused."""
    entries = ["ddim", "ddpm", {"ode": {"rtol": 0.5, "atol": 0.5}}]
    found = measured("metrics=[fd_classifier,nll]", samplers=entries, steps=[3], n=66, batch_size=66)
    assert ["nll" in row["metrics"] for row in found] == [False, True, True]
    assert [row.get("nll", {}).get("kind") for row in found] == [None, "vlb", "ode"]
    assert (found[1]["nll"]["n"], found[1]["nll"]["split"], found[1]["split"]) == (66, "test", "train+val")
    with (tmp_path / "out" / "nll_terms.csv").open() as file:
        terms = [float(row["bpd"]) for row in csv.DictReader(file) if row["name"] == "ddpm, 3 steps"]
    assert len(terms) == 4  # L_0, two KL terms, L_T
    assert sum(terms) == pytest.approx(found[1]["metrics"]["nll"], rel=1e-5)
    outcome, (alone,) = evaluate("metrics=[nll]", "samplers=[ddpm]", "steps=[3]", "n=66", "batch_size=66")
    assert alone["metrics"]["nll"] == pytest.approx(found[1]["metrics"]["nll"], rel=1e-6)
    assert (alone["n"], alone["nfe"], alone["split"], alone["extractor"]) == (66, 3, "test", None)
    assert "66 images, seed 0, weights ema 0.5, likelihood of Digits test" in outcome.out
    with pytest.raises(ValueError, match=r"write samplers=\[ddpm\]"):
        prepare(settings(metrics=["nll"], overwrite=True))


def test_references_are_exported_imported_and_not_mixed_up(measured, settings, tmp_path):
    kept = str(tmp_path / "mine.npz")
    (made,) = measured(save_reference=kept, split="all")
    with np.load(kept, allow_pickle=False) as file:
        assert (file["mu"].shape, file["sigma"].shape, int(file["n"])) == ((64,), (64, 64), 1797)
    (read,) = measured(reference=kept, split="all")
    assert read["metrics"] == made["metrics"]
    np.savez(tmp_path / "inception.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    for values, said in (
        ({"reference": kept, "split": "val"}, "was computed with split=all, but this evaluation has split=val"),
        ({"save_reference": kept}, "exists: name another file"),
        (
            {"reference": kept, "split": "all", "metrics": ["prdc"], "extractor": "classifier"},
            "remove reference=, or kid and prdc",
        ),
        ({"reference": str(tmp_path / "inception.npz")}, "has 2048 features, but extractor=classifier has 64"),
    ):
        with pytest.raises(ValueError, match=said):
            prepare(settings(**values))


def test_inception_metrics_without_weights_are_one_line(evaluate, settings, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "*")
    nowhere = dataclasses.replace(extractors.WEIGHTS, urls=("http://127.0.0.1:9/weights.pth",))
    monkeypatch.setattr(extractors, "WEIGHTS", nowhere)
    line = evaluate("metrics=[fid]", code=2)
    for named in (nowhere.name, str(tmp_path / "torch" / "hub" / "checkpoints"), "http://127.0.0.1:9/"):
        assert named in line
    (tmp_path / "wrong.pth").write_bytes(b"x" * 1000)
    for values, said in (
        ({"metrics": ["kid"]}, nowhere.name),
        ({"metrics": ["is"]}, nowhere.name),
        ({"metrics": ["fid"], "extractor": "classifier"}, nowhere.name),  # FID is Inception's whatever extractor= says
        ({"metrics": ["fid"], "weights_path": "nowhere.pth"}, "no Inception weights at"),
        (
            {"metrics": ["prdc"], "extractor": "inception", "weights_path": str(tmp_path / "wrong.pth")},
            "not the published",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            prepare(settings(**values))


@pytest.mark.parametrize(
    ("values", "remedy"),
    [
        ({"metrics": ["fud"]}, "write one of custom, fd, fd_classifier, fid, is, kid, nll, prdc"),
        ({"metrics": []}, "write one or more of fid, kid, is, prdc"),
        ({"n": 1}, "n=1: write at least 2"),
        ({"samplers": ["dpm"]}, "samplers=dpm is unknown"),
        ({"samplers": [{"ddim": {"etta": 1}}]}, "no option etta"),
        ({"samplers": []}, r"samplers=\[ddim\]"),
        ({"steps": [5000]}, "write fewer steps"),
        ({"repeats": 0}, "repeats=0: write at least 1"),
        ({"batch_size": 0}, "batch_size=0: write at least 1"),
        ({"extractor": "vgg"}, "inception, classifier"),
        ({"split": "tests"}, "split=tests is unknown: write one of train"),
        ({"weights": "0.7"}, r"weights=0\.7 is not in the checkpoint"),
        ({"ckpt": "nowhere"}, "no checkpoint at nowhere"),
        ({"ckpt": None}, "ckpt=PATH"),
        ({"extractor": {"_target_": "builtins.dict"}, "metrics": ["fd"]}, "is not a torch.nn.Module"),
        ({"metrics": ["prdc"], "n": 5}, "at least 6 images"),
        ({"images": "here.npz", "ckpt": None}, "data=digits"),
        ({"images": "here.npz"}, "ckpt=PATH"),
        ({"device": "tpu"}, "auto, cpu or cuda"),
    ],
)
def test_what_cannot_be_is_refused(settings, values, remedy, tmp_path):
    with pytest.raises(ValueError, match=remedy) as caught:
        prepare(settings(**values))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_mistakes_of_the_command_line_are_one_line(evaluate):
    assert "write samplers=[ddpm]" in evaluate("sampler=ddpm", code=2)
    assert "nowhere" in evaluate("data=mnist", "data.root=nowhere", "data.download=false", code=2)
    assert "did you mean samplers" in evaluate("samples=[ddim]", code=2)


def test_images_that_cannot_be_measured_are_refused(settings, measured, tmp_path):
    def npz(name, array):
        np.savez(tmp_path / f"{name}.npz", array)
        return str(tmp_path / f"{name}.npz")

    good = np.random.default_rng(0).integers(0, 256, (80, 8, 8, 1), dtype=np.uint8)
    floats = good / 127.5 - 1
    hole = floats.copy()
    hole[37, 2, 2] = np.nan
    colours = tmp_path / "colours"
    colours.mkdir()
    for i in range(3):
        Image.new("RGB", (8, 9 if i == 0 else 8)).save(colours / f"{i}.png")
    given = {"ckpt": None, "data": composed("evaluate", "data=digits")["data"]}
    for images, said in {
        npz("nan", hole): "image 37 ",
        npz("range", 3 * floats): "scale them to",
        npz("size", np.zeros((80, 9, 8, 1), np.uint8)): "is 9×8×1 where the data set's images are 8×8×1",
        npz("channels", np.zeros((80, 8, 8, 3), np.uint8)): "is 8×8×3",
        npz("kind", good.astype(np.int64)): "write uint8",
        npz("one", good[:1]): "at least 2",
        npz("few", good[:50]): "has 50 images",
        str(colours): r"0\.png in ",
        str(tmp_path / "nowhere"): "no such file",
    }.items():
        with pytest.raises(ValueError, match=said):
            prepare(settings(images=images, **given))
    (row,) = measured(images=npz("floats", floats.astype(np.float32)), **given)
    (same,) = measured(images=npz("bytes", good), **given)
    assert row["metrics"] == same["metrics"]
    assert torch.equal(to_uint8(torch.from_numpy(floats)), torch.from_numpy(good))


def test_too_few_images_for_the_features_are_warned_of(evaluate):
    outcome, (row,) = evaluate("n=20")
    assert "warning: extractor classifier: n=20 images for 64 features" in outcome.err
    assert row["warnings"]


def test_another_data_set_than_the_checkpoint_s(measured, settings, tmp_path):
    for side in (8, 9):
        np.savez(
            tmp_path / f"{side}.npz", np.random.default_rng(1).integers(0, 256, (90, side, side, 1), dtype=np.uint8)
        )

    def mine(side):
        size = f"data.image_size=[{side},{side}]"
        return "data=image_folder", f"data.root={tmp_path}/{side}.npz", "data.channels=1", size

    own = {"extractor": {"_target_": "torch.nn.Flatten"}, "metrics": ["fd"], "split": "all"}
    (row,) = measured(*mine(8), **own)
    assert row["data"]["name"] == "ImageFolder"
    assert row["references"]["flatten"]["n"] == 90
    with pytest.raises(ValueError, match="images of the checkpoint are 8×8×1, but those of the data set are 9×9×1"):
        prepare(settings(*mine(9), **own))
    with pytest.raises(ValueError, match="no labels: write extractor=inception"):
        prepare(settings(*mine(8)))


@pytest.mark.integration
def test_a_wandb_table_offline(evaluate, monkeypatch, tmp_path):
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    evaluate("logger=wandb")
    assert list((tmp_path / "out").glob("wandb/offline-run-*/*.wandb"))


def test_train_classifier_reports_its_accuracy(cache, tmp_path, capfd):
    out = tmp_path / "classifier"
    outcome = command("train_classifier", [f"cache={cache}", f"out={out}"], capfd)
    assert outcome.code == 0, outcome.err
    report = json.loads((out / "accuracy.json").read_text())
    assert f"{report['accuracy']:.2%} accuracy on 180 held-out images" in outcome.out
    assert torch.load(out / "classifier.pt", weights_only=True)["config"]["data"]["name"] == "digits"
    for arguments, said in (([f"out={out}"], "overwrite=true"), (["data.num_classes=0"], "labeled data set")):
        refused = command("train_classifier", [f"cache={cache}", f"out={tmp_path / 'x'}", *arguments], capfd)
        assert refused.code == 2
        assert said in refused.err
    assert not (tmp_path / "x").exists()
