"""The distilled decoder: it learns to agree with the full one, and stands in its place."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from sdseg_cli.commands.autoencoder import autoencoder as command
from sdseg_cli.commands.prepare import phantom
from sdseg_cli.core.data.prepared import PreparedDataset
from sdseg_cli.core.engine.distillation import (
    ask_teacher,
    compare_decoders,
    exact_latents,
    gather_answers,
    make_mask_decoder,
    predicted_latents,
    soft_mask_loss,
    train_mask_decoder,
    with_unsure_latents,
)
from sdseg_cli.core.engine.inference import load_predictor
from sdseg_cli.core.errors import DataError, ModelError, UsageError
from sdseg_cli.core.model.image_encoder import KLImageEncoder
from sdseg_cli.core.model.latents import decode_latents, decode_logits, posterior, spatial_factor
from sdseg_cli.core.model.mask_autoencoder import MaskAutoencoder
from sdseg_cli.core.model.mask_decoder import MaskDecoder, fingerprint
from sdseg_cli.core.model.pipeline import SDSegPipeline
from sdseg_cli.core.model.schedule import make_scheduler
from sdseg_cli.core.model.unet import SDSegUNet
from sdseg_cli.core.run_directory import resolve_model
from tests.small_models import small_kl

CPU = torch.device("cpu")


def pipeline_of(classes: tuple[str, ...], *, conditional: bool = False, joint: bool = False) -> SDSegPipeline:
    torch.manual_seed(1)
    count = len(classes)
    pipeline = SDSegPipeline(
        unet=SDSegUNet(
            sample_size=4,
            latent_channels=4 * (count - 1 if joint else 1),
            channels=(32,),
            blocks=1,
            heads=4,
            attention_strides=(),
            num_class_embeds=count if conditional else None,
        ),
        image_encoder=KLImageEncoder(channels=(32, 32, 32, 32), blocks=1),
        autoencoder=small_kl(),
        scheduler=make_scheduler("sample"),
        image_size=32,
        classes=list(classes),
        latent_scale=0.5,
    )
    for component in (pipeline.unet, pipeline.image_encoder):
        component.eval().requires_grad_(False)
        for parameter in component.parameters():  # what begins at zero would hide the noise and the class
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    return pipeline


@pytest.fixture(scope="module")
def kl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kl")
    small_kl().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A pipeline on that KL autoencoder."""
    folder = tmp_path_factory.mktemp("model")
    pipeline_of(("background", "foreground")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(kl, tmp_path_factory):
    """What the command makes in a few steps."""
    out = tmp_path_factory.mktemp("small") / "decoder"
    command(out=out, distill=str(kl), steps=3, batch_size=2, masks=16, size=64, device="cpu")
    return out


def squares(count: int, size: int = 32) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    found = []
    for _ in range(count):
        mask = np.zeros((size, size), np.uint8)
        top, left = draw.integers(0, size // 2, 2)
        mask[top : top + size // 2, left : left + size // 2] = 1
        found.append(mask)
    return found


def taught(teacher, masks: list[np.ndarray], seed: int = 0, max_noise: float = 0.5):
    """Latents (N, C, h, w) and answers (N, S, S), exact and unsure in turn."""
    chunks = with_unsure_latents(exact_latents(teacher, masks), seed=seed, max_noise=max_noise)
    return gather_answers(ask_teacher(teacher, chunks), len(masks))


def test_it_learns_what_the_full_decoder_makes_of_the_latents_of_masks():
    masks = squares(24)
    teacher = small_kl()
    with torch.no_grad():  # one whose answers are no mask that it was given, as an untrained one's are not
        teacher.decoder.conv_out.weight.mul_(20)
    latents, wanted = taught(teacher, masks)
    assert latents.shape == (24, 4, 4, 4)
    assert (wanted.shape, wanted.dtype) == ((24, 32, 32), torch.float16)
    decoder = make_mask_decoder(teacher, latents, (16, 32))
    before = compare_decoders(decoder, teacher, exact_latents(teacher, masks)).agreement.mean()
    options = {"steps": 60, "batch_size": 8, "learning_rate": 5e-3, "seed": 0, "device": CPU}
    reports = list(train_mask_decoder(decoder, latents, wanted, report_every=20, **options))
    assert [report.step for report in reports] == [20, 40, 60]
    after = compare_decoders(decoder, teacher, exact_latents(teacher, masks))
    assert after.agreement.mean() > before + 0.1
    assert after.agreement.mean() > after.small_with_truth.mean() + 0.1


def test_what_the_full_decoder_doubts_is_learned_as_doubt():
    wanted = torch.full((2, 1, 32, 32), 0.01)
    wanted[:, :, 4:8, 4:8] = 0.4
    logits = torch.zeros_like(wanted, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        soft_mask_loss(logits, wanted).backward()
        optimizer.step()
    torch.testing.assert_close(
        logits.sigmoid().detach(), wanted, atol=0.02, rtol=0
    )  # not 0.84, as by soft Dice


def test_every_second_latent_it_learns_from_is_exact_and_the_others_lie_between_masks_with_noise():
    masks, teacher = squares(10), small_kl()
    latents, wanted = taught(teacher, masks, seed=3)
    exact = posterior(teacher, torch.from_numpy(np.stack(masks)).float().unsqueeze(1)).mode()
    for index, (latent, said) in enumerate(zip(latents, wanted, strict=True)):
        assert torch.allclose(latent, exact[index], atol=1e-5) is (index % 2 == 0)
        decoded = decode_latents(teacher, latent.unsqueeze(0), scale=1.0)[0, 0]
        assert torch.allclose(said.float(), decoded, atol=2e-3)  # what the full decoder says of this very one
    quiet, _ = taught(teacher, masks, seed=3, max_noise=0)
    low, high = exact[:4].amin(dim=0) - 1e-5, exact[:4].amax(dim=0) + 1e-5
    assert all(bool(((latent >= low) & (latent <= high)).all()) for latent in quiet[1:4:2])
    assert not torch.equal(quiet[1], latents[1])
    again, _ = taught(teacher, masks, seed=3)
    other, _ = taught(teacher, masks, seed=4)
    assert torch.equal(again, latents)
    assert not torch.equal(other[1], latents[1])


def test_decoders_are_compared_with_each_other_and_the_truth_on_masks_that_are_not_empty():
    teacher = small_kl()
    decoder = make_mask_decoder(teacher, torch.randn(4, 4, 4, 4), (16, 32)).eval()
    masks = [np.zeros((32, 32), np.uint8), *squares(5), np.zeros((32, 32), np.uint8)]
    found = compare_decoders(decoder, teacher, exact_latents(teacher, masks))
    truth = torch.from_numpy(np.stack(masks[1:-1]))
    latents = posterior(teacher, truth.float().unsqueeze(1)).mode()
    with torch.no_grad():
        small, full = (decode_latents(one, latents, scale=1.0)[:, 0] > 0.5 for one in (decoder, teacher))
    for scores, pair in (
        (found.agreement, (small, full)),
        (found.small_with_truth, (small, truth)),
        (found.full_with_truth, (full, truth)),
    ):
        assert scores == pytest.approx([dice(a.numpy(), b.numpy()) for a, b in zip(*pair, strict=True)])
    assert len(compare_decoders(decoder, teacher, exact_latents(teacher, masks[:1])).agreement) == 0


def dice(first: np.ndarray, second: np.ndarray) -> float:
    total = (first > 0).sum() + (second > 0).sum()
    return 2 * float(((first > 0) & (second > 0)).sum()) / float(total) if total else 1.0


# ---- on what a model predicts


@pytest.fixture(scope="module")
def dataset(organs) -> PreparedDataset:
    return PreparedDataset.open(organs)


ORGANS = ("background", "large", "middle", "small")


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", ["binary", "conditional", "joint"])
def test_latents_that_a_model_predicts_are_those_that_its_masks_are_decoded_of(dataset, polyps, kind, steps):
    if kind == "binary":
        pipeline, dataset = pipeline_of(("background", "polyp")), PreparedDataset.open(polyps)
    else:
        pipeline = pipeline_of(ORGANS, **{kind: True})
    split = dataset.split("train")
    items = [split[position] for position in range(len(split))]
    chunks = list(predicted_latents(pipeline, split, count=len(split), seed=5, num_inference_steps=steps))
    latents = torch.cat([latents for latents, _ in chunks])
    truths = torch.cat([truths for _, truths in chunks]).numpy().reshape(len(split), -1, 32, 32)
    foreground = range(1, pipeline.num_classes)
    for item, truth in zip(items, truths, strict=True):
        label_map = item.grid.labels_to_model(item.label_map)
        whole = [label_map != 0] if kind == "conditional" else []
        assert np.array_equal(truth, [*whole, *(label_map == label for label in foreground)])
    assert truths.any()
    scores = 2 * decode_latents(pipeline.autoencoder, latents, scale=1.0).reshape(*truths.shape) - 1
    background = -scores[:, :1] if kind == "conditional" else -scores.amax(dim=1, keepdim=True)
    scores = torch.cat([background, scores[:, -len(foreground) :]], dim=1)
    drawn = pipeline.sample(
        [item.image for item in items],
        seed=5,
        num_inference_steps=steps,
        case_ids=[item.case_id for item in items],
        slice_indices=[item.slice_index for item in items],
    )[:, 0]
    assert len(np.unique(drawn.argmax(axis=1))) > 1
    assert (scores.argmax(dim=1).numpy() == drawn.argmax(axis=1)).mean() > 0.999  # of ties either may win


def test_images_are_spread_over_a_split_and_come_again_with_other_noise(dataset):
    pipeline = pipeline_of(ORGANS, joint=True)
    split = dataset.split("train")

    def predict(count: int, seed: int = 0) -> torch.Tensor:
        chunks = predicted_latents(pipeline, split, count=count, seed=seed)
        return torch.cat([latents for latents, _ in chunks]).reshape(count, 3, 4, 4, 4)

    once, twice = predict(len(split)), predict(2 * len(split))
    torch.testing.assert_close(twice[: len(split)], once)
    assert not torch.allclose(twice[len(split) :], once)
    half = predict(2)
    torch.testing.assert_close(half, once[[0, len(split) // 2]])
    assert not torch.allclose(predict(2, seed=1), half)


def test_the_command_learns_from_what_a_model_predicts_and_tells_how_far_its_masks_are_from_the_truth(
    dataset, tmp_path, capsys
):
    pipeline_of(ORGANS, conditional=True).save_pretrained(tmp_path / "model")
    few = {"steps": 2, "batch_size": 2, "masks": 24, "device": "cpu", "as_json": True}
    command(out=tmp_path / "small", distill=str(tmp_path / "model"), data=dataset.root, **few)
    told = json.loads(capsys.readouterr().out)
    masks = 24 + sum(len(np.unique(item.label_map)) - 1 for item in dataset.split("train"))
    assert told["predicted_latents"] == masks // 2 // 4 * 4  # four of an image
    found = told["agreement_dice"]["predictions for validation"]
    assert set(found) == {"mean", "worst", "with_truth", "full_with_truth"}
    assert 0 <= found["worst"] <= found["mean"] <= 1
    manifest = json.loads((tmp_path / "small" / "manifest.json").read_text())
    assert manifest["model"]["location"] == str(tmp_path / "model")
    assert manifest["predicted_latents"] == told["predicted_latents"]
    swapped = load_predictor(
        resolve_model(str(tmp_path / "model")), device="cpu", decoder=str(tmp_path / "small")
    )
    assert isinstance(swapped.pipeline.autoencoder, MaskDecoder)


FEW = {"steps": 2, "batch_size": 2, "masks": 16, "device": "cpu"}


def test_a_run_is_distilled_on_what_it_was_trained_on_and_its_test_split_is_not_opened(
    kl, polyps, tiny_recipe, trained, tmp_path, monkeypatch, capsys
):
    data = tmp_path / "data"
    shutil.copytree(polyps, data)
    changes = {"data.dataset": str(data), "model.autoencoder": str(kl), "sampling.num_inference_steps": 2}
    changes |= {"objective.timesteps": "uniform", "train.embed_autoencoder": False}
    run = trained(tiny_recipe(changes), tmp_path / "run").run
    opened, steps = [], []
    split, predict = PreparedDataset.split, SDSegPipeline.predict_latents
    monkeypatch.setattr(PreparedDataset, "split", lambda self, name: opened.append(name) or split(self, name))
    monkeypatch.setattr(
        SDSegPipeline,
        "predict_latents",
        lambda self, *given, **named: (
            steps.append(named["num_inference_steps"]) or predict(self, *given, **named)
        ),
    )
    command(out=tmp_path / "small", distill=str(run.root), as_json=True, **FEW)
    told = json.loads(capsys.readouterr().out)
    assert set(opened) == {"train", "validation"}
    assert set(steps) == {2}  # the recipe's
    assert told["predicted_latents"] > 0
    manifest = json.loads((tmp_path / "small" / "manifest.json").read_text())
    assert manifest["teacher"]["location"] == str(kl)  # which the model refers to
    assert manifest["dataset"]["path"] == str(data)

    shutil.rmtree(data)
    command(out=tmp_path / "without", distill=str(run.root), **FEW)
    said = " ".join(capsys.readouterr().err.split())
    assert "not a prepared dataset" in said
    assert "Going on without it. With --data the decoder learns" in said
    manifest = json.loads((tmp_path / "without" / "manifest.json").read_text())
    assert manifest["predicted_latents"] == 0
    assert "dataset" not in manifest


def test_a_split_that_is_empty_is_left_out(model, tmp_path, capsys):
    for split, fractions in {"train": "0,0.5,0.5", "validation": "0.5,0,0.5"}.items():
        data = tmp_path / split
        phantom(kind="endoscopy", cases=6, size=32, seed=0, fractions=fractions, out=data, workers=1)
        capsys.readouterr()
        command(out=tmp_path / f"small-{split}", distill=str(model), data=data, as_json=True, **FEW)
        told = json.loads(capsys.readouterr().out)
        assert (told["predicted_latents"] > 0) is (split == "validation")
        assert ("predictions for validation" in told["agreement_dice"]) is (split == "train")


def test_a_model_whose_data_is_not_known_is_distilled_from_its_autoencoder_alone(model, tmp_path, capsys):
    command(out=tmp_path / "small", distill=str(model), **FEW)
    said = " ".join(capsys.readouterr().err.split())
    assert "trained on is not known. With --data the decoder learns from what the model predicts too" in said
    assert json.loads((tmp_path / "small" / "manifest.json").read_text())["masks"]["size"] == 32


def test_the_command_makes_a_decoder_that_a_prediction_can_use(small, model):
    plain = load_predictor(resolve_model(str(model)), device="cpu")
    swapped = load_predictor(resolve_model(str(model)), device="cpu", decoder=str(small))
    assert isinstance(swapped.pipeline.autoencoder, MaskDecoder)
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    found = swapped.pipeline(image).probabilities[0]
    assert found.shape == (2, 32, 32)
    assert not np.array_equal(found, plain.pipeline(image).probabilities[0])
    assert len(swapped.pipeline.computing_networks()) == 3


def test_it_is_written_as_it_was_trained_and_reads_unscaled_latents(small):
    decoder = MaskDecoder.from_pretrained(small).eval()
    assert decoder.config["made_for"] == fingerprint(small_kl())
    assert decoder.config["latent_std"] > 0
    assert spatial_factor(decoder) == 8
    latents = torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        score = decoder.decode(latents / 0.5).sample
        torch.testing.assert_close(decode_latents(decoder, latents, 0.5), (score + 1) / 2)
        torch.testing.assert_close(torch.tanh(decode_logits(decoder, latents, 0.5) / 2), score)


def test_a_copy_at_half_size_has_the_same_fingerprint_and_other_weights_another():
    assert fingerprint(small_kl().half()) == fingerprint(small_kl())
    assert fingerprint(small_kl(1)) != fingerprint(small_kl())


@pytest.mark.faults
def test_a_decoder_of_another_autoencoder_is_refused(small, model, tmp_path):
    decoder = MaskDecoder.from_pretrained(small)
    decoder.register_to_config(made_for=fingerprint(small_kl(1)))
    decoder.save_pretrained(tmp_path / "other")
    with pytest.raises(UsageError, match="was made for another KL autoencoder"):
        load_predictor(resolve_model(str(model)), device="cpu", decoder=str(tmp_path / "other"))


@pytest.mark.faults
def test_what_is_no_decoder_is_refused_with_the_command_that_makes_one(kl, model, tmp_path):
    MaskAutoencoder().save_pretrained(tmp_path / "mask")
    for folder in (kl, tmp_path / "mask", tmp_path / "nothing"):
        with pytest.raises(UsageError, match="sdseg autoencoder --distill MODEL"):
            load_predictor(resolve_model(str(model)), device="cpu", decoder=str(folder))


@pytest.mark.faults
def test_what_is_no_kl_autoencoder_is_refused_before_any_work(tmp_path):
    MaskAutoencoder().save_pretrained(tmp_path / "mask")
    with pytest.raises(ModelError, match="holds no KL autoencoder"):
        command(out=tmp_path / "out", distill=str(tmp_path / "mask"), masks=16, size=64, device="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.faults
def test_what_cannot_be_distilled_is_refused_with_the_reason(dataset, model, tmp_path):
    few = {**FEW, "out": tmp_path / "out"}
    with pytest.raises(UsageError, match=r"does not exist.* the folder of a KL autoencoder or a hub"):
        command(distill=str(tmp_path / "nothing"), **few)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"neither a run .* the folder of a KL autoencoder or a hub"):
        command(distill=str(tmp_path / "empty"), **few)
    with pytest.raises(ModelError, match=r"holds no KL.*No folder clinic/none is here, so .* hub id"):
        command(distill="clinic/none", **few)
    with pytest.raises(UsageError, match="--size 64: the model's images have 32"):
        command(distill=str(model), size=64, **few)
    with pytest.raises(UsageError, match="--crop 64: a small decoder learns whole masks"):
        command(distill=str(model), crop=64, **few)
    with pytest.raises(DataError, match=r"classes .*: dataset 4, model 2.*choose another model"):
        command(distill=str(model), data=dataset.root, **few)
    pipeline = pipeline_of(("background", "one"))
    pipeline.register_modules(autoencoder=MaskAutoencoder())
    pipeline.save_pretrained(tmp_path / "builtin")
    with pytest.raises(UsageError, match="has no KL autoencoder"):
        command(distill=str(tmp_path / "builtin"), **few)
    shutil.copytree(model, tmp_path / "torn")
    (tmp_path / "torn" / "model_index.json").write_text('{"_class_name": ')
    with pytest.raises(ModelError, match=r"torn' cannot be loaded.*model_index.json"):
        command(distill=str(tmp_path / "torn"), **few)
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "export.json").write_text("{}")
    with pytest.raises(UsageError, match=r"is an exported model.* it was exported from"):
        command(distill=str(tmp_path / "exported"), **few)
    assert not (tmp_path / "out").exists()


@pytest.mark.faults
def test_an_autoencoder_of_another_factor_is_refused_alone_and_in_a_model(tmp_path):
    pipeline = pipeline_of(("background", "one"))
    coarse = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
    )
    pipeline.register_modules(autoencoder=coarse)
    pipeline.save_pretrained(tmp_path / "model")
    for place in ("model", "model/autoencoder"):
        with pytest.raises(UsageError, match="4 pixels per latent pixel, expected 8"):
            command(out=tmp_path / "out", distill=str(tmp_path / place), **FEW)
