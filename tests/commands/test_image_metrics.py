"""`metrics` as a list group: torchmetrics' metrics by `_target_`, on one process and two, and what is refused in one line."""

import csv
import json

import numpy as np
import pytest
import torch
from command import command, composed, evaluated
from own_features import Pooled

from diffusion_lab.checkpoint import load_checkpoint
from diffusion_lab.commands.train import build
from diffusion_lab.data.pictures import to_uint8
from diffusion_lab.metrics.frechet import frechet_distance, moments
from diffusion_lab.samplers import DDIM

FID = ("+metrics.mine._target_=torchmetrics.image.FrechetInceptionDistance",)
FID = (*FID, "+metrics.mine.feature._target_=own_features.Pooled", "+metrics.mine.feature.num_features=4")
BRIGHT = "+metrics.bright._target_=torchmetrics.MeanMetric"
KEEPS = pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save all extracted features")


@pytest.fixture(scope="session")
def given(tmp_path_factory):
    """70 images as an .npz, and the array."""
    images = np.random.default_rng(3).integers(0, 256, (70, 8, 8, 1), dtype=np.uint8)
    path = tmp_path_factory.mktemp("given") / "images.npz"
    np.savez(path, arr_0=images)
    return path, torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.fixture
def evaluate(given, cache, tmp_path, capfd):
    """evaluate(*arguments) → (outcome, rows) as a command, of the given images unless a checkpoint is named."""

    def call(*arguments, code=0):
        of = () if any(a.startswith("ckpt=") for a in arguments) else (f"images={given[0]}", "data=digits")
        common = ["batch_size=16", "device=cpu", f"cache={cache}"]
        return evaluated([*common, *of, *arguments], tmp_path / "out", capfd, code)

    return call


@pytest.fixture(scope="session")
def real():
    data = build.data(composed("train"))
    data.setup()
    return {split: torch.from_numpy(np.asarray(data.images(split)[:])) for split in ("train+val", "test")}


@pytest.mark.parametrize("split", ["train+val", "test"])
def test_a_torchmetrics_distance_is_that_of_its_features(evaluate, given, real, split):
    """Its own feature module, with a metric of ours in the same command, against the split's images."""
    outcome, (row,) = evaluate("metrics=[fd_classifier]", *FID, f"split={split}")
    want = frechet_distance(moments(Pooled()(given[1])), moments(Pooled()(real[split])))
    assert row["metrics"]["mine"] == pytest.approx(want, rel=1e-3)
    assert {"mine", "fd_classifier", "confident_fraction"} <= set(row["metrics"])
    assert "update(images, real=…)" in row["protocol"]["mine"]
    assert "mine" in outcome.out


@pytest.mark.integration
@pytest.mark.ddp
@KEEPS
def test_two_processes_have_the_figures_of_one(evaluate, given):
    """Five blocks on two processes: unequal shares, of a list state that torchmetrics itself could not gather."""
    kid = [f"+metrics.kid_own.{key}" for key in ("subsets=5", "subset_size=20", "feature._target_=own_features.Pooled")]
    kid.append("+metrics.kid_own._target_=torchmetrics.image.KernelInceptionDistance")
    chosen = ("metrics=[]", *FID, BRIGHT, "+metrics.ends._target_=own_features.Extremes", *kid)
    _, (one,) = evaluate(*chosen)
    _, (two,) = evaluate(*chosen, "devices=2")
    assert (one["processes"], two["processes"]) == (1, 2)
    assert set(one["metrics"]) == {"mine", "bright", "ends_min", "ends_max", "ends_images", "kid_own", "kid_own_std"}
    assert two["metrics"]["ends_images"] == 70
    for name, value in one["metrics"].items():
        assert two["metrics"][name] == pytest.approx(value, rel=1e-9), name
    assert not torch.distributed.is_initialized()


@pytest.mark.integration
@pytest.mark.ddp
@KEEPS
def test_a_metric_that_fails_on_rank_0_ends_both_processes(evaluate, tmp_path):
    chosen = ("metrics=[]", "+metrics.mine._target_=torchmetrics.image.KernelInceptionDistance")
    line = evaluate(*chosen, "+metrics.mine.feature._target_=own_features.Pooled", "devices=2", code=2)
    assert "metrics.mine: KernelInceptionDistance raised an error" in line
    assert "subset_size" in line


@pytest.mark.integration
def test_samples_of_every_sampler_and_seed_are_measured_alone(evaluate, run, tmp_path):
    """The figure of images alone is numpy's; table, csv and plot hold it; nothing of one row is in another's."""
    n = ("n=40", "steps=[2]", "samplers=[ddim,ddpm]")
    outcome, (ddim, ddpm) = evaluate(f"ckpt={run}", "metrics=[]", BRIGHT, *FID, *n, "repeats=2")
    bytes_of = []
    for seed in (0, 1):
        label = {"label": torch.arange(40) % 10}
        samples = load_checkpoint(run).sample(40, DDIM(2), seed=seed, batch_size=16, condition=label)
        bytes_of.append(to_uint8(samples).numpy().astype(float).mean())
    assert [each["bright"] for each in ddim["each"]] == pytest.approx(bytes_of, rel=1e-6)
    assert ddim["metrics"]["bright"] == pytest.approx(np.mean(bytes_of), rel=1e-6)
    assert ddim["spread"]["bright"] == pytest.approx(np.std(bytes_of, ddof=1), rel=1e-3)
    assert ddpm["metrics"]["bright"] != ddim["metrics"]["bright"]
    assert (ddim["extractor"], ddim["n"], ddim["nfe"]) == (None, 40, 2)
    assert "against Digits train+val" in outcome.out
    out = tmp_path / "out"
    with (out / "metrics.csv").open() as file:
        assert [float(line["bright"]) for line in csv.DictReader(file)] == [
            row["metrics"]["bright"] for row in (ddim, ddpm)
        ]
    assert (out / "quality.png").stat().st_size > 1000
    _, (alone,) = evaluate(f"ckpt={run}", "metrics=[]", BRIGHT, *FID, "n=40", "steps=[2]", "samplers=[ddpm]", "seed=1")
    assert alone["metrics"]["mine"] == ddpm["each"][1]["mine"]


def test_a_metric_of_bytes_that_wrap_around_is_warned_of_and_mended(evaluate, given):
    """Total variation subtracts bytes modulo 256; the node that the warning names gives numpy's figure."""
    target = "_target_=torchmetrics.image.TotalVariation"
    outcome, (raw,) = evaluate("metrics=[]", f"+metrics.tv.{target}")
    assert "warning: metrics.tv: TotalVariation has different values" in outcome.err
    wrapped = (
        "+metrics.tv._target_=torchmetrics.wrappers.LambdaInputTransformer",
        f"+metrics.tv.wrapped_metric.{target}",
    )
    mended = "+metrics.tv.transform_pred={_target_: torch.Tensor.float, _partial_: true}"
    outcome, (row,) = evaluate("metrics=[]", *wrapped, mended)
    assert "warning" not in outcome.err
    x = given[1].numpy().astype(float)
    want = np.abs(np.diff(x, axis=2)).sum() + np.abs(np.diff(x, axis=3)).sum()
    assert row["metrics"]["tv"] == pytest.approx(want, rel=1e-6)
    assert raw["metrics"]["tv"] != pytest.approx(want, rel=1e-2)


def test_custom_stands_beside_the_options(evaluate, given):
    custom = ("metrics=[fd_classifier,custom]", "metrics.custom._target_=torchmetrics.MeanMetric")
    _, (row,) = evaluate(*custom)
    assert row["metrics"]["custom"] == pytest.approx(given[1].double().mean().item(), rel=1e-6)
    _, (plain,) = evaluate()
    assert plain["metrics"] == {name: row["metrics"][name] for name in plain["metrics"]}


def test_arguments_of_the_options_count(evaluate):
    chosen = (
        "metrics=[kid,is,prdc,fd]",
        "extractor=classifier",
        "+metrics.half={_target_: diffusion_lab.metrics.options.KID}",
    )
    more = (
        "metrics.kid.subset_size=20",
        "metrics.is.splits=2",
        "metrics.prdc.density_neighbors=2",
        "+metrics.half.subsets=3",
    )
    _, (row,) = evaluate(*chosen, *more)
    assert "100 subsets of at most 20," in row["protocol"]["kid"]
    assert row["protocol"]["is"] == "2 splits, shuffled"
    assert "density, coverage k = 2" in row["protocol"]["prdc"]
    assert {"kid_classifier", "kid_classifier_std", "half", "half_std", "is_classifier", "precision"} <= set(
        row["metrics"]
    )
    assert row["metrics"]["half_std"] < row["metrics"]["kid_classifier_std"]  # subsets of all 70


def test_an_option_of_a_config_dir_takes_its_place(evaluate, tmp_path, given):
    folder = tmp_path / "conf" / "metrics"
    folder.mkdir(parents=True)
    (folder / "near.yaml").write_text(
        "# @package metrics.near\n_target_: diffusion_lab.metrics.options.PRDC\nneighbors: 1\n"
    )
    _, (row,) = evaluate(f"--config-dir={folder.parent}", "metrics=[prdc,near]", "extractor=classifier")
    assert row["metrics"]["near_density"] == row["metrics"]["density"]
    assert row["metrics"]["near_recall"] < row["metrics"]["recall"]  # smaller balls


@pytest.mark.integration
def test_a_sweep_over_lists_and_the_shipped_one(run, cache, tmp_path, capfd):
    common = [f"ckpt={run}", f"cache={cache}", "n=12", "steps=[2]", "device=cpu", "extractor=classifier", "--multirun"]
    lists = "metrics=[fd_classifier],[prdc,fd]"
    outcome = command("evaluate", [*common, lists, f"hydra.sweep.dir={tmp_path / 'lists'}"], capfd)
    assert outcome.code == 0, outcome.err
    found = [json.loads((tmp_path / "lists" / job / "metrics.json").read_text())[0]["metrics"] for job in "01"]
    assert ["precision" in metrics for metrics in found] == [False, True]
    refused = command(
        "evaluate", [*common, "metrics=[fd_classifier],[fud]", f"hydra.sweep.dir={tmp_path / 'x'}"], capfd
    )
    assert refused.code == 2
    assert "unknown option metrics=fud" in refused.err
    assert list(composed("evaluate", "sweep=guidance_scale")["metrics"]) == ["fd_classifier", "prdc"]
    assert list(composed("evaluate", "sweep=guidance_scale", "metrics=[fid]")["metrics"]) == ["fid"]


MINE = "+metrics.mine._target_"


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["metrics=[]"], "write one or more of fid, kid, is, prdc, fd, fd_classifier, nll, or +metrics.NAME._target_="),
        (["metrics=null"], "write metrics=[] for none"),
        (["logger=null"], "write logger=[] for none"),
        (["metrics=[fud]"], "did you mean fd?"),
        (["metrics=[custom]"], "write metrics.custom._target_=my_package.MyClass"),
        (["+metrics.mine.feature=3"], "metrics.mine has no _target_"),
        (["+metrics.mine=3"], "metrics.mine has no _target_"),
        ([f"{MINE}=nowhere.Metric"], "metrics.mine._target_=nowhere.Metric cannot be imported"),
        ([f"{MINE}=builtins.dict"], "metrics.mine: builtins.dict is not a metric"),
        ([f"{MINE}=torchmetrics.MetricCollection", "+metrics.mine.metrics=[]"], "is not a metric"),
        ([f"{MINE}=torchmetrics.MeanMetric", "+metrics.mine.color=1"], "metrics.mine: MeanMetric raised an error"),
        ([f"{MINE}=own_features.Extremes", "+metrics.mine.color=1"], "Extremes has no argument color"),
        (["metrics=[kid]", "+metrics.kid.subset=3"], "KID has no argument subset (did you mean subsets?)"),
        (["metrics=[kid]", "metrics.kid.subset_size=1"], "metrics.kid.subset_size=1: write an integer in [2, 1000000]"),
        (["metrics=[kid]", "metrics.kid.subset_size=few"], "write an integer"),
        (["metrics=[prdc]", "extractor=classifier", "metrics.prdc.neighbors=70"], "at least 71 images"),
        ([f"{MINE}=torchmetrics.MeanSquaredError"], "MeanSquaredError.update has the signature"),
        (["+metrics.n._target_=torchmetrics.MeanMetric"], "write +metrics.my_n._target_="),
        ([*FID[:1], "+metrics.mine.feature={_target_: torch.nn.Conv2d, in_channels: 2, out_channels: 1, kernel_size: 1}"],
         "metrics.mine: "),
        (["metrics=[nll]"], "write ckpt=PATH instead of images="),
    ],
)  # fmt: skip
def test_what_is_no_metric_is_one_line(evaluate, arguments, remedy):
    assert remedy in evaluate(*arguments, code=2)
