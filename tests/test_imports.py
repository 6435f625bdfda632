"""Imports run one way, heavy libraries come late, and the public names are the documented ones."""

import ast
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.samples import trace

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mtad"

# From the bottom up: a module may import what stands on a line above its own, and its own
# package. A new module has to be given its place here.
LAYERS = (
    {"errors", "four_bits", "processor", "shipped", "version"},
    {"fields"},
    {"config"},
    {"catalogue", "trace"},
    {"whatif", "metrics", "pace", "presets", "wheel", "text"},
    {"fetch", "energy", "histories", "inspection"},
    {"loading", "logits"},
    {"ballast", "hidden_draft", "sampling", "tree"},
    {"draft_files", "eager", "growth", "verify"},
    {"cuda", "native"},
    {"lm"},
    {"draft", "hidden_drafter"},
    {"copy_drafter"},
    {"decoders", "recording"},
    {"pairs"},
    {"session", "bound", "ballast_pair"},
    {"iteration_costs"},
    {"runner"},
    {"acceptance"},
    {"bench", "distill"},
    {"terminal"},
    {"cli", "ui"},
    {"__main__", "__init__"},
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
LIGHT = (
    "errors",
    "version",
    "presets",
    "fields",
    "config",
    "catalogue",
    "trace",
    "whatif",
    "metrics",
    "pace",
    "terminal",
    "cli",
)
HEAVY = {"torch", "transformers", "gradio", "plotly", "numpy", "accelerate"}
FILES = sorted(PACKAGE.rglob("*.py"))


def layer(parts: tuple[str, ...]) -> str:
    """The name in LAYERS of a module given as parts below `mtad`; the cli_* files are one."""
    first = parts[0] if parts else "__init__"
    return "cli" if first.startswith("cli_") else first


def imports(file: Path, code: str | None = None) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(line, module as parts) of every import of a file, those inside functions included."""
    here = file.relative_to(ROOT).with_suffix("").parts
    text = file.read_text(encoding="utf-8") if code is None else code
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            base = here[: -node.level] if node.level else ()
            module = base + tuple((node.module or "").split(".") if node.module else ())
            for alias in node.names:
                below = ROOT.joinpath(*module, alias.name)
                is_module = below.is_dir() or below.with_suffix(".py").is_file()
                yield node.lineno, (*module, alias.name) if is_module else module


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def test_the_check_sees_every_form_of_import() -> None:
    file = PACKAGE / "decoders" / "imaginary.py"
    code = (
        "import mtad.lm, os\nfrom mtad import ui\nfrom . import beam\nfrom ..pairs import load\n"
        "def f():\n    from mtad.runner import run\n"
    )
    found = {module for _, module in imports(file, code)}
    assert found == {
        ("mtad", "lm"),
        ("os",),
        ("mtad", "ui"),
        ("mtad", "decoders", "beam"),
        ("mtad", "pairs"),
        ("mtad", "runner"),
    }


def wrong_imports(file: Path, code: str | None = None) -> list[str]:
    """Imports of `mtad` that run against LAYERS."""
    own = layer(file.relative_to(PACKAGE).with_suffix("").parts)
    assert own in RANK, f"give mtad/{own} a place in LAYERS of {Path(__file__).name}"
    wrong = []
    for line, module in imports(file, code):
        if module[0] != "mtad":
            continue
        other = layer(module[1:])
        assert other in RANK, f"{name_of(file)}:{line} imports mtad.{other}, which has no place"
        if other != own and RANK[other] >= RANK[own]:
            wrong.append(f"{name_of(file)}:{line} imports mtad.{other}")
    return wrong


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_run_one_way(file: Path) -> None:
    assert wrong_imports(file) == []


@pytest.mark.parametrize(
    "code", ["from mtad.runner import run", "import mtad.cli", "from mtad import load_pair"]
)
def test_an_import_against_the_direction_is_seen(code: str) -> None:
    assert len(wrong_imports(PACKAGE / "decoders" / "mtad.py", code)) == 1


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_only_the_page_imports_gradio(file: Path) -> None:
    if layer(file.relative_to(PACKAGE).parts) == "ui":
        return
    found = [line for line, module in imports(file) if module[0] in ("gradio", "plotly")]
    assert not found, f"{name_of(file)} imports the page's libraries in lines {found}"


def test_the_app_builds_the_page_and_nothing_else() -> None:
    modules = {module[:2] for _, module in imports(ROOT / "app.py") if module[0] == "mtad"}
    assert modules == {("mtad", "ui")}


def loaded_by(code: str, stdin: str = "") -> set[str]:
    """The heavy libraries in sys.modules of a fresh Python after `code`."""
    tail = "\nimport sys, json\nprint(json.dumps(sorted(name for name in sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code + tail],
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        cwd=ROOT,
        check=True,
        timeout=120,
    )
    return HEAVY & set(json.loads(result.stdout.splitlines()[-1]))


def test_the_check_of_loaded_modules_sees_a_heavy_one() -> None:
    assert loaded_by("import numpy") == {"numpy"}


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_nothing_heavy(module: str) -> None:
    assert loaded_by(f"import mtad.{module}") == set()


@pytest.fixture
def trace_json() -> str:
    return trace().to_json()


def test_listing_and_replaying_load_no_torch(trace_json: str) -> None:
    code = (
        "import sys, mtad\n"
        "assert len(mtad.methods()) == 9\n"
        "trace = mtad.Trace.from_json(sys.stdin.read())\n"
        "assert mtad.Trace.from_json(trace.to_json()) == trace\n"
        "mtad.DecodeConfig()"
    )
    assert loaded_by(code, trace_json) == set()


@pytest.mark.parametrize(
    "arguments",
    [["methods"], ["methods", "--json"], ["replay", "-", "--no-wait"], ["generate", "--help"]],
    ids=" ".join,
)
def test_light_commands_load_no_torch(arguments: list[str], trace_json: str) -> None:
    code = (
        f"import sys\nsys.argv = ['mtad', *{arguments!r}]\nfrom mtad.cli import main\n"
        "try:\n main()\nexcept SystemExit as end:\n assert not end.code, end.code"
    )
    assert loaded_by(code, trace_json) == set()


def test_public_names() -> None:
    import mtad

    def names(function: object) -> list[str]:
        return list(inspect.signature(function).parameters)  # type: ignore[arg-type]

    assert names(mtad.load_pair)[:4] == ["name", "device", "dtype", "engine"]
    assert names(mtad.ModelPair)[:3] == ["target", "draft", "tokenizer"]
    for function in (mtad.run, mtad.stream):
        assert names(function)[:2] == ["method", "pair"]
        assert {"prompt", "messages", "raw_prompt", "prompt_ids", "config"} <= set(names(function))
    assert names(mtad.verify.joint_accept_length) == [
        "target_logprobs",
        "draft_logprobs",
        "threshold",
    ]
    assert callable(mtad.verify.joint_accept_lengths)
    assert callable(mtad.bound.measure) and callable(mtad.whatif.accepted_path)
    info = mtad.methods()[0]
    assert (info.id, info.lossless) == ("autoregressive", True)
    assert info.title and info.citation and info.parameters
    for name in ("text", "token_ids", "steps", "summary", "to_json", "from_json", "decisions"):
        assert name in mtad.Trace.__dataclass_fields__ or hasattr(mtad.Trace, name)
    assert set(mtad.__all__) <= set(dir(mtad))
    missing = {"DecodeConfig", "ModelPair", "Trace", "load_pair", "methods", "run", "stream"}
    assert missing <= set(mtad.__all__)


@pytest.mark.parametrize(
    ("file", "keys"),
    [
        ("requirements.txt", ("project", "dependencies")),
        ("requirements-dev.txt", ("project", "optional-dependencies", "dev")),
    ],
)
def test_requirements_repeat_the_project_file(file: str, keys: tuple[str, ...]) -> None:
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for key in keys:
        wanted = wanted[key]
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == wanted


def test_a_wheel_holds_every_package_and_the_assets() -> None:
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    folders = {file.parent.relative_to(ROOT) for file in PACKAGE.rglob("__init__.py")}
    found = {".".join(folder.parts) for folder in folders} | {"mtad.assets"}
    assert set(tools["setuptools"]["packages"]) == found
    assert (ROOT / tools["setuptools"]["package-dir"]["mtad.assets"]).is_dir()
