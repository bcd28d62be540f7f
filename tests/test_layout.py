"""The house rules that a reader relies on: who imports whom, and what importing costs."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "fastcnn").rglob("*.py"))

# imported inside the functions that need them, so that a missing or broken one stops nothing else
LAZY = {
    *("torchvision", "matplotlib", "sklearn", "nvidia", "onnx", "PIL", "rich", "jinja2"),
    *("tensorboard", "wandb"),
}


def top_level_imports(tree):
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_packages_are_imported_inside_functions(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not LAZY & set(top_level_imports(tree))


@pytest.mark.parametrize("path", sorted((ROOT / "fastcnn/ops/reference").glob("*.py")))
def test_the_oracle_imports_torch_alone(path):
    text = path.read_text(encoding="utf-8")
    text = text.replace("from fastcnn.ops.reference.", "from torch.")  # its other files
    outside = set(top_level_imports(ast.parse(text)))
    assert outside - set(sys.stdlib_module_names) == {"torch"}


def test_imports_follow_the_layers():
    found = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout


def imports_of(module, modules):
    """The modules of the package that `module` imports, also inside its functions."""
    found = set()
    for node in ast.walk(ast.parse(modules[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & modules.keys() or {node.module}
    # the package's own face offers what api.py holds, and is imported for its version
    return (found & modules.keys()) - {"fastcnn"}


def test_no_modules_import_each_other_in_a_circle():
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in SOURCES
    }
    graph = {module: imports_of(module, modules) for module in modules}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


def loaded_by(statement):
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(out.stdout.split())


@pytest.mark.full
@pytest.mark.parametrize(
    ("statement", "untouched"),
    [
        ("import fastcnn", {"torch", "numpy", "torchvision", "nvidia.dali", "rich"}),
        ("import fastcnn.cli", {"torch", "torchvision", "matplotlib", "sklearn"}),
        ("import fastcnn.archs.table", {"torch"}),
        ("import fastcnn.train.run", {"torchvision", "matplotlib", "sklearn", "PIL", "jinja2"}),
    ],
)
def test_importing_loads_only_what_it_needs(statement, untouched):
    assert not untouched & loaded_by(statement)


@pytest.mark.full
@pytest.mark.parametrize("missing", ["torchvision", "matplotlib", "sklearn", "PIL"])
def test_commands_work_without_an_optional_package(missing, tmp_path):
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from fastcnn.cli import main\n"
        "assert main(['archs']) == 0\n"
        "import fastcnn.train.run, fastcnn.data, fastcnn.insight.run_page.page\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
