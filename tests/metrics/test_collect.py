"""Exactly n images, each in one process, for any number of processes; NaN by index; memory that does not grow."""

import functools
import itertools
import math
import tracemalloc
from pathlib import Path

import pytest
import torch
from oracle import Gaussian, oracle
from torch import distributed, multiprocessing, nn

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.errors import ConfigError
from diffusion_lab.generation import batch_of, generate
from diffusion_lab.metrics.collect import Processes, blocks, collect
from diffusion_lab.metrics.extractors import Extractor, Features
from diffusion_lab.metrics.frechet import frechet_distance, moments
from diffusion_lab.metrics.measure import label, measure, plan
from diffusion_lab.metrics.options import FD, FID, KID, PRDC, FDClassifier, InceptionScore
from diffusion_lab.metrics.reference import Reference
from diffusion_lab.metrics.scores import inception_score, kid, prdc
from diffusion_lab.models.classifier import Classifier
from diffusion_lab.noise import normal
from diffusion_lab.objectives import PredNoise
from diffusion_lab.samplers import DDIM, DDPM
from diffusion_lab.schedules import Cosine


class RandomClassifier(Extractor):
    """A random classifier, the same in every process."""

    name, key, dim, classes, has_class_logits = "classifier", "0" * 16, 64, 10, True

    def __init__(self):
        torch.manual_seed(3)
        super().__init__(Classifier(channels=1, num_classes=10))

    def extract(self, images):
        hidden = self.network.features(images / 127.5 - 1)
        return Features(hidden, 40 * self.network.head(hidden))


def metrics_of(*names):
    """The options of these names with their defaults, by name."""
    options = (FD, FID, FDClassifier, KID, InceptionScore, PRDC)
    return {name: next(option for option in options if option.key == name)() for name in names}


def sampled(denoiser, sampler, shape, seed=0, condition=None):
    """A function that samples a block of images."""
    return lambda block: generate(denoiser, sampler, shape, batch_of(block, condition, "cpu"), seed=seed)


class Small(nn.Module):
    """A denoising network of one convolution."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.layer = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, c, label=None):
        shift = 0 if label is None else 0.02 * label[:, None, None, None]
        return self.layer(x) + shift


def measured(n, size, processes, keep=True):
    """Run a whole evaluation; return the images of this process, and the result."""
    own_images = {}
    make = sampled(
        Denoiser(Small(), Cosine(50), PredNoise(), clip=1.0),
        DDPM(4),
        (1, 8, 8),
        condition={"label": torch.arange(n) % 10},
    )

    def images(block):
        own_images[block.start] = make(block).x
        return own_images[block.start]

    extractor = RandomClassifier()
    names = [extractor.name] if keep else []
    labels = torch.arange(n) % 10
    collected = collect(images, n, size, [extractor], features=names, logits=names, labels=labels, processes=processes)
    return own_images, collected[extractor.name]


def received(n, size, processes):
    """Return the blocks that rank 0 receives of n different images; an exception of `feed` is raised in every process."""
    parts = []
    numbers = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2)
    assert collect(lambda b: numbers[b.start : b.stop], n, size, [], feed=parts.append, processes=processes) == {}
    assert processes.first(lambda: len(parts)) == math.ceil(n / size)

    def refuse(images):
        if images[0, 0, 0, 0] == size:  # the second block
            raise ConfigError("no such images")

    with pytest.raises(ConfigError, match="no such images"):
        collect(lambda b: numbers[b.start : b.stop], n, size, [], feed=refuse, processes=processes)
    with pytest.raises(ConfigError, match="no figure"):
        processes.first(functools.partial(fail, "no figure"))
    return parts


def fail(reason):
    raise ConfigError(reason)


def test_blocks_hold_every_image_once():
    for n, size, world in itertools.product((2, 7, 12, 100), (1, 4, 12, 500), (1, 2, 3, 5)):
        parts = [list(blocks(n, size, rank, world)) for rank in range(world)]
        assert sorted(i for part in parts for block in part for i in block) == list(range(n))
        assert sorted((b.start, b.stop) for part in parts for b in part) == [
            (b.start, b.stop) for b in blocks(n, size)
        ]  # the same blocks for any number of processes
    with pytest.raises(ValueError, match="at least 1"):
        list(blocks(4, 0))


CASES = (
    (30, 10),
    (23, 5),
    (9, 4),
)  # n divides into blocks and processes or not; with (9, 4) the third of three has one image


def _work(rank, folder, world):
    torch.set_num_threads(1)
    for count in range(world, 1, -1):  # 3 processes, then 2 of them
        if rank < count:
            distributed.init_process_group("gloo", init_method=f"file://{folder}/{count}", rank=rank, world_size=count)
            results = [measured(n, size, Processes()) for n, size in CASES]
            torch.save([received(n, size, Processes()) for n, size in CASES], f"{folder}/fed-{count}-{rank}.pt")
            torch.save(
                [(images, vars(got) | {"sums": got.sums.vector}) for images, got in results],
                f"{folder}/{count}-{rank}.pt",
            )
            distributed.destroy_process_group()


@pytest.mark.integration
@pytest.mark.ddp
def test_one_two_and_three_processes_give_the_same_images_and_values(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = [measured(n, size, Processes()) for n, size in CASES]
    finally:
        torch.set_num_threads(threads)
    multiprocessing.spawn(_work, (str(tmp_path), 3), nprocs=3)
    reference = Reference(moments(torch.randn(200, 64)), torch.randn(200, 64), None, Path())
    for count in (2, 3):
        fed = [torch.load(tmp_path / f"fed-{count}-{rank}.pt", weights_only=True) for rank in range(count)]
        for case, (n, size) in enumerate(CASES):
            want = received(n, size, Processes())
            assert [part.flatten().tolist() for part in fed[0][case]] == [part.flatten().tolist() for part in want]
            assert torch.equal(torch.cat(want)[:, 0, 0, 0], torch.arange(n))
            assert all(share[case] == [] for share in fed[1:])
        parts = [torch.load(tmp_path / f"{count}-{rank}.pt", weights_only=True) for rank in range(count)]
        for case, (images_alone, want) in enumerate(alone):
            shares = [part[case][0] for part in parts]
            assert sorted(start for share in shares for start in share) == sorted(images_alone)
            for share in shares:
                for start, images in share.items():
                    assert torch.equal(images, images_alone[start])  # bit for bit
            for got in (part[case][1] for part in parts):
                assert torch.equal(got["features"], want.features)
                assert torch.equal(got["logits"], want.logits)
                assert torch.equal(got["confident"], want.confident)
                assert got["label_hits"] == want.label_hits
                assert torch.allclose(got["sums"], want.sums.vector, rtol=1e-12, atol=1e-10)
                want_value = frechet_distance(want.sums.moments(), reference.moments)
                sums = type(want.sums)(64)
                sums.vector = got["sums"]
                assert frechet_distance(sums.moments(), reference.moments) == pytest.approx(want_value, rel=1e-6)


def test_nothing_is_counted_twice_or_dropped():
    _, got = measured(23, 5, Processes())
    assert got.n == got.sums.n == 23
    assert len(got.features) == len(got.logits) == 23
    sure, classes = got.logits.softmax(1).max(1)
    assert got.confident.tolist() == torch.bincount(classes[sure >= 0.9], minlength=10).tolist()
    assert 0 < got.confident.sum() <= 23
    assert got.label_hits == int((classes == torch.arange(23) % 10).sum())
    assert torch.allclose(got.sums.moments().covariance, moments(got.features).covariance, atol=1e-9)


def test_images_do_not_depend_on_the_size_of_blocks():
    gaussian = Gaussian(torch.zeros(1, 4, 4).double(), 0.3)
    denoiser = oracle(gaussian, Cosine(), PredNoise())
    noise = normal((1, 4, 4), seed=0, index=torch.arange(6))
    assert noise.dtype == torch.float32
    network = denoiser.network
    float64 = Denoiser(
        lambda x, c, **k: network(x.double(), c.double(), **k).float(), denoiser.schedule, denoiser.objective
    )
    make = sampled(float64, DDIM(5), (1, 4, 4), seed=1)
    whole = make(range(6)).x
    assert torch.allclose(torch.cat([make(range(2)).x, make(range(2, 6)).x]), whole, atol=1e-6)


def test_nan_is_named_by_its_index_in_the_whole_set():
    images = torch.zeros(20, 1, 8, 8)
    images[13, 0, 2, 2] = float("nan")
    with pytest.raises(ValueError, match="the pixels of image 13 contain NaN"):
        collect(lambda b: images[b.start : b.stop], 20, 6, [RandomClassifier()])

    class Broken(RandomClassifier):
        def extract(self, images):
            out = super().extract(images)
            out.features[images.flatten(1).float().mean(1) > 200] = float("inf")
            return out

    bright = torch.zeros(20, 1, 8, 8, dtype=torch.uint8)
    bright[17] = 255
    with pytest.raises(ValueError, match="the features of image 17 contain"):
        collect(lambda b: bright[b.start : b.stop], 20, 6, [Broken()])


def test_a_network_that_gives_nan_is_refused_with_the_image():
    class Sick(Small):
        def forward(self, x, c, label=None):
            out = super().forward(x, c)
            out[label == 7] = float("nan")
            return out

    make = sampled(
        Denoiser(Sick(), Cosine(50), PredNoise(), clip=1.0),
        DDPM(4),
        (1, 8, 8),
        condition={"label": torch.arange(20) % 10},
    )
    assert bool(make(range(7)).x.isfinite().all())
    with pytest.raises(ValueError, match="image 17: the network returned NaN or infinity"):
        make(range(10, 20))
    with pytest.raises(ValueError, match="image 7: the network returned NaN or infinity"):
        collect(lambda block: make(block).x, 20, 10, [RandomClassifier()])


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_images_are_refused(n):
    with pytest.raises(ValueError, match="at least 2 images"):
        collect(lambda b: torch.zeros(len(b), 1, 8, 8, dtype=torch.uint8), n, 6, [RandomClassifier()])


def test_memory_does_not_grow_with_n():
    """Apart from allocations of Python and NumPy, memory holds one vector of the same size for any n."""

    def kept(n):
        tracemalloc.start()
        got = collect(lambda b: torch.zeros(len(b), 1, 8, 8, dtype=torch.uint8), n, 50, [RandomClassifier()])[
            "classifier"
        ]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return got, peak

    (few, small), (many, large) = kept(100), kept(500)
    assert few.features is many.features is None
    assert few.sums.vector.numel() == many.sums.vector.numel()
    assert large < small + 50_000


def test_metrics_are_sorted_by_extractor_and_named_by_it():
    def keys(*names, extractor=None):
        return {e: list(metrics) for e, metrics in plan(metrics_of(*names), extractor).by_extractor.items()}

    assert keys("fid", "prdc", "fd_classifier") == {"inception": ["fid", "prdc"], "classifier": ["fd_classifier"]}
    assert keys("fd_classifier", "prdc") == {"classifier": ["fd_classifier", "prdc"]}
    assert keys("kid", "is", "fid", extractor="classifier") == {"classifier": ["kid", "is"], "inception": ["fid"]}
    assert keys("fd", "fd", extractor="own") == {"own": ["fd"]}
    assert keys() == {}
    _, got = measured(23, 5, Processes())
    reference = Reference(moments(torch.randn(200, 64)), torch.randn(200, 64), None, Path())
    named = measure(metrics_of("kid", "is", "prdc", "fd"), RandomClassifier(), got, reference)
    assert {"kid_classifier", "is_classifier", "precision", "coverage", "fd_classifier", "confident_fraction"} <= set(
        named
    )
    assert not {"fid", "kid", "is"} & set(named)
    assert [label("fid", n) for n in (1000, 50_000, 2500, 900)] == ["fid_1k", "fid_50k", "fid_2500", "fid_900"]


def test_a_metric_under_another_key_has_its_own_arguments_and_names():
    """Three neighbors of density in place of five, subsets of ten: the functions' figures, under the key."""
    _, got = measured(23, 5, Processes())
    g = torch.Generator().manual_seed(1)
    real = got.features[torch.randint(0, 23, (40,), generator=g)] + 0.3 * torch.randn(40, 64, generator=g)
    reference = Reference(moments(real), real, None, Path())
    others = {"near": PRDC(neighbors=1, density_neighbors=2), "small": KID(subsets=7, subset_size=10), "mine": FD()}
    named = measure({**others, "is": InceptionScore(splits=2), "prdc": PRDC()}, RandomClassifier(), got, reference)
    near = prdc(got.features, real, 1, 2)
    assert {name: named[f"near_{name}"] for name in near} == near
    assert near != {name: named[name] for name in near} == prdc(got.features, real)
    assert (named["small"], named["small_std"]) == kid(got.features, real, 7, 10)[:2]
    assert named["is_classifier"] == inception_score(got.logits, 2).mean
    assert named["mine"] == frechet_distance(got.sums.moments(), reference.moments)
    assert PRDC(neighbors=7).least == 8
    assert InceptionScore(splits=4).least == 4
    for make in (
        lambda: KID(subset_size=1),
        lambda: KID(subsets=0),
        lambda: PRDC(neighbors=0),
        lambda: InceptionScore(0),
    ):
        with pytest.raises(ValueError, match="write an integer in"):
            make()
