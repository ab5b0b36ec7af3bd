"""A page in the browser to play with a trained model: samples, one's own picture reconstructed and
varied, interpolations, traversals. It is served to this machine alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from data.get_dataset import fit_of
from evaluate import open_model
from lib.checkpoint import CheckpointError
from lib.cli import OneLineParser, one_line_errors
from lib.config import ConfigError
from lib.DisentanglementVAE import DisentanglementVAE
from lib.evaluation.loading import LoadedModel, choose_device, find_checkpoint
from lib.evaluation.options import add_model_flags
from lib.optional import optional
from lib.pictures import grid_picture, load_image, square
from lib.synthesis import encode, interpolate, neighborhood, reconstruct, sample_images, traverse

FRAMES = 8
BATCH = 32


def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser("demo.py", description=__doc__)
    add_model_flags(parser)
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--output_dir", default=".", help="where checkpoints/ is")
    flags = parser.parse_args(arguments)
    with one_line_errors(parser.prog, ConfigError, CheckpointError, OSError):
        checkpoints = Path(flags.output_dir) / "checkpoints"
        path, name = find_checkpoint(flags.model, flags.checkpoint, checkpoints)
        answers = Answers(open_model(path, "auto", choose_device(flags.device)))
        where = dict(server_name="127.0.0.1", server_port=flags.port, share=False)
        page(answers, name).launch(**where, show_error=True)


@dataclass
class Answers:
    """What the page asks for, as pictures.

    Pictures come as paths of files, and are fitted to the model's images. They raise ValueError if
    they cannot be read.
    """

    loaded: LoadedModel

    @property
    def depth(self) -> int:
        """Number of layers of latents."""
        return len(self.loaded.model.latent_shapes)

    def samples(self, seed: float, temperature: float, count: float) -> Image.Image:
        """A grid of samples from the prior."""
        noise = {"seed": int(seed), "batch": BATCH}
        images = sample_images(self.loaded.model, int(count), temperature, **noise)
        return grid_picture(images, square(count))

    def variations(
        self, path: str, layers: float, temperature: float, seed: float
    ) -> tuple[Image.Image, Image.Image]:
        """A picture beside its reconstruction, and samples that share its top layers."""
        model, noise = self.loaded.model, {"seed": int(seed), "batch": BATCH}
        image = self._image(path)
        pair = [image, reconstruct(model, image, **noise)]
        latents = encode(model, image, [0], **noise)
        below = dict(layers=int(layers), temperature=temperature, **noise)
        around = neighborhood(model, latents, index=0, count=FRAMES, **below)
        return grid_picture(torch.cat(pair), 2), grid_picture(around, FRAMES // 2)

    def between(
        self, first: str, second: str, layers: float, temperature: float, seed: float
    ) -> Image.Image:
        """Interpolations of the top layers of two pictures, the pictures at the ends."""
        model, noise = self.loaded.model, {"seed": int(seed), "batch": BATCH}
        images = torch.cat([self._image(first), self._image(second)])
        latents = encode(model, images, [0, 1], **noise)
        ends = [[z[i : i + 1] for z in latents] for i in (0, 1)]
        below = dict(layers=int(layers), temperature=temperature, **noise)
        frames = interpolate(model, *ends, frames=FRAMES, **below)
        return grid_picture(torch.cat([images[:1], frames, images[1:]]), FRAMES + 2)

    def traversal(self, path: str) -> Image.Image:
        """What each latent dimension of a β-VAE changes in a picture, a row for each."""
        images = traverse(self.loaded.model, self._image(path), values=FRAMES, batch=BATCH)
        return grid_picture(images, FRAMES)

    def _image(self, path: str | None) -> torch.Tensor:
        if not path:
            raise ValueError("choose a picture first")
        fit = fit_of(self.loaded.config.dataset, self.loaded.config.root)
        return load_image(path, self.loaded.model.image_shape, fit).unsqueeze(0)


def page(answers: Answers, name: str) -> Any:
    """The page as Gradio's Blocks.

    Raises:
        ConfigError: if the package gradio is missing.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    gr = optional("gradio", "demo.py", "demo", ConfigError)
    model, config = answers.loaded.model, answers.loaded.config

    def picture(label: str) -> Any:
        return gr.Image(type="filepath", sources=["upload", "clipboard"], label=label)

    def result(label: str) -> Any:
        # Gradio's button to share would send the picture to somebody else's server.
        return gr.Image(type="pil", format="png", label=label, buttons=["download", "fullscreen"])

    def settings() -> tuple[Any, Any, Any]:
        top, several = max(1, answers.depth // 2), answers.depth > 1
        most = max(2, answers.depth)
        return (
            gr.Slider(1, most, top, step=1, label="Top layers that are kept", visible=several),
            gr.Slider(0, 1.5, 0.8, label="Temperature of the layers below"),
            gr.Number(0, precision=0, minimum=0, label="Seed"),
        )

    with gr.Blocks(title=name, analytics_enabled=False) as blocks:
        channels, height, width = model.image_shape
        gr.Markdown(
            f"# {name}\n{type(model).__name__}, {config.dataset}, {answers.loaded.step:,} steps, "
            f"images of {channels} x {height}x{width}"
        )
        with gr.Tab("Samples"):
            with gr.Row():
                seed = gr.Number(0, precision=0, minimum=0, label="Seed")
                temperature = gr.Slider(0, 1.5, 0.8, label="Temperature")
                count = gr.Slider(1, 64, 36, step=1, label="Images")
            inputs, shown = [seed, temperature, count], result("Samples")
            gr.Button("Draw").click(answers.samples, inputs, shown, api_name="samples")
            blocks.load(answers.samples, inputs, shown, api_name=False)
        with gr.Tab("Your picture"):
            with gr.Row():
                given = picture("Picture")
                with gr.Column():
                    inputs = [given, *settings()]
            outputs = [result("The picture and its reconstruction"), result("Variations")]
            button = gr.Button("Reconstruct and vary")
            button.click(answers.variations, inputs, outputs, api_name="variations")
        with gr.Tab("Between two pictures"):
            with gr.Row():
                inputs = [picture("First"), picture("Second")]
                with gr.Column():
                    inputs += settings()
            button, shown = gr.Button("Interpolate"), result("From the first to the second")
            button.click(answers.between, inputs, shown, api_name="between")
        if isinstance(model, DisentanglementVAE):
            with gr.Tab("Latent dimensions"):
                inputs = [picture("Picture")]
                button, shown = gr.Button("Traverse"), result("Each dimension from -2 to 2")
                button.click(answers.traversal, inputs, shown, api_name="traversal")
    return blocks


if __name__ == "__main__":
    main()
