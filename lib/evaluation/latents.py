"""How much each layer, or latent dimension, carries: its KL in bits/dim, as numbers and a plot."""

from __future__ import annotations

from ..pictures import save_rates
from .elbo import validation_elbo
from .options import LIMIT
from .registry import Context, Evaluation, Result, register
from .tables import shares_of


@register
class Latents(Evaluation):
    name = "latents"
    help = "KL of each layer or latent dimension, as a bar plot"
    order = 40
    flags = (LIMIT,)
    needs = ("validation",)
    packages = {"matplotlib": "evaluate"}
    title = "Information in each layer"
    paper = "the second observation at Figure 11"
    explanation = (
        "How the rate (the KL divergence from posterior to prior) is spread over the layers; the "
        "paper finds most of the information in the topmost ones."
    )

    def compute(self, context: Context) -> Result:
        elbo, path = validation_elbo(context), context.folder / "latents.png"
        if "rate_per_dimension" in elbo:
            part, facts = "dimension", {}
            save_rates(elbo["rate_per_dimension"], path)
        else:
            scales = [list(shape[1:]) for shape in context.model.latent_shapes]
            part, facts = "layer", {"scale_per_layer": scales}
            save_rates(elbo["rate_per_layer"], path, scales)
        rates = elbo[f"rate_per_{part}"]
        caption = f"KL divergence of each {part}'s posterior from its prior, in bits/dim"
        return {
            f"rate_per_{part}": list(rates),
            f"share_per_{part}": shares_of(rates),
            **facts,
            "images": elbo["images"],
            "pictures": [context.entry(path, caption)],
        }
