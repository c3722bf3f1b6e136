"""The losses, against numbers worked by hand."""

import math

import pytest
import torch

from sdseg_cli.core.model.losses import diffusion_loss, pixel_loss, segmentation_loss
from sdseg_cli.core.model.schedule import make_scheduler


def constant(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 4, 2, 2)


LAST, FIRST = torch.tensor([999]), torch.tensor([0])


def test_noise_loss_is_the_mean_absolute_error_of_the_noise_of_every_sample():
    loss = diffusion_loss(
        make_scheduler(),
        output=constant(0.5, -1.0),
        clean_latent=constant(0.0, 0.0),
        noisy_latent=constant(0.0, 0.0),
        noise=constant(1.0, 1.0),
        timestep=torch.tensor([10, 20]),
    )
    assert loss.noise.tolist() == [0.5, 2.0]


def test_latent_loss_is_the_noise_error_times_the_schedules_factor():
    scheduler = make_scheduler()
    clean, noise = constant(2.0), constant(1.0)
    noisy = scheduler.add_noise(clean, noise, LAST)
    loss = diffusion_loss(scheduler, constant(0.9), clean, noisy, noise, LAST)
    assert loss.noise.item() == pytest.approx(0.1)
    assert loss.latent.item() == pytest.approx(0.1 * 38.67, abs=0.003)
    assert loss.predicted_original.mean().item() == pytest.approx(2.0 + 3.867, abs=0.003)


def test_both_losses_vanish_for_a_network_that_knows_the_noise():
    scheduler = make_scheduler()
    clean, noise, timestep = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999])
    noisy = scheduler.add_noise(clean, noise, timestep)
    loss = diffusion_loss(scheduler, noise, clean, noisy, noise, timestep)
    assert loss.noise.tolist() == [0.0, 0.0, 0.0]
    assert loss.latent.max().item() < 1e-4


def test_a_network_that_predicts_the_clean_latent_has_one_loss_twice():
    loss = diffusion_loss(
        make_scheduler("sample"), constant(0.25), constant(1.0), constant(7.0), constant(3.0), LAST
    )
    assert loss.noise.item() == 0.75
    assert loss.latent.item() == 0.75


def test_the_velocitys_target_is_signal_times_noise_minus_spread_times_latent():
    scheduler = make_scheduler("velocity")
    clean, noise = constant(2.0), constant(3.0)
    signal, spread = math.sqrt(6.687e-4), math.sqrt(1 - 6.687e-4)
    noisy = scheduler.add_noise(clean, noise, LAST)
    loss = diffusion_loss(scheduler, constant(0.0), clean, noisy, noise, LAST)
    assert loss.noise.item() == pytest.approx(abs(signal * 3 - spread * 2), abs=1e-4)
    # The estimate from velocity 0 is signal * noisy, and noisy is signal * 2 + spread * 3.
    assert loss.latent.item() == pytest.approx(2 - signal * (signal * 2 + spread * 3), abs=1e-4)


def test_losses_are_float32_whatever_the_network_computes_in():
    scheduler = make_scheduler()
    clean, noise = constant(2.0), constant(1.0)
    noisy = scheduler.add_noise(clean, noise, FIRST)
    loss = diffusion_loss(scheduler, constant(0.9).bfloat16(), clean, noisy, noise, FIRST)
    assert loss.noise.dtype == loss.latent.dtype == torch.float32


# Pixels


def test_cross_entropy_and_dice_of_an_undecided_network():
    # p = 1/2 everywhere; truth: 1 of 4 pixels. CE = ln 2; Dice = 1 - (2 * 1/2 + 1) / (2 + 1 + 1) = 1/2.
    truth = torch.tensor([[[1, 0], [0, 0]]])
    loss = segmentation_loss(torch.zeros(1, 2, 2, 2), truth)
    assert loss.item() == pytest.approx(math.log(2) + 0.5)


def test_dice_is_the_mean_over_the_foreground_classes():
    # Certain and right about class 1, undecided never: class 2 is absent and not predicted, Dice loss 0.
    truth = torch.tensor([[[1, 0], [0, 0]]])
    logits = 100.0 * torch.nn.functional.one_hot(truth, 3).movedim(-1, 1)
    assert segmentation_loss(logits, truth).item() == pytest.approx(0, abs=1e-6)
    # All of it called class 2 instead: class 1 loses 1 - 1/2, class 2 loses 1 - 1/5.
    wrong = 100.0 * torch.nn.functional.one_hot(torch.full_like(truth, 2), 3).movedim(-1, 1)
    assert segmentation_loss(wrong, truth).item() == pytest.approx(100 + (0.5 + 0.8) / 2, abs=1e-4)


def test_an_empty_mask_predicted_empty_costs_nothing_and_a_false_alarm_does():
    truth = torch.zeros(1, 1, 4, 4)
    assert pixel_loss(torch.full((1, 1, 4, 4), -10.0), truth).item() < 1e-2
    assert pixel_loss(torch.full((1, 1, 4, 4), 1.0), truth).item() > 1


def test_pixel_loss_reads_log_odds():
    # log-odds ln 3 are probability 0.75: CE = -ln 0.75; Dice = 1 - (2 * 3 + 1) / (3 + 4 + 1).
    logits, truth = torch.full((1, 1, 2, 2), math.log(3)), torch.ones(1, 1, 2, 2)
    assert pixel_loss(logits, truth).item() == pytest.approx(-math.log(0.75) + 1 - 7 / 8, abs=1e-5)


def test_a_pixel_that_is_certain_and_wrong_has_the_largest_gradient():
    logits = torch.tensor([-40.0, -1.0, 1.0, 40.0]).view(1, 1, 2, 2).requires_grad_()
    loss = pixel_loss(logits, torch.ones(1, 1, 2, 2))
    loss.sum().backward()
    gradient = logits.grad.flatten().abs()
    assert torch.isfinite(loss).all()
    assert gradient[0] >= 0.25  # of the cross-entropy, one of four pixels
    assert gradient[3] < 1e-6


def test_every_sample_has_its_own_loss():
    scores, masks = torch.randn(3, 1, 8, 8), (torch.rand(3, 1, 8, 8) > 0.5).float()
    together = pixel_loss(scores, masks)
    alone = torch.cat([pixel_loss(scores[i : i + 1], masks[i : i + 1]) for i in range(3)])
    assert together.shape == (3,)
    assert torch.allclose(together, alone)


def test_the_background_of_several_masks_has_log_odds_of_zero():
    # Two masks of log-odds ln 3 and 0 at one pixel: softmax over (0, ln 3, 0) gives the first 3 / 5.
    logits = torch.tensor([math.log(3), 0.0]).view(1, 2, 1, 1)
    first = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    dice = (1 - (2 * 0.6 + 1) / (1.6 + 1), 1 - 1 / (0.2 + 1))
    assert pixel_loss(logits, first).item() == pytest.approx(-math.log(0.6) + sum(dice) / 2, abs=1e-5)
    dice = (1 - 1 / (0.6 + 1), 1 - 1 / (0.2 + 1))
    expected = -math.log(0.2) + sum(dice) / 2  # all background
    assert pixel_loss(logits, torch.zeros(1, 2, 1, 1)).item() == pytest.approx(expected, abs=1e-5)
