"""``sdseg recipes``: the shipped recipes, one of them in full, a copy to change, and a check."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from sdseg_cli import console
from sdseg_cli.commands._options import JsonOption, OverwriteOption, complete_recipe
from sdseg_cli.core.errors import RecipeError, UsageError
from sdseg_cli.core.recipe import Recipe, find_recipe, load_recipe, recipe_to_yaml, shipped_recipes
from sdseg_cli.core.run_directory import atomic_write

EXAMPLES = """
sdseg recipes list                   # the shipped recipes and what they need
sdseg recipes show kseg              # with its comments
sdseg recipes copy kseg-fast mine.yaml
sdseg recipes check mine.yaml        # every mistake with its line
"""
app = typer.Typer(
    help="List, show, copy and check recipes.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
)
NameArgument = Annotated[
    str,
    typer.Argument(metavar="NAME", help="Shipped recipe, or a recipe file.", autocompletion=complete_recipe),
]


@app.command("list")
def list_recipes(as_json: JsonOption = False) -> None:
    """List the shipped recipes, what each is for and what it needs.

    Examples:

    sdseg recipes list

    sdseg recipes list --json
    """
    rows: list[dict[str, Any]] = []
    for name in shipped_recipes():
        recipe = load_recipe(name)
        text = find_recipe(name).read_text(encoding="utf-8")
        rows.append({"name": name, "what": _what(text), "needs": _needs(recipe), "steps": recipe.train.steps})
    if as_json:
        console.show_json(rows)
        return
    for row in rows:
        console.show_facts({"what": row["what"], "needs": "; ".join(row["needs"])}, title=row["name"])
        console.show_text("")


@app.command()
def show(
    name: NameArgument,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="Write out every key with its default, without comments.")
    ] = False,
) -> None:
    """Print a recipe as it is written, or with every default.

    Examples:

    sdseg recipes show kseg-fast

    sdseg recipes show kseg-fast --resolved
    """
    if resolved:
        console.show_text(recipe_to_yaml(load_recipe(name)))
    else:
        console.show_text(_text(find_recipe(name)))


@app.command()
def copy(
    name: NameArgument,
    destination: Annotated[
        Path | None, typer.Argument(metavar="DEST", help="File or folder. Default: NAME.yaml here.")
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Copy a recipe with its comments, to change it.

    Examples:

    sdseg recipes copy kseg-fast

    sdseg recipes copy kseg-fast mine.yaml --overwrite
    """
    source = find_recipe(name)
    target = destination or Path(source.name)
    if target.is_dir():
        target = target / source.name
    if target.exists() and target.resolve() == source.resolve():
        raise UsageError(f"{target} is the recipe itself. Choose another DEST.")
    if target.exists() and not overwrite:
        raise UsageError(f"{target} exists already. Pass --overwrite to replace it, or choose another DEST.")
    atomic_write(target, source.read_bytes())
    console.done(f"{target}: change it, then sdseg recipes check {target}")


@app.command()
def check(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE...", help="Recipe files or names.", autocompletion=complete_recipe),
    ],
) -> None:
    """Check recipes: every mistake with its line. Leaves with 2 where there is one.

    Examples:

    sdseg recipes check mine.yaml

    sdseg recipes check recipes/*.yaml
    """
    wrong = 0
    for file in files:
        try:
            recipe = load_recipe(file)
        except RecipeError as error:
            wrong += 1
            console.fail(error)
        else:
            console.show_text(f"{file}: fine (name {recipe.name}, {recipe.train.steps:,} steps)")
    if wrong:
        raise typer.Exit(2)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise RecipeError(f"recipe {path} cannot be read as text: {error}.") from error


def _what(text: str) -> str:
    """The first sentence of the comment that a recipe begins with."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("# "):
            break
        lines.append(line[2:].strip())
    return re.split(r"\.(?:\s|$)", " ".join(lines), maxsplit=1)[0] if lines else ""


def _needs(recipe: Recipe) -> list[str]:
    """What has to be at hand before the recipe trains."""
    model = recipe.model
    needs = [f"the prepared dataset {recipe.data.dataset}"]
    places: dict[str, Any] = {
        "autoencoder": model.autoencoder,
        "U-Net weights": model.unet_weights,
        "image encoder weights": model.image_encoder_weights,
    }
    own = (None, "builtin", "random", "none", "autoencoder")
    needs += [f"{what} {place}" for what, place in places.items() if place not in own]
    return needs
