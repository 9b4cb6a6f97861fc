"""The DataModule: configuration files, checks, batches, and under Lightning."""

import inspect
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from diffusion_lab.data.datamodule import DataModule
from diffusion_lab.data.sources import Digits, ImageFolder

from .helpers import save

CONF = sorted((Path(__file__).parents[2] / "conf" / "data").glob("*.yaml"))


def digits(**options) -> DataModule:
    options = {"channels": 1, "image_size": [8, 8], "num_classes": 10, "val": 0.1, "test": 0.1, **options}
    return DataModule(Digits(), **options)


@pytest.mark.parametrize("path", CONF, ids=lambda path: path.stem)
def test_each_configuration_states_every_argument(path):
    """All but the run's seed, which the command passes, and the class of data=custom."""
    node = OmegaConf.load(path)
    assert {"_target_", *inspect.signature(DataModule).parameters} == {*node, "seed"}
    if path.stem == "custom":
        node.source._target_ = "diffusion_lab.data.sources.Digits"
    module = instantiate(node, _convert_="all", seed=7)
    assert module.seed == 7
    assert set(node.source) == {"_target_", *inspect.signature(type(module.source)).parameters}


def test_all_sets_are_configured():
    assert {path.stem for path in CONF} == {
        "digits",
        "mnist",
        "fashion_mnist",
        "cifar10",
        "celeba",
        "image_folder",
        "custom",
    }


def test_digits_split_and_described():
    data = digits(stratify=True)
    data.prepare_data()
    data.setup()
    assert [data.size(split) for split in ("train", "val", "test", "all", "train+val")] == [1437, 180, 180, 1797, 1617]
    assert data.class_names == tuple("0123456789")
    assert data.images("val").shape == (180, 1, 8, 8)
    assert data.images("val")[:3].dtype == np.uint8
    assert np.bincount(data.labels("test")).tolist() == pytest.approx([18] * 10, abs=1)
    with pytest.raises(ValueError, match=r"split=valid is unknown: write one of train, val, test, all"):
        data.size("valid")


def test_evaluation_batches_agree_with_the_arrays():
    data = digits(eval_batch_size=64)
    data.setup()
    batches = list(data.val_dataloader())
    assert torch.equal(torch.cat([batch["index"] for batch in batches]), torch.arange(180))
    expected = torch.from_numpy(np.asarray(data.images("val"))).double() / 127.5 - 1
    assert torch.equal(torch.cat([batch["image"] for batch in batches]), expected.float())
    assert torch.cat([batch["label"] for batch in batches]).tolist() == data.labels("val").tolist()
    assert sum(len(batch["index"]) for batch in data.test_dataloader()) == 180


def test_training_starts_at_the_given_step():
    data = digits(batch_size=32, seed=1)
    stream = data.train_dataloader()
    expected = [batch["image"] for batch in islice(stream, 5, 7)]
    data.start_at(5)
    for batches in (islice(stream, 2), islice(data.train_dataloader(), 2)):
        assert all(torch.equal(batch["image"], image) for batch, image in zip(batches, expected, strict=True))


def test_splits_do_not_depend_on_the_run_s_seed():
    a, b = digits(seed=0), digits(seed=1)
    assert np.array_equal(a.images("train"), b.images("train"))
    assert not torch.equal(next(iter(a.train_dataloader()))["image"], next(iter(b.train_dataloader()))["image"])


def test_unused_labels_are_left_out():
    data = digits(num_classes=0, stratify=True)
    assert data.labels("all") is None
    assert data.class_names == ()
    assert "label" not in next(iter(data.train_dataloader()))
    data.prepare_data()  # a trainer calls it again
    assert data.labels("all") is None


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"channels": 3}, r"Digits has 1 channel.* write data\.channels=1 data\.image_size=\[8,8\]"),
        ({"image_size": [8, 16]}, r"but data.channels=1 and data.image_size=\[8,16\]"),
        ({"image_size": [8]}, r"image_size=\[8\]: write a list of 2 integers in \[1, 65536\]: \[height,width\]"),
        ({"num_classes": 9}, r"data\.num_classes=9, but Digits has 10: write data\.num_classes=10"),
        ({"num_attributes": 4}, r"write data\.num_attributes=0"),
        ({"test": None}, r"data\.test=null"),
        ({"batch_size": 0}, r"data\.batch_size=0: write an integer in \[1, 1000000\]"),
    ],
)
def test_a_configuration_that_contradicts_the_data_is_refused(options, remedy):
    with pytest.raises(ValueError, match=remedy):
        digits(**options).train_dataloader()


def test_stratification_needs_labels(tmp_path):
    for i in range(10):
        save(tmp_path / f"{i}.png")
    options = {"channels": 3, "image_size": [8, 8], "root": str(tmp_path), "val": 0.2, "test": 0.2}
    with pytest.raises(ValueError, match=r"write data\.stratify=false"):
        DataModule(ImageFolder(), num_classes=0, stratify=True, **options).setup()
    with pytest.raises(ValueError, match="images of each class into a separate folder"):
        DataModule(ImageFolder(), num_classes=2, **options).setup()
    data = DataModule(ImageFolder(), num_classes=0, limit=3, **options)
    assert [data.size(split) for split in ("train", "val", "test", "all")] == [3, 2, 2, 10]


class Recorder(pl.LightningModule):
    """Train one parameter and record the batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: list[tuple[int, list[int]]] = []
        self.validated: list[int] = []

    def training_step(self, batch, batch_idx):
        self.trained.append((batch["step"], batch["position"].tolist()))
        return ((batch["image"] - self.weight) ** 2).mean()

    def validation_step(self, batch, batch_idx):
        self.validated += batch["index"].tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("val", [180, pytest.param(0, marks=pytest.mark.filterwarnings("ignore:Total length of"))])
@pytest.mark.filterwarnings("ignore::lightning_fabric.utilities.warnings.PossibleUserWarning")
def test_lightning_takes_the_stream(tmp_path, val):
    data, module = digits(batch_size=8, val=val), Recorder()
    data.start_at(40)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=3,
        accumulate_grad_batches=2,
        val_check_interval=6,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, datamodule=data)
    micro = [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert module.trained == [(step, micro[m]) for step in (40, 41, 42) for m in (0, 1)]
    assert module.validated == list(range(val))
