"""How alike two pictures of the same case are: PSNR, SSIM, MS-SSIM and LPIPS, under a named protocol.

``standard``: range 255, MS-SSIM as torchmetrics computes it today.

``sdseg``: the published stability protocol. It was run with a torchmetrics that inferred the range
from each pair, so the ranges are worked out here and passed on: PSNR's from the target alone,
max(target, 0) - min(target, 0); SSIM's the larger of the two pictures' own ranges; MS-SSIM's the
same at each of its five scales, with the border of every scale cut off and no clamping. Pairs whose
target is black are skipped.

Under both protocols SSIM leaves out the 5 outermost pixels, where its window hangs over the edge (as
scikit-image does), an identical pair has no PSNR, and a figure that cannot be computed is NaN.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from sdseg_cli.core.errors import ModelError

if TYPE_CHECKING:
    import torch

Protocol = Literal["standard", "sdseg"]
PROTOCOLS: tuple[str, ...] = get_args(Protocol)

SSIM_BORDER = 5  # half of the 11-pixel Gaussian window
SSIM_MIN_SIDE = 11
MS_SSIM_MIN_SIDE = 176  # five scales: 176 / 16 = 11, one window
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang, Simoncelli, Bovik 2003, section 4

LPIPS_MIN_SIDE = 32  # AlexNet's pools leave nothing of a smaller picture
LPIPS_BATCH = 50
LPIPS_TRUNK_URL = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
LPIPS_TRUNK_FILE = "alexnet-owt-7be5be79.pth"  # the digits are the start of the file's SHA-256


@dataclass(frozen=True)
class PairScores:
    """Similarity of one pair of pictures; NaN where a figure is not defined."""

    psnr: float  # dB; NaN for an identical pair
    ssim: float
    ms_ssim: float  # NaN below 176 pixels a side
    identical: bool
    skipped: bool  # the protocol leaves this pair out; all figures are NaN


def pair_scores(picture: np.ndarray, target: np.ndarray, protocol: Protocol = "standard") -> PairScores:
    """Compare two pictures.

    Args:
        picture: uint8, (H, W), grey values in [0, 255]. (Three equal channels give the same figures.)
        target: uint8, the same shape; the protocol's reference, the first run.
        protocol: see the module.

    Returns:
        The figures, computed in float64.

    Raises:
        ValueError: the shapes differ, or the pictures are not two-dimensional uint8.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol is {protocol!r}, expected one of {', '.join(PROTOCOLS)}")
    if picture.shape != target.shape or picture.ndim != 2:
        raise ValueError(f"pictures have shapes {picture.shape} and {target.shape}, expected one (H, W)")
    if picture.dtype != np.uint8 or target.dtype != np.uint8:
        raise ValueError(f"pictures are {picture.dtype} and {target.dtype}, expected uint8")
    identical = bool(np.array_equal(picture, target))
    if protocol == "sdseg" and not target.any():
        return PairScores(math.nan, math.nan, math.nan, identical, skipped=True)
    return PairScores(
        math.nan if identical else psnr(picture, target, protocol),
        ssim(picture, target, protocol),
        ms_ssim(picture, target, protocol),
        identical,
        skipped=False,
    )


def psnr(picture: np.ndarray, target: np.ndarray, protocol: Protocol = "standard") -> float:
    """Peak signal-to-noise ratio in dB; infinite for an identical pair, arguments as :func:`pair_scores`."""
    import torch
    from torchmetrics.functional.image import peak_signal_noise_ratio

    data_range = 255.0
    if protocol == "sdseg":
        data_range = float(max(int(target.max()), 0) - min(int(target.min()), 0))
        if data_range == 0:
            return math.nan
    first, second = _tensor(picture), _tensor(target)
    if torch.equal(first, second):
        return math.inf
    return float(peak_signal_noise_ratio(first, second, data_range=data_range))


def ssim(picture: np.ndarray, target: np.ndarray, protocol: Protocol = "standard") -> float:
    """Structural similarity (Wang et al. 2004) without the border; NaN below 11 pixels a side.

    Arguments as :func:`pair_scores`. Two flat pictures have no range under ``sdseg``: alike or NaN.
    """
    from skimage.metrics import structural_similarity

    if min(picture.shape) < SSIM_MIN_SIDE:
        return math.nan
    data_range = 255.0
    if protocol == "sdseg":
        data_range = float(max(np.ptp(picture), np.ptp(target)))
    if data_range == 0:  # both constants vanish: 0 / 0
        return 1.0 if np.array_equal(picture, target) else math.nan
    # Its filters are separable: 0.03 s for 600 pixels, where torchmetrics' convolution takes 9 s on a CPU.
    return float(
        structural_similarity(
            picture,
            target,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=data_range,
        )
    )


def ms_ssim(picture: np.ndarray, target: np.ndarray, protocol: Protocol = "standard") -> float:
    """Multi-scale SSIM (Wang, Simoncelli, Bovik 2003); NaN below 176 pixels a side.

    Arguments as :func:`pair_scores`. Under ``sdseg`` a negative contrast term has no real power: NaN.
    """
    from torch.nn import functional
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    if min(picture.shape) < MS_SSIM_MIN_SIDE:
        return math.nan
    first, second = _tensor(picture), _tensor(target)
    if protocol == "standard":
        return float(multiscale_structural_similarity_index_measure(first, second, data_range=255.0))
    product = 1.0
    for scale, weight in enumerate(MS_SSIM_WEIGHTS):
        similarity, contrast = _ssim_parts(first, second, _range(first, second, protocol))
        factor = similarity if scale == len(MS_SSIM_WEIGHTS) - 1 else contrast
        if not factor >= 0:
            return math.nan
        product *= factor**weight
        first, second = functional.avg_pool2d(first, 2), functional.avg_pool2d(second, 2)
    return product


def _tensor(picture: np.ndarray) -> torch.Tensor:
    import torch

    # float64: float32 is off by 1.5e-4 on masks.
    return torch.from_numpy(picture.astype(np.float64))[None, None]


def _range(first: torch.Tensor, second: torch.Tensor, protocol: Protocol) -> float:
    if protocol == "standard":
        return 255.0
    return max(float(picture.max() - picture.min()) for picture in (first, second))


def _ssim_parts(first: torch.Tensor, second: torch.Tensor, data_range: float) -> tuple[float, float]:
    """(similarity, contrast), means over the picture without its border; 1 for two flat equal pictures."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    if data_range == 0:
        # Both constants vanish: 0 / 0. Flat pictures are alike if they have the same grey.
        same = float(first.mean()) == float(second.mean())
        return (1.0, 1.0) if same else (math.nan, 1.0)
    _, full = structural_similarity_index_measure(
        first, second, data_range=data_range, return_full_image=True
    )
    _, contrast = structural_similarity_index_measure(
        first, second, data_range=data_range, return_contrast_sensitivity=True
    )
    inside = full[..., SSIM_BORDER:-SSIM_BORDER, SSIM_BORDER:-SSIM_BORDER]
    return float(inside.mean()), float(contrast.mean())


class PerceptualDistance:
    """LPIPS with AlexNet (Zhang et al. 2018), version 0.1."""

    def __init__(self, trunk: Path, *, device: str = "cpu") -> None:
        """Load the network.

        Args:
            trunk: torchvision's AlexNet weights: a state dict with ``features.*`` (a ``.pth`` file). The
                linear heads come with the lpips package.
            device: where to compute.

        Raises:
            ModelError: the file is not there, cannot be read, or is no AlexNet.
        """
        import lpips
        import torch

        state = _read_trunk(trunk)
        # The package's own trunk would be fetched over the network: start it empty and fill it here.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # It asks torchvision in an old way, and draws weights that are replaced below.
            warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
            network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
        parts: dict[str, Any] = {}
        for name in network.net.state_dict():  # "slice2.3.weight" is torchvision's "features.3.weight"
            source = "features." + name.split(".", 1)[1]
            if source not in state:
                raise ModelError(
                    f"{trunk}: no {source!r} in this file, so it is no AlexNet of torchvision. "
                    f"Get {LPIPS_TRUNK_URL} and pass its path as --lpips-backbone."
                )
            parts[name] = state[source]
        try:
            network.net.load_state_dict(parts)
        except RuntimeError as error:
            raise ModelError(
                f"{trunk}: the weights have other shapes than AlexNet's. Get {LPIPS_TRUNK_URL}."
            ) from error
        self._network = network.to(torch.device(device)).eval()
        self._device = torch.device(device)

    def __call__(self, pictures: np.ndarray, targets: np.ndarray) -> list[float]:
        """Distances of pairs.

        Args:
            pictures: uint8, (N, H, W) or (N, H, W, 3), range [0, 255], scaled to [-1, 1] here.
            targets: the same shape.

        Returns:
            N distances, 0 for equal pictures; NaN below 32 pixels a side.

        Raises:
            ValueError: the shapes differ or the type is not uint8.
        """
        import torch

        if pictures.shape != targets.shape or pictures.ndim not in (3, 4):
            raise ValueError(f"pictures have shapes {pictures.shape} and {targets.shape}")
        if pictures.dtype != np.uint8 or targets.dtype != np.uint8:
            # The network would take any range without a word.
            raise ValueError(f"pictures are {pictures.dtype} and {targets.dtype}, expected uint8")
        if min(pictures.shape[1:3]) < LPIPS_MIN_SIDE:
            return [math.nan] * len(pictures)
        distances: list[float] = []
        with torch.inference_mode():
            for start in range(0, len(pictures), LPIPS_BATCH):
                part = slice(start, start + LPIPS_BATCH)
                batch = self._network(self._scaled(pictures[part]), self._scaled(targets[part]))
                distances += [float(value) for value in batch.flatten().cpu()]
        return distances

    def _scaled(self, pictures: np.ndarray) -> torch.Tensor:
        import torch

        if pictures.ndim == 3:
            pictures = np.repeat(pictures[..., None], 3, axis=-1)
        planes = torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)))
        return planes.to(self._device, torch.float32) / 127.5 - 1


def find_perceptual_trunk(choice: str | None = None) -> Path:
    """Where the AlexNet weights for LPIPS are.

    Args:
        choice: a path; ``"download"`` to fetch the file into torch's cache (233 MB); None to look in that
            cache only.

    Returns:
        The path of a file that exists. A file of the cache has been checked against its SHA-256.

    Raises:
        ModelError: it is not at hand, altered, or cannot be fetched; the message says what to do.
    """
    if choice not in (None, "download"):
        path = Path(str(choice))
        if not path.is_file():
            raise ModelError(
                f"LPIPS backbone {path}: no such file. Give torchvision's AlexNet ({LPIPS_TRUNK_URL})."
            )
        return path
    import torch

    cached = Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_TRUNK_FILE
    if not cached.is_file() and choice == "download":
        cached.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(
                LPIPS_TRUNK_URL, str(cached), hash_prefix=_hash_prefix(), progress=False
            )
        except (OSError, RuntimeError) as error:
            raise ModelError(
                f"LPIPS backbone: {LPIPS_TRUNK_URL} could not be fetched ({error}). Copy the file to "
                f"{cached}, or pass its path as --lpips-backbone."
            ) from error
    if not cached.is_file():
        raise ModelError(
            f"its backbone is not at hand: {cached} is not there. Pass --lpips-backbone download "
            f"(233 MB from download.pytorch.org) or --lpips-backbone PATH of {LPIPS_TRUNK_FILE}."
        )
    with cached.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if not digest.startswith(_hash_prefix()):
        raise ModelError(
            f"LPIPS backbone {cached}: SHA-256 starts with {digest[:8]}, expected {_hash_prefix()}. "
            "The file is damaged or altered: delete it and fetch it again."
        )
    return cached


def _hash_prefix() -> str:
    return LPIPS_TRUNK_FILE.rsplit("-", 1)[1].removesuffix(".pth")


def _read_trunk(path: Path) -> dict[str, Any]:
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a torn or foreign file
        raise ModelError(
            f"LPIPS backbone {path}: cannot be read as a file of weights "
            f"({type(error).__name__}). Expected torchvision's AlexNet ({LPIPS_TRUNK_URL})."
        ) from error
    if not isinstance(state, dict):
        raise ModelError(f"LPIPS backbone {path}: holds a {type(state).__name__}, expected a state dict.")
    return state
