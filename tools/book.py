"""Execute the chapters; build the book; give chapters their cell for Colab: `python tools/book.py execute|build|colab`.

A chapter is executed once. What it gave is kept in .book/executed under a key made of all that the result depends on:
the chapter's code, the library, the records, the lock, the Python and the machine's models. Text can change freely.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import nbformat
import yaml
from appendices import records, status
from colab_cell import replaced, write_colab_cell

ROOT = Path(__file__).resolve().parents[1]
SCRATCH = ROOT / ".book"  # nbmake skips, without a word, paths that contain `_build`
EXECUTED = SCRATCH / "executed"
WORKERS = 2
CELL_SECONDS = 600
PAGES = {".ipynb", ".md", ".bib"}


def chapters() -> list[Path]:
    """The notebooks of the table of contents, in order."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    entries = [toc["root"]]
    for part in toc.get("parts", [toc]):
        entries += [entry["file"] for entry in part["chapters"]]
    return [path for entry in entries if (path := ROOT / f"{entry}.ipynb").exists()]


def environment() -> dict[str, str]:
    """One thread a chapter, the kernel of this environment, and the folder of real models and media if there is one."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "JUPYTER_PREFER_ENV_PATH": "1"}
    variables.pop("JUPYTER_PATH", None)  # it would go before this environment's kernel
    real = ROOT.parent / "shared" / "real"
    if real.is_dir():
        variables.setdefault("MMQLORA_REAL", str(real))
        variables.setdefault("MMQLORA_MODELS", str(real / "models"))
    return variables


def inputs() -> Iterator[Path]:
    """The files that every chapter depends on."""
    yield ROOT / "requirements.lock"
    for path in sorted([*(ROOT / "src").rglob("*"), *(ROOT / "book").rglob("*")]):
        parts = path.relative_to(ROOT).parts
        if path.is_file() and path.suffix not in PAGES and not {"__pycache__", "_static", "_ext"} & set(parts):
            if not any(part.endswith(".egg-info") for part in parts):
                yield path


def shared_key() -> str:
    variables = environment()
    seen: list[object] = [sys.version_info[:2], shutil.which("nvidia-smi") is not None]
    seen += [(str(path.relative_to(ROOT)), hashlib.sha256(path.read_bytes()).hexdigest()) for path in inputs()]
    for name in ("MMQLORA_REAL", "MMQLORA_MODELS"):
        for folder in filter(None, variables.get(name, "").split(os.pathsep)):
            files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
            seen.append((name, [(str(path.relative_to(folder)), path.stat().st_size) for path in files]))
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def executed_path(chapter: Path, shared: str) -> Path:
    cells = [(cell.source, cell.metadata.get("tags", [])) for cell in code_cells(nbformat.read(chapter, as_version=4))]
    key = hashlib.sha256(json.dumps([shared, cells]).encode()).hexdigest()[:16]
    return EXECUTED / f"{chapter.stem}.{key}.ipynb"


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def run(chapter: Path, result: Path) -> bool:
    """Execute one chapter in a folder of its own; keep the result only if every cell passed."""
    folder = SCRATCH / "run" / chapter.stem
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "book", folder, ignore=shutil.ignore_patterns("*.ipynb", "_static", "_ext"))
    notebook = Path(shutil.copy(chapter, folder))
    # The unit tests' time limit is not the chapters'.
    options = ["-o", "timeout=0", "-p", "no:cacheprovider", "--no-header"]
    nbmake = ["--nbmake", "--overwrite", f"--nbmake-timeout={CELL_SECONDS}", "--nbmake-kernel=python3"]
    start = time.monotonic()
    command = [sys.executable, "-m", "pytest", *options, *nbmake, str(notebook)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    seconds = time.monotonic() - start
    if done.returncode:
        print(f"{chapter.stem}: FAILED after {seconds:.0f} s\n{done.stdout}{done.stderr}", flush=True)
        return False
    for old in EXECUTED.glob(f"{chapter.stem}.*.ipynb"):
        old.unlink()
    note(notebook, seconds)
    notebook.replace(result)
    print(f"{chapter.stem}: executed in {seconds:.0f} s", flush=True)
    return True


def note(notebook: Path, seconds: float) -> None:
    """Keep beside the outputs what the page on the status of the book says."""
    from mmqlora.records import environment as versions_and_machine

    executed = nbformat.read(notebook, as_version=4)
    when = time.strftime("%Y-%m-%dT%H:%M", time.gmtime())
    executed.metadata["executed"] = {"seconds": round(seconds, 1), "when": when, **versions_and_machine()}
    nbformat.write(executed, notebook)


def execute(shared: str) -> bool:
    EXECUTED.mkdir(parents=True, exist_ok=True)
    results = {chapter: executed_path(chapter, shared) for chapter in chapters()}
    stale = {chapter: result for chapter, result in results.items() if not result.exists()}
    print(f"Chapters: {len(stale)} to execute, {len(results) - len(stale)} unchanged", flush=True)
    with ThreadPoolExecutor(WORKERS) as pool:
        passed = list(pool.map(run, stale, stale.values()))
    if not all(passed):
        print("Failed: " + ", ".join(chapter.stem for chapter, good in zip(stale, passed, strict=True) if not good))
    return all(passed)


def render(shared: str) -> bool:
    """Put the outputs into the chapters as they are now and render them to _build/html."""
    site = SCRATCH / "site"
    wanted = {Path("_config.yml"): b"", Path("_toc.yml"): b""}
    wanted |= {path.relative_to(ROOT): b"" for path in (ROOT / "book").rglob("*") if path.is_file()}
    states = []
    for chapter in chapters():
        notebook = nbformat.read(chapter, as_version=4)
        ran = nbformat.read(executed_path(chapter, shared), as_version=4)
        for cell, done in zip(code_cells(notebook), code_cells(ran), strict=True):
            cell.outputs, cell.execution_count = done.outputs, done.execution_count
            if "figure" in cell.metadata.get("mystnb", {}) and len(cell.outputs) != 1:
                name = cell.metadata.mystnb.figure.name
                print(f"{chapter.stem}: the cell of {name} shows {len(cell.outputs)} things, a figure's cell shows one")
                return False
        notebook.metadata.language_info = ran.metadata.language_info
        title = notebook.cells[0].source.splitlines()[0].removeprefix("# ")
        states.append((title, chapter.stem, ran.metadata.get("executed", {})))
        wanted[chapter.relative_to(ROOT)] = nbformat.writes(notebook).encode()
    wanted[Path("book/status.md")] = status(states).encode()
    wanted |= {Path("book") / name: content for name, content in records(ROOT / "book" / "records").items()}
    for path in [path for path in site.rglob("*") if path.is_file() and path.relative_to(site) not in wanted]:
        path.unlink()
    for name, content in wanted.items():
        # What has not changed keeps its time, so that Sphinx reads only what has.
        content = content or (ROOT / name).read_bytes()
        if not (site / name).exists() or (site / name).read_bytes() != content:
            (site / name).parent.mkdir(parents=True, exist_ok=True)
            (site / name).write_bytes(content)
    print("Rendering to _build/html", flush=True)
    command = [Path(sys.executable).with_name("jupyter-book"), "build", "-W", "-n", "--keep-going", "-q"]
    # stdout holds Jupyter Book's banners; the warnings are on stderr.
    done = subprocess.run([*command, "--path-output", ROOT, site], env=environment(), stdout=subprocess.DEVNULL)
    if done.returncode:
        # Sphinx says a warning only when it reads the page: forget what it read, or the next run would pass.
        shutil.rmtree(ROOT / "_build" / ".doctrees", ignore_errors=True)
        print("Failed: the warnings above count as errors")
        return False
    # Jupyter Book's page at the root names no icon, so a browser that stays on it for a moment asks for one in vain. An
    # empty one asks for nothing.
    first, icon = ROOT / "_build" / "html" / "index.html", '<link rel="icon" href="data:,">'
    if icon not in (page := first.read_text()):
        first.write_text(f"{icon}\n{page.strip()}\n")
    print("The book is in _build/html/index.html")
    return True


@contextmanager
def alone() -> Iterator[None]:
    """Two runs at the same time would write the same files."""
    SCRATCH.mkdir(exist_ok=True)
    with open(SCRATCH / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Waiting for another run on this book to end", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(command: str) -> bool:
    if command == "colab":
        for chapter in chapters():
            write_colab_cell(chapter)
        for name, (shipped, wanted) in replaced().items():
            print(f"Colab ships {name} {shipped}; the first cell of a chapter installs one that is {wanted}")
        return True
    with alone():
        shared = shared_key()
        return execute(shared) and (command == "execute" or render(shared))


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in ("execute", "build", "colab"):
        sys.exit(__doc__)
    sys.exit(not main(sys.argv[1]))
