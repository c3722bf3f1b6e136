"""Splits as files: lists of case ids that are sorted, disjoint and complete.

Validation chooses the checkpoint; test is scored once, at the end. A group (a patient, a video sequence)
belongs to one split only, since its images show the same thing twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from sdseg_cli.core.data.images import natural_key
from sdseg_cli.core.data.prepared import SPLITS
from sdseg_cli.core.errors import DataError, UsageError
from sdseg_cli.core.seeding import derive_seed


@dataclass(frozen=True)
class Split:
    """Which case belongs to train, validation and test.

    Attributes:
        name: a word for messages and ``dataset.json``.
        train: case ids in natural order.
        validation: likewise.
        test: likewise.
    """

    name: str
    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]

    def parts(self) -> dict[str, tuple[str, ...]]:
        """Give the ids by split name, in the order train, validation, test."""
        return {name: getattr(self, name) for name in SPLITS}

    def of_case(self) -> dict[str, str]:
        """Give the split name by case id."""
        return {case_id: name for name, ids in self.parts().items() for case_id in ids}

    def without(self, case_ids: Iterable[str]) -> Split:
        """Give the same split with some cases left out."""
        excluded = frozenset(case_ids)
        kept = {n: tuple(c for c in ids if c not in excluded) for n, ids in self.parts().items()}
        return Split(self.name, **kept)


def read_split(path: Path) -> Split:
    """Read a split file: YAML with the lists ``train``, ``validation`` and ``test``.

    Ids are text whatever they look like: ``007`` stays ``007``.

    Raises:
        UsageError: there is no such file.
        DataError: it is not a split, or a case stands in it twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such split file.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the split file cannot be read ({error}).") from error
    expected = "expected the lists train, validation and test"
    try:
        # BaseLoader makes text of every scalar and constructs nothing else.
        content = yaml.load(text, Loader=_SplitLoader)  # noqa: S506
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not a split file ({error}); {expected}.") from error
    if not isinstance(content, dict) or not content.keys() <= {"name", *SPLITS} or "train" not in content:
        kinds = {type(None): "nothing", list: "a list", str: "text"}
        found = (", ".join(content) if isinstance(content, dict) else kinds.get(type(content))) or "nothing"
        raise DataError(f"{path}: not a split file (found {found}); {expected}.")
    parts: dict[str, tuple[str, ...]] = {}
    for name in SPLITS:
        ids = content.get(name) or []
        if not isinstance(ids, list) or not all(isinstance(case_id, str) for case_id in ids):
            raise DataError(f"{path}: {name} is not a list of case ids.")
        parts[name] = tuple(sorted(ids, key=natural_key))
    _refuse_doubled(path, parts)
    return Split(str(content.get("name", path.stem)), **parts)


def split_to_yaml(split: Split, header: str = "") -> str:
    """Write a split as YAML text that :func:`read_split` reads.

    Args:
        split: what to write.
        header: comment lines, without the leading ``#``.
    """
    lines = [f"# {line}".rstrip() for line in header.splitlines()]
    lines.append(f"name: {_scalar(split.name)}")
    for name, ids in split.parts().items():
        lines.append(f"{name}:" + ("" if ids else " []"))
        lines += [f"- {_scalar(case_id)}" for case_id in ids]
    return "\n".join(lines) + "\n"


def check_split(split: Split, groups: Mapping[str, str], *, where: str, may_share_groups: bool) -> list[str]:
    """Compare a split with the cases that are there.

    Args:
        split: as read from a file.
        groups: case id -> group, for every case found.
        where: name of the split file, for messages.
        may_share_groups: a published split that cuts through groups is allowed, and reported.

    Returns:
        The groups that stand in more than one split (only with ``may_share_groups``).

    Raises:
        DataError: a case is missing on either side, or a group is cut.
    """
    listed = split.of_case()
    absent = sorted(listed.keys() - groups.keys(), key=natural_key)
    surplus = sorted(groups.keys() - listed.keys(), key=natural_key)
    if absent or surplus:
        reasons = []
        if absent:
            reasons.append(f"{len(absent)} listed cases are not in the data ({_some(absent)})")
        if surplus:
            reasons.append(f"{len(surplus)} cases of the data are not listed ({_some(surplus)})")
        raise DataError(
            f"split {where} does not fit the data: {' and '.join(reasons)}. Give a split file that lists "
            "exactly these cases with --split FILE, or drop cases that are not there with --exclude-bad."
        )
    homes: dict[str, set[str]] = {}
    for case_id, name in listed.items():
        homes.setdefault(groups[case_id], set()).add(name)
    shared = sorted((group for group, names in homes.items() if len(names) > 1), key=natural_key)
    if shared and not may_share_groups:
        raise DataError(
            f"split {where} cuts {len(shared)} groups in two ({_some(shared)}): images of one patient or "
            "sequence in train and test make the score look better than it is. Keep each group together."
        )
    return shared


def make_split(
    groups: Mapping[str, str], fractions: Sequence[float], *, seed: int, name: str = "seeded"
) -> Split:
    """Split cases by fractions; a group always stays whole.

    The order comes from a hash of (seed, id), so the result depends on nothing but the arguments: neither
    on the order of the cases nor on any library's random numbers.

    Args:
        groups: case id -> group.
        fractions: of train, validation and test; they sum to 1.
        seed: another seed, another split.
        name: of the split.

    Raises:
        UsageError: the fractions make no sense.
        DataError: fewer groups than splits that want cases.
    """
    _check_fractions(fractions)
    members: dict[str, list[str]] = {}
    for case_id, group in groups.items():
        members.setdefault(group, []).append(case_id)
    wanted = [index for index, fraction in enumerate(fractions) if fraction > 0]
    if len(members) < len(wanted):
        raise DataError(
            f"{len(groups)} cases in {len(members)} groups cannot fill {len(wanted)} splits; at least "
            f"{len(wanted)} groups are needed. Add cases, or set fractions to 0, like --fractions 1,0,0."
        )
    targets = _targets(len(groups), fractions)
    counts = [0, 0, 0]
    homes: dict[str, list[str]] = {split: [] for split in SPLITS}
    filled = dict.fromkeys(wanted, 0)
    # The largest groups first: the small ones can then even out what those leave.
    order = sorted(members, key=lambda group: (-len(members[group]), derive_seed("split", seed, group)))
    for position, group in enumerate(order):
        empty = [index for index in wanted if not filled[index]]
        # The last groups go to splits that have none yet, so that no split stays empty.
        candidates = empty if len(order) - position == len(empty) else wanted
        home = max(candidates, key=lambda index: (targets[index] - counts[index], -index))
        homes[SPLITS[home]] += members[group]
        counts[home] += len(members[group])
        filled[home] += 1
    return Split(name, **{split: tuple(sorted(ids, key=natural_key)) for split, ids in homes.items()})


class _SplitLoader(yaml.BaseLoader):
    """Text only, and no key twice: PyYAML would silently keep the last of two lists."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        doubled = {key for key in keys if keys.count(key) > 1}
        if doubled:
            raise yaml.constructor.ConstructorError(
                None, None, f"{doubled.pop()} stands there twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _refuse_doubled(path: Path, parts: Mapping[str, Sequence[str]]) -> None:
    seen: dict[str, str] = {}
    doubled = []
    for name, ids in parts.items():
        for case_id in ids:
            if case_id in seen:
                doubled.append(f"{case_id} ({seen[case_id]} and {name})")
            seen[case_id] = name
    if doubled:
        raise DataError(
            f"{path}: {len(doubled)} cases stand in the split twice: {_some(doubled)}. "
            "Splits must be disjoint: remove one of the two lines."
        )


def _check_fractions(fractions: Sequence[float]) -> None:
    if len(fractions) != len(SPLITS) or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        shown = ",".join(f"{fraction:g}" for fraction in fractions)
        raise UsageError(
            f"--fractions {shown}: expected three numbers from 0 to 1 that sum to 1, for train, validation "
            "and test, like 0.8,0.1,0.1."
        )


def _targets(total: int, fractions: Sequence[float]) -> list[int]:
    """Round shares to whole cases that sum to ``total``: the largest remainders are rounded up."""
    exact = [total * fraction for fraction in fractions]
    targets = [int(share) for share in exact]
    remainders = sorted(range(len(exact)), key=lambda index: (targets[index] - exact[index], index))
    for index in remainders[: total - sum(targets)]:
        targets[index] += 1
    return targets


def _some(names: Sequence[str], shown: int = 5) -> str:
    listing = ", ".join(names[:shown])
    return listing + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _scalar(text: str) -> str:
    """Quote what YAML would not read back as the same text."""
    return yaml.safe_dump(text, allow_unicode=True, width=10_000).removesuffix("\n").removesuffix("\n...")
