"""Labels, guidance and conditions made of data, by the commands: what comes out, and what is refused in one line."""

import json

import numpy as np
import pytest
import torch
from command import TINY, code, command, train

from diffusion_lab.checkpoint import load_checkpoint
from diffusion_lab.checkpoint.archive import sealed
from diffusion_lab.checkpoint.guidance import guided
from diffusion_lab.conditions import requested_condition
from diffusion_lab.guidance import ClassifierFreeTransform, ClassifierTransform
from diffusion_lab.instantiation import instantiate_untrusted
from diffusion_lab.metrics.classifier import Noise, Recipe, load_or_train
from diffusion_lab.samplers import DDIM, DDPM
from diffusion_lab.schedules import Cosine
from diffusion_lab.training.classifier import train_classifier

pytestmark = pytest.mark.integration  # commands and trainings of seconds

QUICK = ("device=cpu", "sampler.steps=3", "save_images=false")
COSINE = {"_target_": "diffusion_lab.schedules.Cosine"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run without labels."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    assert code("train", [*TINY, "trainer.max_steps=2", f"hydra.run.dir={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def judges(tmp_path_factory, run):
    """Folders of a noisy classifier and of a clean one, hardly trained."""
    data = instantiate_untrusted(load_checkpoint(run).config["data"], ())
    data.setup()
    found = {}
    for kind, noise in (("noisy", Noise(Cosine(), COSINE)), ("clean", None)):
        folder = tmp_path_factory.mktemp(kind)
        made = load_or_train(
            data.examples("train"),
            data.examples("val"),
            folder,
            train_classifier,
            name="digits",
            recipe=Recipe(1, 2),
            noise=noise,
        )
        made.path.rename(folder / "classifier.pt")
        found[kind] = folder
    return found


@pytest.fixture
def sample(tmp_path, capfd):
    def call(*arguments, refused=False):
        out = tmp_path / "out"
        outcome = command("sample", [*QUICK, f"out={out}", "overwrite=true", *arguments], capfd)
        assert outcome.code == (2 if refused else 0), outcome.err
        if refused:
            assert not out.exists()
            assert outcome.err.count("error: ") == 1
            assert "Traceback" not in outcome.err
            return outcome.err.splitlines()[-1]
        with np.load(out / "samples.npz") as file:
            return {name: file[name] for name in file.files}

    return call


def test_scale_1_is_no_guidance_bit_for_bit(sample, run):
    asked = (f"ckpt={run}", "n=12", "labels=[3,1]")
    without = sample(*asked)
    assert without["arr_1"].tolist() == [3, 1] * 6
    one = sample(*asked, "guidance=cfg", "guidance.scale=1")
    two = sample(*asked, "guidance=cfg", "guidance.scale=1e8")  # four steps leave the label next to no effect
    assert (one["arr_0"] == without["arr_0"]).all()
    assert (two["arr_0"] != without["arr_0"]).any()


@pytest.mark.parametrize("sampler", ["ddpm", "heun", "unipc", "predictor_corrector"])
def test_guidance_with_any_sampler_and_batch_size(sampler, run, judges, plain):
    """Image i depends on (seed, i) and its class, not on its neighbours: to 1e-4 between batches of 3 and of 7."""
    from command import composed

    from diffusion_lab.instantiation import instantiate

    made = instantiate(
        composed("sample", f"sampler={sampler}", "sampler.steps=3")["sampler"]
        | ({"variance": None} if sampler == "ddpm" else {})
    )
    node = {"_target_": "diffusion_lab.guidance.ClassifierGuidance", "ckpt": str(judges["noisy"]), "scale": 2.0}
    free = {"_target_": "diffusion_lab.guidance.ClassifierFree", "scale": 2.0}
    label = torch.arange(7) % 10
    for given, guidance, kind in ((run, free, ClassifierFreeTransform), (plain, node, ClassifierTransform)):
        guided_run = guided(guidance, load_checkpoint(given))
        assert [type(transform) for transform in guided_run.denoiser.on_output] == [kind]
        assert guided_run.num_classes == 10
        whole = guided_run.sample(7, made, condition={"label": label})
        parts = guided_run.sample(7, made, condition={"label": label}, batch_size=3)
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-4)
        assert not torch.allclose(load_checkpoint(plain).sample(7, made), whole, atol=1e-2)


def test_a_classifier_guides_an_unconditional_checkpoint(sample, plain, judges):
    asked = (f"ckpt={plain}", "n=20", "sampler=ddpm", "sampler.steps=3")
    guidance = ("guidance=classifier", f"guidance.ckpt={judges['noisy']}", "guidance.scale=50")
    found = sample(*asked, *guidance, "labels=[2,7]")
    assert found["arr_1"].tolist() == [2, 7] * 10
    published = sample(*asked, *guidance, "labels=[2,7]", "guidance.form=published")
    assert (found["arr_0"] != sample(*asked)["arr_0"]).any()
    assert (found["arr_0"] != published["arr_0"]).any()


def test_evaluation_says_what_guided(run, judges, cache, tmp_path, capfd):
    out = tmp_path / "out"
    guidance = ("guidance=cfg", "guidance.scale=3", "guidance.interval=[0.1,0.9]")
    common = ("device=cpu", "n=70", "steps=[2]", "batch_size=35", f"cache={cache}", f"ckpt={run}", f"out={out}")
    assert command("evaluate", [*common, *guidance], capfd).code == 0
    (row,) = json.loads((out / "metrics.json").read_text())
    assert row["checkpoint"]["guidance"] == {
        "kind": "ClassifierFree", "scale": 3, "rescale": 0.0, "interval": [0.1, 0.9],
    }  # fmt: skip
    assert 0 <= row["metrics"]["label_accuracy"] <= 1
    common = [a for a in common if not a.startswith("out=")]
    outcome = command("evaluate", [*common, f"out={tmp_path / 'other'}", "metrics=[nll]", "guidance=cfg"], capfd)
    assert outcome.code == 2
    assert "write guidance=none" in outcome.err


def test_super_resolution_end_to_end(sample, tmp_path, cache, capfd):
    """A condition of data: trained, sampled from full and from small images, evaluated."""
    run = tmp_path / "run"
    tiny = [a for a in TINY if a != "callbacks.samples=null"]
    grids = ["callbacks.samples.n=4", "callbacks.samples.every=2", "sampler.steps=2"]
    chosen = ["condition=low_resolution", "trainer.max_steps=2", f"hydra.run.dir={run}"]
    assert command("train", [*tiny, *grids, *chosen], capfd).code == 0
    assert (run / "samples" / "step_0000002.png").is_file()
    full = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    full = np.repeat(np.repeat(full[:, ::2, ::2], 2, 1), 2, 2)
    np.savez(tmp_path / "full.npz", full)
    np.savez(tmp_path / "small.npz", full[:, ::2, ::2])
    asked = (f"ckpt={run}", "n=6")
    a, b = (sample(*asked, f"condition_data={tmp_path / name}.npz")["arr_0"] for name in ("full", "small"))
    assert (a == b).all()
    other = tmp_path / "other.npz"
    np.savez(other, 255 - full)
    assert (sample(*asked, f"condition_data={other}")["arr_0"] != a).any()
    out = tmp_path / "evaluated"
    common = ("device=cpu", "n=70", "steps=[2]", "batch_size=35", f"cache={cache}", f"ckpt={run}", f"out={out}")
    assert command("evaluate", [*common, "metrics=[fd_classifier,nll]", "samplers=[ddpm]"], capfd).code == 0


def test_tensors_of_ones_own_data_set(tmp_path, capfd, monkeypatch):
    """`Examples.more` reaches a network of one's own by name, in training and from an .npz in sampling."""
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1]))
    run, out = tmp_path / "run", tmp_path / "out"
    outcome = command(
        "train",
        [
            *[a for a in TINY if not a.startswith("model.")],
            "data.source._target_=own_data.Squares", "data.num_classes=0", "data.stratify=false",
            "model=custom", "model._target_=own_data.SizedNetwork", "condition=tensors", "condition.keys=[size]",
            "trust=[own_data]", "trainer.max_steps=2", f"hydra.run.dir={run}",
        ],
        capfd,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    np.savez(tmp_path / "sizes.npz", size=np.array([0.25, 1.0], np.float32))
    common = [*QUICK, f"ckpt={run}", "trust=[own_data]", "n=4", f"out={out}"]
    assert command("sample", [*common, f"condition_data={tmp_path / 'sizes.npz'}"], capfd).code == 0
    outcome = command("sample", [*common, "overwrite=true"], capfd)
    assert outcome.code == 2
    assert "condition_data=PATH" in outcome.err


def test_attributes_by_their_names(tmp_path, capfd, monkeypatch):
    """The names come with the checkpoint; what is not named is not said; guidance moves away from saying nothing."""
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1]))
    run = tmp_path / "run"
    data = [
        "data.source._target_=own_data.Squares",
        "data.num_classes=0",
        "data.num_attributes=2",
        "data.stratify=false",
    ]
    chosen = ["condition=attributes", "trust=[own_data]", "trainer.max_steps=3", f"hydra.run.dir={run}"]
    outcome = command("train", [*TINY, *data, *chosen], capfd)
    assert outcome.code == 0, outcome.err
    loaded = load_checkpoint(run)
    assert loaded.config["condition"]["names"] == ["big", "odd"]
    asked = requested_condition(loaded.condition, None, 3, ["odd", "-big"])["label"]
    assert asked.tolist() == [[-1.0, 1.0]] * 3
    assert requested_condition(loaded.condition, None, 2, "cycle")["label"].tolist() == [[0.0, 0.0]] * 2
    common = [*QUICK, f"ckpt={run}", "n=4", "guidance=cfg"]
    outcome = command("sample", [*common, "labels=[odd,-big]", f"out={tmp_path / 'a'}"], capfd)
    assert outcome.code == 0, outcome.err
    outcome = command("sample", [*common, "labels=[old]", f"out={tmp_path / 'b'}"], capfd)
    assert outcome.code == 2
    assert "some of big, odd" in outcome.err


@pytest.mark.parametrize(
    ("which", "arguments", "remedy"),
    [
        ("run", ["labels=[3,10]"], "0 … 9"),
        ("run", ["labels=[three]"], "cycle or a list"),
        ("run", ["condition_data=somewhere"], "remove it"),
        ("run", ["guidance=cfg", "guidance.scale=-1"], "write a number in [0, 1000000000]"),
        ("run", ["guidance=cfg", "guidance.interval=[0.5,0.1]"], "low < high"),
        ("run", ["guidance.scale=2"], "guidance"),
        ("run", ["guidance=classifier"], "train_classifier.py data=digits noisy=true schedule=cosine"),
        ("run", ["guidance=classifier", "guidance.ckpt=nowhere"], "train_classifier.py"),
        ("run", ["guidance=classifier", "guidance.ckpt={clean}"], "clean images"),
        ("plain", ["labels=[1]"], "condition=label"),
        ("plain", ["guidance=cfg"], "condition=label"),
        ("plain", ["guidance=classifier", "guidance.ckpt={noisy}", "labels=[11]"], "0 … 9"),
        ("plain", ["guidance=classifier", "guidance.ckpt={noisy}", "guidance.form=published"], "sampler=ddpm"),
    ],
)
def test_refusals(which, arguments, remedy, sample, run, plain, judges):
    places = {name: str(folder) for name, folder in judges.items()}
    line = sample(f"ckpt={run if which == 'run' else plain}", *[a.format(**places) for a in arguments], refused=True)
    assert remedy in line


def test_a_checkpoint_without_a_null_label_is_not_guided(tmp_path, sample, capfd):
    folder = tmp_path / "run"
    train(folder, "condition=label", "condition.drop=0", "trainer.max_steps=1", capfd=capfd)
    assert "condition.drop=0.1" in sample(f"ckpt={folder}", "guidance=cfg", refused=True)


def test_a_classifier_of_other_images_is_refused(sample, plain, judges, tmp_path):
    saved = torch.load(judges["noisy"] / "classifier.pt", weights_only=True)
    saved["config"]["data"]["name"] = "mnist"
    torch.save(sealed(saved), tmp_path / "classifier.pt")
    line = sample(f"ckpt={plain}", "guidance=classifier", f"guidance.ckpt={tmp_path}", refused=True)
    assert "classifies mnist" in line


def test_samplers_agree_on_guidance_objects(run):
    """The same run, guided in Python: a sampler is handed a denoiser and knows no more."""
    loaded = load_checkpoint(run)
    label = {"label": torch.tensor([4, 4])}
    strong = guided({"_target_": "diffusion_lab.guidance.ClassifierFree", "scale": 4.0}, loaded)
    for sampler in (DDIM(3), DDPM(3)):
        assert not torch.equal(strong.sample(2, sampler, condition=label), loaded.sample(2, sampler, condition=label))
