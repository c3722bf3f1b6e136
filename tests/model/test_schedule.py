"""The noise schedule: the paper's numbers, and the way back to the clean latent."""

import pytest
import torch

from sdseg_cli.core.model.schedule import make_scheduler, predicted_original, reverse_step

PREDICTIONS = ("epsilon", "sample", "velocity")


def draw(seed: int, count: int = 5) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def target(scheduler, prediction: str, clean, noise, timestep):
    """What a network that knows the truth would say."""
    if prediction == "epsilon":
        return noise
    if prediction == "sample":
        return clean
    return scheduler.get_velocity(clean, noise, timestep)


def test_the_default_is_the_papers_schedule():
    alphas = make_scheduler().alphas_cumprod
    assert len(alphas) == 1000
    assert float(alphas[0]) == pytest.approx(1 - 0.0015, abs=1e-7)
    assert float(alphas[-1]) == pytest.approx(6.687e-4, abs=5e-8)


def test_the_last_step_multiplies_the_error_of_a_predicted_noise_by_38_67():
    scheduler = make_scheduler()
    noisy, last = draw(0), torch.full((5,), 999)
    estimates = [predicted_original(scheduler, output, noisy, last) for output in (draw(1), draw(1) + 1)]
    assert float((estimates[0] - estimates[1]).mean()) == pytest.approx((1 / 6.687e-4 - 1) ** 0.5, rel=1e-4)
    assert float((estimates[0] - estimates[1]).mean()) == pytest.approx(38.67, abs=0.02)


def test_betas_are_linear_in_their_square_roots():
    roots = make_scheduler().betas.double().sqrt()
    steps = roots.diff()
    assert float(roots[0]) == pytest.approx(0.0015**0.5)
    assert float(roots[-1]) == pytest.approx(0.0155**0.5)
    assert torch.allclose(steps, steps.mean().expand_as(steps), rtol=1e-3)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_clean_latent_comes_back_from_what_noise_was_added_to_it(prediction):
    scheduler = make_scheduler(prediction)
    clean, noise, timestep = draw(0), draw(1), torch.tensor([0, 10, 500, 900, 999])
    noisy = scheduler.add_noise(clean, noise, timestep)
    output = target(scheduler, prediction, clean, noise, timestep)
    assert torch.allclose(predicted_original(scheduler, output, noisy, timestep), clean, atol=2e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("step", [0, 500, 999])
def test_the_estimate_equals_that_of_the_scheduler(prediction, step):
    scheduler = make_scheduler(prediction)
    scheduler.set_timesteps(1000)
    noisy, output = draw(0), draw(1)
    theirs = scheduler.step(output, step, noisy).pred_original_sample
    ours = predicted_original(scheduler, output, noisy, torch.full((5,), step))
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_one_step_starts_at_the_last_timestep_and_ends_at_the_estimate(prediction):
    scheduler = make_scheduler(prediction)
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [999]
    noisy, output = draw(0), draw(1)
    estimate = predicted_original(scheduler, output, noisy, torch.full((5,), 999))
    assert torch.equal(reverse_step(scheduler, output, noisy, 999, None), estimate)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 5, 10])
def test_a_reverse_step_equals_the_schedulers_where_the_steps_divide_the_schedule(prediction, steps):
    scheduler = make_scheduler(prediction)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.tolist()
    noisy, output = draw(0), draw(1)
    for timestep, following in zip(timesteps, [*timesteps[1:], None], strict=True):
        theirs = scheduler.step(output, timestep, noisy).prev_sample
        ours = reverse_step(scheduler, output, noisy, timestep, following)
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 50])
def test_any_number_of_steps_with_the_true_answer_ends_at_the_clean_latent(prediction, steps):
    scheduler = make_scheduler(prediction)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.tolist()
    clean, noise = draw(0), draw(1)
    latent = scheduler.add_noise(clean, noise, torch.full((5,), 999))
    for timestep, following in zip(timesteps, [*timesteps[1:], None], strict=True):
        output = target(scheduler, prediction, clean, noise, torch.full((5,), timestep))
        latent = reverse_step(scheduler, output, latent, timestep, following)
    assert torch.allclose(latent, clean, atol=1e-4)


def test_half_precision_is_left_for_the_line_that_amplifies_the_error():
    scheduler = make_scheduler()
    noisy, output, last = draw(0).half(), draw(1).half(), torch.full((5,), 999)
    estimate = predicted_original(scheduler, output, noisy, last)
    assert estimate.dtype == torch.float32
    assert torch.equal(estimate, predicted_original(scheduler, output.float(), noisy.float(), last))
