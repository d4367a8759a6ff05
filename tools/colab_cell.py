"""The first code cell of every chapter: on Colab it fetches the book and the library, elsewhere it reads LARGE."""

from __future__ import annotations

import tomllib
from pathlib import Path

import nbformat
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]

SOURCE = """\
# Colab only: fetch the book, install its library, keep Colab's torch. Anywhere else this cell only reads LARGE.
import os

LARGE = bool(os.environ.get("MMQLORA_LARGE"))  # True on a GPU: a larger model or a whole run, where there is one
REPOSITORY, BRANCH = "", "main"  # "owner/name"; needed only if this notebook was not opened from GitHub

if "COLAB_RELEASE_TAG" in os.environ:
    import re
    import subprocess
    import sys
    from importlib.metadata import version
    from urllib.parse import unquote

    import requests

    opened = unquote(requests.get("http://172.28.0.12:9000/api/sessions", timeout=10).json()[0]["path"])
    if found := re.search(r"github\\.com/([^/]+/[^/]+)/blob/(.+)/book/", opened):
        REPOSITORY, BRANCH = found.groups()
    if not REPOSITORY:
        raise RuntimeError("Set REPOSITORY above to this book's 'owner/name' on GitHub and run the cell again.")
    folder = "/content/mmqlora"
    if not os.path.isdir(folder):
        source = f"https://github.com/{REPOSITORY}.git"
        subprocess.run(["git", "clone", "-q", "--depth=1", f"--branch={BRANCH}", source, folder], check=True)
    kept = [f"{name}=={version(name)}" for name in ("torch", "torchvision", "torchaudio")]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", folder, "seaborn", *kept], check=True)
    os.chdir(f"{folder}/book")"""


def write_colab_cell(path: Path) -> None:
    """Make the cell the first code cell: in place of an older one, or of `# colab-setup`, or before all others."""
    notebook = nbformat.read(path, as_version=4)
    first = next((i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"), len(notebook.cells))
    if first == len(notebook.cells) or not notebook.cells[first].source.lower().startswith("# colab"):
        notebook.cells.insert(first, nbformat.v4.new_code_cell())
    cell = notebook.cells[first]
    if (cell.source, cell.metadata.get("tags")) != (SOURCE, ["remove-cell"]):
        cell.source, cell.metadata = SOURCE, nbformat.from_dict({"tags": ["remove-cell"]})
        nbformat.write(notebook, path)


def replaced() -> dict[str, tuple[str, str]]:
    """What installing the library on Colab replaces: name to the version that Colab ships, and what is wanted."""
    lines = (ROOT / "tools" / "colab_versions.txt").read_text().splitlines()
    shipped = dict(line.split("==") for line in lines if not line.startswith("#"))
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return {
        need.name: (shipped[need.name], str(need.specifier))
        for need in map(Requirement, wanted)
        if need.name in shipped and not need.specifier.contains(shipped[need.name])
    }
