"""The direction of the imports: cli, commands, engine; then data, model, metrics, reporting; the rest."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "sdseg_cli"
FILES = sorted(PACKAGE.rglob("*.py"))

# What a part of the package may import from the package, by prefix. Each may import itself.
BASE = ("errors", "grid", "seeding", "files", "integrity")
ALLOWED = {
    "core.data": (*BASE, "recipe", "strict_yaml"),  # recipe only tells where the shipped split files are
    "core.model": BASE,
    "core.metrics": BASE,
    "core.reporting": BASE,
    "core.engine": (*BASE, "recipe", "run_directory", "manifest", "data", "model", "metrics", "reporting"),
    "core.errors": (),
    "core.grid": ("errors",),
    "core.seeding": ("errors",),
    "core.files": ("errors",),
    "core.strict_yaml": ("errors",),
    "core.recipe_schema": ("errors", "recipe"),
    "core.recipe": ("errors", "recipe_schema", "strict_yaml"),
    "core.recipe_reference": ("recipe",),
    "core.run_directory": (*BASE, "recipe"),
    "core.integrity": ("errors", "files"),
    "core.manifest": ("files", "integrity", "run_directory"),
    "core.verification": ("errors", "files", "integrity", "manifest", "run_directory"),
}
SCREEN = {"typer", "click", "rich", "tqdm", "argparse"}
HEAVY = {
    "torch",
    "torchvision",
    "diffusers",
    "accelerate",
    "datasets",
    "timm",
    "monai",
    "lpips",
    "matplotlib",
}
NO_TORCH = ("cli", "console", "commands", "core.errors", "core.grid", "core.seeding", "core.files")
NO_TORCH += (
    "core.integrity",
    "core.manifest",
    "core.verification",
    "core.strict_yaml",
    "core.recipe",
    "core.run_directory",
    "core.reporting.tables",
)


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(path: Path, *, only_at_import: bool = False) -> Iterator[tuple[str, int]]:
    """Modules a file imports with their lines; optionally only those that importing it brings in."""
    for node in walk(ast.parse(path.read_text(encoding="utf-8")), only_at_import):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            yield node.module or "", node.lineno
            for alias in node.names:  # `from sdseg_cli.core import recipe` imports a module, too
                yield f"{node.module}.{alias.name}", node.lineno


def walk(tree: ast.AST, only_at_import: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if only_at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if only_at_import and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from walk(node, only_at_import)


def below(name: str, prefixes: tuple[str, ...] | str) -> bool:
    prefixes = (prefixes,) if isinstance(prefixes, str) else prefixes
    return any(name == prefix or name.startswith((f"{prefix}.", f"{prefix}_")) for prefix in prefixes)


def test_there_are_files_to_look_at():
    assert len(FILES) > 40


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_imports_go_one_way(path):
    name = dotted(path)
    part = next((part for part in sorted(ALLOWED, key=len, reverse=True) if below(name, part)), None)
    if not name.startswith("core.") or part is None:
        return
    allowed = tuple(f"sdseg_cli.core.{other}" for other in ALLOWED[part])
    for module, line in imports(path):
        if not module.startswith("sdseg_cli."):
            continue
        inside = module.count(".") == 1 and module in ("sdseg_cli.__version__", "sdseg_cli.core")
        fine = inside or below(module, (f"sdseg_cli.{part}", *allowed))
        assert fine, f"{path}:{line}: {name} must not import {module}"


@pytest.mark.parametrize("path", [path for path in FILES if dotted(path).startswith("core")], ids=dotted)
def test_core_draws_nothing_on_the_screen(path):
    for module, line in imports(path):
        assert module.split(".")[0] not in SCREEN, f"{path}:{line} imports {module}"
        assert not below(module, ("sdseg_cli.console", "sdseg_cli.cli", "sdseg_cli.commands")), (
            f"{path}:{line}"
        )
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("print", "input", "exit", "quit", "sys.exit", "os._exit"), (
                path,
                node.lineno,
            )


@pytest.mark.parametrize("path", [path for path in FILES if below(dotted(path), NO_TORCH)], ids=dotted)
def test_what_answers_at_once_imports_nothing_heavy(path):
    for module, line in imports(path, only_at_import=True):
        assert module.split(".")[0] not in HEAVY, f"{path}:{line} imports {module} at once"


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_pickles_are_read_only_as_plain_weights(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert keywords.get("weights_only") == "True", f"{path}:{node.lineno}"
    for module, line in imports(path):
        assert module.split(".")[0] not in ("pickle", "dill", "cloudpickle"), f"{path}:{line}"
