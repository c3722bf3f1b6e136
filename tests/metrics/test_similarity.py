"""PSNR, SSIM and MS-SSIM against scikit-image and hand-worked values; LPIPS against the lpips package."""

import hashlib
import math

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torchmetrics.functional.image import structural_similarity_index_measure

from sdseg_cli.core.errors import ModelError
from sdseg_cli.core.metrics import similarity
from sdseg_cli.core.metrics.similarity import (
    PerceptualDistance,
    find_perceptual_trunk,
    ms_ssim,
    pair_scores,
    psnr,
    ssim,
)


def ellipse(height=192, width=200, shift=0, value=255):
    y, x = np.mgrid[:height, :width]
    inside = ((y - height / 2) / (height / 4)) ** 2 + ((x - width / 2 - shift) / (width / 4)) ** 2 < 1
    return (inside * value).astype(np.uint8)


def noise(seed, height=40, width=48):
    return np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)


def torchmetrics_ssim(first, second, data_range):
    pair = (torch.from_numpy(picture.astype(np.float64))[None, None] for picture in (first, second))
    _, full = structural_similarity_index_measure(*pair, data_range=float(data_range), return_full_image=True)
    return float(full[..., 5:-5, 5:-5].mean())


def test_psnr_of_a_known_error():
    target = np.full((8, 8), 100, np.uint8)
    assert psnr(target + 5, target) == pytest.approx(20 * math.log10(255 / 5), abs=1e-5)


def test_official_psnr_takes_its_range_from_the_target_alone():
    target = np.full((8, 8), 100, np.uint8)  # from min(100, 0) to 100
    picture = np.full((8, 8), 200, np.uint8)
    assert psnr(picture, target, "sdseg") == pytest.approx(20 * math.log10(100 / 100), abs=1e-5)
    assert psnr(target, picture, "sdseg") == pytest.approx(20 * math.log10(200 / 100), abs=1e-5)


@pytest.mark.parametrize(
    ("picture", "target"), [(ellipse(shift=3), ellipse()), (noise(1), noise(2)), (noise(1) // 2, noise(1))]
)
def test_ssim_equals_torchmetrics_without_its_border(picture, target):
    assert ssim(picture, target) == pytest.approx(torchmetrics_ssim(picture, target, 255), abs=1e-12)


def test_official_ssim_uses_the_larger_of_the_two_ranges():
    picture, target = noise(1) // 2, noise(2) // 4
    larger = max(np.ptp(picture), np.ptp(target))
    assert ssim(picture, target, "sdseg") == pytest.approx(
        torchmetrics_ssim(picture, target, larger), abs=1e-12
    )
    assert ssim(picture, target, "sdseg") == pytest.approx(ssim(target, picture, "sdseg"), abs=1e-12)


def test_ms_ssim_equals_torchmetrics_under_standard():
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    pair = [torch.from_numpy(p.astype(np.float64))[None, None] for p in (ellipse(shift=3), ellipse())]
    expected = float(multiscale_structural_similarity_index_measure(*pair, data_range=255.0))
    assert ms_ssim(ellipse(shift=3), ellipse()) == pytest.approx(expected, abs=1e-12)


def test_official_ms_ssim_is_the_product_over_five_scales_of_borderless_terms():
    """Worked with scikit-image: contrast = SSIM with the luminance term divided out."""
    from scipy.ndimage import gaussian_filter

    pair = ellipse(width=192, shift=3, value=200), ellipse(width=192)
    first, second = (picture.astype(np.float64) for picture in pair)
    expected = 1.0
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        data_range = max(np.ptp(first), np.ptp(second))
        settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        mean, picture = structural_similarity(first, second, data_range=data_range, full=True, **settings)
        if scale == 4:
            expected *= mean**weight
            break
        c1 = (0.01 * data_range) ** 2
        a, b = (gaussian_filter(p, 1.5, truncate=3.5) for p in (first, second))
        luminance = (2 * a * b + c1) / (a**2 + b**2 + c1)
        expected *= (picture / luminance)[5:-5, 5:-5].mean() ** weight
        first, second = (
            p.reshape(p.shape[0] // 2, 2, p.shape[1] // 2, 2).mean((1, 3)) for p in (first, second)
        )
    assert ms_ssim(*pair, "sdseg") == pytest.approx(expected, abs=1e-9)


def test_an_identical_pair_is_fully_similar_and_has_no_psnr():
    for protocol in ("standard", "sdseg"):
        scores = pair_scores(ellipse(), ellipse(), protocol)
        assert scores.identical
        assert math.isnan(scores.psnr)
        assert scores.ssim == pytest.approx(1.0)
        assert scores.ms_ssim == pytest.approx(1.0)


def test_the_official_protocol_skips_a_black_target_and_the_standard_one_does_not():
    black = np.zeros((192, 200), np.uint8)
    official = pair_scores(ellipse(), black, "sdseg")
    assert official.skipped
    assert math.isnan(official.ssim)
    standard = pair_scores(ellipse(), black, "standard")
    assert not standard.skipped
    assert 0 < standard.ssim < 0.95


@pytest.mark.parametrize("protocol", ["standard", "sdseg"])
def test_ms_ssim_needs_176_pixels_a_side(protocol):
    small, enough = ellipse(175, 200), ellipse(176, 176)
    assert math.isnan(ms_ssim(small, small, protocol))
    assert ms_ssim(enough, enough, protocol) == pytest.approx(1.0)


def test_flat_pictures_of_different_grey_have_no_official_ssim():
    assert math.isnan(ssim(np.full((16, 16), 9, np.uint8), np.full((16, 16), 8, np.uint8), "sdseg"))


@pytest.mark.faults
def test_floats_and_different_shapes_are_refused():
    with pytest.raises(ValueError, match="float64 and uint8, expected uint8"):
        pair_scores(np.zeros((4, 4)), np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match=r"shapes \(4, 4\) and \(4, 5\)"):
        pair_scores(np.zeros((4, 4), np.uint8), np.zeros((4, 5), np.uint8))


@pytest.fixture(scope="module")
def made_trunk(tmp_path_factory):
    """Random features in the layout of torchvision's AlexNet file (without the large classifier)."""
    from torchvision.models import alexnet

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        weights = {k: v for k, v in alexnet(weights=None).state_dict().items() if k.startswith("features.")}
    path = tmp_path_factory.mktemp("lpips") / "made.pth"
    torch.save(weights, path)
    return path


def test_lpips_with_a_made_trunk_equals_the_lpips_package_called_directly(made_trunk):
    import lpips

    direct = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    features = torch.load(made_trunk, weights_only=True)
    for part in (
        direct.net.slice1,
        direct.net.slice2,
        direct.net.slice3,
        direct.net.slice4,
        direct.net.slice5,
    ):
        for index, layer in part.named_children():
            if isinstance(layer, torch.nn.Conv2d):
                layer.weight.data = features[f"features.{index}.weight"]
                layer.bias.data = features[f"features.{index}.bias"]
    pictures = np.stack([noise(seed, 64, 70) for seed in (1, 2, 3)])
    targets = np.stack([noise(4, 64, 70)] * 3)
    with torch.no_grad():
        expected = [
            float(direct(*(torch.from_numpy(p / 127.5 - 1).float().expand(1, 3, -1, -1) for p in pair)))
            for pair in zip(pictures, targets, strict=True)
        ]
    assert PerceptualDistance(made_trunk)(pictures, targets) == pytest.approx(expected, abs=1e-6)
    assert min(expected) > 0.01


def test_lpips_of_equal_pictures_is_zero_and_colour_is_taken_as_it_is(made_trunk):
    distance = PerceptualDistance(made_trunk)
    grey = noise(1, 64, 64)[None]
    assert distance(grey, grey) == [0.0]
    assert distance(np.stack([grey] * 3, -1), np.stack([noise(2, 64, 64)[None]] * 3, -1)) == pytest.approx(
        distance(grey, noise(2, 64, 64)[None]), abs=1e-6
    )


def test_lpips_does_not_depend_on_its_batches(made_trunk, monkeypatch):
    distance = PerceptualDistance(made_trunk)
    pictures = np.stack([noise(seed, 40, 40) for seed in range(5)])
    together = distance(pictures, pictures[::-1].copy())
    monkeypatch.setattr(similarity, "LPIPS_BATCH", 2)
    assert distance(pictures, pictures[::-1].copy()) == pytest.approx(together, abs=1e-6)


def test_lpips_of_pictures_too_small_for_its_network_is_undefined(made_trunk):
    tiny = np.zeros((2, 31, 64), np.uint8)
    assert all(math.isnan(value) for value in PerceptualDistance(made_trunk)(tiny, tiny))


@pytest.mark.faults
def test_lpips_refuses_floats_which_its_network_would_take_without_a_word(made_trunk):
    with pytest.raises(ValueError, match="expected uint8"):
        PerceptualDistance(made_trunk)(np.zeros((1, 64, 64)), np.zeros((1, 64, 64)))


@pytest.mark.faults
def test_without_a_trunk_the_message_says_where_it_belongs_and_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ModelError, match=r"alexnet-owt-7be5be79\.pth is not there.*--lpips-backbone"):
        find_perceptual_trunk()


@pytest.mark.faults
def test_an_altered_file_in_the_cache_is_refused_by_its_hash(tmp_path, monkeypatch, made_trunk):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(made_trunk.read_bytes())
    with pytest.raises(ModelError, match=r"expected 7be5be79\. The file is damaged or altered"):
        find_perceptual_trunk()
    digest = hashlib.sha256(cached.read_bytes()).hexdigest()
    monkeypatch.setattr(similarity, "_hash_prefix", lambda: digest[:8])
    assert find_perceptual_trunk() == cached


@pytest.mark.faults
def test_a_trunk_that_is_missing_torn_or_foreign_is_refused_by_name(tmp_path, made_trunk):
    with pytest.raises(ModelError, match=r"gone\.pth: no such file"):
        find_perceptual_trunk(str(tmp_path / "gone.pth"))
    torn = tmp_path / "torn.pth"
    torn.write_bytes(made_trunk.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"torn\.pth: cannot be read"):
        PerceptualDistance(torn)
    foreign = tmp_path / "foreign.pth"
    torch.save({"conv.weight": torch.zeros(1)}, foreign)
    with pytest.raises(ModelError, match=r"foreign\.pth: no 'features\.0\.weight'"):
        PerceptualDistance(foreign)
