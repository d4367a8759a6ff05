"""What holds the project's files together: versions, the chapters, the lock, the cell for Colab, the book's links."""

from __future__ import annotations

import gzip
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "tools"), str(ROOT / "book" / "_ext")]

import appendices  # noqa: E402
import book_site  # noqa: E402
import colab_cell  # noqa: E402

import book as book_tool  # noqa: E402
import mmqlora  # noqa: E402

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
LISTED = [TOC["root"], *(entry["file"] for part in TOC["parts"] for entry in part["chapters"])]
NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))
LONGEST_CELL = 45


def notebook(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook(path).cells if cell.cell_type == "code"]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def chapter(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_every_page_is_in_the_table_of_contents_and_exists() -> None:
    pages = {f"book/{path.stem}" for path in (ROOT / "book").iterdir() if path.suffix in {".ipynb", ".md"}}
    assert pages.isdisjoint(appendices.GENERATED)
    assert pages | set(appendices.GENERATED) == set(LISTED)
    assert len(LISTED) == len(set(LISTED))


def test_chapter_is_stored_without_outputs(chapter: Path) -> None:
    assert "version" not in notebook(chapter).metadata.get("language_info", {})
    for cell in code_cells(chapter):
        assert not cell.outputs and cell.execution_count is None, f"run `make tidy`: {cell.id} has outputs"


def test_chapter_has_a_title_and_cell_ids(chapter: Path) -> None:
    raw = json.loads(chapter.read_text())
    ids = [cell.get("id") for cell in raw["cells"]]
    assert None not in ids and len(set(ids)) == len(ids)
    first = notebook(chapter).cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")


def test_chapter_starts_with_the_cell_for_colab(chapter: Path) -> None:
    first = code_cells(chapter)[0]
    assert first.source == colab_cell.SOURCE, "run `make tidy`"
    assert first.metadata.tags == ["remove-cell"]


def test_chapter_has_no_long_cell(chapter: Path) -> None:
    for cell in code_cells(chapter):
        assert len(cell.source.splitlines()) <= LONGEST_CELL, f"{cell.id} is too long to read"


def test_figures_have_a_caption_a_name_and_an_alternative_text(chapter: Path) -> None:
    for cell in code_cells(chapter):
        mystnb = cell.metadata.get("mystnb", {})
        if "figure" in mystnb or "image" in mystnb:
            assert mystnb["figure"]["caption"].strip() and mystnb["figure"]["name"].startswith("fig-"), cell.id
            alt = mystnb.get("image", {}).get("alt", "")
            assert len(alt.split()) >= 3, f"{cell.id}: the alternative text has to say what the figure shows"


def test_citations_are_in_the_bibliography() -> None:
    known = set(re.findall(r"@\w+\{\s*([^,\s]+)\s*,", (ROOT / "book" / "references.bib").read_text()))
    cited = set()
    for path in [*NOTEBOOKS, *(ROOT / "book").glob("*.md")]:
        text = "\n".join(cell.source for cell in notebook(path).cells) if path.suffix == ".ipynb" else path.read_text()
        for keys in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", text):
            cited |= {key.strip() for key in keys.split(",")}
    assert cited and cited <= known


def test_the_lock_has_a_version_that_fits_each_dependency() -> None:
    locked: dict[str, list[str]] = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        pin = Requirement(line)
        locked.setdefault(canonicalize_name(pin.name), []).append(next(iter(pin.specifier)).version)
    wanted = [*PROJECT["dependencies"], *chain(*PROJECT["optional-dependencies"].values())]
    for need in map(Requirement, wanted):
        pins = locked.get(canonicalize_name(need.name), [])
        assert pins and all(need.specifier.contains(pin) for pin in pins), (
            f"{need}: the lock has {pins}; run `make lock`"
        )


def test_conda_environment_takes_all_from_pyproject() -> None:
    *conda, pip = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    python = Requirement(next(line for line in conda if line.startswith("python")))
    assert python.specifier == Requirement(f"python{PROJECT['requires-python']}").specifier
    (entry,) = pip["pip"]
    found = re.fullmatch(r"--editable \.\[([\w,-]+)\]", entry)
    assert found and set(found[1].split(",")) <= set(PROJECT["optional-dependencies"])


def test_one_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert PROJECT["version"] == mmqlora.__version__ == citation["version"] == version("mmqlora")


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    files = [ROOT / ".ci" / "run", *(ROOT / ".github" / "workflows").glob("*.yml"), ROOT / "README.md", *NOTEBOOKS]
    named = {
        name
        for file in files
        if file.exists()
        for name in re.findall(r"(?:^|[`:] ?)make ([a-z][\w-]*)", file.read_text(), re.M)
    }
    assert {"book", "test"} <= named <= targets


def test_no_path_of_one_machine_is_tracked() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    pattern = re.compile(rb"(?<![\w.}])/(?:work|root|home|Users)/\w")
    for name in filter(None, names.split("\0")):
        path = ROOT / name
        if path.is_file():
            found = pattern.search(path.read_bytes())
            assert not found, f"{name} has a path of one machine: {found}"


def run_colab_cell(monkeypatch: pytest.MonkeyPatch, opened: str, source: str = colab_cell.SOURCE) -> list[list[str]]:
    """Run the cell as on Colab, with a notebook opened from `opened`; return the commands it would have run."""
    commands: list[list[str]] = []
    answer = SimpleNamespace(json=lambda: [{"path": opened}])
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    monkeypatch.setitem(sys.modules, "requests", SimpleNamespace(get=lambda url, timeout: answer))
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    monkeypatch.setattr(os, "chdir", lambda folder: commands.append(["cd", folder]))
    exec(compile(source, "cell", "exec"), {})
    return commands


@pytest.mark.parametrize("branch", ["main", "feature/ranks"])
def test_colab_cell_takes_the_repository_that_the_notebook_was_opened_from(
    monkeypatch: pytest.MonkeyPatch, branch: str
) -> None:
    opened = f"fileId=https%3A%2F%2Fgithub.com%2Fsome-one%2Ffork%2Fblob%2F{branch}%2Fbook%2Fsetup.ipynb"
    clone, install, change = run_colab_cell(monkeypatch, opened)
    assert clone[:2] == ["git", "clone"] and "https://github.com/some-one/fork.git" in clone
    assert f"--branch={branch}" in clone
    assert f"torch=={version('torch')}" in install
    assert change == ["cd", f"{clone[-1]}/book"] and clone[-1] in install


def test_colab_cell_asks_for_the_repository_of_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="REPOSITORY"):
        run_colab_cell(monkeypatch, "fileId=1a2b3c")
    named = colab_cell.SOURCE.replace('REPOSITORY, BRANCH = ""', 'REPOSITORY, BRANCH = "some/one"')
    assert "https://github.com/some/one.git" in run_colab_cell(monkeypatch, "fileId=1a2b3c", named)[0]


def test_colab_cell_does_nothing_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("ran a command"))
    exec(compile(colab_cell.SOURCE, "cell", "exec"), {})


@pytest.mark.parametrize(
    "environ, origin, branch, expected",
    [
        ({}, "", "main", None),
        ({}, "https://git.example.org/a/b.git", "main", None),
        ({}, "../a/b", "main", None),
        ({}, "https://github.com/a/b.git", "work", ("https://github.com/a/b", "work")),
        ({}, "git@github.com:a/b.c.git", "", ("https://github.com/a/b.c", "main")),
        ({}, "https://token@github.com/a/b", "main", ("https://github.com/a/b", "main")),
        (
            {"GITHUB_REPOSITORY": "c/d", "GITHUB_REF_NAME": "main"},
            "https://github.com/a/b",
            "x",
            ("https://github.com/c/d", "main"),
        ),
        (
            {"GITHUB_REPOSITORY": "c/d", "GITHUB_REF_NAME": "12/merge", "GITHUB_BASE_REF": "main"},
            "",
            "",
            ("https://github.com/c/d", "main"),
        ),
        (
            {"BOOK_REPOSITORY_URL": "https://github.com/e/f/", "GITHUB_REPOSITORY": "c/d"},
            "",
            "",
            ("https://github.com/e/f", "main"),
        ),
        ({"BOOK_REPOSITORY_URL": "https://gitlab.com/e/f"}, "https://github.com/a/b", "main", None),
    ],
)
def test_repository_of_the_links(environ: dict, origin: str, branch: str, expected: tuple[str, str] | None) -> None:
    assert book_site.repository(environ, origin, branch) == expected


def test_no_button_where_no_repository_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(book_site, "repository", lambda *_: None)
    options = {"launch_buttons": {"colab_url": "https://colab.research.google.com"}, "repository_url": "https://x"}
    book_site.set_links(None, SimpleNamespace(html_theme_options=options))
    assert not options["launch_buttons"] and not options["use_repository_button"] and "repository_url" not in options


def test_the_button_of_each_chapter_opens_it_in_a_given_repository(tmp_path: Path) -> None:
    """Rendered with the book's configuration, of every chapter only its title."""
    for name in ("_config.yml", "book/_ext/book_site.py", "book/_static/favicon.svg", "book/references.bib"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for path in NOTEBOOKS:
        short = notebook(path)
        short.cells = [nbformat.v4.new_markdown_cell(short.cells[0].source.splitlines()[0])]
        nbformat.write(short, tmp_path / "book" / path.name)
    others = [{"file": f"book/{path.stem}"} for path in NOTEBOOKS if path.stem != "index"]
    (tmp_path / "_toc.yml").write_text(yaml.safe_dump({"format": "jb-book", "root": "book/index", "chapters": others}))
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", "-q", str(tmp_path)]
    environment = {"BOOK_REPOSITORY_URL": "https://github.com/some-one/fork", "GITHUB_REF_NAME": "topic"}
    subprocess.run(command, env={**os.environ, **environment}, check=True, capture_output=True)
    for path in NOTEBOOKS:
        page = (tmp_path / "_build" / "html" / "book" / f"{path.stem}.html").read_text()
        links = set(re.findall(r'href="(https://colab[^"]+)"', page))
        assert links == {f"https://colab.research.google.com/github/some-one/fork/blob/topic/book/{path.name}"}


def write_chapter(path: Path, text: str, code: str) -> None:
    cells = [nbformat.v4.new_markdown_cell(text), nbformat.v4.new_code_cell(code)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)


def test_chapters_are_executed_again_only_where_needed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("ROOT", tmp_path), ("SCRATCH", tmp_path / ".book"), ("EXECUTED", tmp_path / ".book/executed")):
        monkeypatch.setattr(book_tool, name, value)
    monkeypatch.delenv("MMQLORA_REAL", raising=False)
    monkeypatch.delenv("MMQLORA_MODELS", raising=False)
    for folder in ("src", "book/records"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "requirements.lock").write_text("a==1\n")
    (tmp_path / "_toc.yml").write_text("root: book/good\nchapters: [{file: book/bad}]\n")
    good, bad = tmp_path / "book/good.ipynb", tmp_path / "book/bad.ipynb"
    write_chapter(good, "# Good", "import sys\nsys.prefix")
    write_chapter(bad, "# Bad", "1 / 0")

    def path_of(chapter: Path) -> Path:
        return book_tool.executed_path(chapter, book_tool.shared_key())

    # A failure is shown and forgotten; what the other chapter gave is kept, and ran in this environment.
    assert not book_tool.execute(book_tool.shared_key())
    assert "ZeroDivisionError" in capfd.readouterr().out
    assert path_of(good).exists() and not path_of(bad).exists()
    noted = notebook(path_of(good)).metadata["executed"]
    assert noted["seconds"] > 0 and noted["versions"]["python"] == platform.python_version()
    assert sys.prefix in path_of(good).read_text()
    write_chapter(bad, "# Bad", "1 / 1")
    assert book_tool.execute(book_tool.shared_key())
    assert "1 to execute, 1 unchanged" in capfd.readouterr().out

    before = path_of(good)
    write_chapter(good, "# Other words", "import sys\nsys.prefix")
    assert path_of(good) == before
    for file in ("requirements.lock", "src/module.py", "book/records/runs.jsonl"):
        (tmp_path / file).write_text("changed")
        assert path_of(good) != before, f"a change in {file} has to execute the chapters again"
        before = path_of(good)
    monkeypatch.setenv("MMQLORA_MODELS", str(tmp_path / "book"))
    assert path_of(good) != before
    before = path_of(good)
    write_chapter(good, "# Good", "2")
    assert path_of(good) != before


def test_requirements_name_tests_that_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)`", (ROOT / "book" / "design.md").read_text())
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")}
    assert len(named) >= 18 and set(named) <= there


def test_the_library_imports_only_what_comes_before_it() -> None:
    order = re.findall(r"automodule:: mmqlora\.([\w.]+)", (ROOT / "book" / "api.md").read_text())
    for number, name in enumerate(order):
        path = ROOT / "src" / "mmqlora" / Path(*name.split("."))
        code = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
        for other in re.findall(r"^from \.+([a-z][\w.]*) import", code, flags=re.MULTILINE):
            later = order[number + 1 :]
            assert other not in later and f"datasets.{other}" not in later, f"{name} imports {other}, which comes later"


def test_a_model_of_ones_own_takes_less_than_forty_lines() -> None:
    cells = [
        cell
        for cell in code_cells(ROOT / "book" / "your_model.ipynb")
        if "remove-cell" not in cell.metadata.get("tags", [])
    ]
    lines = [line for cell in cells for line in cell.source.splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) < 40, len(lines)


def test_colab_keeps_what_its_kernel_has_loaded() -> None:
    """Replacing what a running process has loaded, or torch with its CUDA, would need a restart."""
    assert set(colab_cell.replaced()) <= {"peft", "transformers"}


def test_the_page_of_records_has_every_run_and_stays_small() -> None:
    folder = ROOT / "book" / "records"
    found = appendices.records(folder)
    page = found[Path("records.md")].decode()
    for path in folder.glob("*.jsonl"):
        section = page.split(f"(records-{path.stem})=")[1].split("\n(records-")[0]
        runs = mmqlora.read_records(path)
        assert sorted(re.findall(r"<code>(\w{12})</code>", section)) == sorted(run["id"] for run in runs)
        assert all(f"`{commit}`" in section for commit in {run["commit"] for run in runs})
        assert gzip.decompress(found[Path("records") / f"{path.name}.gz"]) == path.read_bytes()
    assert len(page) < 1_400_000 and sum(map(len, found.values())) < 20_000_000
    assert found == appendices.records(folder)  # or Sphinx would read it again each time


def test_the_status_says_what_ran_where_and_when() -> None:
    machine = {"processor": "CPU", "cores": 2, "threads": 1, "memory_bytes": 2**34, "accelerator": None}
    run = {"seconds": 61.2, "when": "2026-01-02T03:04", "versions": {"python": "3.11.9"}, "machine": machine}
    page = appendices.status([("Setup", "setup", run), ("Ranks", "ranks", {})])
    assert "| [Setup](setup.ipynb) | 61 s | 2026-01-02 03:04 |" in page and "| [Ranks](ranks.ipynb) | | |" in page
    assert "CPU, 2 cores, 16 GiB, 1 thread, no GPU" in page and "| python | 3.11.9 |" in page
    assert platform.node() not in page or not platform.node()


@pytest.mark.parametrize("number, letters", [(0, "a"), (25, "z"), (26, "aa"), (27, "ab"), (52, "ba"), (702, "aaa")])
def test_letters_of_commits(number: int, letters: str) -> None:
    assert appendices._letters(number) == letters
