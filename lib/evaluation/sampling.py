"""Samples from the prior: a grid and single images at each temperature (Figures 6 left, 10)."""

from __future__ import annotations

from ..pictures import save_grid, save_image, square
from ..synthesis import sample_images
from .options import COUNT, OUTPUT, SAMPLING_TEMPERATURES, TEMPERATURES
from .registry import Context, Evaluation, Result, register


@register
class Sampling(Evaluation):
    name = "sampling"
    help = "samples from the prior: grids and single images"
    order = 60
    flags = (COUNT, TEMPERATURES, OUTPUT)
    title = "Samples"
    paper = "Figures 6 (left) and 10"
    explanation = (
        "Images drawn from the model's prior; a lower temperature stays nearer to the prior's "
        "mean, so that images become smoother and more generic."
    )

    def compute(self, context: Context) -> Result:
        flags, folder, pictures = context.flags, context.folder, []
        temperatures = flags.temperatures or SAMPLING_TEMPERATURES
        for temperature in context.track(temperatures, "samples"):
            images = sample_images(
                context.model, flags.count, temperature, output=flags.output, **context.noise
            )
            name = samples_name(temperature)
            grid = save_grid(images, folder / f"{name}.png", square(flags.count))
            for earlier in (folder / name).glob("*.png"):
                earlier.unlink()
            for i, image in enumerate(images):
                save_image(image, folder / name / f"{i:04d}.png")
            caption = f"Samples from the prior at temperature {temperature:g}"
            pictures.append(context.entry(grid, caption))
        return {
            "temperatures": list(temperatures),
            "count": flags.count,
            "output": flags.output,
            "pictures": pictures,
        }


def samples_name(temperature: float) -> str:
    """Of the pictures of samples; different temperatures have different names."""
    rounded = f"{temperature:.2f}"
    return f"samples_t{rounded if float(rounded) == temperature else repr(temperature)}"
