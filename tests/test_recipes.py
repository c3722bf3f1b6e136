"""Recipes: every shipped one loads, every key is explained, every mistake is told with its place."""

from pathlib import Path

import pytest

from sdseg_cli.core.errors import RecipeError
from sdseg_cli.core.recipe import (
    Recipe,
    load_recipe,
    read_recipe,
    recipe_from_values,
    recipe_keys,
    recipe_to_yaml,
    resources_root,
    shipped_recipes,
)
from sdseg_cli.core.recipe_reference import recipe_reference

ROOT = Path(__file__).resolve().parents[1]
OTHERS = ("splits", "ablations")  # what lies beside the recipes
FILES = sorted(
    path for path in (ROOT / "recipes").rglob("*.y*ml") if not set(OTHERS) & set(path.relative_to(ROOT).parts)
)
MINIMAL = "name: tiny\ndata:\n  dataset: data/tiny\n"


NAME_FORM = "up to 64 letters, digits, dots, dashes and underscores, the first a letter or a digit."
RESNET = {"model__image_encoder": "timm:resnet18"}
BASELINE = {**RESNET, "objective__diffusion": "off", "objective__pixel_weight": 1}
LAST = {"objective__timesteps": "last", "objective__prediction": "velocity"}


def mistakes(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read_recipe(text, source="my.yaml", overrides=overrides)
    return [line.strip() for line in str(caught.value).splitlines()[1:-1]]


def refusal(**values: object) -> str:
    sections: dict = {"name": "tiny", "data": {"dataset": "data/tiny"}}
    for dotted, value in values.items():
        section, _, key = dotted.partition("__")
        sections.setdefault(section, {})[key] = value
    with pytest.raises(RecipeError) as caught:
        recipe_from_values(sections)
    return str(caught.value)


# The shipped ones


def test_there_are_recipes_to_test():
    papers = {"kseg", "cvc", "refuge", "btcv", "btcv-8", "btcv-13", "sts3d"}
    assert {path.stem for path in FILES} == papers | {"kseg-fast", "cvc-fast", "demo"}
    assert shipped_recipes() == sorted(path.stem for path in FILES)
    assert (resources_root() / "splits" / "kseg.yaml").is_file()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_by_path_and_by_name(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert load_recipe(path.stem) == recipe
    assert load_recipe(path.name) == recipe


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_shipped_recipe_opens_with_what_a_reader_needs(path):
    header = "".join(
        line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.startswith("#")
    )
    for word in (
        "Data:",
        "Licence:",
        "Figures:",
        f"sdseg train --recipe {path.stem}",
        "sdseg evaluate",
        "--set",
    ):
        assert word in header, word


@pytest.mark.parametrize("name", ["kseg", "cvc", "refuge", "btcv", "btcv-8", "btcv-13", "sts3d"])
def test_the_papers_recipes_hold_the_papers_settings(name):
    recipe = load_recipe(name)
    assert recipe.data.image_size == 256
    assert recipe.model.unet_channels == (192, 384, 384, 768, 768)
    assert recipe.model.unet_attention_strides == (1, 2, 4, 8)
    assert (recipe.model.unet_heads, recipe.model.unet_dropout) == (8, 0.2)
    assert (recipe.model.fusion, recipe.model.conditioning_channels) == ("input", 4)
    assert (recipe.objective.beta_start, recipe.objective.beta_end) == (0.0015, 0.0155)
    assert (recipe.objective.prediction, recipe.objective.timesteps) == ("epsilon", "uniform")
    assert recipe.train.learning_rate == 1e-5 * recipe.train.batch_size
    assert (recipe.train.warmup_steps, recipe.train.steps) == (10_000, 100_000)
    assert (recipe.train.ema_decay, recipe.train.ema_scope) == (0.9999, "unet")


# The schema


def test_every_key_is_explained_with_its_unit_and_bounds():
    keys = recipe_keys()
    assert len(keys) > 70
    for key in keys.values():
        assert len(key.meaning) > 20, key.path
        assert key.meaning.rstrip()[-1] == ".", key.path
        assert key.form, key.path
        if "number" in key.form and key.path[-1] != "seed":
            assert any(word in key.form for word in ("from", "above", "at most")), key.path
            assert key.unit or isinstance(key.default, str), key.path


def test_the_reference_page_is_up_to_date():
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert page == recipe_reference(), "run: make docs"
    for path in recipe_keys():
        assert f"\n| `{path[-1]}` | " in page
    headings = [line for line in page.splitlines() if line.startswith("## ")]
    assert len(headings) == len(set(headings)) == 9


def test_a_recipe_of_two_keys_is_complete():
    recipe = read_recipe(MINIMAL)
    assert recipe.train.batch_size == 4
    assert recipe.data.augmentation.horizontal_flip == 0.5


def test_a_recipe_cannot_be_changed_by_accident():
    recipe = read_recipe(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.steps = 5  # type: ignore[misc]


@pytest.mark.parametrize("name", [*shipped_recipes(), None])
def test_a_written_recipe_reads_back_equal(name):
    recipe = load_recipe(name) if name else read_recipe('name: "1.5"\ndata: {dataset: "off: [1] #é"}')
    text = recipe_to_yaml(recipe, header="first\n\nsecond")
    assert text.startswith("# first\n#\n# second\nname: ")
    assert read_recipe(text) == recipe


# Values as YAML 1.2 means them


def test_numbers_and_words_are_read_as_yaml_1_2_means_them():
    recipe = read_recipe(
        MINIMAL
        + "train: {learning_rate: 1e-5, seed: 0x10, max_minutes: 30}\n"
        + "objective: {diffusion: on}\n"
        + "model: {latent_scale: 2}\n"
    )
    assert recipe.train.learning_rate == 1e-5
    assert recipe.train.seed == 16
    assert recipe.train.max_minutes == 30.0
    assert recipe.objective.diffusion == "on"
    assert recipe.model.latent_scale == 2.0


@pytest.mark.faults
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("cache: off", "data.cache: found 'off', expected true or false"),
        ("cache: no", "data.cache: found 'no', expected true or false"),
        ("image_size: 256.0", "data.image_size: found 256.0, expected a whole number"),
        ("image_size: 1:30", "data.image_size: found '1:30', expected a whole number"),
        ('image_size: "256"', "data.image_size: found '256', expected a whole number"),
        ("image_size: true", "data.image_size: found true, expected a whole number"),
        ("image_size:", "data.image_size: found nothing, expected a whole number"),
        ("image_size: [256]", "data.image_size: found [256], expected a whole number"),
        ("workers: 65", "data.workers: found 65, expected a whole number from 0 to 64"),
        ("augmentation: 5", "data.augmentation: found 5, expected a section with the keys horizontal_flip, "),
        ("augmentation: {hue: .nan}", "data.augmentation.hue: found nan, expected a number from 0 to 0.5"),
        ("augmentation: {hue: .inf}", "data.augmentation.hue: found inf, expected a number from 0 to 0.5"),
    ],
)
def test_a_wrong_value_is_shown_beside_what_is_expected(line, message):
    (found,) = mistakes(f"{MINIMAL}  {line}\n")
    assert found.startswith(f"my.yaml:4: {message}")


# Mistakes


@pytest.mark.faults
def test_all_mistakes_are_told_at_once_each_with_its_line():
    text = """\
name: two words
data:
  dataset: data/tiny
  image_sise: 256
  image_size: 250
model:
  autoencoder: bultin
  unet_channels: [64, 128]
  unet_channels: [64, 33]
objective:
  prediction: epsilon
  timesteps: last
train:
  steps: many
trian: {}
"""
    found = mistakes(text, "train.seeds=4", "sampling.threshold=2")
    expected = f"""\
my.yaml:1: name: found 'two words', expected {NAME_FORM}
my.yaml:4: data.image_sise is not a key. Did you mean data.image_size?
my.yaml:5: data.image_size: found 250, expected a whole number that is a multiple of 8, from 32 to 1,024.
my.yaml:7: model.autoencoder: found 'bultin', expected builtin, a hub id (owner/name), or a folder \
written with a slash (./kl-f8). Did you mean builtin?
my.yaml:8: model.unet_attention_strides: [4, 8] is no stride of a U-Net of 2 levels. \
Choose from [1, 2], each once.
my.yaml:9: model.unet_channels is given twice, first in line 8. Remove one of them.
my.yaml:11: objective.prediction: epsilon with timesteps: last: the input is the noise itself, so the \
answer is already there. Use prediction: sample or velocity.
my.yaml:14: train.steps: found 'many', expected a whole number from 1 to 10,000,000.
my.yaml:15: trian is not a key. Did you mean train?
--set train.seeds=4: train.seeds is not a key. Did you mean train.seed?
--set sampling.threshold=2: sampling.threshold: found 2, expected a number above 0 and below 1."""
    assert "\n".join(found) == expected


@pytest.mark.faults
def test_the_message_names_the_recipe_the_count_and_where_to_read_on():
    with pytest.raises(RecipeError) as caught:
        read_recipe(MINIMAL + "  cach: true\n", source="my.yaml")
    lines = str(caught.value).splitlines()
    assert lines[0] == "recipe 'my.yaml' cannot be used: 1 mistake."
    assert lines[-1] == "Every key with its unit and bounds is listed in docs/recipes.md."
    assert caught.value.exit_code == 2


@pytest.mark.faults
def test_a_key_in_the_wrong_section_is_sent_to_the_right_one():
    (found,) = mistakes(MINIMAL + "train:\n  image_size: 128\n")
    assert found == "my.yaml:5: train.image_size is not a key. Did you mean data.image_size?"


@pytest.mark.faults
def test_an_unknown_key_without_a_neighbour_lists_the_keys_there_are():
    (found,) = mistakes(MINIMAL + "sampling: {eta: 0}\n")
    assert found == (
        "my.yaml:4: sampling.eta is not a key. The keys of sampling are num_inference_steps, num_samples, "
        "threshold, flips, largest_component."
    )


@pytest.mark.faults
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty; expected at least `name:` and `data:`."),
        ("# only a comment\n", "the file is empty; expected at least `name:` and `data:`."),
        ("kseg", "my.yaml:1: found 'kseg', expected sections such as data: and train:."),
        ("- name: x\n", "my.yaml:1: found"),
        ("name: [tiny\n", "my.yaml:2: not valid YAML: while parsing a flow sequence expected"),
        ("name: tiny\n\tdata: 1\n", "my.yaml:2: not valid YAML: while scanning for the next token found"),
        ("name: a\n---\nname: b\n", "my.yaml:2: not valid YAML: expected a single document"),
        (
            "a: &x {}\nb: *x\n",
            "my.yaml:1: not valid YAML: the anchor or alias 'x' is not allowed; write the value",
        ),
        (
            "name: !!python/name:os.system x\n",
            "my.yaml:1: not valid YAML: the tag 'tag:yaml.org,2002:python/name:os.system' is",
        ),
        ("? [a]\n: b\n", "my.yaml:1: a key must be a single word."),
        ("{" * 5000, "the text is nested too deeply to be a recipe."),
        ("x" * 1_000_001, "the text has 1,000,001 characters; expected at most 1,000,000."),
        ("name: \x00", "not valid YAML:"),
    ],
)
def test_a_text_that_is_no_recipe_is_refused_with_the_reason(text, message):
    assert any(found.startswith(message) for found in mistakes(text)), mistakes(text)


@pytest.mark.faults
def test_missing_keys_are_named():
    assert mistakes("train: {steps: 20000}\ndata:\n  workers: 1\n") == [
        f"name: is missing, expected {NAME_FORM}",
        "my.yaml:2: data.dataset: is missing, expected a path.",
    ]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "ksge",
            "recipe 'ksge' does not exist. Did you mean kseg? Give the path of a YAML file, or one of the ",
        ),
        ("kseg-fats.yaml", "recipe 'kseg-fats.yaml' does not exist. Did you mean kseg-fast?"),
        ("nowhere/mine.yaml", "recipe 'nowhere/mine.yaml' does not exist. Give the path"),
        (".", "recipe '.' is a folder, not a recipe."),
    ],
)
def test_a_recipe_that_is_not_there_is_named_with_those_that_are(name, message):
    with pytest.raises(RecipeError) as caught:
        load_recipe(name)
    assert str(caught.value).startswith(message)
    assert "btcv, btcv-13, btcv-8, cvc, cvc-fast, demo, kseg, kseg-fast, refuge, sts3d." in str(caught.value)


@pytest.mark.faults
def test_a_picture_given_as_a_recipe_is_not_read(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\x89PNG\r\n\x1a\n\x00")
    with pytest.raises(RecipeError, match="is not a text file: byte 0 is not UTF-8"):
        load_recipe(path)


def test_a_file_in_the_working_directory_wins_over_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("kseg.yaml").write_text(MINIMAL)
    assert load_recipe("kseg.yaml").name == "tiny"
    assert load_recipe("kseg").name == "kseg"


def test_a_byte_order_mark_does_no_harm(tmp_path):
    (tmp_path / "a.yaml").write_text(MINIMAL, encoding="utf-8-sig")
    assert load_recipe(tmp_path / "a.yaml").name == "tiny"


# --set


def test_overrides_are_laid_over_the_file_and_the_last_one_wins():
    recipe = load_recipe(
        "kseg-fast",
        ["train.steps=500", "train.steps=600", "train.learning_rate=1e-3", "model.unet_channels=[32, 64]",
         "model.unet_attention_strides=[]", "data.dataset=my data", "data.cache=false"],
    )  # fmt: skip
    assert recipe.train.steps == 600
    assert recipe.train.learning_rate == 1e-3
    assert recipe.model.unet_channels == (32, 64)
    assert recipe.model.unet_attention_strides == ()
    assert recipe.data.dataset == "my data"
    assert recipe.data.cache is False


@pytest.mark.faults
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "expected KEY=VALUE, such as train.steps=500."),
        ("=5", "expected KEY=VALUE, such as train.steps=500."),
        ("steps=5", "steps is not a key. Did you mean train.steps?"),
        ("train.stesp=5", "train.stesp is not a key. Did you mean train.steps?"),
        ("train=5", "train is a section. Set its keys one by one: train.KEY=VALUE."),
        ("train.steps=", "train.steps: found nothing, expected a whole number from 1 to 10,000,000."),
        ("train.steps=0", "train.steps: found 0, expected a whole number from 1 to 10,000,000."),
        ("model.unet_channels=[64", "not valid YAML: while parsing a flow sequence"),
        ("objective.prediction=epsilo", "objective.prediction: found 'epsilo', expected epsilon, sample or "),
        ("train.batch_size=5", "train.batch_size: 5 images cannot be split into 2 equal parts"),
    ],
)
def test_a_wrong_override_is_told_with_what_was_typed(override, message):
    (found,) = mistakes(MINIMAL + "train: {gradient_accumulation: 2}\n", override)
    assert found.startswith(f"--set {override}: {message}")


def test_an_override_mends_what_the_file_has_wrong():
    assert (
        read_recipe(MINIMAL + "train: {steps: many}\n", overrides=["train.steps=20000"]).train.steps == 20_000
    )


def test_a_changed_copy_is_checked_like_a_file():
    recipe = read_recipe(MINIMAL)
    changed = recipe.replace({"train.steps": 20_000, "data.augmentation.hue": 0.1})
    assert (changed.train.steps, changed.data.augmentation.hue) == (20_000, 0.1)
    assert recipe.train.steps == 100_000
    with pytest.raises(RecipeError, match=r"train\.warmup_steps: 10000 is more than steps 20"):
        recipe.replace({"train.steps": 20})
    with pytest.raises(RecipeError, match=r"train\.stesp is not a key\. Did you mean train\.steps\?"):
        recipe.replace({"train.stesp": 20})
    with pytest.raises(RecipeError, match=r"has no key 'nowhere\.at\.all'"):
        recipe.replace({"nowhere.at.all": 20})


def test_the_constructor_refuses_what_a_file_may_not_say():
    with pytest.raises(ValueError, match="the input is the noise itself"):
        Recipe.model_validate({"name": "tiny", "data": {"dataset": "d"}, "objective": {"timesteps": "last"}})


# Combinations


@pytest.mark.faults
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"objective__timesteps": "last"}, "epsilon with timesteps: last"),
        ({"objective__noise": "zeros", "objective__prediction": "velocity"}, "zeros with timesteps: uniform"),
        ({"objective__noise": "zeros", "objective__timesteps": "last"}, "zeros with prediction: epsilon"),
        ({"objective__prediction": "sample"}, "1 with prediction: sample"),
        ({"objective__beta_start": 0.1}, "0.1 is not below beta_end 0.0155"),
        ({"objective__noise_weight": 0, "objective__latent_weight": 0}, "all three loss weights are 0"),
        ({"objective__diffusion": "off", "objective__pixel_weight": 1}, "off needs a backbone"),
        ({**BASELINE, "model__fusion": "multiscale"}, "multiscale with diffusion: off"),
        ({**BASELINE, "model__fusion": "attention"}, "attention with diffusion: off"),
        ({**BASELINE, "model__multiclass": "joint"}, "joint with diffusion: off"),
        (
            {"model__fusion": "attention", "model__unet_attention_strides": []},
            "attention without any level that has it: the U-Net would never see the image",
        ),
        ({"train__embed_autoencoder": False}, "the builtin one is always copied"),
        ({**BASELINE, "objective__pixel_weight": 0}, "0 with diffusion: off, whose only loss it is"),
        (
            {**BASELINE, "model__image_encoder_weights": "pretrained"},
            "model.image_encoder_weights: pretrained with diffusion: off, whose plain U-Net starts at random",
        ),
        (
            {**BASELINE, "model__unet_weights": "weights/lsun"},
            "model.unet_weights: weights/lsun with diffusion: off, whose plain U-Net starts at random",
        ),
        ({**BASELINE, "model__freeze_image_encoder": True}, "true with diffusion: off, which trains"),
        ({**BASELINE, "sampling__num_samples": 2}, "2 with diffusion: off: all draws would be equal"),
        (
            {**BASELINE, "sampling__num_inference_steps": 2},
            "2 with diffusion: off, which has no reverse steps",
        ),
        ({**LAST, "sampling__num_inference_steps": 2}, "2 with timesteps: last"),
        ({**LAST, "objective__noise": "zeros", "sampling__num_samples": 2}, "2 with noise: zeros"),
        (
            {"objective__num_train_timesteps": 10, "sampling__num_inference_steps": 11},
            "11 is more than num_train_timesteps 10",
        ),
        ({"model__image_encoder_weights": "autoencoder"}, "autoencoder needs a KL autoencoder"),
        (
            {**RESNET, "model__image_encoder_weights": "autoencoder"},
            "autoencoder does not fit timm:resnet18",
        ),
        ({"model__image_encoder_weights": "pretrained"}, "pretrained means timm's weights"),
        (
            {**RESNET, "model__image_encoder_blocks": 3},
            "model.image_encoder_blocks: has no effect with image_encoder: timm:resnet18",
        ),
        (
            {**RESNET, "model__image_encoder_channels": [32, 32, 32, 32]},
            "model.image_encoder_channels: has no effect",
        ),
        ({**RESNET, "model__image_encoder_dropout": 0.0}, "model.image_encoder_dropout: has no effect"),
        (
            {"data__image_size": 200},
            "200 is not a multiple of 128, which 5 U-Net levels on a latent of 1/8 need. Use 256",
        ),
        (
            {
                **RESNET,
                "data__image_size": 72,
                "model__unet_channels": [64],
                "model__unet_attention_strides": [],
            },
            "72 is not a multiple of 32, which timm:resnet18 needs. Use 64",
        ),
        ({"model__unet_heads": 5}, "5 heads do not divide the widths [192, 384, 768] that have attention"),
        ({"model__unet_attention_strides": [1, 3]}, "[3] is no stride of a U-Net of 5 levels"),
        ({"model__unet_attention_strides": [1, 1]}, "a stride is given twice for a U-Net of 5 levels"),
        ({"train__steps": 100}, "10000 is more than steps 100"),
        ({"train__gradient_accumulation": 3}, "4 images cannot be split into 3 equal parts"),
        ({"train__trackers": ["tensorboard", "tensorboard"]}, "a tracker is given twice"),
        ({"sampling__flips": ["vertical", "vertical"]}, "a flip is given twice"),
        (
            {"sampling__flips": ["horizontal"], "data__augmentation": {"horizontal_flip": 0}},
            "horizontal with horizontal_flip: 0: the network never saw an image mirrored so",
        ),
    ],
)
def test_a_combination_that_makes_no_sense_is_refused_with_the_reason(values, message):
    assert message in refusal(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"objective__timesteps": "last", "objective__prediction": "sample", "objective__latent_weight": 0},
        {"objective__timesteps": "last", "objective__prediction": "velocity", "objective__noise": "zeros"},
        {
            "objective__diffusion": "off",
            "objective__pixel_weight": 1,
            "model__image_encoder": "timm:resnet18",
        },
        {"model__unet_attention_strides": [], "model__unet_heads": 7},
        {"sampling__num_inference_steps": 10, "sampling__num_samples": 3},
        {"sampling__flips": ["horizontal", "vertical"], "sampling__largest_component": True},
    ],
)
def test_sensible_combinations_are_accepted(values):
    sections: dict = {"name": "tiny", "data": {"dataset": "data/tiny"}}
    for dotted, value in values.items():
        section, _, key = dotted.partition("__")
        sections.setdefault(section, {})[key] = value
    assert recipe_from_values(sections).name == "tiny"
