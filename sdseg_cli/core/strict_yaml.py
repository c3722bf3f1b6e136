"""YAML as written: the 1.2 core schema, the line of every key, and no silent surprises.

PyYAML on its own follows YAML 1.1: ``1e-5`` is a string, ``off`` is False, ``1:30`` is 90, and the last
of two equal keys wins. Here ``1e-5`` is a number, ``off`` and ``no`` stay words, and a repeated key is a
mistake. Anchors, aliases and tags are refused: a recipe needs none, and they can hide a bomb or a class.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

KeyPath = tuple[str, ...]

MAX_CHARACTERS = 1_000_000

_NULL = re.compile(r"(?:null|Null|NULL|~|)")
_TRUE = re.compile(r"(?:true|True|TRUE)")
_FALSE = re.compile(r"(?:false|False|FALSE)")
_INTEGER = re.compile(r"[-+]?[0-9]{1,300}")
_OCTAL = re.compile(r"0o[0-7]{1,300}")
_HEXADECIMAL = re.compile(r"0x[0-9a-fA-F]{1,300}")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_INFINITY = re.compile(r"[-+]?\.(?:inf|Inf|INF)")
_NOT_A_NUMBER = re.compile(r"\.(?:nan|NaN|NAN)")


@dataclass(frozen=True)
class Mistake:
    """One thing wrong with a document: ``line`` counts from 1, None where there is no line."""

    line: int | None
    text: str


@dataclass
class Document:
    """What a YAML text holds, where each key stands, and what was wrong with the text."""

    values: Any = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)


def parse_yaml(text: str) -> Document:
    """Read a YAML text into plain Python values.

    Args:
        text: the whole document, up to one million characters.

    Returns:
        A :class:`Document`. Where ``mistakes`` is not empty, ``values`` holds what could be read.
    """
    document = Document()
    if len(text) > MAX_CHARACTERS:
        found = f"the text has {len(text):,} characters; expected at most {MAX_CHARACTERS:,}"
        document.mistakes.append(Mistake(None, found))
        return document
    try:
        node = yaml.compose(text, Loader=_Composer)
        document.values = _value_of(node, (), document)
    except RecursionError:
        document.mistakes.append(Mistake(None, "the text is nested too deeply to be a recipe"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(part for part in (error.context, error.problem) if part)
        document.mistakes.append(Mistake(mark.line + 1 if mark else None, f"not valid YAML: {problem}"))
    except yaml.YAMLError as error:
        document.mistakes.append(Mistake(None, f"not valid YAML: {' '.join(str(error).split())}"))
    return document


class _Composer(yaml.SafeLoader):
    """Builds the tree of nodes and stops at the first anchor, alias or tag."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        anchor, tag = getattr(event, "anchor", None), getattr(event, "tag", None)
        if anchor is not None:
            problem = f"the anchor or alias {anchor!r} is not allowed; write the value out"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        if tag is not None:
            problem = f"the tag {tag!r} is not allowed; remove it"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)


def _value_of(node: yaml.Node | None, path: KeyPath, document: Document) -> Any:
    if node is None:
        return None
    document.lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        return _mapping_of(node, path, document)
    if isinstance(node, yaml.SequenceNode):
        return [_value_of(item, (*path, str(index)), document) for index, item in enumerate(node.value)]
    is_plain = isinstance(node, yaml.ScalarNode) and node.style is None
    return resolve_plain(node.value) if is_plain else node.value


def _mapping_of(node: yaml.MappingNode, path: KeyPath, document: Document) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            document.mistakes.append(Mistake(line, "a key must be a single word"))
            continue
        key = key_node.value
        if key in values:
            first = document.lines[(*path, key)]
            dotted = ".".join((*path, key))
            document.mistakes.append(
                Mistake(line, f"{dotted} is given twice, first in line {first}. Remove one of them")
            )
            continue
        document.lines[(*path, key)] = line
        values[key] = _value_of(value_node, (*path, key), document)
    return values


def resolve_plain(text: str) -> Any:
    """Give an unquoted scalar its type by the YAML 1.2 core schema: null, bool, int, float or str."""
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text):
        return True
    if _FALSE.fullmatch(text):
        return False
    if _INTEGER.fullmatch(text):
        return int(text)
    if _OCTAL.fullmatch(text):
        return int(text[2:], 8)
    if _HEXADECIMAL.fullmatch(text):
        return int(text[2:], 16)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INFINITY.fullmatch(text):
        return float(text.replace(".", ""))
    if _NOT_A_NUMBER.fullmatch(text):
        return float("nan")
    return text
