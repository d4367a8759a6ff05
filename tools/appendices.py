"""The two appendices that are made when the book is rendered: its records, and the status of its chapters.

Example:
    >>> sorted(records(Path("book/records")))[0]
    PosixPath('records/base_models.jsonl.gz')
    >>> "| chapter |" in status([("Setup", "setup", {})])
    True
"""

from __future__ import annotations

import gzip
import html
import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from string import ascii_lowercase
from typing import Any

GENERATED = ("book/records", "book/status")  # pages of the table of contents that are no files of the repository

# What a file of records holds, and what makes it again, in book/ unless it says otherwise.
FILES: dict[str, tuple[str, str]] = {
    "base_models": ("Training of the three base models", "python -m experiments.base_models MODEL"),
    "base_models_again": ("The base models, trained once more", "python -m experiments.base_models MODEL --again"),
    "base_models_bits": ("The base models with regions in 4 bits", "python -m experiments.base_models MODEL --bits"),
    "shifts": ("Every shift: the model as it comes and fine-tuned", "python -m experiments.baselines --shifts"),
    "baselines": ("Every known method, at 16 and 4 bits", "python -m experiments.baselines"),
    "baselines_tuning": ("Learning rates of the baselines", "python -m experiments.baselines --tune"),
    "baselines_memory": ("Peak memory of the baselines", "python -m experiments.baselines --memory"),
    "baselines_cost": ("Time of a step of the baselines", "python -m experiments.baselines_cost"),
    "first_qlora_run": ("Whisper on new voices", "python -m experiments.first_qlora_run"),
    "first_qlora_run_tuning": ("Learning rates of Whisper", "python -m experiments.first_qlora_run --tune"),
    "first_qlora_run_memory": ("Peak memory of Whisper", "python -m experiments.first_qlora_run --memory"),
    "first_qlora_run_discarded": (
        "A run at the learning rate that was given up",
        "python -m experiments.first_qlora_run --arm qlora --seed 1 (with that rate)",
    ),
    "temporal": ("Temporal adapters and their controls", "python -m experiments.temporal"),
    "temporal_tuning": ("Learning rates of the temporal adapters", "python -m experiments.temporal --tune"),
    "temporal_mechanism": ("What pulls at the gates", "python -m experiments.temporal_mechanism"),
    "temporal_cost": ("Time and memory of gates", "python -m experiments.temporal_cost"),
    "temporal_speech": ("Temporal adapters on speech", "python -m experiments.temporal_speech"),
    "temporal_speech_tuning": ("Their learning rates", "python -m experiments.temporal_speech --tune"),
    "signals_cost": ("Signals beside decoding", "python -m experiments.temporal_cost --signals"),
    "peft_suite": ("PEFT's own tests, with gates", "python peft_suite.py PEFT (in tests/)"),
    "conformance": ("Architectures and what gates do on them", "python conformance.py (in tests/)"),
    "ranks": ("Where the rank goes, and where A starts", "python -m experiments.ranks"),
    "ranks_tuning": ("Learning rates of the ranks", "python -m experiments.ranks --tune"),
    "ranks_speech": ("Where the rank goes, on speech", "python -m experiments.ranks_speech"),
    "ranks_speech_tuning": ("Their learning rates", "python -m experiments.ranks_speech --tune"),
    "ranks_shares": ("Shares of a budget, without training", "python -m experiments.ranks_shares"),
    "ranks_cost": ("What a calibration costs", "python -m experiments.ranks_cost"),
    "selection_frames": ("Selectors of frames, before a model as it comes", "python -m experiments.selection frames"),
    "selection_sounds": ("Selectors of segments of sound", "python -m experiments.selection sounds"),
    "selection_floors": ("Frames kept, by what is taken for noise", "python -m experiments.selection floors"),
    "selection_heights": ("Floors of log-determinants", "python -m experiments.selection heights"),
    "selection_prices": ("Thumbnails or features of the encoder", "python -m experiments.selection prices"),
    "selection_cache": ("Frames and bits under one budget", "python -m experiments.selection cache"),
    "selection_trained": ("QLoRA on the frames of a selector", "python -m experiments.selection trained"),
    "selection_tuning": ("Learning rates by selector", "python -m experiments.selection trained --tune"),
    "selection_speech": ("Selection in a window of thirty seconds", "python -m experiments.selection_speech"),
    "selection_cost": ("What selecting costs", "python -m experiments.selection_cost --hour"),
    "together": ("The three contributions under one budget", "python -m experiments.together"),
    "together_tuning": ("Learning rates of their combinations", "python -m experiments.together --tune"),
    "ablations": ("One thing at a time around the standard run", "python -m experiments.ablations"),
    "ablations_tuning": ("Learning rates of the ablations", "python -m experiments.ablations --tune"),
    "memory_checks": ("Predicted and counted bytes of real steps", "python rehearsals.py (in tests/)"),
    "memory_published": ("Predicted memory of published runs", "python -m experiments.memory_published"),
    "recipes": ("Planned memory of the recipes", "python -m experiments.recipes"),
    "efficiency_hold": ("Bytes held by a step, and bytes saved", "python -m experiments.efficiency --part hold"),
    "efficiency_steps": ("Time of a step", "python -m experiments.efficiency --part steps"),
    "efficiency_roofline": (
        "What a 4-bit layer does, part by part",
        "python -m experiments.efficiency --part roofline",
    ),
    "efficiency_scaling": ("How cost grows", "python -m experiments.efficiency --part scaling"),
    "efficiency_curves": ("Scores in the course of training", "python -m experiments.efficiency --part curves"),
}
PACKAGES = ("python", "torch", "transformers", "peft")
# The score of a run that the page shows: the first of these that its record has.
SCORES = ("word_accuracy", "reciprocal_rank", "wer/synthetic/30s", "wer/voices/30s", "word_error_rate", "ratio")

HEAD = """\
# Records

A number in this book that was measured in a run comes from one of these files, a JSON line for each run: configuration,
seed, data, versions, commit, machine, time, scores, mostly down to every item. A chapter names its files at its top.

To find a run, open the table of its file: a row for each configuration, with seed, score, id and commit of every run.
To make it again, run the command of the file in `book/`. What has a record is not run twice, so take its line out of
the file first. A commit with a plus had changes that were not committed yet.

| file | what | runs |
|---|---|---|
"""


def records(folder: Path) -> dict[Path, bytes]:
    """The page of the records, and the files that can be downloaded from it.

    Args:
        folder: with files of records.

    Returns:
        Names in the book's folder to contents.
    """
    sections, head, files = [], HEAD, {}
    for path in sorted(folder.glob("*.jsonl")):
        found = _read(path)
        head += f"| {{ref}}`records-{path.stem}` | {FILES[path.stem][0]} | {len(found):,} |\n"
        sections.append(_section(path.stem, found))
        files[Path("records") / f"{path.name}.gz"] = gzip.compress(path.read_bytes(), mtime=0)
    return {Path("records.md"): "\n".join([head, *sections]).encode(), **files}


def _read(path: Path) -> list[dict[str, Any]]:
    """As `mmqlora.records.read_records`, without waiting for PyTorch to be imported."""
    found = (json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n"))
    return list({record["id"]: record for record in found}.values())


def _section(name: str, records: Sequence[Mapping[str, Any]]) -> str:
    what, command = FILES[name]
    order = sorted(records, key=lambda record: (_key(record["config"]), record["seed"]))
    rows = [list(group) for _, group in groupby(order, key=lambda record: _key(record["config"]))]
    configs = [row[0]["config"] for row in rows]
    names = list(dict.fromkeys(key for config in configs for key in config))
    turned = [key for key in names if len({_text(config.get(key)) for config in configs}) > 1]
    same = ", ".join(f"{key} {_text(configs[0][key])}" for key in names if key not in turned)
    commits = {commit: _letters(i) for i, commit in enumerate(dict.fromkeys(str(r["commit"]) for r in records))}
    machines = dict.fromkeys(_machine(record["machine"]) for record in records)
    versions = {name: sorted({r["versions"].get(name, "none") for r in records}) for name in PACKAGES}
    days = sorted(record["when"][:10] for record in records)
    seeds = sorted({record["seed"] for record in records})
    facts = {
        "made by": f"`{command}`",
        "runs": f"{len(records):,} of {len(rows):,} configurations, seed{'s' * (len(seeds) > 1)} {_span(seeds)}",
        "made on": f"{_span(days)}; {'; '.join(machines)}",
        "versions": ", ".join(f"{package} {' and '.join(found)}" for package, found in versions.items()),
        "commits": ", ".join(f"{letter} `{commit}`" for commit, letter in commits.items()),
        "the same in all": f"`{same}`" if same else "",
        "all of it": f"{{download}}`{name}.jsonl.gz <records/{name}.jsonl.gz>`",
    }
    list_ = "\n".join(f"- {fact}: {value}" for fact, value in facts.items() if value)
    table = _table(name, rows, turned, commits)
    return f"(records-{name})=\n## `{name}`\n\n{what}.\n\n{list_}\n\n```{{raw}} html\n{table}\n```\n"


def _table(
    name: str, rows: Sequence[Sequence[Mapping[str, Any]]], turned: Sequence[str], commits: Mapping[str, str]
) -> str:
    """A row a configuration: what is not the same in all of them, and its runs."""
    score = next((s for s in SCORES if any(s in (run.get("metrics") or {}) for row in rows for run in row)), "")
    told = f"seed{', ' + score.replace('_', ' ') if score else ''}, id, commit"
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in [*turned, told]) + "</tr>"]
    for row in rows:
        cells = [html.escape(_text(row[0]["config"].get(key))) for key in turned]
        runs = []
        for run in row:
            value = (run.get("metrics") or {}).get(score)
            shown = f" {value:.4g}" if isinstance(value, float) else ""
            runs.append(f"<span>{run['seed']}{shown} <code>{run['id']}</code> {commits[str(run['commit'])]}</span>")
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in [*cells, " ".join(runs)]) + "</tr>")
    label = f"runs of {name}"
    return (
        f'<details class="runs"><summary>The runs of {name}</summary>\n'
        f'<div tabindex="0" role="region" aria-label="{label}"><table>\n'
        + "\n".join(lines)
        + "\n</table></div></details>"
    )


def _key(config: Mapping[str, Any]) -> str:
    return json.dumps(config, sort_keys=True)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value) if isinstance(value, str | int) else "" if value is None else json.dumps(value)


def _span(values: Sequence[Any]) -> str:
    return f"{values[0]}" if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


def _letters(number: int) -> str:
    """a, b, ... z, aa, ab, ..."""
    before, last = divmod(number, len(ascii_lowercase))
    return (_letters(before - 1) if before else "") + ascii_lowercase[last]


def _machine(machine: Mapping[str, Any]) -> str:
    """What a machine is; not whose, and not where."""
    parts = [machine["processor"], f"{machine['cores']} cores", f"{machine['memory_bytes'] / 2**30:.0f} GiB"]
    parts += [f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}", machine["accelerator"] or "no GPU"]
    return ", ".join(parts)


def status(chapters: Sequence[tuple[str, str, Mapping[str, Any]]]) -> str:
    """The page on the state of the chapters.

    Args:
        chapters: title, file name and what was noted when the chapter was executed: ``seconds``, ``when``, and what
            `mmqlora.records.environment` says.

    Returns:
        Markdown.
    """
    rows = [
        f"| [{title}]({name}.ipynb) | {run['seconds']:.0f} s | {run['when'].replace('T', ' ')} |"
        if run
        else f"| [{title}]({name}.ipynb) | | |"
        for title, name, run in chapters
    ]
    known = [run for _, _, run in chapters if run]
    machines = dict.fromkeys(_machine(run["machine"]) for run in known)
    versions = {
        name: sorted({run["versions"][name] for run in known}) for name in (known[0]["versions"] if known else ())
    }
    seconds = sum(run["seconds"] for run in known)
    return "\n".join(
        [
            "# Status",
            "",
            "Every chapter was executed from its first cell to the last before the book was rendered: with an error in "
            f"one, there would be no book. They took {seconds / 60:.0f} minutes, two at a time. A chapter is executed "
            "again when its code, the library, a record or a version changes.",
            "",
            "| chapter | took | executed (UTC) |",
            "|---|---|---|",
            *rows,
            "",
            f"**The machine**: {'; '.join(machines) or 'not noted'}.",
            "",
            "| package | version |",
            "|---|---|",
            *(f"| {name} | {', '.join(found)} |" for name, found in versions.items()),
            "",
        ]
    )
