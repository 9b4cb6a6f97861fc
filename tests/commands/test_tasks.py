"""Every task from its command line on a tiny checkpoint: what it writes, what it promises, what it refuses."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
import yaml
from command import command, composed, train
from PIL import Image

from diffusion_lab.checkpoint import load_checkpoint
from diffusion_lab.commands.sample import tasks
from diffusion_lab.commands.sample.latents import CONDITION
from diffusion_lab.commands.sample.trajectory import FRAMES, Film
from diffusion_lab.data import inputs
from diffusion_lab.data.pictures import class_grid, to_uint8
from diffusion_lab.denoiser import Prediction
from diffusion_lab.samplers import DDIM
from diffusion_lab.schedules import Cosine

pytestmark = pytest.mark.integration  # commands and trainings of seconds


def pixels(path):
    """A file's pixels."""
    with Image.open(path) as picture:
        return np.asarray(picture)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Real digits as files, a mask, and things that are none of these."""
    from sklearn.datasets import load_digits

    place = tmp_path_factory.mktemp("given")
    digits = np.clip(load_digits().images * 17, 0, 255).astype(np.uint8)
    (place / "folder").mkdir()
    for name, picture in (("a", digits[0]), ("b", digits[1]), ("folder/c", digits[2]), ("folder/d", digits[3])):
        Image.fromarray(picture).save(place / f"{name}.png")
    np.savez(place / "many.npz", digits[:5, :, :, None])
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255
    Image.fromarray(mask).save(place / "mask.png")
    Image.fromarray(mask * 0).save(place / "black.png")
    Image.fromarray(digits[0].repeat(2, 0).repeat(2, 1)).save(place / "large.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(place / "colour.png")
    (place / "broken.png").write_bytes((place / "a.png").read_bytes()[:60])
    (place / "broken.npz").write_bytes(b"PK but nothing else")
    np.savez(place / "nan.npz", np.full((1, 8, 8, 1), np.nan, np.float32))
    np.savez(place / "other.npz", np.zeros((2, 1, 8, 8), np.float32))
    return place


@pytest.fixture
def sample(run, tmp_path, capfd):
    """sample(out, *arguments) → what it printed, and images and labels of samples.npz; three steps unless told otherwise."""

    def call(out, *arguments, steps=3):
        told = [f"ckpt={run}", f"out={tmp_path / out}", "device=cpu", *arguments]
        outcome = command("sample", told if steps is None else [*told, f"sampler.steps={steps}"], capfd)
        assert outcome.code == 0, outcome.err
        assert f"look at  {tmp_path / out}" in outcome.out
        with np.load(tmp_path / out / "samples.npz") as file:
            images, labels = file["arr_0"], file["arr_1"]
        assert images.dtype == np.uint8
        assert (tmp_path / out / "grid.png").is_file()
        written = [pixels(p) for p in sorted((tmp_path / out / "images").glob("*.png"))]
        assert np.array_equal(np.stack(written), images[..., 0])
        return outcome.out, images[..., 0], labels

    return call


def test_a_labelled_grid_has_a_row_a_class(sample, tmp_path):
    _, images, labels = sample("cycle", "n=20")
    assert labels.tolist() == [i % 10 for i in range(20)]
    picture = pixels(tmp_path / "cycle" / "grid.png")
    assert len(picture) == 10 * 42 - 2
    tiles = picture[:, -82:, 0]  # two columns: image c, then image c + 10
    assert np.array_equal(tiles[3 * 42 : 3 * 42 + 40 : 5, 0:40:5], images[3])
    assert np.array_equal(tiles[3 * 42 : 3 * 42 + 40 : 5, 42:82:5], images[13])
    _, _, labels = sample("list", "n=4", "labels=[7,1]")
    assert labels.tolist() == [7, 1, 7, 1]


def test_a_grid_of_classes_of_unequal_size():
    images, labels = torch.zeros(4, 1, 40, 40), torch.tensor([5, 2, 5, 5])
    picture = class_grid(images, labels, 400)
    assert picture.shape[0] == 2 * 42 - 2
    assert (picture[20, -60] == 127).all() or (picture[20, -60] == 128).all()
    assert (picture[62, -60] == 246).all()  # class 2 has one image: paper beside it


def test_interpolation_ends_are_the_decoded_latents(sample, given, tmp_path):
    images = f"images=[{given / 'a.png'},{given / 'b.png'}]"
    said, path, labels = sample("path", "task=interpolate", "n=5", images, "labels=[3]")
    assert "including both" in said
    assert set(labels.tolist()) == {3}
    _, again, _ = sample("again", "task=decode", f"latents={tmp_path / 'path' / 'latents.npz'}")
    assert np.array_equal(path, again)
    # each end's own latent, by task=encode of the files themselves
    for name, end in (("a", 0), ("b", -1)):
        sample(name, "task=encode", f"image={given / name}.png", "labels=[3]")
        with np.load(tmp_path / name / "latents.npz") as own, np.load(tmp_path / "path" / "latents.npz") as whole:
            assert np.allclose(own["arr_0"][0], whole["arr_0"][end], atol=1e-5)
        _, decoded, _ = sample(f"{name}-decoded", "task=decode", f"latents={tmp_path / name / 'latents.npz'}")
        assert np.abs(decoded[0].astype(int) - path[end]).max() <= 1


def test_interpolation_ends_are_equal_bit_for_bit(run, tmp_path, sample):
    """Between noises 0 and 1: with batches of one, the floats of the ends are those of decoding the ends alone."""
    _, path, _ = sample("noises", "task=interpolate", "n=4", "batch_size=1", "labels=[3]")
    loaded = load_checkpoint(run)
    loaded.denoiser = dataclasses.replace(loaded.denoiser, clip=1.0)
    ends = loaded.sample(2, DDIM(3), batch_size=1, condition={"label": torch.tensor([3, 3])})
    with np.load(tmp_path / "noises" / "latents.npz") as file:
        z, stored = torch.from_numpy(file["arr_0"]), file[CONDITION + "label"]
    assert stored.tolist() == [3] * 4
    label = torch.tensor([3])
    decoded = [DDIM(3)(loaded.denoiser, z[i : i + 1], condition={"label": label}).x.clamp(-1, 1) for i in (0, 3)]
    assert torch.equal(torch.cat(decoded), ends)
    levels = (ends * 127.5 + 128).clamp(0, 255).to(torch.uint8).numpy()[:, 0]
    assert np.array_equal(path[[0, -1]], levels)


def test_the_round_trip_is_reported_and_falls_with_the_steps(sample, given, tmp_path):
    errors = []
    for steps in (4, 16, 64):
        said, back, _ = sample(f"to{steps}", "task=encode", f"image={given / 'folder'}", steps=steps)
        report = json.loads((tmp_path / f"to{steps}" / "error.json").read_text())
        assert f"root mean square error {report['rmse']:.2f} levels" in said
        assert report["steps"] == steps
        assert report["nfe"] == 2 * steps
        assert len(report["each"]) == 2
        originals = [pixels(p) for p in sorted((given / "folder").glob("*.png"))]
        assert np.abs(back.astype(float) - np.stack(originals)).max() <= report["max"] + 1
        errors.append(report["rmse"])
        assert (tmp_path / f"to{steps}" / "sheet.png").is_file()
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2]
    _, back, _ = sample("back", "task=decode", f"latents={tmp_path / 'to64' / 'latents.npz'}", steps=64)
    assert np.abs(back.astype(int) - np.stack(originals)).max() <= report["max"] + 1


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "heun", "ode"])
def test_known_pixels_come_back_exactly(sampler, sample, given, tmp_path):
    arguments = ["task=inpaint", f"image={given / 'a.png'}", f"mask={given / 'mask.png'}", "n=3", f"sampler={sampler}"]
    steps = None if sampler == "ode" else 3
    told = (
        ["sampler.rtol=0.01", "sampler.atol=0.01"] if steps is None else ["inpaint.jump_length=1", "inpaint.resample=2"]
    )
    said, images, _ = sample("filled", *arguments, *told, steps=steps)
    original = pixels(given / "a.png")
    assert all(np.array_equal(image[:, :4], original[:, :4]) for image in images)
    assert not np.array_equal(images[0][:, 4:], images[1][:, 4:])
    assert "50% of the pixels generated" in said
    assert (" 0 resampled segments" in said) == (steps is None)
    assert (tmp_path / "filled" / "sheet.png").is_file()


def test_little_noise_keeps_an_image_and_much_does_not(sample, given, tmp_path):
    original, gaps = pixels(given / "a.png").astype(float), []
    for strength in (0.02, 0.3, 1.0):
        said, images, _ = sample(
            f"at{strength}", "task=edit", f"image={given / 'a.png'}", "n=4", f"strength={strength}"
        )
        gaps.append(np.abs(images - original).mean())
        assert f"t={strength:g}" in said
    assert gaps[0] < gaps[1] < gaps[2]
    assert gaps[0] < 10


def test_an_edit_is_noised_to_the_first_time_of_the_grid(sample, given, run):
    """grid=leading omits strength=1: the text names the time of the noised image, and sheet.png shows it."""
    times = DDIM(3, grid="leading").time_grid(load_checkpoint(run).denoiser)
    said, *_ = sample("leading", "task=edit", f"image={given / 'a.png'}", "strength=1", "sampler.grid=leading")
    assert f"t={float(times[0]):g}" in said


def test_a_trajectory_is_filmed(sample, tmp_path):
    said, images, _ = sample("film", "task=trajectory", "n=5", "batch_size=3", steps=7)
    assert "5 images with their trajectories" in said
    with Image.open(tmp_path / "film" / "trajectory.gif") as film:
        assert film.n_frames == 7 + 1
        film.seek(7)
        last = np.asarray(film.convert("L"))
    assert np.abs(last[:40:5, :40:5].astype(int) - images[0]).max() <= 1
    assert np.array_equal(last[:, :124], last[:, -124:])  # x_t and the estimate of x_0 have met
    assert (tmp_path / "film" / "strip.png").is_file()
    _, plain, _ = sample("plain", "n=5", steps=7)
    assert np.abs(plain.astype(int) - images).max() <= 1
    sample("adaptive", "task=trajectory", "n=2", "sampler=ode", "sampler.rtol=0.01", "sampler.atol=0.01", steps=None)


@pytest.mark.parametrize("steps", [3, FRAMES, 2 * FRAMES, 1000])
def test_a_film_of_any_length_is_even_and_short(steps):
    film, x = Film(Cosine(), 2), torch.zeros(3, 1, 1, 1)
    for i in range(steps):
        shade = torch.full_like(x, 2 * i / steps - 1)
        film(i, 1 - i / steps, x, Prediction(shade, x, x))
    assert len(film.moments) < 2 * FRAMES
    shades = film.end(x + 1, min(FRAMES, len(film.moments)))[:, 1, 1, 0, 0, 0].int()
    assert len(shades) == min(FRAMES, steps) + 1
    assert shades[0] == 0
    assert shades[-1] == 255
    assert shades.diff().max() <= max(12, 256 // min(FRAMES, steps) + 1)


TASKS = {
    "interpolate": ["images=[{given}/a.png,{given}/b.png]", "labels=[1]"],
    "inpaint": ["image={given}/a.png", "mask={given}/mask.png", "inpaint.jump_length=1", "sampler=ddpm"],
    "edit": ["image={given}/a.png"],
}


@pytest.mark.parametrize("task", TASKS)
def test_images_do_not_depend_on_the_batch_size(task, sample, given):
    """Pixels within a level: floats agree to 1e-4, a level is 8e-3."""
    arguments = [f"task={task}", "n=5", *(a.format(given=given) for a in TASKS[task])]
    _, whole, _ = sample("whole", *arguments)
    _, parts, _ = sample("parts", *arguments, "batch_size=2")
    assert np.abs(whole.astype(int) - parts).max() <= 1
    assert (whole != parts).mean() < 0.02


BAD = {  # seen without a checkpoint
    ("task=dream",): "write task=generate",
    ("task=inpaint", "image={given}/a.png"): "needs mask=PATH",
    ("task=inpaint", "mask={given}/mask.png"): "needs image=PATH",
    ("task=encode",): "needs image=PATH",
    ("task=edit",): "needs image=PATH",
    ("task=decode",): "needs latents=PATH",
    ("image={given}/a.png",): "task=encode or task=inpaint or task=edit",
    ("task=edit", "image={given}/none.png"): "no such file",
    ("task=edit", "image={given}/a.png", "strength=0"): "outside (0, 1]",
    ("task=edit", "image={given}/a.png", "strength=1.5"): "outside (0, 1]",
    ("task=interpolate", "images=[{given}/a.png]"): "images=[A.png,B.png]",
    ("task=interpolate", "n=1"): "at least n=2",
}


@pytest.mark.parametrize(
    ("arguments", "remedy"), BAD.items(), ids=lambda v: " ".join(v) if isinstance(v, tuple) else ""
)
def test_what_is_wrong_without_a_checkpoint_is_refused_before_one_is_read(arguments, remedy, given, tmp_path):
    told = yaml.safe_load("{" + ", ".join(arguments).format(given=given).replace("=", ": ") + "}")
    settings = {**composed("sample"), "ckpt": "nowhere", "out": str(tmp_path / "out"), **told}
    with pytest.raises(ValueError, match=re.escape(remedy)):
        tasks.check(settings)


UNREADABLE = {
    "broken.png": "cannot be read as an image",
    "large.png": "resize it to 8×8",
    "colour.png": "save it in grayscale",
    "many.npz": "has 5 images, but one is needed",
    "broken.npz": "cannot be read as an .npz",
    "other.npz": "1×8×8 where the checkpoint's images are 8×8×1",
    "nan.npz": "of image 0 contain NaN",
}


@pytest.mark.parametrize(("name", "remedy"), UNREADABLE.items())
def test_images_that_do_not_fit(name, remedy, given):
    with pytest.raises(ValueError, match=re.escape(remedy)):
        inputs.read_one("image", given / name, (1, 8, 8))


def test_images_that_fit_are_read_level_by_level(given):
    original = pixels(given / "a.png")
    Image.fromarray(original).convert("RGB").save(given / "rgb.png")
    for name in ("a.png", "rgb.png"):
        assert np.array_equal(to_uint8(inputs.read_one("image", given / name, (1, 8, 8)))[0, 0], original)
    assert inputs.read("image", given / "many.npz", (1, 8, 8))[0].shape == (5, 1, 8, 8)
    np.savez(given / "said.npz", pixels(given / "a.png")[None], np.array([7]))
    assert inputs.read("image", given / "said.npz", (1, 8, 8))[1] == [7]


REFUSED = {  # by a command: the checkpoint is read, nothing is sampled or written
    ("task=edit", "image={given}/a.png", "strength=0.002", "sampler.steps=50"): "write fewer steps",
    ("task=edit", "image={given}/broken.png"): "cannot be read as an image",
    ("task=inpaint", "image={given}/a.png", "mask={given}/large.png"): "resize it to 8×8",
    ("task=inpaint", "image={given}/a.png", "mask={given}/black.png"): "no white pixel",
    (
        "task=inpaint",
        "image={given}/a.png",
        "mask={given}/mask.png",
        "inpaint.resample=0",
    ): "inpaint.resample=0: write an integer in [1, 10000]",
    ("task=inpaint", "image={given}/a.png"): "needs mask=PATH",
    ("task=encode", "image={given}/a.png", "sampler.eta=1"): "sampler=ddim variance=fixed_small",
    ("task=encode", "image={given}/a.png", "sampler.grid=leading"): "grid=trailing",
    ("task=interpolate", "sampler=ddpm"): "deterministic sampler",
    ("task=interpolate", "labels=[1,2]"): "needs one class",
    ("task=decode", "latents={given}/other.npz"): "latents= with latents.npz of task=encode",
}


@pytest.mark.parametrize(
    ("arguments", "remedy"), REFUSED.items(), ids=lambda v: " ".join(v) if isinstance(v, tuple) else ""
)
def test_bad_input_is_one_line_and_nothing_is_written(arguments, remedy, run, given, tmp_path, capfd):
    out = tmp_path / "out"
    told = [f"ckpt={run}", f"out={out}", "device=cpu", *(a.format(given=given) for a in arguments)]
    code, printed, err = command("sample", told, capfd)
    assert (code, printed) == (2, ""), err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in err
    assert remedy in lines[0]
    assert not out.exists()


def test_latents_of_another_checkpoint_are_refused(sample, run, given, tmp_path, capfd):
    sample("own", "task=encode", f"image={given / 'a.png'}")
    latents = f"latents={tmp_path / 'own' / 'latents.npz'}"
    refused = command("sample", [f"ckpt={run}", "task=decode", latents, "weights=raw", f"out={tmp_path / 'x'}"], capfd)
    assert refused.code == 2
    assert "belongs to other weights" in refused.err
    assert str(run) in refused.err
    train(tmp_path / "other", "trainer.max_steps=1", capfd=capfd)
    refused = command("sample", [f"ckpt={tmp_path / 'other'}", "task=decode", latents, f"out={tmp_path / 'x'}"], capfd)
    assert refused.code == 2
    assert "belongs to other weights" in refused.err
    assert not (tmp_path / "x").exists()
