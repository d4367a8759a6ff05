"""What the book's pages need beyond _config.yml: links to the repository they were built from, and accessible lists."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping

from sphinx.application import Sphinx
from sphinx.config import Config


def git(*arguments: str) -> str:
    """What git answers, or nothing where there is no git, no repository or no such thing."""
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def repository(environ: Mapping[str, str], origin: str, branch: str) -> tuple[str, str] | None:
    """The repository's address on GitHub and its branch; None where it is not known to be there.

    A fork gets links to itself without an edit, and no page links to a place that does not exist.
    """
    url = environ.get("BOOK_REPOSITORY_URL") or ""
    if not url and environ.get("GITHUB_REPOSITORY"):
        url = f"https://github.com/{environ['GITHUB_REPOSITORY']}"
    found = re.fullmatch(
        r"(?:https://(?:[^@/]+@)?|ssh://git@|git@)github\.com[/:]([\w.-]+)/([\w.-]+?)(?:\.git)?/?", url or origin
    )
    if not found:
        return None
    # A pull request's name, such as 12/merge, is no branch.
    name = environ.get("GITHUB_REF_NAME", "") if environ.get("GITHUB_REF_TYPE", "branch") == "branch" else ""
    if name.endswith("/merge"):
        name = environ.get("GITHUB_BASE_REF", "")
    return f"https://github.com/{found[1]}/{found[2]}", name or branch or "main"


def set_links(app: Sphinx, config: Config) -> None:
    options = config.html_theme_options
    options["navbar_persistent"] = []  # the theme would show a second search field
    place = repository(os.environ, git("remote", "get-url", "origin"), git("branch", "--show-current"))
    if place is None:
        options["launch_buttons"] = {}
        options.pop("repository_url", None)
    else:
        options["repository_url"], options["repository_branch"] = place
    options["use_repository_button"] = options["use_issues_button"] = place is not None


def mark_references(app: Sphinx, page: str, template: str, context: dict, doctree: object) -> None:
    # Screen readers no longer know docutils' role; its list needs list items.
    if "body" in context:
        context["body"] = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("config-inited", set_links)
    app.connect("html-page-context", mark_references)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
