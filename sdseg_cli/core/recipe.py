"""Reading and writing recipes: every mistake at once, each with its file, line, value and remedy.

The keys themselves are declared in :mod:`sdseg_cli.core.recipe_schema`, which this module hands on.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from sdseg_cli.core.errors import RecipeError
from sdseg_cli.core.recipe_schema import (
    AugmentationSettings,
    DataSettings,
    EvaluateSettings,
    Form,
    ModelSettings,
    ObjectiveSettings,
    Recipe,
    Refusal,
    SamplingSettings,
    TrainSettings,
    refusals,
)
from sdseg_cli.core.strict_yaml import Document, KeyPath, parse_yaml, resolve_plain

__all__ = [
    "AugmentationSettings",
    "DataSettings",
    "EvaluateSettings",
    "Key",
    "ModelSettings",
    "ObjectiveSettings",
    "Recipe",
    "Refusal",
    "SamplingSettings",
    "TrainSettings",
    "find_recipe",
    "format_value",
    "load_recipe",
    "read_recipe",
    "recipe_from_values",
    "recipe_keys",
    "recipe_to_yaml",
    "refusals",
    "resources_root",
    "shipped_ablations",
    "shipped_recipes",
]

SUFFIXES = (".yaml", ".yml")


# Where recipes are ----------------------------------------------------------------------------------


def resources_root() -> Path:
    """Folder of the shipped recipes: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "recipes", package.parent / "recipes"):
        if folder.is_dir():
            return folder
    raise RecipeError(
        f"the shipped recipes are missing: looked in {package / 'recipes'} and {package.parent / 'recipes'}. "
        "Install sdseg again."
    )


def shipped_recipes() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return sorted(path.stem for path in resources_root().glob("*.yaml"))


def shipped_ablations() -> dict[str, Path]:
    """Name -> file of the shipped lists of variants, for ``sdseg ablate``."""
    return {path.stem: path for path in sorted((resources_root() / "ablations").glob("*.yaml"))}


def find_recipe(name_or_path: str | Path) -> Path:
    """Find a recipe by path, or a shipped one by its bare name (``kseg`` or ``kseg.yaml``).

    Raises:
        RecipeError: there is none; the message lists the shipped ones and the nearest name.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    if len(path.parts) == 1:
        name = path.stem if path.suffix in SUFFIXES else path.name
        if name in shipped_recipes():
            return resources_root() / f"{name}.yaml"
    known = shipped_recipes()
    hint = _did_you_mean(path.stem if path.suffix in SUFFIXES else path.name, known)
    what = "is a folder, not a recipe" if path.is_dir() else "does not exist"
    raise RecipeError(
        f"recipe '{name_or_path}' {what}.{hint} Give the path of a YAML file, or one of the shipped recipes: "
        f"{', '.join(known)}."
    )


# Reading --------------------------------------------------------------------------------------------


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and lay ``KEY=VALUE`` overrides over it.

    Args:
        name_or_path: a shipped recipe's bare name, or the path of a file.
        overrides: as given to ``--set``, ``train.steps=500``; a later one wins over an earlier one.

    Raises:
        RecipeError: every mistake of the file and of the overrides, each with its place.
    """
    path = find_recipe(name_or_path)
    return read_recipe(_read_text(path), source=str(name_or_path), overrides=overrides)


def read_recipe(text: str, *, source: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from YAML text; ``source`` names it in messages. Raises as :func:`load_recipe`."""
    document = parse_yaml(text)
    report = _Report(source, document)
    for mistake in document.mistakes:
        report.add_line(mistake.line, mistake.text)
    values = document.values
    if values is None and not document.mistakes:
        report.add_line(None, "the file is empty; expected at least `name:` and `data:`")
    elif values is not None and not isinstance(values, dict):
        report.add_line(1, f"found {_shown(values)}, expected sections such as data: and train:")
    if not isinstance(values, dict):
        raise report.error()
    for override in overrides:
        _apply_override(values, override, report)
    return _validated(values, report)


def recipe_from_values(values: Mapping[str, Any]) -> Recipe:
    """Make a recipe from nested dictionaries, with the same checks and messages as for a file."""
    return _validated(dict(values), _Report(str(values.get("name", "without a name")), Document()))


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise RecipeError(f"recipe {path} cannot be read: {error.strerror or error}.") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"recipe {path} is not a text file: byte {error.start} is not UTF-8. Save it as UTF-8 text."
        ) from error


@dataclass
class _Report:
    """Collects mistakes with their place and turns them into one error."""

    source: str
    document: Document
    overridden: dict[KeyPath, str] = field(default_factory=dict)
    mistakes: list[tuple[float, str]] = field(default_factory=list)

    def add_line(self, line: int | None, text: str) -> None:
        self.mistakes.append((line or 0, f"{self.source}:{line}: {text}" if line else text))

    def add_override(self, override: str, text: str) -> None:
        self.mistakes.append((math.inf, f"--set {override}: {text}"))

    def add_key(self, path: KeyPath, text: str) -> None:
        """Report a key where it was given: in an override, in its line, or in its section's line."""
        if path in self.overridden:
            self.add_override(self.overridden[path], text)
            return
        lines = self.document.lines
        while path and path not in lines:
            path = path[:-1]
        self.add_line(lines.get(path) if path else None, text)

    def given(self, path: KeyPath) -> bool:
        return path in self.overridden or path in self.document.lines

    def error(self) -> RecipeError:
        found = list(dict.fromkeys(text for _, text in sorted(self.mistakes, key=lambda item: item[0])))
        count = "1 mistake" if len(found) == 1 else f"{len(found)} mistakes"
        listed = "\n".join(f"  {text}" if text.endswith("?") else f"  {text}." for text in found)
        return RecipeError(
            f"recipe '{self.source}' cannot be used: {count}.\n{listed}\n"
            "Every key with its unit and bounds is listed in docs/recipes.md."
        )


def _apply_override(values: dict[str, Any], override: str, report: _Report) -> None:
    dotted, equals, text = override.partition("=")
    path = tuple(part.strip() for part in dotted.split("."))
    keys = recipe_keys()
    if not equals or not dotted.strip():
        report.add_override(override, "expected KEY=VALUE, such as train.steps=500")
        return
    if path not in keys:
        name = ".".join(path)
        if any(known[: len(path)] == path for known in keys):
            report.add_override(override, f"{name} is a section. Set its keys one by one: {name}.KEY=VALUE")
        else:
            report.add_override(override, f"{name} is not a key.{_nearest_key(path)}")
        return
    parsed = parse_yaml(text)
    if parsed.mistakes:
        report.add_override(override, parsed.mistakes[0].text)
        return
    report.overridden[path] = override
    place = values
    for section in path[:-1]:
        inner = place.setdefault(section, {})
        if not isinstance(inner, dict):
            return  # the section itself is wrong, which validation reports with its line
        place = inner
    place[path[-1]] = parsed.values


# Checking -------------------------------------------------------------------------------------------


def _validated(values: dict[str, Any], report: _Report) -> Recipe:
    prepared = _lists_to_tuples(values)
    recipe: Recipe | None = None
    wrong: set[KeyPath] = set()
    try:
        recipe = Recipe.model_validate(prepared)
    except ValidationError as error:
        wrong = _report_invalid(error, values, report)
        for refusal in refusals(_best_guess(prepared, wrong)):
            paths = [tuple(key.split(".")) for key in refusal.keys]
            if not any(path[: len(bad)] == bad for path in paths for bad in wrong):
                given = [path for path in paths if report.given(path)]
                report.add_key((given or paths)[0], f"{refusal.keys[0]}: {refusal.reason}")
    if report.mistakes or recipe is None:
        raise report.error()
    return recipe


def _lists_to_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists_to_tuples(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return tuple(_lists_to_tuples(inner) for inner in value)
    return value


def _report_invalid(error: ValidationError, values: dict[str, Any], report: _Report) -> set[KeyPath]:
    """Report each key that is wrong in itself once; return their paths."""
    wrong: set[KeyPath] = set()
    keys = recipe_keys()
    for detail in error.errors(include_url=False):
        if detail["type"] == "refused":
            continue
        path = _declared_path(tuple(str(part) for part in detail["loc"]), keys)
        if path in wrong:
            continue
        wrong.add(path)
        dotted = ".".join(path)
        if detail["type"] == "extra_forbidden":
            report.add_key(path, f"{dotted} is not a key.{_nearest_key(path)}")
        elif path in keys:
            expected = f"expected {keys[path].form}"
            value = _lookup(values, path)
            found = "is missing" if detail["type"] == "missing" else f"found {_shown(value)}"
            hint = _did_you_mean(value, keys[path].words) if isinstance(value, str) else ""
            report.add_key(path, f"{dotted}: {found}, {expected}{hint and '.' + hint}")
        else:
            inner = [known[len(path)] for known in keys if known[: len(path)] == path]
            listed = ", ".join(dict.fromkeys(inner))
            found = "is missing" if detail["type"] == "missing" else f"found {_shown(_lookup(values, path))}"
            report.add_key(path, f"{dotted}: {found}, expected a section with the keys {listed}")
    return wrong


def _declared_path(location: KeyPath, keys: Mapping[KeyPath, Key]) -> KeyPath:
    """Cut what pydantic appends below a key: the index in a list, the branch of a union."""
    for length in range(len(location), 0, -1):
        if location[:length] in keys:
            return location[:length]
    return location


def _best_guess(values: dict[str, Any], wrong: set[KeyPath]) -> Recipe:
    """The recipe with every wrong key at its default, so that the rest can be checked too."""
    mended = _without(values, wrong)
    data = {"dataset": "data", **mended.get("data", {})}
    return Recipe.model_construct(
        name="recipe",
        data=DataSettings.model_validate(data),
        **{
            name: info.annotation.model_validate(mended.get(name, {}))
            for name, info in Recipe.model_fields.items()
            if name not in ("name", "data") and info.annotation is not None
        },
    )


def _without(values: dict[str, Any], wrong: set[KeyPath], path: KeyPath = ()) -> dict[str, Any]:
    kept = {}
    for name, value in values.items():
        here = (*path, str(name))
        if here in wrong:
            continue
        kept[name] = _without(value, wrong, here) if isinstance(value, dict) else value
    return kept


def _lookup(values: Any, path: KeyPath) -> Any:
    for part in path:
        if not isinstance(values, dict) or part not in values:
            return None
        values = values[part]
    return values


def _shown(value: Any) -> str:
    """A value as the user wrote it, cut to a readable length."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a section"
    text = repr(value) if isinstance(value, str) else format_value(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _nearest_key(path: KeyPath) -> str:
    """For an unknown key: a similar neighbour, else a similar key elsewhere, else all the neighbours."""
    keys = list(recipe_keys())
    depth = len(path)
    siblings = [known for known in keys if len(known) >= depth and known[: depth - 1] == path[:-1]]
    close = difflib.get_close_matches(path[-1], sorted({known[depth - 1] for known in siblings}), 1, 0.6)
    elsewhere = [".".join(known) for known in keys if known[-1] == path[-1]]
    if elsewhere or close:
        return f" Did you mean {elsewhere[0] if elsewhere else '.'.join((*path[:-1], close[0]))}?"
    leaves = {known[-1]: ".".join(known) for known in reversed(keys)}
    close = difflib.get_close_matches(path[-1], sorted(leaves), 1, 0.75)
    if close:
        return f" Did you mean {leaves[close[0]]}?"
    place = f"of {'.'.join(path[:-1])} " if siblings and depth > 1 else ""
    listed = dict.fromkeys(known[depth - 1] for known in siblings) if depth > 1 else Recipe.model_fields
    return f" The keys {place}are {', '.join(listed)}" if listed else ""


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), 1, 0.6)
    return f" Did you mean {close[0]}?" if close else ""


# The schema in words --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """One key of a recipe in words; ``required`` keys have no default."""

    path: KeyPath
    form: str
    unit: str
    default: Any
    required: bool
    meaning: str
    words: tuple[str, ...] = ()


@cache
def recipe_keys() -> dict[KeyPath, Key]:
    """Every key of a recipe by its path, in the schema's order."""
    return {key.path: key for key in _keys_of(Recipe, ())}


def _keys_of(model: type[BaseModel], path: KeyPath) -> Iterable[Key]:
    for name, info in model.model_fields.items():
        annotation = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from _keys_of(annotation, (*path, name))
            continue
        extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        yield Key(
            path=(*path, name),
            form=_form(annotation, info.metadata),
            unit=str(extra.get("unit", "")),
            default=None if info.is_required() else info.default,
            required=info.is_required(),
            meaning=info.description or "",
            words=_words(annotation, info.metadata),
        )


def _form(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What a value must look like: "a whole number from 0 to 64"."""
    metadata = [*metadata]
    while get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        for extra in more:
            metadata += extra.metadata if isinstance(extra, FieldInfo) else [extra]
    for part in metadata:
        if isinstance(part, Form):
            return part.text
    origin = get_origin(annotation)
    if origin is Literal:
        return " or ".join(", ".join(map(str, get_args(annotation))).rsplit(", ", 1))
    if origin in (Union, UnionType):
        return " or ".join(_form(branch) for branch in get_args(annotation))
    if origin is tuple:
        return _list_form(_form(get_args(annotation)[0]), metadata)
    if annotation is bool:
        return "true or false"
    return _number_form("a whole number" if annotation is int else "a number", metadata)


def _words(annotation: Any, metadata: Sequence[Any]) -> tuple[str, ...]:
    """Values that are words, to find a misspelt one."""
    for part in metadata:
        if isinstance(part, Form):
            return part.words
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(word for branch in get_args(annotation) for word in _words(branch, ()))


def _bounds(metadata: Sequence[Any]) -> dict[str, Any]:
    names = ("ge", "gt", "le", "lt", "multiple_of", "min_length", "max_length")
    return {name: getattr(part, name) for part in metadata for name in names if hasattr(part, name)}


def _number_form(kind: str, metadata: Sequence[Any]) -> str:
    bounds = _bounds(metadata)
    text = kind
    if "multiple_of" in bounds:
        text += f" that is a multiple of {bounds['multiple_of']},"
    if "ge" in bounds:
        text += f" from {_number(bounds['ge'])}"
    if "gt" in bounds:
        text += f" above {_number(bounds['gt'])}"
    if "le" in bounds:
        text += f" to {_number(bounds['le'])}" if "ge" in bounds else f", at most {_number(bounds['le'])}"
    if "lt" in bounds:
        text += f" and below {_number(bounds['lt'])}"
    return text


def _list_form(item: str, metadata: Sequence[Any]) -> str:
    bounds = _bounds(metadata)
    low, high = bounds.get("min_length", 0), bounds.get("max_length")
    count = f"{low}" if low == high else f"{low} to {high}" if high is not None else f"{low} or more"
    return f"a list in [brackets] of {count} values, each {item}"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


# Writing --------------------------------------------------------------------------------------------


def recipe_to_yaml(recipe: Recipe, *, header: str = "") -> str:
    """Write a recipe with every key; reading the text gives an equal recipe.

    Args:
        recipe: what to write.
        header: text that goes above it as comment lines.
    """
    lines = [f"# {line}".rstrip() for line in header.splitlines()]
    _write_section(recipe.values(), 0, lines)
    return "\n".join(lines) + "\n"


def _write_section(values: Mapping[str, Any], depth: int, lines: list[str]) -> None:
    for name, value in values.items():
        indent = "  " * depth
        if isinstance(value, dict):
            lines.append(f"{indent}{name}:")
            _write_section(value, depth + 1, lines)
        else:
            lines.append(f"{indent}{name}: {format_value(value)}")


def format_value(value: Any) -> str:
    """Write a value as YAML that reads back as the same value; lists in brackets."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(format_value(item) for item in value)}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z0-9_./~][\w./~+:-]*(?<!:)", value) and resolve_plain(value) == value
        return value if plain else json.dumps(value, ensure_ascii=False)
    return "null" if value is None else repr(value)
