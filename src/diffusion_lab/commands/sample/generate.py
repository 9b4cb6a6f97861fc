"""task=generate: images from noise."""

from diffusion_lab.commands.sample.context import SamplingContext, write


def do(work: SamplingContext) -> str:
    """Samples n images and writes them; a labelled checkpoint's grid has a row a class."""
    settings = work.settings
    condition = work.condition(settings["n"])
    images, nfe, _ = work.run.generate(
        settings["n"],
        work.sampler,
        seed=settings["seed"],
        batch_size=settings["batch_size"],
        condition=condition,
        progress=True,
    )
    write(work.out, images, condition.get("label"), settings["save_images"])
    return work.said(f"{len(images)} images", nfe)
