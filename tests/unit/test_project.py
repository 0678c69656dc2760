"""The project keeps its own promises: names, file lengths, import direction, links, commands."""

from __future__ import annotations

import configparser
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / name
    for name in (
        "README.md",
        "CHANGELOG.md",
        *(str(p.relative_to(ROOT)) for d in ("docs", "launch", "configs") for p in sorted((ROOT / d).rglob("*.md"))),
    )
]
PUBLIC = {
    "Attention",
    "ConfigError",
    "Layout",
    "LayoutError",
    "RankLost",
    "RanksDisagree",
    "Ring",
    "RingAttention",
    "RingctxError",
    "Unsupported",
    "decode_attention",
    "explain",
    "ring_attention",
    "ring_sdpa",
}
PATTERNS = {
    "band",
    "blocks",
    "causal",
    "dilated",
    "documents",
    "fixed",
    "full",
    "global_tokens",
    "own_block",
    "per_head",
    "prefix",
    "queries_from",
    "random_blocks",
    "sinks",
    "star",
    "strided",
    "window",
}
KINDS = {".py", ".sh", ".md", ".cfg", ".toml", ".txt", ".yaml", ".yml", ".Dockerfile", ""}
# a path of the machine something was written on, and work left for later without an anchor
WRITTEN_ELSEWHERE = re.compile(r"(?<![\w.~$}/-])/(?:[r]oot|[w]ork|[h]ome|[U]sers|[t]mp)/\w")
LEFT_FOR_LATER = re.compile(r"\b(?:[T]ODO|[F]IXME|[X]XX|[H]ACK)\b(?!\()")


def code(*folders: str) -> Iterator[Path]:
    """Every Python file under these folders."""
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def shipped() -> list[Path]:
    """Every text file that the project ships, tracked or about to be."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / line for line in listed.stdout.splitlines()]
    return [p for p in paths if p.is_file() and p.suffix in KINDS and p.name != "LICENSE" and "documents" not in p.parts]


def name_of(path: Path) -> str:
    """The path inside the project."""
    return str(path.relative_to(ROOT))


def test_public_names_are_these_and_no_others():
    assert set(importlib.import_module("ringctx").__all__) == PUBLIC
    patterns = importlib.import_module("ringctx.patterns")
    own = {name for name, value in inspect.getmembers(patterns, inspect.isfunction) if value.__module__ == patterns.__name__}
    assert {name for name in own if not name.startswith("_")} == PATTERNS


def test_every_public_name_exists_and_says_what_it_is():
    for module, names in (("ringctx", PUBLIC), ("ringctx.patterns", PATTERNS)):
        for name in names:
            assert getattr(importlib.import_module(module), name).__doc__, f"{module}.{name} has no docstring"


def test_importing_ringctx_loads_no_optional_package():
    probe = "import ringctx, sys; print([m for m in ('transformers', 'accelerate', 'yaml', 'typer', 'rich') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"


def test_no_file_is_longer_than_400_lines():
    long = {name_of(p): n for p in code("ringctx", "tests", "launch") if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_every_module_says_what_it_is():
    silent = [name_of(p) for p in code("ringctx") if (text := p.read_text().strip()) and not re.match(r'(?:#.*\n)*[rR]?"""', text)]
    assert not silent


def test_imports_point_one_way():
    """The cheap half of what lint-imports checks, so that it also fails where only pytest runs."""
    order = ["kernels", "core", "methods", "huggingface", "runtime training", "embed", "tools", "cli"]
    height = {name: i for i, names in enumerate(order) for name in names.split()}
    wrong = []
    for path in code("ringctx"):
        here = path.relative_to(ROOT / "ringctx").parts[0].removesuffix(".py")
        for there in re.findall(r"^\s*(?:from|import) ringctx\.(\w+)", path.read_text(), re.M):
            upwards = height.get(there, -1) > height.get(here, len(order))
            beside = here != there and height.get(there, -1) == height.get(here, -2)
            if upwards or beside:
                wrong.append(f"{name_of(path)} imports {there}")
    assert not wrong


def test_the_order_of_imports_is_the_one_lint_imports_checks():
    settings = configparser.RawConfigParser()
    settings.read(ROOT / "setup.cfg")
    layers = settings["importlinter:contract:direction"]["layers"].split("\n")
    names = [re.sub(r"ringctx\.|[()]", "", layer).strip() for layer in layers if layer.strip()]
    assert names == ["cli", "tools", "embed", "runtime | training", "asked", "huggingface", "methods", "core", "kernels"]


def test_no_file_names_the_machine_it_was_written_on():
    found = [f"{name_of(p)}: {m.group()}" for p in shipped() for m in WRITTEN_ELSEWHERE.finditer(p.read_text())]
    assert not found


def test_nothing_is_left_for_later_without_an_anchor():
    found = [f"{name_of(p)}: {m.group()}" for p in shipped() for m in LEFT_FOR_LATER.finditer(p.read_text())]
    assert not found


def test_no_figure_is_a_placeholder():
    found = [f"{name_of(p)}: {m}" for p in PAGES for m in re.findall(r"\bTBD[-\w]*", p.read_text())]
    assert not found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_and_path_in_the_documentation_exists(page):
    text = re.sub(r"^(```|~~~).*?^\1", "", page.read_text(), flags=re.S | re.M)
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:", link)]
    named = re.findall(r"`((?:ringctx|tests|launch|configs|docs|docker|requirements)/[\w./-]*\w)`", text)
    missing = [link for link in links if link and not (page.parent / link).exists()]
    missing += [path for path in named if not (ROOT / path).exists()]
    assert not missing


def test_commands_in_the_documentation_exist_in_the_makefile():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    said = {word for page in PAGES for word in re.findall(r"(?:^|`)make ([a-z]+)", page.read_text(), re.M)}
    assert {"run", "test", "check", "exact", "mutants", "parity", "bench", "clean"} <= targets
    assert said <= targets


def test_the_example_in_the_readme_is_the_one_that_runs():
    shown = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert shown
    assert (ROOT / "launch/examples/attend.py").read_text().endswith(shown.group(1))
    assert len(shown.group(1).splitlines()) <= 21


def test_make_and_setup_agree_on_the_oldest_python():
    assert "python_requires = >=3.11" in (ROOT / "setup.cfg").read_text()
    assert "sys.version_info < (3, 11)" in (ROOT / "Makefile").read_text()
    assert 'target-version = "py311"' in (ROOT / "pyproject.toml").read_text()


def test_what_the_tests_need_is_pinned():
    pinned = set(re.findall(r"^([\w.-]+)==", (ROOT / "requirements/constraints.txt").read_text().lower(), re.M))
    settings = configparser.RawConfigParser()
    settings.read(ROOT / "setup.cfg")
    extras = settings["options.extras_require"]
    asked = "\n".join(
        [settings["options"]["install_requires"], extras["huggingface"], extras["serve"], extras["test"], extras["dev"]]
    ).lower()
    wanted = set(re.findall(r"^([\w-]+)", asked, re.M)) - {"torch", "ringctx"}
    assert wanted <= pinned
