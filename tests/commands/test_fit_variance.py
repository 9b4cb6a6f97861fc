"""`variance=` from the command line: trained, fitted, found beside the checkpoint, refused where it cannot be."""

import csv
import re

import pytest
import torch
from command import TINY, command, composed, module, train

from diffusion_lab.checkpoint import fits as variances
from diffusion_lab.checkpoint import load_checkpoint
from diffusion_lab.instantiation import instantiate
from diffusion_lab.models import VarianceHead
from diffusion_lab.samplers import DDIM, DDPM
from diffusion_lab.variances import NPR, SN, Analytic, FixedLarge, FixedSmall, Learned

MADE = {}


@pytest.fixture
def made(tmp_path_factory, capfd):
    """made(name, *options): the folder of a run of two steps, trained once for this file."""

    def make(name, *options):
        if name not in MADE:
            folder = tmp_path_factory.mktemp("fits") / name
            train(folder, "trainer.max_steps=2", "schedule.steps=40", "sampler.steps=4", *options, capfd=capfd)
            MADE[name] = folder
        return MADE[name]

    return make


def refused(outcome, remedy):
    assert outcome.code == 2, outcome.err
    lines = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in outcome.err
    assert remedy in lines[0], lines[0]


@pytest.fixture
def fit(tmp_path, capfd):
    def run(folder, *arguments):
        options = (f"hydra.run.dir={tmp_path / 'fit'}", "overwrite=true")
        if any(a.startswith("overwrite=") for a in arguments):
            options = options[:1]
        return command("fit_variance", [f"ckpt={folder}", *options, *arguments], capfd)

    return run


@pytest.fixture
def sample(tmp_path, capfd):
    def run(folder, *arguments):
        common = ["n=2", "save_images=false", "overwrite=true", f"hydra.run.dir={tmp_path / 'sample'}"]
        return command("sample", [f"ckpt={folder}", *common, *arguments], capfd)

    return run


@pytest.mark.integration
def test_analytic_from_nothing_to_images(made, fit, sample, tmp_path):
    """Refused with the command that helps; fitted; stored by the weights' hash; found by sample.py for any η and grid."""
    plain = made("plain")
    asked = ("variance=analytic", "sampler=ddpm", "sampler.steps=4")
    refused(
        sample(plain, *asked),
        f"first run python src/fit_variance.py ckpt={plain}/checkpoints/last.ckpt variance=analytic",
    )
    assert not (tmp_path / "sample").is_dir() or not list((tmp_path / "sample").iterdir())
    done = fit(plain, "n=2", "variance=analytic")
    assert done.code == 0, done.err
    assert "python src/sample.py" in done.out
    files = list((plain / "checkpoints").glob("variance_*"))
    run = load_checkpoint(plain)
    assert files == [variances.place(run, "analytic")]
    stored = torch.load(files[0], weights_only=True)
    assert stored["weights"] == variances.fingerprint(run)
    assert stored["times"].tolist() == [k / 40 for k in range(1, 41)]
    assert stored["moments"].isfinite().all()
    with (tmp_path / "fit" / "analytic.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert len(rows) == 40
    assert all(0 <= float(row["covariance"]) <= 1 for row in rows)
    refused(fit(plain, "n=2", "overwrite=false"), "overwrite=true")
    for more in (
        (),
        ("sampler.grid=optimal",),
        ("sampler=ddim",),
        ("sampler=ddim", "sampler.eta=0.5", "sampler.max_final_noise=2"),
    ):
        outcome = sample(plain, "variance=analytic", "sampler=ddpm", "sampler.steps=4", *more)
        assert outcome.code == 0, outcome.err
    refused(sample(plain, *asked, "weights=raw"), "variance=analytic weights=raw")
    refused(sample(plain, "sampler=ddpm", "sampler.grid=optimal", "sampler.steps=4"), "variance=analytic")
    variance, same = variances.variance_for(
        {"_target_": "diffusion_lab.variances.Analytic", "times": None, "moments": None}, run
    )
    assert same is run
    assert torch.equal(variance.moments, stored["moments"])


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["sn", "npr"])
def test_a_second_head_from_nothing_to_images(made, fit, sample, kind, tmp_path):
    plain = made("plain")
    refused(sample(plain, f"variance={kind}", "sampler.steps=3"), f"variance={kind}")
    done = fit(plain, "steps=3", f"variance={kind}", "batch_size=8")
    assert done.code == 0, done.err
    with (tmp_path / "fit" / f"{kind}.csv").open() as table:
        assert [row["step"] for row in csv.DictReader(table)] == ["3"]
    outcome = sample(plain, f"variance={kind}", "sampler.steps=3")
    assert outcome.code == 0, outcome.err
    run = load_checkpoint(plain)
    node = {"_target_": f"diffusion_lab.variances.{kind.upper()}"}
    variance, wrapped = variances.variance_for(node, run)
    assert isinstance(variance, SN if kind == "sn" else NPR)
    assert isinstance(wrapped.denoiser.network, VarianceHead)
    assert not wrapped.denoiser.network.training
    assert not any(p.requires_grad for p in wrapped.denoiser.network.parameters())
    x, t = torch.randn(2, 1, 8, 8), torch.tensor(0.5)
    prediction = wrapped.denoiser(x, t)
    assert prediction.extra.shape == x.shape
    assert torch.equal(prediction.output, run.denoiser(x, t).output)
    _, other = variances.variance_for(node, wrapped)  # one on top of it: of the bare network all the same
    assert torch.equal(other.denoiser(x, t).extra, prediction.extra)
    assert wrapped.sample(2, DDPM(3, variance)).shape == (2, 1, 8, 8)


@pytest.mark.integration
def test_a_fit_of_other_weights_and_a_broken_one_are_refused(made, fit, sample):
    plain, other = made("plain"), made("other", "seed=1")
    assert fit(other, "n=1", "nodes=4").code == 0
    theirs = variances.place(load_checkpoint(other), "analytic")
    ours = variances.place(load_checkpoint(plain), "analytic")
    assert ours.name != theirs.name
    kept = ours.read_bytes() if ours.exists() else None
    asked = ("variance=analytic", "sampler.steps=3")
    for content, said in (
        (theirs.read_bytes(), "was fitted to other weights"),
        (theirs.read_bytes()[:100], "is truncated or not a fit"),
        (b"text", "is truncated or not a fit"),
    ):
        ours.write_bytes(content)
        refused(sample(plain, *asked), said)
    torch.save({"format": 1, "kind": "sn"}, ours)
    refused(sample(plain, *asked), "is not a fit of variance=analytic")
    ours.unlink()
    (ours.parent / theirs.name).write_bytes(theirs.read_bytes())
    refused(sample(plain, *asked), "(1 fit(s) for other weights)" if kept is None else "for other weights)")
    (ours.parent / theirs.name).unlink()
    if kept:
        ours.write_bytes(kept)


def test_what_cannot_be_fitted(made, fit, capfd, tmp_path):
    plain = made("plain")
    for arguments, remedy in {
        ("variance=fixed_small",): "write variance=analytic",
        ("variance=learned",): "write variance=analytic",
        ("n=0",): "an integer in [1, 1000000000]",
        ("nodes=41",): "nodes=41: write null, or an integer in [1, 40]",
        ("variance=sn", "devices=2"): "devices=1",
        ("variance=sn", "steps=0"): "an integer in [1, 1000000000]",
        ("weights=0.5",): "ema, raw",
        ("device=tpu",): "write auto, cpu or cuda",
    }.items():
        refused(fit(plain, *arguments), remedy)
    refused(command("fit_variance", [f"hydra.run.dir={tmp_path / 'fit'}"], capfd), "ckpt=PATH")
    refused(fit(tmp_path / "nowhere"), "no checkpoint at")


@pytest.mark.integration
def test_a_learned_variance_simply_trains_and_samples(made, sample, fit):
    """variance=learned alone chooses 2C channels; sample.py takes the checkpoint's variance where its sampler can, and
    fixed_small for DDIM."""
    learned = made("learned", "variance=learned", "sampler=ddpm", "validation.every=1", "callbacks.ema.decay=0.5")
    run = load_checkpoint(learned)
    assert run.config["model"]["learned_variance"] is True
    assert isinstance(run.sampler(), DDPM)
    assert isinstance(run.sampler().variance, Learned)
    assert run.sample(2).shape == (2, 1, 8, 8)
    for node, want in (({"_target_": "diffusion_lab.samplers.DDPM", "variance": None}, Learned),
                       ({"_target_": "diffusion_lab.samplers.DDIM", "variance": None}, FixedSmall)):  # fmt: skip
        assert isinstance(variances.sampler_for(node, run)[0].variance, want)
    assert variances.sampler_for({"_target_": "diffusion_lab.samplers.Euler", "steps": 3}, run)[1] is run
    for arguments in ((), ("variance=learned", "sampler=ddpm"), ("variance=fixed_large", "sampler=ddpm")):
        outcome = sample(learned, "sampler.steps=3", *arguments)
        assert outcome.code == 0, outcome.err
    refused(sample(learned, "variance=learned", "sampler=ddim"), "sampler=ddpm")
    refused(sample(made("plain"), "variance=learned", "sampler=ddpm", "sampler.steps=3"), "train with variance=learned")
    assert fit(learned, "n=1", "nodes=4").code == 0, "its mean alone is looked at"
    outcome = sample(learned, "variance=analytic", "sampler.steps=3")
    assert outcome.code == 0, outcome.err


def test_the_bound_alone_with_importance_sampling(tmp_path, capfd):
    options = (
        "variance=learned",
        "sampler=ddpm",
        "variance.loss=vlb",
        "time_sampler=importance",
        "trainer.max_steps=2",
        "schedule.steps=40",
    )
    train(tmp_path / "run", *options, capfd=capfd)
    assert load_checkpoint(tmp_path / "run").config["variance"]["loss"] == "vlb"


REFUSED = {
    ("variance=analytic",): "python src/fit_variance.py ckpt=PATH variance=analytic",
    ("variance=sn",): "python src/fit_variance.py ckpt=PATH variance=sn",
    ("variance=npr",): "python src/fit_variance.py ckpt=PATH variance=npr",
    ("variance=learned", "sampler=ddim"): "sampler=ddpm",
    ("variance=learned", "variance.loss=mse"): "hybrid, vlb",
    ("variance=learned", "sampler=ddpm", "schedule=vp", "sampler.steps=4"): "schedule=cosine",
    ("sampler=ddpm", "sampler.max_final_noise=0"): "sampler.max_final_noise=0: write null, or a number in (0, inf]",
    ("sampler.grid=optimal",): "write variance=analytic",
}


@pytest.mark.parametrize(("arguments", "remedy"), REFUSED.items(), ids=" ".join)
def test_a_variance_that_cannot_be_trained_or_used_is_refused(arguments, remedy):
    config = composed("train", *arguments, "model.width=8", "model.multipliers=[1]")
    with pytest.raises(ValueError, match=re.escape(remedy)):
        instantiate(config["sampler"]).check(module(config).denoiser)


def test_and_on_the_command_line_before_training(tmp_path, capfd):
    run = tmp_path / "run"
    outcome = command("train", [*TINY, "variance=sn", f"hydra.run.dir={run}"], capfd)
    refused(outcome, "python src/fit_variance.py ckpt=PATH variance=sn")
    assert not (run / "checkpoints").exists()


@pytest.mark.integration
def test_networks_of_one_s_own(tmp_path, capfd, fit, sample):
    """With 2C channels they learn a variance; without they are refused in one line; no features, so no second head."""
    tiny = [o for o in TINY if not o.startswith(("model.", "lr_scheduler"))]
    common = [*tiny, "model=custom", "trainer.max_steps=1", "schedule.steps=40", "sampler.steps=4"]
    one, two = tmp_path / "one", tmp_path / "two"
    asked = [*common, "model._target_=own_network.Own", f"hydra.run.dir={one}"]
    refused(command("train", [*asked, "variance=learned"], capfd), "the network gives 0 of them for images of 1")
    assert command("train", [*asked, "overwrite=true"], capfd).code == 0
    asked = [*common, "model._target_=own_network.OwnVariance", "variance=learned", f"hydra.run.dir={two}"]
    done = command("train", asked, capfd)
    assert done.code == 0, done.err
    trust = "trust=[own_network]"
    outcome = sample(two, trust, "sampler=ddpm", "sampler.steps=3")
    assert outcome.code == 0, outcome.err
    refused(fit(one, trust, "variance=sn"), "but the network is a Own: write variance=analytic")
    assert fit(one, trust, "n=1", "nodes=4").code == 0
    refused(sample(one, trust, "variance=learned", "sampler=ddpm", "sampler.steps=3"), "train with variance=learned")


def test_the_checkpoint_s_own_variance_holds(made):
    large = made("large", "variance=fixed_large", "sampler=ddpm")
    run = load_checkpoint(large)
    assert isinstance(variances.variance_for(None, run)[0], FixedLarge)
    given, _ = variances.variance_for(
        {"_target_": "diffusion_lab.variances.Analytic", "times": [0.5], "moments": [0.2]}, run
    )
    assert isinstance(given, Analytic), "numbers of one's own need no file"
    ddim = {"_target_": "diffusion_lab.samplers.DDIM", "variance": {"_target_": "diffusion_lab.variances.FixedLarge"}}
    with pytest.raises(ValueError, match="sampler=ddpm"):
        variances.sampler_for(ddim, run)
    assert isinstance(variances.sampler_for({**ddim, "variance": None}, run)[0], DDIM)
    run.path = None
    with pytest.raises(ValueError, match="load_checkpoint"):
        variances.variance_for({"_target_": "diffusion_lab.variances.SN"}, run)
    assert instantiate({"_target_": "diffusion_lab.variances.SN"}).kind == "sn"


@pytest.mark.integration
@pytest.mark.ddp
def test_two_processes_fit_what_one_does(made, fit, capfd):
    plain = made("plain")
    found = []
    for devices in (1, 2):
        done = fit(plain, "n=2", "nodes=10", f"devices={devices}", "device=cpu")
        assert done.code == 0, done.err
        found.append(variances.read(load_checkpoint(plain), "analytic")["moments"])
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)
