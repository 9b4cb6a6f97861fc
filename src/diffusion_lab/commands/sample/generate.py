"""task=generate: sample images from noise."""

from diffusion_lab.commands.sample.context import SamplingContext, write_samples


def run_task(context: SamplingContext) -> str:
    """Sample n images and write them. For a class-conditional checkpoint, the grid has one row per class."""
    settings, condition = context.settings, context.condition(context.settings["n"])
    images, nfe, _ = context.run.generate(
        settings["n"], context.sampler, settings["seed"], settings["batch_size"], condition, progress=True
    )
    write_samples(context.out, images, condition.get("label"), settings["save_images"])
    return context.summary(f"{len(images)} images", nfe)
