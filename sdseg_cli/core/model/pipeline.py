"""SDSegPipeline: from images to label maps, probabilities and uncertainty in one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image

from sdseg_cli.core.grid import Grid
from sdseg_cli.core.model.image_encoder import ImageEncoder
from sdseg_cli.core.model.latents import decode_scores, input_dtype, masks_per_latent, spatial_factor
from sdseg_cli.core.model.mask_autoencoder import MaskAutoencoder
from sdseg_cli.core.model.plain_unet import PlainUNet
from sdseg_cli.core.model.schedule import reverse_step
from sdseg_cli.core.model.unet import SDSegUNet
from sdseg_cli.core.seeding import generator_for

ImageInput = Image.Image | np.ndarray
NoiseKey = tuple[str | int, ...]  # (seed, case id, slice index, sample index)


@dataclass
class SDSegOutput(BaseOutput):
    """What the pipeline returns, one entry per image, on the image's own grid.

    Attributes:
        label_maps: uint8, (H, W), class indices.
        probabilities: float32, (K, H, W), mean over the samples; K counts the background; sums to 1.
        uncertainty: float32, (H, W): standard deviation over the samples of the foreground probabilities,
            the largest over the classes, in [0, 0.5]; NaN where only one sample was drawn.
        samples: float32, (N, K, H, W), the probabilities of every sample, or None if not asked for.
        overlaps: int64, (K - 1, N, N), pixels that two samples' masks share, see :func:`draw_overlaps`.

    A test-time flip makes further samples: N is ``num_samples`` times the number of views.
    """

    label_maps: list[np.ndarray]
    probabilities: list[np.ndarray]
    uncertainty: list[np.ndarray]
    samples: list[np.ndarray] | None
    overlaps: list[np.ndarray]


class SDSegPipeline(DiffusionPipeline):
    """Segment images with latent diffusion in one reverse step.

    Args:
        unet: the denoiser, or a :class:`PlainUNet`, which needs none of the other components.
        image_encoder: from images to conditioning.
        autoencoder: between masks and latents; frozen.
        scheduler: noise schedule and kind of prediction.
        classes: names, the background first.
        image_size: side of the model's square grid, pixels.
        resize: how images are brought to that grid: ``squeeze`` (the paper) or ``pad``.
        latent_scale: what latents are multiplied by.
        noise: ``gaussian``, or ``zeros`` for a model that was trained to start from zeros.
        training_data: what the model was trained on: the dataset's name and fingerprint.
        autoencoder_reference: where the autoencoder is and what it holds (``location``, ``sha256``), if it is
            not to be saved with the model but looked up when the model is loaded.
    """

    _optional_components = ["image_encoder", "autoencoder", "scheduler"]  # noqa: RUF012  (diffusers' own form)

    def __init__(
        self,
        unet: SDSegUNet | PlainUNet,
        image_encoder: ImageEncoder | None = None,
        autoencoder: AutoencoderKL | MaskAutoencoder | None = None,
        scheduler: DDIMScheduler | None = None,
        classes: Sequence[str] = ("background", "foreground"),
        image_size: int = 256,
        resize: str = "squeeze",  # of Resize; diffusers complains of a Literal at every loading
        latent_scale: float = 1.0,
        noise: str = "gaussian",
        training_data: dict | None = None,
        autoencoder_reference: dict | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            unet=unet, image_encoder=image_encoder, autoencoder=autoencoder, scheduler=scheduler
        )
        self.register_to_config(
            classes=list(classes),
            image_size=image_size,
            resize=resize,
            latent_scale=latent_scale,
            noise=noise,
            training_data=training_data or {},
            autoencoder_reference=autoencoder_reference,
        )

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Save as diffusers does; an autoencoder that is referred to is not copied."""
        autoencoder = self.autoencoder
        if self.config.autoencoder_reference:
            self.register_modules(autoencoder=None)
        try:
            super().save_pretrained(save_directory, **options)
        finally:
            self.register_modules(autoencoder=autoencoder)

    @classmethod
    def from_pretrained(cls, location: str | Path, **options: Any) -> SDSegPipeline:
        """Load as diffusers does, and the autoencoder from where it is referred to.

        Raises:
            ModelError: the autoencoder is not there any more, or is another one.
        """
        pipeline = super().from_pretrained(location, **options)
        reference = pipeline.config.get("autoencoder_reference")
        if reference and pipeline.autoencoder is None:
            from sdseg_cli.core.model.weights import load_referenced_autoencoder  # which imports this module

            autoencoder = load_referenced_autoencoder(reference["location"], reference["sha256"])
            pipeline.register_modules(autoencoder=autoencoder.to(pipeline.device, pipeline.unet.dtype))
        return pipeline

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, the background first."""
        return tuple(self.config.classes)

    @property
    def num_classes(self) -> int:
        """Number of classes with the background."""
        return len(self.config.classes)

    @property
    def is_diffusion(self) -> bool:
        """False for the plain U-Net baseline."""
        return not isinstance(self.unet, PlainUNet)

    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of what the U-Net denoises: the latent of one mask, or those of all of them."""
        side = self.config.image_size // spatial_factor(self.autoencoder)
        return self.unet.config["latent_channels"], side, side

    def computing_networks(self) -> list[torch.nn.Module]:
        """The modules that a prediction runs: image encoder, U-Net and the autoencoder's decoder."""
        decoder = self.autoencoder.decoder if self.autoencoder is not None else None
        return [module for module in (self.image_encoder, self.unet, decoder) if module is not None]

    @torch.no_grad()
    def __call__(
        self,
        images: ImageInput | Sequence[ImageInput],
        *,
        num_inference_steps: int = 1,
        num_samples: int = 1,
        seed: int = 0,
        case_ids: Sequence[str] | None = None,
        slice_indices: Sequence[int] | None = None,
        first_sample: int = 0,
        threshold: float = 0.5,
        grids: Sequence[Grid] | None = None,
        return_samples: bool = False,
        flips: Sequence[str] = (),
    ) -> SDSegOutput:
        """Segment images.

        The noise of an image depends on (seed, case id, slice index, sample index) alone.

        Args:
            images: one or several, each a PIL image or a uint8 array (H, W, 3) or (H, W), of any size.
            num_inference_steps: reverse steps; 1 is the paper's, more are DDIM.
            num_samples: independent draws of the noise to average.
            seed: names the noise.
            case_ids: names of the cases; their positions by default.
            slice_indices: which slice of its case each image is; 0 by default.
            first_sample: index of the first draw; draw ``i`` is the same whichever call makes it.
            threshold: foreground probability above which a pixel of a binary mask is foreground.
            grids: given, the images are already on the model's grid, and these say where they come from.
            return_samples: also return every sample's probabilities.
            flips: ``horizontal``, ``vertical`` or both: the mirrored images are predicted too (with both,
                also the one mirrored twice), from the same noise, and their probabilities mirrored back.
                Every view makes ``num_samples`` further samples.

        Returns:
            Label maps, probabilities and uncertainty on each image's own grid.

        Raises:
            ValueError: an argument does not fit; the message says how.
        """
        # 1. Bring every image to the model's grid
        batch = [images] if isinstance(images, Image.Image | np.ndarray) else list(images)
        pixels = [_pixels(image) for image in batch]
        size, resize = self.config.image_size, self.config.resize
        if grids is None:
            grids = [Grid(array.shape[0], array.shape[1], size, resize) for array in pixels]
            pixels = [grid.image_to_model(array) for grid, array in zip(grids, pixels, strict=True)]
        case_ids = [str(i) for i in range(len(batch))] if case_ids is None else case_ids
        slice_indices = [0] * len(batch) if slice_indices is None else slice_indices
        check_inputs(size, pixels, grids, case_ids, slice_indices, num_inference_steps, num_samples)

        # 2. Encode once, then one reverse process per sample
        samples = self.sample(
            pixels,
            num_inference_steps=num_inference_steps,
            num_samples=num_samples,
            seed=seed,
            case_ids=case_ids,
            slice_indices=slice_indices,
            first_sample=first_sample,
            flips=flips,
        )

        # 3. Back to every image's own grid, and only then to classes
        output = SDSegOutput([], [], [], [] if return_samples else None, [])
        for grid, own in zip(grids, samples, strict=True):
            label_map, mean, uncertainty, on_case = on_case_grid(own, grid, threshold)
            output.label_maps.append(label_map)
            output.probabilities.append(mean)
            output.uncertainty.append(uncertainty)
            output.overlaps.append(draw_overlaps(on_case, threshold))
            if output.samples is not None:
                output.samples.append(on_case)
        return output

    def sample(self, images: Sequence[np.ndarray], **settings: Any) -> np.ndarray:
        """Draw probabilities on the model's grid, float32 (B, N, K, S, S); see :meth:`draw`."""
        return np.stack([drawn.cpu().numpy() for drawn in self.draw(images, **settings)], axis=1)

    @torch.no_grad()
    def draw(
        self,
        images: Sequence[np.ndarray],
        *,
        num_inference_steps: int = 1,
        num_samples: int = 1,
        seed: int = 0,
        case_ids: Sequence[str],
        slice_indices: Sequence[int],
        first_sample: int = 0,
        flips: Sequence[str] = (),
        pad_to: int = 0,
    ) -> Iterator[torch.Tensor]:
        """Draw probabilities on the model's grid; the arguments are those of the call.

        Args:
            images: uint8, (S, S, 3), one per image.
            num_inference_steps: reverse steps.
            num_samples: draws of the noise.
            seed: names the noise.
            case_ids: names of the cases.
            slice_indices: which slice of its case each image is.
            first_sample: index of the first draw.
            flips: see the call.
            pad_to: images that the networks are given at least: a compiled graph is made for one shape. What
                is added is thrown away.

        Yields:
            float32, (B, K, S, S), on the networks' device: the draws of every view.
        """
        # Padded before they become tensors: other strides would be another graph.
        blanks = [np.zeros_like(images[0])] * (pad_to - len(images))
        inputs = self.normalise(np.stack([*images, *blanks]))  # (B, 3, S, S)
        draws = noise_keys(case_ids, slice_indices, seed, range(first_sample, first_sample + num_samples))
        for axes in mirrored_axes(flips):
            view = inputs.flip(axes) if axes else inputs
            conditioning = self.image_encoder(view) if self.is_diffusion else None
            for keys in draws:
                if conditioning is None:
                    probabilities = self.unet(view).float().softmax(dim=1)
                else:
                    noise = _padded(self.draw_noise(keys), pad_to)
                    scores = self.denoise(conditioning, noise, num_inference_steps)
                    probabilities = scores_to_probabilities(scores)
                yield probabilities[: len(images)].flip(axes)

    def normalise(self, images: np.ndarray) -> torch.Tensor:
        """Turn images, uint8 (B, S, S, 3), into the networks' input, (B, 3, S, S) in [-1, 1]."""
        tensor = to_device(torch.from_numpy(np.ascontiguousarray(images)), self.device).movedim(-1, 1)
        return tensor.to(input_dtype(self.unet, self.device)) / 127.5 - 1

    def draw_noise(self, keys: Sequence[NoiseKey]) -> torch.Tensor:
        """Draw the starting noise, (B, C, h, w) float32, one key per image; zeros if trained so."""
        shape = self.latent_shape()
        if self.config.noise == "zeros":
            return torch.zeros(len(keys), *shape, device=self.device)
        return to_device(named_noise(keys, shape), self.device)

    def denoise(
        self, conditioning: Sequence[torch.Tensor], noise: torch.Tensor, num_inference_steps: int
    ) -> torch.Tensor:
        """Run the reverse process and decode.

        Args:
            conditioning: the image encoder's output.
            noise: float32, (B, C, h, w).
            num_inference_steps: reverse steps.

        Returns:
            float32 scores of about -1 to 1: (B, 1, S, S) for binary masks, (B, K, S, S) for K classes.
            A class-conditional U-Net runs one reverse process per class, that of the background already
            negated (its mask is "anything but background"). A joint one runs once, and the background's
            score is the largest of the others negated: it wins where no mask is likelier than not.
        """
        latent = self._reverse_process(conditioning, noise, num_inference_steps)
        scores = decode_scores(self.autoencoder, latent, self.config.latent_scale)
        if masks_per_latent(self.autoencoder, latent.shape[1]) > 1:
            return torch.cat([-scores.amax(dim=1, keepdim=True), scores], dim=1)
        scores = scores.reshape(len(noise), -1, *scores.shape[2:])  # from (B * K, 1, S, S)
        if scores.shape[1] > 1:
            scores[:, 0] = -scores[:, 0]
        return scores

    @torch.no_grad()
    def predict_latents(
        self, images: np.ndarray, keys: Sequence[NoiseKey], *, num_inference_steps: int = 1
    ) -> torch.Tensor:
        """Predict what the autoencoder's decoder is given.

        Args:
            images: uint8, (B, S, S, 3).
            keys: one an image, naming its noise.
            num_inference_steps: reverse steps.

        Returns:
            Unscaled latents, float32 (B, M, C, h, w), of the M masks of :meth:`masks_of`.
        """
        conditioning = self.image_encoder(self.normalise(images))
        latent = self._reverse_process(conditioning, self.draw_noise(keys), num_inference_steps)
        channels = self.autoencoder.config["latent_channels"]
        return latent.reshape(len(images), -1, channels, *latent.shape[2:]) / self.config.latent_scale

    @property
    def masks_an_image(self) -> int:
        """How many masks are predicted for an image, each from a latent of its own."""
        return len(self.masks_of(np.zeros((1, 1), np.uint8)))

    def masks_of(self, label_map: np.ndarray) -> np.ndarray:
        """Give the masks that the latents stand for, bool (M, H, W), of a label map (H, W).

        They are those of the foreground classes; a class-conditional U-Net has the foreground's before them.
        """
        masks = label_map[None] == np.arange(1, self.num_classes)[:, None, None]
        conditional = self.unet.config["num_class_embeds"] is not None
        return np.concatenate([label_map[None] != 0, masks]) if conditional else masks

    def _reverse_process(
        self, conditioning: Sequence[torch.Tensor], noise: torch.Tensor, num_inference_steps: int
    ) -> torch.Tensor:
        """Bring noise, (B, C, h, w), to scaled latents: (B, C, h, w), or (B * K, C, h, w) for K classes."""
        class_labels, num_maps = None, 1
        if self.unet.config["num_class_embeds"] is not None:
            num_maps = self.num_classes
            class_labels = torch.arange(num_maps, device=noise.device).repeat(len(noise))
            conditioning = [features.repeat_interleave(num_maps, dim=0) for features in conditioning]
        latent = noise.repeat_interleave(num_maps, dim=0)
        self.scheduler.set_timesteps(num_inference_steps)
        timesteps = self.scheduler.timesteps.tolist()
        for timestep, following in zip(timesteps, [*timesteps[1:], None], strict=True):
            at = torch.full((len(latent),), timestep, device=noise.device)
            output = self.unet(latent.to(input_dtype(self.unet, self.device)), at, conditioning, class_labels)
            latent = reverse_step(self.scheduler, output, latent, timestep, following)
        return latent


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Bring a tensor of the host to a device, without waiting for what a GPU is at."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def check_inputs(
    size: int,
    pixels: Sequence[np.ndarray],
    grids: Sequence[Grid],
    case_ids: Sequence[str],
    slice_indices: Sequence[int],
    num_inference_steps: int,
    num_samples: int,
) -> None:
    """Refuse what does not fit together; ``size`` is the side of the model's grid.

    Raises:
        ValueError: the message says what does not fit.
    """
    if not pixels:
        raise ValueError("no images were given; expected at least one")
    for name, values in {"grids": grids, "case_ids": case_ids, "slice_indices": slice_indices}.items():
        if len(values) != len(pixels):
            raise ValueError(f"{name} has {len(values)} entries for {len(pixels)} images")
    for array in pixels:
        if array.shape != (size, size, 3):
            raise ValueError(
                f"an image on the model's grid is {array.shape}, expected {(size, size, 3)}; "
                "leave out grids to have images resized"
            )
    if num_inference_steps < 1 or num_samples < 1:
        raise ValueError(
            f"num_inference_steps is {num_inference_steps} and num_samples is {num_samples}; "
            "both must be at least 1"
        )


def on_case_grid(
    samples: np.ndarray, grid: Grid, threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Bring one image's samples back to its own grid, and only then choose classes.

    Args:
        samples: float32, (N, K, S, S), probabilities on the model's grid.
        grid: the way back.
        threshold: for binary masks.

    Returns:
        Label map uint8 (H, W), mean probabilities (K, H, W), uncertainty (H, W), samples (N, K, H, W).
    """
    on_case = grid.probabilities_to_case(samples)
    mean = on_case.mean(axis=0)
    return probabilities_to_labels(mean, threshold), mean, _spread(on_case), on_case


def _padded(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """Add zeros along the first axis up to ``count``."""
    missing = count - len(tensor)
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing > 0 else tensor


def noise_keys(
    case_ids: Sequence[str], slice_indices: Sequence[int], seed: int, samples: Sequence[int]
) -> list[list[NoiseKey]]:
    """Name the noise of every draw: a list for each of the sample indices, with a key for each image."""
    images = list(zip(case_ids, slice_indices, strict=True))
    return [[(seed, case, index, sample) for case, index in images] for sample in samples]


def named_noise(keys: Sequence[NoiseKey], shape: Sequence[int]) -> torch.Tensor:
    """Draw standard normal noise on the CPU, float32 (B, *shape): for each key always the same."""
    return torch.stack([torch.randn(tuple(shape), generator=generator_for("noise", *key)) for key in keys])


def mirrored_axes(flips: Sequence[str]) -> list[tuple[int, ...]]:
    """The views of an image under ``flips``: which axes of (B, C, H, W) each mirrors, the plain one first.

    Raises:
        ValueError: a word is neither ``horizontal`` nor ``vertical``.
    """
    axis_of = {"horizontal": 3, "vertical": 2}
    unknown = [word for word in flips if word not in axis_of]
    if unknown:
        raise ValueError(f"flips holds {unknown[0]!r}, expected horizontal or vertical")
    axes = [axis_of[word] for word in dict.fromkeys(flips)]
    return [(), *((axis,) for axis in axes), *([tuple(axes)] if len(axes) == 2 else [])]


def scores_to_probabilities(scores: torch.Tensor) -> torch.Tensor:
    """Turn decoded scores into class probabilities.

    Args:
        scores: float, (B, 1, S, S) for binary masks, (B, K, S, S) else.

    Returns:
        float, (B, 2, S, S) with (score + 1) / 2 for the foreground, or the softmax over K classes.
    """
    if scores.shape[1] > 1:
        return scores.softmax(dim=1)
    foreground = ((scores + 1) / 2).clamp(0, 1)
    return torch.cat([1 - foreground, foreground], dim=1)


def probabilities_to_labels(probabilities: np.ndarray, threshold: float = 0.5) -> np.ndarray:
    """Choose classes: above the threshold for binary masks, the most probable class else.

    Args:
        probabilities: float32, (K, H, W).
        threshold: in [0, 1]; of use for K = 2 only.

    Returns:
        uint8, (H, W).
    """
    if len(probabilities) == 2:
        return (probabilities[1] > threshold).astype(np.uint8)
    return probabilities.argmax(axis=0).astype(np.uint8)


def draw_overlaps(samples: np.ndarray, threshold: float = 0.5) -> np.ndarray:
    """Count the pixels that the masks of each two samples share.

    Args:
        samples: float32, (N, K, H, W), probabilities.
        threshold: for two classes, as in :func:`probabilities_to_labels`.

    Returns:
        int64, (K - 1, N, N), one matrix a foreground class: entry (i, j) counts the pixels that are of the
        class in both sample i and sample j, the diagonal the areas. The counts of a case's slices add up.
    """
    label_maps = np.stack([probabilities_to_labels(sample, threshold).ravel() for sample in samples])
    shared = np.zeros((samples.shape[1] - 1, len(samples), len(samples)), np.int64)
    # A product of matrices, in pieces that float32 counts exactly.
    for start in range(0, label_maps.shape[1], 1 << 20):
        piece = label_maps[:, start : start + (1 << 20)]
        for index in range(len(shared)):
            masks = (piece == index + 1).astype(np.float32)
            shared[index] += np.rint(masks @ masks.T).astype(np.int64)
    return shared


def _spread(samples: np.ndarray) -> np.ndarray:
    """Standard deviation over the samples (N, K, H, W), the largest of the foreground classes, (H, W)."""
    if len(samples) == 1:
        return np.full(samples.shape[2:], np.nan, np.float32)
    return samples[:, 1:].std(axis=0).max(axis=0)


def _pixels(image: ImageInput) -> np.ndarray:
    """Give (H, W, 3) uint8, refusing what a plain conversion would clip."""
    if isinstance(image, Image.Image):
        if image.mode in ("I", "F") or image.mode.startswith("I;"):
            raise ValueError(
                f"a PIL image of mode {image.mode!r} holds more than 8 bits a channel; "
                "scale it to uint8 first (sdseg predict does)"
            )
        return np.asarray(image.convert("RGB"))
    if image.dtype != np.uint8:
        raise ValueError(f"an image array is {image.dtype}, expected uint8 in [0, 255]")
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image array is {image.shape}, expected (H, W, 3) or (H, W)")
    return image
