"""What each latent dimension of a disentanglement VAE changes in validation images."""

from __future__ import annotations

from ..pictures import save_table
from ..synthesis import traverse
from .options import FRAMES, IMAGES
from .registry import Context, Evaluation, Result, register


@register
class Traversal(Evaluation):
    name = "traversal"
    help = "what each latent dimension of a disentanglement VAE changes in validation images"
    order = 80
    flags = (IMAGES, FRAMES)
    needs = ("images",)
    only_disentanglement = True
    title = "Latent traversals"
    explanation = (
        "What a latent dimension means: it alone changes along a row, the others stay at the "
        "image's posterior means."
    )

    def compute(self, context: Context) -> Result:
        """For each image a table with a row for each latent dimension, from -2 to 2."""
        frames, pictures = context.flags.frames, []
        for image, name in zip(context.images.split(1), context.image_names, strict=True):
            drawn = traverse(context.model, image, values=frames, batch=context.flags.batch)
            rows = [[image, of_dimension] for of_dimension in drawn.split(frames)]
            path = save_table(
                rows,
                context.folder / f"traversal_{name}.png",
                row_labels=[f"z{dimension}" for dimension in range(len(rows))],
                columns=frames,
            )
            caption = f"Image {name} (left), and each latent dimension of it from -2 to 2"
            pictures.append(context.entry(path, caption))
        return {"images": list(context.flags.images), "frames": frames, "pictures": pictures}
