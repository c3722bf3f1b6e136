"""Writes ``docs/recipes.md`` from the recipe's schema, so that the two cannot differ."""

from __future__ import annotations

from collections.abc import Iterator

from sdseg_cli.core.recipe import Key, Recipe, format_value, recipe_keys

_INTRODUCTION = """\
# Recipes

<!-- Written from the schema by `make docs`; a test fails where the two differ. -->

A recipe is one YAML file that holds every setting of a training. Shipped ones are found by name
(`sdseg train --recipe kseg-fast`), your own by path. Only `name` and `data.dataset` must be given; the
other keys have the defaults below. A run writes the resolved recipe, with every default, to its
`recipe.yaml`.

- Change a key for one run with `--set`: `sdseg train --recipe kseg-fast --set train.steps=500`. Lists are
  written in brackets: `--set 'model.unet_channels=[64, 128, 256]'`.
- See what a recipe comes to without training: `sdseg train --recipe kseg-fast --dry-run`.
- Unknown keys, values out of bounds, repeated keys and combinations that make no sense are errors. All of
  them are shown at once, with their lines; nothing is started.
- YAML is read by its version 1.2: `1e-5` is a number, `on` and `off` are words, only `true` and `false` are
  yes and no. Anchors, aliases and tags are not allowed.

"""

_REFUSED = """\
## What is refused together

| Combination | Why |
| --- | --- |
| `prediction: epsilon` with `timesteps: last` | the input is the noise, so the answer is already there |
| `noise: zeros` with `prediction: epsilon` | the noise to predict is always 0 |
| `noise: zeros` with `timesteps: uniform` | without noise the truth shows through |
| `prediction: sample` with `latent_weight` above 0 | the target is the clean latent already |
| all of `noise_weight`, `latent_weight`, `pixel_weight` 0 | nothing to learn |
| `beta_start` not below `beta_end` | noise must grow |
| `diffusion: off` with `image_encoder: kl` | there is no backbone to decode from |
| `diffusion: off` with `fusion: multiscale` | there is no latent to join |
| `diffusion: off` with `pixel_weight: 0` | it is the baseline's only loss |
| `diffusion: off` with starting weights, or a frozen encoder | it starts at random and trains all |
| `diffusion: off` with several samples or reverse steps | it is deterministic, and has none |
| `timesteps: last` with several reverse steps | the network only ever saw the last timestep |
| `noise: zeros` with several samples | all draws would be equal |
| more reverse steps than `num_train_timesteps` | there are no more |
| `image_encoder_weights: autoencoder` with the builtin autoencoder or a timm encoder | nothing fits |
| `image_encoder_weights: pretrained` with `kl` | it means timm's weights |
| a key of the `kl` encoder changed with a timm encoder | it would have no effect |
| `image_size` not a multiple of 8 x 2^(levels - 1), or of 32 with timm | the grids would not fit |
| `unet_heads` that do not divide a width with attention | heads share the width |
| `unet_attention_strides` that are no stride of the U-Net | there is no such level |
| `warmup_steps` above `steps` | the learning rate would never be reached |
| `batch_size` not divisible by `gradient_accumulation` | parts must be equal |
"""


def recipe_reference() -> str:
    """The page, as Markdown: every key with what it takes, its unit, its default and its meaning."""
    return _INTRODUCTION + "\n".join([*_tables(), _REFUSED])


def _tables() -> Iterator[str]:
    sections: dict[tuple[str, ...], list[Key]] = {}
    for key in recipe_keys().values():
        sections.setdefault(key.path[:-1], []).append(key)
    for section, keys in sections.items():
        yield f"## `{'.'.join(section)}`" if section else "## Top level"
        yield ""
        if section:
            yield from (_section_description(section), "")
        yield "| Key | Takes | Unit | Default | Meaning |"
        yield "| --- | --- | --- | --- | --- |"
        yield from map(_row, keys)
        yield ""


def _section_description(section: tuple[str, ...]) -> str:
    model: object = Recipe
    for name in section:
        model = model.model_fields[name].annotation  # type: ignore[attr-defined]
    return model.__doc__ or ""


def _row(key: Key) -> str:
    default = "required" if key.required else f"`{format_value(key.default)}`"
    cells = (f"`{key.path[-1]}`", key.form, key.unit or "-", default, key.meaning)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
