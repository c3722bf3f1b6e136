"""Image and label map move together, labels stay labels, and every change follows from its seed."""

from __future__ import annotations

import pytest
import torch

from sdseg_cli.core.data.augmentation import Augmentation

OFF = {"horizontal_flip": 0.0, "vertical_flip": 0.0}


def pair(size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """An off-centre rectangle of class 2 and a bar of class 5; the image shows exactly the labels."""
    label_map = torch.zeros(size, size, dtype=torch.uint8)
    label_map[4:14, 6:22] = 2
    label_map[20:26, 3:12] = 5
    return (label_map * 40).expand(3, -1, -1).clone(), label_map


def changes(augmentation: Augmentation, seeds: int = 12) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [augmentation(*pair(), seed=seed) for seed in range(seeds)]


def test_everything_off_changes_nothing() -> None:
    image, label_map = Augmentation(**OFF)(*pair(), seed=1)
    assert torch.equal(image, pair()[0])
    assert torch.equal(label_map, pair()[1])


def test_a_certain_horizontal_flip_mirrors_both() -> None:
    image, label_map = Augmentation(horizontal_flip=1, vertical_flip=0)(*pair(), seed=0)
    assert torch.equal(image, pair()[0].flip(-1))
    assert torch.equal(label_map, pair()[1].flip(-1))


def test_a_certain_vertical_flip_turns_both_upside_down() -> None:
    image, label_map = Augmentation(horizontal_flip=0, vertical_flip=1)(*pair(), seed=0)
    assert torch.equal(image, pair()[0].flip(-2))
    assert torch.equal(label_map, pair()[1].flip(-2))


def test_an_even_chance_flips_about_half_of_the_pictures() -> None:
    flipped = [
        not torch.equal(label_map, pair()[1])
        for _, label_map in changes(Augmentation(horizontal_flip=0.5, vertical_flip=0), 60)
    ]
    assert 15 < sum(flipped) < 45


@pytest.mark.parametrize(
    "setting", [{"rotation_degrees": 40.0}, {"translate": 0.2}, {"scale": 0.3}, {"shear_degrees": 25.0}]
)
def test_each_affine_setting_moves_image_and_label_map_together(setting: dict[str, float]) -> None:
    still = {"rotation_degrees": 0.0, "translate": 0.0, "scale": 0.0, "shear_degrees": 0.0}
    augmentation = Augmentation(**OFF, affine=1.0, **{**still, **setting})
    moved = changes(augmentation)
    assert sum(not torch.equal(label_map, pair()[1]) for _, label_map in moved) > 6
    for image, label_map in moved:
        # Away from the edges, where the image is interpolated, both say the same.
        agree = (image[0].int() - label_map.int() * 40).abs() < 20
        assert agree.float().mean() > 0.9


def test_affine_settings_all_zero_move_nothing() -> None:
    still = {"rotation_degrees": 0.0, "translate": 0.0, "scale": 0.0, "shear_degrees": 0.0}
    image, label_map = Augmentation(**OFF, affine=1.0, **still)(*pair(), seed=3)
    assert torch.equal(label_map, pair()[1])
    assert torch.equal(image, pair()[0])


def test_labels_are_never_interpolated() -> None:
    augmentation = Augmentation(affine=1.0, rotation_degrees=45, scale=0.4, shear_degrees=20, blur=1, noise=1)
    for _, label_map in changes(augmentation):
        assert set(label_map.unique().tolist()) <= {0, 2, 5}


@pytest.mark.parametrize("setting", ["brightness", "contrast", "saturation", "hue"])
def test_each_colour_setting_changes_the_image_and_never_the_label_map(setting: str) -> None:
    off = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    augmentation = Augmentation(**OFF, colour=1.0, **{**off, setting: 0.4})
    picture = torch.randint(
        0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    image, label_map = augmentation(picture, pair()[1], seed=1)
    assert not torch.equal(image, picture)
    assert torch.equal(label_map, pair()[1])


def test_blur_softens_and_noise_roughens_the_image_alone() -> None:
    image, label_map = pair()
    for setting in ("blur", "noise"):
        changed, same = Augmentation(**OFF, **{setting: 1.0})(image, label_map, seed=0)
        assert not torch.equal(changed, image)
        assert torch.equal(same, label_map)
    noisy, _ = Augmentation(**OFF, noise=1.0)(torch.full((3, 64, 64), 128, dtype=torch.uint8), label_map, 0)
    assert 0.01 * 255 < float(noisy.float().std()) < 0.06 * 255


def test_types_and_shapes_stay() -> None:
    everything = Augmentation(affine=1, colour=1, blur=1, noise=1)
    for image, label_map in changes(everything, 4):
        assert type(image) is type(label_map) is torch.Tensor
        assert image.dtype == label_map.dtype == torch.uint8
        assert image.shape == (3, 32, 32)
        assert label_map.shape == (32, 32)


def test_the_same_seed_gives_the_same_change_and_another_seed_another() -> None:
    everything = Augmentation(affine=1, colour=1, blur=0.5, noise=0.5)
    first, again, other = (everything(*pair(), seed=seed) for seed in (7, 7, 2**63 - 1))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_the_global_generator_and_the_inputs_are_left_alone() -> None:
    image, label_map = pair()
    before = torch.random.get_rng_state()
    Augmentation(affine=1, colour=1, blur=1, noise=1)(image, label_map, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(image, pair()[0])
    assert torch.equal(label_map, pair()[1])
