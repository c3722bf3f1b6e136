"""Builds the networks, and fills them from files, from the hub or from what is shipped."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from pathlib import Path

import timm
import torch
from diffusers import AutoencoderKL, ModelMixin
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from sdseg_cli.core.errors import ModelError, UsageError
from sdseg_cli.core.integrity import refuse_altered
from sdseg_cli.core.model.image_encoder import ImageEncoder, KLImageEncoder, TimmImageEncoder
from sdseg_cli.core.model.latents import Autoencoder, spatial_factor
from sdseg_cli.core.model.mask_autoencoder import MaskAutoencoder
from sdseg_cli.core.model.mask_decoder import MaskDecoder, fingerprint
from sdseg_cli.core.model.pipeline import SDSegPipeline
from sdseg_cli.core.model.plain_unet import PlainUNet
from sdseg_cli.core.model.unet import SDSegUNet

_NO_DOWNLOAD = (
    "A recipe that needs no published weights: `sdseg train --recipe kseg-fast` "
    "(or --set model.autoencoder=builtin --set model.unet_weights=random)."
)
_PUBLISHED = {"model.autoencoder": "kl-f8", "model.unet_weights": "lsun_churches"}
_ADVICE = (". If you want to", " Please check", "\n")  # how other libraries go on
_ADDED = ("class_embedding", "fusions", "attentions")  # of a U-Net, that a published start lacks
_FILES = ["*.json", "*.safetensors"]  # of a model on the hub: no code and no pickles
_NAMED = 6  # tensors that an error names before it only counts
_LOAD_FAILURES = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)


def quiet_diffusers() -> None:
    """Keep diffusers' progress bars and advice off the screen; what fails still raises."""
    diffusers_logging.set_verbosity(logging.CRITICAL)  # it logs what it then raises
    diffusers_logging.disable_progress_bar()
    for library in ("timm", "huggingface_hub"):  # the latter tells of every retry
        logging.getLogger(library).setLevel(logging.ERROR)


def builtin_autoencoder_folder() -> Path:
    """Where the shipped mask autoencoder lies."""
    return Path(str(files("sdseg_cli") / "resources" / "mask_autoencoder"))


def load_autoencoder(location: str) -> Autoencoder:
    """Load a frozen autoencoder.

    Args:
        location: ``builtin``, or the folder or hub id of a ``MaskAutoencoder`` or ``AutoencoderKL``.

    Raises:
        UsageError: it cannot be had; the message says where to put it and which recipe needs none.
        ModelError: it is not as its manifest says.
    """
    quiet_diffusers()
    if location == "builtin":
        autoencoder: Autoencoder = MaskAutoencoder.from_pretrained(builtin_autoencoder_folder())
    else:
        autoencoder = _load(location, "autoencoder", "model.autoencoder")
    factor = spatial_factor(autoencoder)
    if factor != 8:
        raise UsageError(
            f"autoencoder {location!r} has {factor} pixels per latent pixel, expected 8 (a kl-f8 "
            "autoencoder). " + _NO_DOWNLOAD
        )
    return autoencoder.eval().requires_grad_(False)


def _load(location: str, what: str, key: str) -> Autoencoder:
    classes: dict[str, type[ModelMixin]] = {
        "AutoencoderKL": AutoencoderKL,
        "MaskAutoencoder": MaskAutoencoder,
    }
    expected = "config.json and diffusion_pytorch_model.safetensors"
    if location.startswith((".", "/", "~")) and not Path(location).exists():
        raise _missing(location, what, key, expected)  # a path: the hub is not asked
    refuse_altered(Path(location))
    try:
        config = AutoencoderKL.load_config(location)
        kind = classes.get(str(config.get("_class_name")), AutoencoderKL)
        network, found = kind.from_pretrained(location, output_loading_info=True)
        # The library fills what a file lacks with whatever is in the memory, and says nothing.
        _refuse_partial(found["missing_keys"], found["unexpected_keys"])
    except _LOAD_FAILURES as error:
        raise _missing(location, what, key, expected, _reason(error)) from error
    return network


def load_published_autoencoder(location: str) -> AutoencoderKL:
    """Load the autoencoder of a diffusers model, such as Stable Diffusion's ``vae``, in float32.

    Args:
        location: a folder or hub id, of a whole model or of an autoencoder alone.

    Raises:
        ModelError: there is none; the message names the place.
    """
    quiet_diffusers()
    folder = Path(location).expanduser()
    place = str(folder) if folder.is_dir() else location
    refuse_altered(folder)
    subfolders = [None] if folder.is_dir() and not (folder / "vae").is_dir() else ["vae", None]
    problems: list[str] = []
    for subfolder in subfolders:
        try:
            network, found = AutoencoderKL.from_pretrained(
                place, subfolder=subfolder, output_loading_info=True, torch_dtype=torch.float32
            )
            _refuse_partial(found["missing_keys"], found["unexpected_keys"])
        except _LOAD_FAILURES as error:
            problems.append(f"{subfolder or 'itself'}: {_reason(error)}")
            remedy = _hub_remedy(place, error)
        else:
            return network.eval().requires_grad_(False)
    raise ModelError(
        f"{location} holds no KL autoencoder that can be read ({'; '.join(problems)}). Expected the folder "
        f"or hub id of one, or of a diffusers model with a vae.{remedy}"
    )


def load_any_autoencoder(location: str) -> Autoencoder:
    """Load an autoencoder from a folder or hub id, of an autoencoder or of a whole diffusers model.

    Raises:
        ModelError: there is none.
    """
    try:
        return load_autoencoder(location)
    except UsageError:
        return load_published_autoencoder(location)


def refer_to_autoencoder(location: str, autoencoder: Autoencoder) -> dict[str, str]:
    """Say where an autoencoder is, a folder by its full path, and what it holds (SHA-256 of its tensors)."""
    folder = Path(location).expanduser()
    place = str(folder.resolve()) if folder.is_dir() else location
    return {"location": place, "sha256": _digest(autoencoder)}


def load_referenced_autoencoder(location: str, sha256: str) -> Autoencoder:
    """Load what :func:`refer_to_autoencoder` referred to.

    Raises:
        ModelError: it is not there any more, or is another one.
    """
    remedy = (
        "Put it back there, or make the model again with a copy of its autoencoder (sdseg train with "
        "train.embed_autoencoder=true; sdseg convert without --autoencoder)."
    )
    refuse_altered(Path(location))  # which has a remedy of its own
    try:
        autoencoder = load_any_autoencoder(location)
    except ModelError as error:
        raise ModelError(
            f"the model holds no autoencoder but refers to {location}, which cannot be read. {remedy}"
        ) from error
    if _digest(autoencoder) != sha256:
        raise ModelError(
            f"the autoencoder at {location} is not the one that the model was made with: its tensors differ. "
            + remedy
        )
    return autoencoder


def _digest(autoencoder: Autoencoder) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(autoencoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _refuse_partial(missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raise a ValueError where a file does not hold exactly a network's tensors."""
    missing, unexpected = sorted(missing), sorted(unexpected)
    if missing or unexpected:
        raise ValueError(
            "the weights do not match the configuration beside them. "
            f"Missing: {_named(missing)}. Unexpected: {_named(unexpected)}"
        )


def _named(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return (", ".join(names[:_NAMED]) or "none") + rest


def _missing(location: str, what: str, key: str, expected: str, reason: str = "") -> UsageError:
    folder = Path(location)
    if folder.exists():
        found = f"{folder} exists but holds no {what} that can be read"
        found += f" ({reason})" if reason else ""
    elif location.count("/") == 1 and not location.startswith((".", "/")):
        found = f"there is no folder {location!r}, and no model of that name in the hub's cache or on the hub"
    else:
        found = f"{folder} does not exist"
    return UsageError(
        f"{key}: the published {what} was asked for, and {found}. Expected: a folder with {expected}. "
        f"Put it there, or name another place with --set {key}=FOLDER. {_where_published(key)}{_NO_DOWNLOAD}"
    )


def _where_published(key: str) -> str:
    name = _PUBLISHED.get(key)
    if name is None:
        return ""
    return (
        f"The paper's is in {name}.zip at https://ommer-lab.com/files/latent-diffusion/: unpack it, and make "
        f"the folder with `sdseg convert model.ckpt --out weights/{name}`. "
    )


def build_image_encoder(
    kind: str,
    *,
    weights: str,
    conditioning_channels: int,
    levels: int,
    channels: Sequence[int],
    blocks: int,
    dropout: float,
    autoencoder: Autoencoder,
) -> ImageEncoder:
    """Build an image encoder and fill it.

    Args:
        kind: ``kl`` or ``timm:NAME``.
        weights: ``random``, ``autoencoder``, ``pretrained`` or a path.
        conditioning_channels: channels of each output.
        levels: outputs, at strides 8, 16, ...
        channels: of the ``kl`` encoder.
        blocks: of the ``kl`` encoder.
        dropout: of the ``kl`` encoder.
        autoencoder: whose encoder ``autoencoder`` copies.

    Raises:
        UsageError: an unknown backbone, or weights that cannot be had or do not fit.
    """
    if kind == "kl":
        encoder: ImageEncoder = KLImageEncoder(
            conditioning_channels, levels, tuple(channels), blocks, dropout
        )
    else:
        name = _timm_name(kind)
        try:
            encoder = TimmImageEncoder(name, conditioning_channels, levels)
        except (ValueError, RuntimeError, AttributeError, TypeError) as error:
            raise UsageError(f"model.image_encoder: timm:{name} cannot serve: {error}") from error
    if weights == "autoencoder":
        _copy_encoder(autoencoder, encoder)
    elif weights == "pretrained":
        _load_timm(encoder)
    elif weights != "random":
        _load_state(encoder, weights, "model.image_encoder_weights")
    return encoder


def build_plain_unet(kind: str, num_classes: int) -> PlainUNet:
    """Build the baseline on the backbone ``timm:NAME``, from random weights.

    Raises:
        UsageError: an unknown backbone, or one that a U-Net cannot be built on.
    """
    name = _timm_name(kind)
    try:
        return PlainUNet(name, num_classes)
    except (ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise UsageError(f"model.image_encoder: timm:{name} cannot serve: {error}") from error


def _timm_name(kind: str) -> str:
    name = kind.removeprefix("timm:")
    if not timm.is_model(name):
        near = timm.list_models(f"*{name[:6]}*")[:5]
        raise UsageError(
            f"model.image_encoder: timm has no network named {name!r}"
            + (f"; near: {', '.join(near)}" if near else "")
            + ". timm.list_models() gives them all."
        )
    return name


def _copy_encoder(autoencoder: Autoencoder, encoder: ImageEncoder) -> None:
    if not isinstance(autoencoder, AutoencoderKL):
        raise UsageError(
            "model.image_encoder_weights: autoencoder copies the encoder of a KL autoencoder, and "
            "model.autoencoder is the built-in mask autoencoder. Use random, or name a KL autoencoder."
        )
    try:
        encoder.encoder.load_state_dict(autoencoder.encoder.state_dict())
    except RuntimeError as error:
        raise UsageError(
            "model.image_encoder_weights: the KL autoencoder's encoder does not fit "
            f"model.image_encoder_channels and image_encoder_blocks: {_first_line(error)}"
        ) from error


def _load_timm(encoder: ImageEncoder) -> None:
    name = encoder.config["name"]
    try:
        pretrained = timm.create_model(name, pretrained=True, features_only=True)
    except Exception as error:  # the hub client raises many kinds, none of them ours
        raise UsageError(
            f"model.image_encoder_weights: the published weights of timm:{name} cannot be had "
            f"({type(error).__name__}: {_first_line(error)}). With no network fill the hub's cache on "
            "another machine, name a file, or use --set model.image_encoder_weights=random."
        ) from error
    encoder.backbone.load_state_dict(pretrained.state_dict())


def build_unet(
    *,
    weights: str,
    sample_size: int,
    latent_channels: int,
    conditioning_channels: int,
    fusion: str,
    channels: Sequence[int],
    blocks: int,
    heads: int,
    attention_strides: Sequence[int],
    dropout: float,
    num_class_embeds: int | None,
) -> SDSegUNet:
    """Build the denoiser and fill it; see :class:`SDSegUNet`.

    Layers that a fusion adds and the weights lack start as they are built, as the identity.

    Raises:
        UsageError: weights that cannot be had or do not fit.
    """
    unet = SDSegUNet(
        sample_size=sample_size,
        latent_channels=latent_channels,
        conditioning_channels=conditioning_channels,
        fusion=fusion,
        channels=tuple(channels),
        blocks=blocks,
        heads=heads,
        attention_strides=tuple(attention_strides),
        dropout=dropout,
        num_class_embeds=num_class_embeds,
    )
    if weights != "random":
        _load_state(unet, weights, "model.unet_weights", fit=lambda state: _fitted_to(unet, state))
    return unet


def _fitted_to(unet: SDSegUNet, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fit a start to classes and to a fusion that it was not made for.

    The embedding of the classes and the layers of the fusion are added as they are built. Input channels for
    conditioning, which ``attention`` does not have, are left out if they are zero, as in a converted start.
    """
    own = unet.state_dict()
    channels, found = unet.config["latent_channels"], state.get("conv_out.bias")
    if found is not None and len(found) != channels:
        raise RuntimeError(
            f"conv_out gives {len(found)} channels of latent, the recipe's {channels}. With "
            "model.multiclass: joint start at random, or from a U-Net trained jointly for as many classes"
        )
    added = {name: own[name] for name in own if name.split(".")[0] in _ADDED}
    given, taken = state.get("conv_in.weight"), own["conv_in.weight"].shape[1]
    if given is not None and unet.config["fusion"] == "attention" and not given[:, taken:].any():
        state = {**state, "conv_in.weight": given[:, :taken].contiguous()}
    return {**added, **state}


def _load_state(
    module: torch.nn.Module,
    location: str,
    key: str,
    *,
    fit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None,
) -> None:
    """Fill a network from a safetensors file, or from the folder that ``save_pretrained`` wrote."""
    path = Path(location)
    if path.is_dir():
        path = path / "diffusion_pytorch_model.safetensors"
    if not path.is_file():
        raise _missing(location, "weights", key, "diffusion_pytorch_model.safetensors")
    refuse_altered(path.parent)
    try:
        state = load_file(path)
        module.load_state_dict(fit(state) if fit else state)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{key}: {path} cannot be read as safetensors: {error}") from error
    except RuntimeError as error:
        raise UsageError(
            f"{key}: the weights in {path} do not fit the recipe's network: {_first_line(error)}"
        ) from error


def load_pipeline(location: str) -> SDSegPipeline:
    """Load a saved pipeline from a folder or a hub id.

    Raises:
        ModelError: it is not there, or broken; the message names it.
    """
    quiet_diffusers()
    try:
        # The pipeline's own download takes sdseg's classes for code that the repository should hold.
        folder = location if Path(location).is_dir() else snapshot_download(location, allow_patterns=_FILES)
        refuse_altered(Path(folder))
        pipeline = SDSegPipeline.from_pretrained(folder, use_safetensors=True)
        for name, component in pipeline.components.items():
            referred = name == "autoencoder" and pipeline.config.get("autoencoder_reference")
            if isinstance(component, torch.nn.Module) and not referred:
                _check_whole(component, Path(folder) / name)
    except ModelError as error:
        raise ModelError(f"model {location!r} cannot be loaded: {error}") from error
    except Exception as error:
        raise ModelError(
            f"model {location!r} cannot be loaded: {_reason(error)}. "
            "Expected a folder written by `sdseg train` (with model_index.json) or such a model on the hub."
            + _hub_remedy(location, error)
        ) from error
    if not isinstance(pipeline, SDSegPipeline):
        raise ModelError(f"model {location!r} is a {type(pipeline).__name__}, expected an SDSegPipeline.")
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _hub_remedy(location: str, error: BaseException) -> str:
    """What to do where a model of the hub cannot be had, by the hub's answer; "" for a folder."""
    if Path(location).is_dir():
        return ""
    cause: BaseException | None = error
    status = None
    while cause is not None and status is None:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        cause = cause.__cause__ or cause.__context__
    taken = f" No folder {location} is here, so it was taken for a hub id."
    if status in (401, 403, 404):
        return f"{taken} The hub answered {status}: check it, and for a private model the token (HF_TOKEN)."
    return f"{taken} Check the network, HF_HUB_OFFLINE and HF_ENDPOINT; or copy the model here."


def replace_decoder(pipeline: SDSegPipeline, location: str) -> None:
    """Put a distilled decoder in the place of a pipeline's autoencoder.

    Args:
        pipeline: changed in place; it can then predict, and no longer encode masks.
        location: folder of a :class:`MaskDecoder`.

    Raises:
        UsageError: there is none, or it was made for another autoencoder.
        ModelError: it is not as its manifest says.
    """
    quiet_diffusers()
    folder = Path(location)
    refuse_altered(folder)
    remedy = "Make one with: sdseg autoencoder --distill MODEL --out FOLDER"
    try:
        kind = MaskDecoder.load_config(folder).get("_class_name") if folder.is_dir() else "no folder"
        if kind != "MaskDecoder":
            raise ValueError(f"found {kind}, expected a MaskDecoder")
        decoder, found = MaskDecoder.from_pretrained(folder, output_loading_info=True)
        _refuse_partial(found["missing_keys"], found["unexpected_keys"])
    except _LOAD_FAILURES as error:
        raise UsageError(f"--decoder {location} cannot be read ({_reason(error)}). {remedy}") from error
    if not isinstance(pipeline.autoencoder, AutoencoderKL):
        raise UsageError(
            f"--decoder {location} reads the latents of a KL autoencoder, and this model has none. Leave it "
            "out: the model's own decoder is small."
        )
    own = fingerprint(pipeline.autoencoder)
    if decoder.config["made_for"] != own:
        raise UsageError(
            f"--decoder {location} was made for another KL autoencoder ({decoder.config['made_for'][:12]}, "
            f"the model's is {own[:12]}). {remedy}, of this model."
        )
    pipeline.register_modules(autoencoder=decoder.eval().requires_grad_(False).to(pipeline.device))


def _check_whole(network: torch.nn.Module, folder: Path) -> None:
    """Raise a ValueError where the files of a component lack or exceed its tensors."""
    stored: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            stored.update(file.keys())
    expected = set(network.state_dict())
    try:
        _refuse_partial(expected - stored, stored - expected)
    except ValueError as error:
        raise ValueError(f"{folder.name}: {error}") from error


def _reason(error: BaseException) -> str:
    """The first sentence of an error, without the library's advice to its own callers."""
    text = str(error).strip() or type(error).__name__
    for advice in _ADVICE:
        text = text.split(advice)[0]
    return " ".join(text.split()).rstrip(".:")[:400]


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:2])[:400] if lines else type(error).__name__
