"""Official SDSeg and latent-diffusion checkpoints, turned into the networks of this package.

The architecture is read from the shapes of the tensors, every tensor finds its place or is named in an error,
and the numbers are those of the original. What the two sides call differently is written as tables: a table
maps the parts of one of our layers to the parts of theirs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, Union

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from torch import nn

from sdseg_cli.core.errors import ModelError, UsageError
from sdseg_cli.core.model.checkpoint_file import read_state_dict
from sdseg_cli.core.model.image_encoder import KLImageEncoder
from sdseg_cli.core.model.pipeline import SDSegPipeline
from sdseg_cli.core.model.schedule import make_scheduler
from sdseg_cli.core.model.unet import SDSegUNet

_Module = TypeVar("_Module", bound=nn.Module)
State = Mapping[str, torch.Tensor]
Published: TypeAlias = Union[SDSegPipeline, SDSegUNet, AutoencoderKL]  # noqa: UP007  (diffusers is opaque)
Weights = Literal["ema", "raw"]
Kind = Literal["sdseg", "ldm", "autoencoder"]

_UNET = "model.diffusion_model."
_EMA = "model_ema."
_AUTOENCODER = "first_stage_model."
_IMAGE_ENCODER = "cond_stage_model."
_EMA_COUNTERS = {"decay", "num_updates"}
_SCHEDULE = {
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "lvlb_weights",
    "logvar",
}
_OPTIONS: Mapping[str, set[str]] = {
    "sdseg": {"weights", "heads", "image_size", "classes"},
    "ldm": {"weights", "heads", "conditioning_channels"},
    "autoencoder": set(),
}
_KIND_NAMES = {
    "sdseg": "an official SDSeg checkpoint",
    "ldm": "a latent-diffusion U-Net",
    "autoencoder": "a KL autoencoder",
}
_TRAINING_ONLY = "loss."  # discriminator and perceptual network of an autoencoder's training
_ALPHA_TOLERANCE = 1e-6
_NAMED = 8  # keys that an error names before it only counts


# The tables -----------------------------------------------------------------------------------------

Parts = Mapping[str, str]
Layer = tuple[str, str, Parts]  # our prefix, their prefix, parts

_SAME: Parts = {"": ""}
_TIMED_RESIDUAL: Parts = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_FUSED_ATTENTION: Parts = {
    "group_norm": "norm",
    "to_q": "qkv",
    "to_k": "qkv",
    "to_v": "qkv",
    "to_out.0": "proj_out",
}
_RESIDUAL: Parts = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "conv_shortcut": "nin_shortcut",
}
_ATTENTION: Parts = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_QKV = ("to_q", "to_k", "to_v")


@dataclass(frozen=True)
class UNetShape:
    """What the tensors of a U-Net tell about it."""

    latent_channels: int
    conditioning_channels: int
    channels: tuple[int, ...]
    blocks: int
    attended: tuple[bool, ...]
    class_embeddings: int | None

    @property
    def attention_strides(self) -> tuple[int, ...]:
        """Strides of the latent with attention."""
        return tuple(2**level for level, attended in enumerate(self.attended) if attended)


@dataclass(frozen=True)
class EncoderShape:
    """What the tensors of an encoder tell about it."""

    channels: tuple[int, ...]
    blocks: int
    code_channels: int


def _unet_layers(shape: UNetShape) -> Iterator[Layer]:
    yield "time_embedding.linear_1", "time_embed.0", _SAME
    yield "time_embedding.linear_2", "time_embed.2", _SAME
    yield "class_embedding", "label_emb", _SAME
    yield "conv_in", "input_blocks.0.0", _SAME
    last = len(shape.channels) - 1
    index = 1
    for level in range(last + 1):
        for block in range(shape.blocks):
            yield f"down_blocks.{level}.resnets.{block}", f"input_blocks.{index}.0", _TIMED_RESIDUAL
            if shape.attended[level]:
                yield f"down_blocks.{level}.attentions.{block}", f"input_blocks.{index}.1", _FUSED_ATTENTION
            index += 1
        if level < last:
            yield f"down_blocks.{level}.downsamplers.0", f"input_blocks.{index}.0", _TIMED_RESIDUAL
            index += 1
    yield "mid_block.resnets.0", "middle_block.0", _TIMED_RESIDUAL
    yield "mid_block.attentions.0", "middle_block.1", _FUSED_ATTENTION
    yield "mid_block.resnets.1", "middle_block.2", _TIMED_RESIDUAL
    index = 0
    for up, level in enumerate(range(last, -1, -1)):
        for block in range(shape.blocks + 1):
            yield f"up_blocks.{up}.resnets.{block}", f"output_blocks.{index}.0", _TIMED_RESIDUAL
            if shape.attended[level]:
                yield f"up_blocks.{up}.attentions.{block}", f"output_blocks.{index}.1", _FUSED_ATTENTION
            if level and block == shape.blocks:
                place = 1 + shape.attended[level]
                yield f"up_blocks.{up}.upsamplers.0", f"output_blocks.{index}.{place}", _TIMED_RESIDUAL
            index += 1
    yield "conv_norm_out", "out.0", _SAME
    yield "conv_out", "out.2", _SAME


def _encoder_layers(shape: EncoderShape) -> Iterator[Layer]:
    yield from _coder_layers("encoder")
    for level in range(len(shape.channels)):
        for block in range(shape.blocks):
            ours, theirs = f"down_blocks.{level}.resnets.{block}", f"down.{level}.block.{block}"
            yield f"encoder.{ours}", f"encoder.{theirs}", _RESIDUAL
        ours, theirs = f"down_blocks.{level}.downsamplers.0.conv", f"down.{level}.downsample.conv"
        yield f"encoder.{ours}", f"encoder.{theirs}", _SAME


def _decoder_layers(shape: EncoderShape) -> Iterator[Layer]:
    yield from _coder_layers("decoder")
    for up, level in enumerate(reversed(range(len(shape.channels)))):  # theirs count from the finest
        for block in range(shape.blocks + 1):
            ours, theirs = f"up_blocks.{up}.resnets.{block}", f"up.{level}.block.{block}"
            yield f"decoder.{ours}", f"decoder.{theirs}", _RESIDUAL
        ours, theirs = f"up_blocks.{up}.upsamplers.0.conv", f"up.{level}.upsample.conv"
        yield f"decoder.{ours}", f"decoder.{theirs}", _SAME


def _coder_layers(name: str) -> Iterator[Layer]:
    yield f"{name}.conv_in", f"{name}.conv_in", _SAME
    yield f"{name}.mid_block.resnets.0", f"{name}.mid.block_1", _RESIDUAL
    yield f"{name}.mid_block.attentions.0", f"{name}.mid.attn_1", _ATTENTION
    yield f"{name}.mid_block.resnets.1", f"{name}.mid.block_2", _RESIDUAL
    yield f"{name}.conv_norm_out", f"{name}.norm_out", _SAME
    yield f"{name}.conv_out", f"{name}.conv_out", _SAME


def _autoencoder_layers(shape: EncoderShape) -> Iterator[Layer]:
    yield from _encoder_layers(shape)
    yield from _decoder_layers(shape)
    yield "quant_conv", "quant_conv", _SAME
    yield "post_quant_conv", "post_quant_conv", _SAME


def _image_encoder_layers(shape: EncoderShape) -> Iterator[Layer]:
    yield from _encoder_layers(shape)
    yield "out", "out", _SAME


# Shapes from tensors --------------------------------------------------------------------------------


def unet_shape(state: State) -> UNetShape:
    """Read a U-Net's architecture from its tensors, named as in ``model.diffusion_model``.

    Raises:
        ModelError: they are not those of such a U-Net.
    """
    blocks_in_all = _count(state, r"input_blocks\.(\d+)\.")
    # A block that ends with a second residual block goes up a level.
    resampled = {
        key.split(".")[1] for key in state if re.match(r"output_blocks\.\d+\.[12]\.in_layers\.", key)
    }
    levels = len(resampled) + 1
    blocks, rest = divmod(blocks_in_all, levels)
    if blocks < 2 or rest:
        raise ModelError(
            f"the U-Net has {blocks_in_all} input blocks and {levels} levels, which do not fit: expected "
            "residual blocks that down- and upsample, as in the official U-Net."
        )
    first = [1 + level * blocks for level in range(levels)]
    _, joined, *_ = _size(state, "input_blocks.0.0.weight")
    latent_channels, *_ = _size(state, "out.2.weight")
    if joined < latent_channels:
        raise ModelError(f"the U-Net takes {joined} channels and gives {latent_channels}; expected no fewer.")
    return UNetShape(
        latent_channels=latent_channels,
        conditioning_channels=joined - latent_channels,
        channels=tuple(_size(state, f"input_blocks.{index}.0.out_layers.3.weight")[0] for index in first),
        blocks=blocks - 1,
        attended=tuple(f"input_blocks.{index}.1.qkv.weight" in state for index in first),
        class_embeddings=_size(state, "label_emb.weight")[0] if "label_emb.weight" in state else None,
    )


def encoder_shape(state: State) -> EncoderShape:
    """Read the architecture of an autoencoder's encoder from its tensors, named ``encoder.down.0...``.

    Raises:
        ModelError: they are not those of such an encoder.
    """
    levels = _count(state, r"encoder\.down\.(\d+)\.")
    return EncoderShape(
        channels=tuple(_size(state, f"encoder.down.{i}.block.0.conv1.weight")[0] for i in range(levels)),
        blocks=_count(state, r"encoder\.down\.0\.block\.(\d+)\."),
        code_channels=_size(state, "encoder.conv_out.weight")[0],
    )


def _count(state: State, pattern: str) -> int:
    found = {match[1] for key in state if (match := re.match(pattern, key))}
    return max(map(int, found), default=-1) + 1


def _size(state: State, key: str, *, dimensions: int = 2) -> torch.Size:
    if key not in state:
        raise ModelError(f"the checkpoint lacks {key}, from which the architecture is read.")
    size = state[key].shape
    if len(size) < dimensions or 0 in size:
        raise ModelError(
            f"{key} of the checkpoint has the shape {tuple(size)}; expected {dimensions} dimensions or more, "
            "none of them 0."
        )
    return size


# Networks -------------------------------------------------------------------------------------------


def unet_from(
    state: State, *, heads: int = 8, conditioning_channels: int | None = None, sample_size: int = 32
) -> SDSegUNet:
    """Make a U-Net from official tensors, named as in ``model.diffusion_model``.

    Args:
        state: the tensors.
        heads: at every attention; no tensor tells it.
        conditioning_channels: what the first convolution takes beside the latent; channels that it lacks
            are added and start at zero. None leaves it as it is.
        sample_size: side of the latent.

    Raises:
        ModelError: a tensor is missing, unexpected or of another shape.
        UsageError: ``heads`` does not divide a width.
    """
    shape = unet_shape(state)
    attended = [width for width, has in zip(shape.channels, shape.attended, strict=True) if has]
    if any(width % heads for width in [*attended, shape.channels[-1]]):
        raise UsageError(
            f"{heads} attention heads do not divide the U-Net's widths {list(shape.channels)}. "
            "Give the head count that it was trained with as --heads."
        )
    state = dict(state)
    if conditioning_channels is not None and conditioning_channels != shape.conditioning_channels:
        state["input_blocks.0.0.weight"] = _widened(
            state["input_blocks.0.0.weight"], shape, conditioning_channels
        )
        shape = unet_shape(state)
    with torch.device("meta"):
        unet = SDSegUNet(
            sample_size=sample_size,
            latent_channels=shape.latent_channels,
            conditioning_channels=shape.conditioning_channels,
            channels=shape.channels,
            blocks=shape.blocks,
            heads=heads,
            attention_strides=shape.attention_strides,
            num_class_embeds=shape.class_embeddings,
        )
    return _filled(unet, _unet_layers(shape), state, "U-Net", heads)


def _widened(weight: torch.Tensor, shape: UNetShape, conditioning_channels: int) -> torch.Tensor:
    extra = conditioning_channels - shape.conditioning_channels
    if extra < 0:
        raise UsageError(
            f"the U-Net takes {shape.conditioning_channels} channels of conditioning, "
            f"{conditioning_channels} were asked for: it can be widened, not narrowed."
        )
    return torch.cat([weight, weight.new_zeros(weight.shape[0], extra, *weight.shape[2:])], dim=1)


def autoencoder_from(state: State) -> AutoencoderKL:
    """Make a KL autoencoder from official tensors, named ``encoder...``, ``decoder...``, ``quant_conv...``.

    Raises:
        ModelError: a tensor is missing, unexpected or of another shape.
    """
    shape = encoder_shape(state)
    levels = len(shape.channels)
    with torch.device("meta"):
        autoencoder = AutoencoderKL(
            block_out_channels=shape.channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=shape.blocks,
            latent_channels=_size(state, "post_quant_conv.weight")[1],
        )
    return _filled(autoencoder, _autoencoder_layers(shape), state, "autoencoder")


def image_encoder_from(state: State) -> KLImageEncoder:
    """Make an image encoder from official tensors, named ``encoder...`` and ``out...``.

    Raises:
        ModelError: a tensor is missing, unexpected or of another shape.
    """
    shape = encoder_shape(state)
    with torch.device("meta"):
        encoder = KLImageEncoder(
            conditioning_channels=_size(state, "out.weight")[0],
            channels=shape.channels,
            blocks=shape.blocks,
            code_channels=shape.code_channels,
        )
    return _filled(encoder, _image_encoder_layers(shape), state, "image encoder")


def schedule_from(state: State) -> DDIMScheduler:
    """Make the noise schedule from a checkpoint's buffers.

    Raises:
        ModelError: they are missing, or not of the kind that is linear in the square root of beta.
    """
    for key in ("betas", "alphas_cumprod"):
        _size(state, key, dimensions=1)
    # Stored in float32; seven digits give back the number that was written in the configuration.
    start, end = (float(f"{float(state['betas'][i]):.7g}") for i in (0, -1))
    scheduler = make_scheduler("epsilon", len(state["betas"]), start, end)
    deviation = (scheduler.alphas_cumprod - state["alphas_cumprod"].float()).abs().max().item()
    if not deviation < _ALPHA_TOLERANCE:
        raise ModelError(
            f"the noise schedule (betas from {start} to {end}) is not linear in the square root of beta: its "
            f"alphas_cumprod are up to {deviation:.1e} away from such a schedule's, expected at most "
            f"{_ALPHA_TOLERANCE}."
        )
    return scheduler


def _filled(module: _Module, layers: Iterable[Layer], state: State, what: str, heads: int = 1) -> _Module:
    """Put every tensor into its place, in float32, or name those that have none."""
    own = module.state_dict()
    sources = dict(_sources(layers, own))
    missing = sorted({theirs for theirs in sources.values() if theirs not in state})
    unexpected = sorted(set(state) - set(sources.values()))
    if missing or unexpected:
        raise ModelError(
            f"the {what} of the checkpoint is not one that sdseg knows. Missing: {_named(missing)}. "
            f"Unexpected: {_named(unexpected)}."
        )
    expected = {theirs: _their_shape(own[ours], theirs) for ours, theirs in sources.items()}
    wrong = [
        f"{theirs} has shape {tuple(state[theirs].shape)}, expected {shape}"
        for theirs, shape in expected.items()
        if _without_ones(state[theirs].shape) != shape
    ]
    if wrong:
        raise ModelError(f"the {what} of the checkpoint contradicts itself: {_named(wrong, '; ')}.")
    weights = {
        ours: _part(state[theirs], ours, theirs, heads).float().reshape(own[ours].shape).contiguous()
        for ours, theirs in sources.items()
    }
    module.load_state_dict(weights, assign=True)
    return module.eval().requires_grad_(False)


def _their_shape(ours: torch.Tensor, theirs: str) -> tuple[int, ...]:
    rows, *rest = ours.shape
    return _without_ones((rows * 3 if _is_fused(theirs) else rows, *rest))


def _without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    """Drop trailing ones: a 1x1 convolution there is a linear layer here, with the same numbers."""
    shape = tuple(shape)
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _sources(layers: Iterable[Layer], own: State) -> Iterator[tuple[str, str]]:
    """Pair our keys with theirs."""
    for ours, theirs, parts in layers:
        for our_part, their_part in parts.items():
            for tensor in ("weight", "bias"):
                key = ".".join(filter(None, (ours, our_part, tensor)))
                if key in own:
                    yield key, ".".join(filter(None, (theirs, their_part, tensor)))


def _part(tensor: torch.Tensor, ours: str, theirs: str, heads: int) -> torch.Tensor:
    """Cut q, k or v out of a fused tensor, whose rows are ordered by head first and by q, k, v second."""
    if not _is_fused(theirs):
        return tensor
    which = _QKV.index(ours.split(".")[-2])
    rows = tensor.shape[0] // 3
    return tensor.reshape(heads, 3, rows // heads, -1)[:, which].reshape(rows, *tensor.shape[1:])


def _is_fused(theirs: str) -> bool:
    return theirs.split(".")[-2] == "qkv"


def _named(names: Sequence[str], separator: str = ", ") -> str:
    shown = separator.join(names[:_NAMED]) or "none"
    return shown + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


# Checkpoints ----------------------------------------------------------------------------------------


def recognise(state: State) -> Kind:
    """Tell what a checkpoint is from the names of its tensors.

    Raises:
        ModelError: it is of no kind that can be converted.
    """
    groups = {key.split(".")[0] for key in state}
    if {"model", "first_stage_model", "cond_stage_model"} <= groups and _under(state, _UNET):
        return "sdseg"
    if _under(state, _UNET) and "cond_stage_model" not in groups:
        return "ldm"
    if {"encoder", "decoder", "quant_conv", "post_quant_conv"} <= groups:
        return "autoencoder"
    raise ModelError(
        "the checkpoint is of a kind that sdseg does not know: its tensors belong to "
        f"{_named(sorted(groups))}. Expected an official SDSeg checkpoint (model, model_ema, "
        "first_stage_model, cond_stage_model), an unconditional latent-diffusion U-Net (model, model_ema), "
        "or a KL autoencoder (encoder, decoder, quant_conv, post_quant_conv)."
    )


def sdseg_from(
    state: State,
    *,
    weights: Weights = "ema",
    heads: int = 8,
    image_size: int = 256,
    classes: Sequence[str] | None = None,
) -> SDSegPipeline:
    """Make a pipeline from the tensors of an official SDSeg checkpoint.

    Args:
        state: the tensors.
        weights: of the U-Net: their running average, as the official code predicts, or raw.
        heads: at every attention of the U-Net.
        image_size: side of the model's square grid.
        classes: names, the background first; by default background and foreground, or numbers.

    Raises:
        ModelError: a tensor is missing, unexpected or of another shape.
        UsageError: ``heads``, ``image_size`` or ``classes`` contradicts the weights.
    """
    unet = unet_from(_unet_state(state, weights), heads=heads, sample_size=image_size // 8)
    image_encoder = image_encoder_from(_under(state, _IMAGE_ENCODER))
    autoencoder = autoencoder_from(_without_training(_under(state, _AUTOENCODER)))
    scheduler = schedule_from(state)
    _account_for_the_rest(state, {"scale_factor"}, (_UNET, _EMA, _AUTOENCODER, _IMAGE_ENCODER))
    if "scale_factor" not in state:
        raise ModelError("the checkpoint lacks scale_factor, what its latents are multiplied by.")
    given = image_encoder.config["conditioning_channels"]
    taken = unet.config["conditioning_channels"]
    if given != taken:
        raise ModelError(f"the image encoder gives {given} channels and the U-Net takes {taken}.")
    coarsest = 8 * 2 ** (len(unet.config["channels"]) - 1)
    if image_size < 1 or image_size % coarsest:
        raise UsageError(f"--image-size {image_size}: this U-Net needs a multiple of {coarsest}.")
    return SDSegPipeline(
        unet=unet,
        image_encoder=image_encoder,
        autoencoder=autoencoder,
        scheduler=scheduler,
        classes=_class_names(classes, unet.config["num_class_embeds"]),
        image_size=image_size,
        resize="squeeze",
        latent_scale=float(state["scale_factor"]),
    )


def ldm_unet_from(
    state: State, *, weights: Weights = "ema", heads: int = 8, conditioning_channels: int = 4
) -> SDSegUNet:
    """Make the start of a U-Net from an unconditional latent-diffusion checkpoint.

    Its first convolution is widened for the conditioning by channels of zero: before training, the
    conditioning has no effect.

    Raises:
        ModelError: a tensor is missing, unexpected or of another shape.
        UsageError: ``heads`` contradicts the weights.
    """
    _account_for_the_rest(state, {"scale_factor"}, (_UNET, _EMA, _AUTOENCODER))
    return unet_from(_unet_state(state, weights), heads=heads, conditioning_channels=conditioning_channels)


def kl_autoencoder_from(state: State) -> AutoencoderKL:
    """Make an autoencoder from a kl-f8 checkpoint; what only its training needed is left out.

    Raises:
        ModelError: a tensor is missing, unexpected or of another shape.
    """
    return autoencoder_from(_without_training(state))


def load_published(path: Path, options: Mapping[str, Any] | None = None) -> Published:
    """Read a published checkpoint of any kind that sdseg knows.

    Args:
        path: the file.
        options: of the kind that the file turns out to be: those of :func:`sdseg_from` or
            :func:`ldm_unet_from`; an autoencoder has none.

    Returns:
        A pipeline, a U-Net to start training from, or an autoencoder; in float32.

    Raises:
        ModelError: it cannot be read or converted; the message names the file.
        UsageError: an option contradicts the weights, or is not one of this kind's.
    """
    state = read_state_dict(path)
    options = dict(options or {})
    try:
        kind = recognise(state)
        if strangers := sorted(set(options) - _OPTIONS[kind]):
            flags = ", ".join("--" + name.replace("_", "-") for name in strangers)
            raise UsageError(f"{path} is {_KIND_NAMES[kind]}, to which {flags} does not apply. Leave it out.")
        if kind == "sdseg":
            return sdseg_from(state, **options)
        if kind == "ldm":
            return ldm_unet_from(state, **options)
        return kl_autoencoder_from(state)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def _unet_state(state: State, weights: Weights) -> State:
    """Give the raw tensors of the U-Net, or their running averages under the same names."""
    raw = _under(state, _UNET)
    if weights == "raw":
        return raw
    # The averages are stored under the raw names without dots.
    averaged = {name: ("diffusion_model." + name).replace(".", "") for name in raw}
    ema = {name: value for name, value in _under(state, _EMA).items() if name not in _EMA_COUNTERS}
    if not ema:
        raise ModelError(f"the checkpoint has no running averages ({_EMA}*). Convert it with --weights raw.")
    missing = sorted(_EMA + name for name in set(averaged.values()) - set(ema))
    unexpected = sorted(_EMA + name for name in set(ema) - set(averaged.values()))
    if missing or unexpected:
        raise ModelError(
            "the running averages do not match the U-Net's weights. "
            f"Missing: {_named(missing)}. Unexpected: {_named(unexpected)}."
        )
    return {name: ema[average] for name, average in averaged.items()}


def _account_for_the_rest(state: State, known: set[str], prefixes: tuple[str, ...]) -> None:
    unexpected = sorted(key for key in state if key not in known | _SCHEDULE and not key.startswith(prefixes))
    if unexpected:
        raise ModelError(f"the checkpoint holds tensors that have no place here: {_named(unexpected)}.")


def _under(state: State, prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _without_training(state: State) -> State:
    return {key: value for key, value in state.items() if not key.startswith(_TRAINING_ONLY)}


def _class_names(classes: Sequence[str] | None, embeddings: int | None) -> tuple[str, ...]:
    if embeddings is None:
        names = tuple(classes or ("background", "foreground"))
        if len(names) != 2:
            raise UsageError(f"--classes names {len(names)} classes; this checkpoint is binary, expected 2.")
        return names
    names = tuple(classes or ("background", *(f"class {index}" for index in range(1, embeddings))))
    if not 3 <= len(names) <= embeddings:
        raise UsageError(
            f"--classes names {len(names)} classes with the background; this checkpoint has embeddings for "
            f"{embeddings}, expected 3 to {embeddings}."
        )
    return names
