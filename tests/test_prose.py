"""What the chapters say, and where it comes from: their parts, their links, and no measured number typed by hand."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))

import appendices  # noqa: E402

TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
LISTED = [entry["file"] for part in TOC["parts"] for entry in part["chapters"]]
INDEX = ROOT / f"{TOC['root']}.ipynb"
CHAPTERS = [path for name in LISTED if (path := ROOT / f"{name}.ipynb").exists()]
RECORDS = {path.stem for path in (ROOT / "book" / "records").glob("*.jsonl")}

UNIT = r"(?:%|(?:points?|times|fold|m?s|(?:milli)?seconds?|minutes?|hours?|[kMG]i?B|bytes|dB|nats)\b)"
NUMBER = re.compile(rf"(?<![\w.,^_{{/-])(\d[\d,]*(?:\.\d+)?)(?:\s?({UNIT}))?")
# Numbers that no record could hold, and why: facts about the world, not measurements of ours.
KNOWN = {
    "Python 3.11": "a version",
    "3.13": "a version",
    "bitsandbytes 0.50": "a version",
    "wav2vec 2.0": "a name",
    "to 30 s": "Whisper's window, by its configuration",
    "hears 30 s": "Whisper's window, by its configuration",
    "126 GB": "the table above the figure, by the formula above the table",
    "about 15 GB": "the same",
    "about 5 GB": "the same",
    "at most 6 s": "how the clips were cut",
    "6 to 30 seconds": "the axis of the figure",
    "from 20 seconds on": "a place on the axis of the figure",
    "39 million to 1.55 billion": "sizes of a family of models, in the code of the cell in another form",
    "95% interval": "a convention",
    "edges of 5 ms": "by the definition of the world",
    "lasts 0.3 s": "a chirp, by the definition of the world",
    "1% of the parameters": "how large adapters usually are, as the cell below takes it",
    "4.127 bits": "the arithmetic of double quantization, in the formula of another chapter",
    "4.5 bits": "the arithmetic of one 32-bit scale for 64 weights",
}


def cells(path: Path, kind: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def text_of(path: Path) -> str:
    return "\n\n".join(cell.source for cell in cells(path, "markdown"))


@pytest.fixture(params=CHAPTERS, ids=lambda path: path.stem)
def chapter(request: pytest.FixtureRequest) -> Path:
    return request.param


# --- Numbers


def prose(markdown: str) -> str:
    """What is left without code, formulas, links and roles; citations stay."""
    for pattern in (
        r"^(`{3,}|:{3,}).*?^\1[ \t]*$",  # blocks of code and answers
        r"^    .*$",
        r"\$\$.*?\$\$",
        r"\$[^$]+\$",
        r"\{(?!cite)[\w:]+\}`[^`]*`",
        r"(?<!\})`[^`]*`",
        r"\]\([^)]*\)",
    ):
        markdown = re.sub(pattern, " ", markdown, flags=re.DOTALL | re.MULTILINE)
    return markdown


def shown(source: str) -> Iterator[str]:
    """The fixed parts of what a cell displays as Markdown."""
    for call in ast.walk(ast.parse(source)):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Markdown":
            yield " ".join(
                node.value for node in ast.walk(call) if isinstance(node, ast.Constant) and isinstance(node.value, str)
            )


def by_hand(text: str, given: str) -> list[str]:
    """Numbers that look measured, in sentences that cite nobody, and that are not among what is given."""
    given = given.replace("{,}", "").replace(",", "").replace("_", "")
    found = []
    for sentence in re.split(r"(?<=[.:;!?])\s+(?=[A-Z*{\[-])|\n\n|\n[-*|]", prose(text)):
        if "{cite" in sentence:
            continue
        for known in KNOWN:
            sentence = sentence.replace(known, " ")
        for match in NUMBER.finditer(sentence):
            number = match[1].rstrip(",").replace(",", "")
            looks_measured = "." in number or match[2]
            if looks_measured and not re.search(rf"(?<![\d.]){re.escape(number)}(?!\.?\d)", given):
                found.append(f"{match[0]!r} in: {' '.join(sentence.split())}")
    return found


def formulas(path: Path) -> str:
    """Formulas and code within the text; the code of the cells, of which one digit alone says nothing."""
    inline = re.findall(r"\$\$.*?\$\$|\$[^$]+\$|`[^`]*`", text_of(path), flags=re.DOTALL)
    code = "\n".join(cell.source for cell in cells(path, "code")).replace("_", "")
    return "\n".join([*inline, *re.findall(r"\d+\.\d+|\d{2,}", code)])


@pytest.mark.parametrize("chapter", [INDEX, *CHAPTERS], ids=lambda path: path.stem)
def test_no_measured_number_is_typed_by_hand(chapter: Path) -> None:
    """Exercises compute; all else comes from a record, a formula, a setting, or somebody who is cited."""
    given = formulas(chapter)
    texts = [re.split(r"^## Exercises", text_of(chapter), flags=re.MULTILINE)[0]]
    for cell in cells(chapter, "code"):
        mystnb = cell.metadata.get("mystnb", {})
        texts += [mystnb.get("figure", {}).get("caption", ""), mystnb.get("image", {}).get("alt", "")]
        texts += shown(cell.source)
    found = [number for text in texts for number in by_hand(text, given)]
    assert not found, (
        f"{chapter.stem}: fill these from a record in a cell that displays Markdown, cite who measured them, or, where "
        "they are facts, add them to KNOWN with the reason:\n" + "\n".join(found)
    )


@pytest.mark.parametrize(
    "text, found",
    [
        ("QLoRA gains 3.4 points.", 1),
        ("It takes 12% of the time of LoRA.", 1),
        ("It takes 12 ms.", 1),
        ("Six seeds of 500 items, rank 8.", 0),
        ("Full fine-tuning reaches 0.94 {cite}`hu2022lora`.", 0),
        ("It costs $0.94$ bytes, that is 0.94 bytes.", 0),
        ("`rate=0.94` and\n\n    a block of 0.94\n", 0),
        ("At 0.94 of the score it stops. That is 2.5 times as much.", 2),
        ("Python 3.11 is needed.", 0),
    ],
)
def test_the_check_finds_what_it_should(text: str, found: int) -> None:
    given = "\n".join(re.findall(r"\$[^$]+\$", text))
    assert len(by_hand(text, given)) == found


# --- Parts


def test_a_chapter_opens_with_its_question_and_its_answer(chapter: Path) -> None:
    every = nbformat.read(chapter, as_version=4).cells
    assert "**The question.**" in every[0].source
    answers = [place for place, cell in enumerate(every) if "**The answer" in cell.source]
    assert answers, f"{chapter.stem} has no answer"
    # Before the answer there is nothing to read but the question.
    assert not [c for c in every[1 : answers[0]] if c.cell_type == "markdown"]


def test_a_chapter_closes_with_its_limits_and_exercises_with_folded_answers(chapter: Path) -> None:
    parts = re.split(r"^## (.*)$", text_of(chapter), flags=re.MULTILINE)
    headings, bodies = parts[1::2], parts[2::2]
    assert headings[-1] == "Exercises"
    assert [h for h in headings if re.match(r"Where (it|uniform)\b.*\b(fails|nothing)", h)], headings
    asked = re.findall(r"^(?:\*\*\d+\.\*\*|\d+\.) ", bodies[-1], flags=re.MULTILINE)
    answered = re.findall(r"\{admonition\} Answer\s+:class: dropdown|\{dropdown\} (?:Answer|Hint)", bodies[-1])
    assert 2 <= len(asked) == len(answered)


def behind(path: Path) -> str:
    """The line that says which modules and records are behind a chapter."""
    (line,) = [cell.source for cell in cells(path, "markdown") if cell.source.startswith("*Behind this page:*")]
    return line


def test_a_chapter_names_the_modules_and_the_records_behind_it(chapter: Path) -> None:
    line = behind(chapter)
    modules = set(re.findall(r"\{mod\}`mmqlora\.([\w.]+)`", line))
    documented = set(re.findall(r"automodule:: mmqlora\.([\w.]+)", (ROOT / "book" / "api.md").read_text()))
    assert modules and modules <= documented
    code = "\n".join(cell.source for cell in cells(chapter, "code"))
    for name in re.findall(r"^from experiments\.(\w+_results) import", code, flags=re.MULTILINE):
        code += (ROOT / "book" / "experiments" / f"{name}.py").read_text()
    read = set(re.findall(r"\b(\w+)\.jsonl", code)) & RECORDS
    assert read <= set(re.findall(r"`records-(\w+)`", line)), f"{chapter.stem} reads {read}: name them behind the page"


def test_no_cell_displays_what_outputs_can_not_show(chapter: Path) -> None:
    # They are read as CommonMark, which has no tables, formulas or roles: the page would show the signs.
    trees = [ast.parse(cell.source) for cell in cells(chapter, "code") if "Markdown(" in cell.source]
    texts = [node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    assert not [text for text in texts if re.search(r"\|\s*:?-{3}|\$[^$]+\$|\{\w+\}`", str(text))]


def test_every_file_of_records_is_behind_a_page_and_in_the_list_of_files() -> None:
    named = {name for path in CHAPTERS for name in re.findall(r"`records-(\w+)`", behind(path))}
    assert named == RECORDS, "name them in the line *Behind this page* of the chapter that reads them"
    assert set(appendices.FILES) >= RECORDS, "say in FILES of tools/appendices.py what they hold and what makes them"


def test_what_makes_records_again_exists() -> None:
    for _, command in appendices.FILES.values():
        module, script = re.fullmatch(r"python (?:-m experiments\.(\w+)|(\w+\.py)).*", command).groups()
        assert (ROOT / "book/experiments" / f"{module}.py" if module else ROOT / "tests" / script).exists(), command
