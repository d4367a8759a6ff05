from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import re
import sys
import threading
import time
from types import SimpleNamespace

import grid_functions
import psutil
import pytest

from mmqlora import GridError
from mmqlora.grids import SCRIPT, run_grid
from mmqlora.records import append_record

CHEAP = "grid_functions:cheap"
TROUBLED = "grid_functions:troubled"
FORK = multiprocessing.get_context("fork")  # a new Python would spend seconds on importing torch


def grid_of(count, **config):
    return [({"x": x, **config}, seed) for x in range(count // 2) for seed in (1, 2)]


def raw(path):
    """Every line of the file, doubles too; raises on a broken one."""
    text = path.read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def in_another_process(function, runs, path, **options):
    process = FORK.Process(target=run_grid, args=(function, runs, path), kwargs={"progress": False, **options})
    process.start()
    return process


def test_a_grid_returns_the_records_in_the_order_of_the_runs_and_runs_nothing_twice(tmp_path):
    path, log = tmp_path / "new" / "demo.jsonl", tmp_path / "log"
    runs = grid_of(6, log=str(log))
    first = run_grid(grid_functions.log, runs[3:5], path, progress=False)
    assert [(r["config"], r["seed"]) for r in first.records] == runs[3:5] and not first.failures
    grid = run_grid(grid_functions.log, runs, path, progress=False)
    assert [(r["config"], r["seed"]) for r in grid.records] == runs
    assert run_grid("grid_functions:log", runs, path, progress=False) == grid
    made = log.read_text().splitlines()
    assert len(made) == len(set(made)) == len(runs) == len(raw(path))
    assert [p.name for p in path.parent.iterdir() if p.name.endswith(".lock")] == ["demo.jsonl.lock"]


def test_the_progress_bar_counts_what_is_done_and_failed(tmp_path, capsys):
    runs = [*grid_of(4, how="not"), ({"how": "raise"}, 1)]
    run_grid(TROUBLED, runs[:1], tmp_path / "demo.jsonl", progress=False)
    assert not capsys.readouterr().err
    run_grid(TROUBLED, runs, tmp_path / "demo.jsonl", retries=0)
    shown = capsys.readouterr().err
    assert "1/5" in shown and "4/5" in shown and "failed=1" in shown


def survivors(parent):
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(parent.pid).children()
    return []


@pytest.mark.parametrize("whom", ["parent", "worker"])
def test_a_grid_killed_ten_times_ends_as_an_undisturbed_one(tmp_path, whom):
    runs = grid_of(40, sleep=0.1)
    undisturbed = run_grid(CHEAP, [({**c, "sleep": 0}, s) for c, s in runs], tmp_path / "calm.jsonl", progress=False)
    path, chance = tmp_path / "demo.jsonl", random.Random(7)
    parent = in_another_process(CHEAP, runs, path)
    workers, killed = set(), 0
    while killed < 10:
        time.sleep(chance.uniform(0.05, 0.25))
        if not parent.is_alive():
            parent = in_another_process(CHEAP, runs, path)
            continue
        children = survivors(parent)
        workers.update(children)
        if whom == "parent":
            parent.kill()
            parent.join()
        elif children:
            with contextlib.suppress(psutil.NoSuchProcess):
                chance.choice(children).kill()
        else:
            continue
        killed += 1
    parent.join(60)
    _, left = psutil.wait_procs(workers, timeout=5)
    assert not left, "a worker outlived its parent"
    before = len(raw(path)) if path.exists() else 0
    assert whom == "parent" or before >= 30
    grid = run_grid(CHEAP, runs, path, progress=False)
    assert not grid.failures
    assert [(r["config"], r["seed"]) for r in grid.records] == runs
    assert [(r["metrics"], r["filler"]) for r in grid.records] == [
        (r["metrics"], r["filler"]) for r in undisturbed.records
    ]
    ids = [record["id"] for record in raw(path)]
    assert len(ids) == len(set(ids)) == len(runs)


def test_a_grid_goes_on_behind_a_record_that_a_killed_parent_left_unfinished(tmp_path):
    path, runs = tmp_path / "demo.jsonl", grid_of(4)
    run_grid(CHEAP, runs, path, progress=False)
    path.write_bytes(path.read_bytes()[:-50_000])
    assert len(run_grid(CHEAP, runs, path, progress=False).records) == len(raw(path)) == 4


def test_two_grids_at_once_on_one_file_make_every_run_once(tmp_path):
    path, log = tmp_path / "demo.jsonl", tmp_path / "log"
    runs = grid_of(30, log=str(log))
    other = in_another_process("grid_functions:log", runs[::-1], path)
    grid = run_grid("grid_functions:log", runs, path, progress=False)
    other.join(60)
    assert other.exitcode == 0 and len(grid.records) == 30
    made = log.read_text().splitlines()
    assert len(made) == len(set(made)) == len(raw(path)) == 30


def test_a_run_that_another_grid_holds_is_taken_over_when_that_one_is_killed(tmp_path):
    path = tmp_path / "demo.jsonl"
    run = ({"how": "hang", "once": str(tmp_path / "once")}, 1)
    other = in_another_process(TROUBLED, [run], path)
    while not (tmp_path / "once").exists():
        time.sleep(0.01)
    threading.Timer(0.5, other.kill).start()
    started = time.monotonic()
    assert len(run_grid(TROUBLED, [run], path, progress=False).records) == 1
    assert time.monotonic() - started > 0.4
    other.join()


@pytest.mark.parametrize(
    "how, words",
    [
        ("raise", "ValueError: no such arm"),
        ("quit", "SystemExit: enough"),
        ("exit", "last words\nThe process ended itself with exit code 3"),
        ("crash", "was ended by SIGSEGV"),
        ("hang", "last words\nThe run took longer than 3 s"),
        ("orphan", "exit code 4"),
        ("nan", "Out of range float values are not JSON compliant"),
        ("nothing", "returned 'None'; expected a record"),
        ("other run", "seed 2, id [0-9a-f]{12}; asked for .* seed 1"),
        ("other experiment", "'other', but .* holds those of {'demo'}"),
    ],
)
def test_a_run_that_fails_is_named_with_its_last_words_and_the_rest_goes_on(tmp_path, how, words):
    path = tmp_path / "demo.jsonl"
    run_grid(TROUBLED, [({"how": "not"}, 9)], path, progress=False)
    runs = [({"how": how}, 1), *grid_of(4, how="not"), ({"how": "not"}, 9)]
    grid = run_grid(TROUBLED, runs, path, timeout=3 if how == "hang" else None, progress=False)
    assert [(r["config"], r["seed"]) for r in grid.records] == runs[1:] and len(raw(path)) == 5
    (failure,) = grid.failures
    assert (failure.config, failure.seed, failure.attempts) == ({"how": how}, 1, 2)
    assert re.search(words, failure.error)
    assert len(failure.error.splitlines()) <= 20


@pytest.mark.parametrize("how", ["raise", "crash", "hang"])
def test_a_run_that_failed_once_is_tried_again(tmp_path, how):
    runs = [({"how": how, "once": str(tmp_path / "once")}, 1)]
    grid = run_grid(TROUBLED, runs, tmp_path / "demo.jsonl", timeout=3, progress=False)
    assert len(grid.records) == 1 and not grid.failures
    (tmp_path / "once").unlink()
    grid = run_grid(TROUBLED, runs, tmp_path / "again.jsonl", timeout=3, retries=0, progress=False)
    assert not grid.records and grid.failures[0].attempts == 1
    assert len(run_grid(TROUBLED, runs, tmp_path / "again.jsonl", progress=False).records) == 1


def test_a_process_serves_many_runs_or_one_with_its_threads_and_an_empty_stdin(tmp_path):
    def made(**options):
        records = run_grid(
            "grid_functions:process", grid_of(6), tmp_path / f"{options}.jsonl", progress=False, **options
        ).records
        assert all(r["argument"] == "" and r["pid"] != os.getpid() for r in records)
        return len({r["pid"] for r in records}), {r["threads"] for r in records}

    assert made(processes=1) == (1, {"1"})
    assert made(fresh=True, threads=3) == (6, {"3"})


def test_torch_gets_the_threads_that_were_asked_for(tmp_path):
    grid = run_grid("grid_functions:torch_threads", [({}, 1)], tmp_path / "demo.jsonl", threads=2, progress=False)
    assert grid.records[0]["threads"] == 2


def test_an_interrupted_grid_ends_its_workers_and_gives_its_runs_back(tmp_path, monkeypatch):
    path, seen = tmp_path / "demo.jsonl", []
    others = set(psutil.Process().children())  # such as multiprocessing's resource tracker, of an earlier test

    def interrupt(*_):
        seen.extend(set(psutil.Process().children()) - others)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mmqlora.grids.wait", interrupt)
        run_grid(CHEAP, grid_of(4, sleep=0.2), path, progress=False)
    assert seen and not any(child.is_running() for child in seen)
    assert len(run_grid(CHEAP, grid_of(4, sleep=0.2), path, progress=False).records) == 4


def nested():
    def run(config, seed):
        return None

    return run


@pytest.mark.parametrize(
    "function, words",
    [
        ("no_such_module:run", "'no_such_module:run' can't be imported .*No module named"),
        ("grid_functions:no_such", "has no attribute 'no_such'"),
        ("grid_functions", "'grid_functions:?' can't be imported"),
        ("grid_functions:NO_FUNCTION", "is a int; expected a function"),
        (lambda config, seed: None, "neither of a notebook nor inside another function"),
        (nested(), "neither of a notebook nor inside another function"),
    ],
)
def test_a_function_that_a_new_process_cannot_import_is_refused(tmp_path, function, words):
    with pytest.raises(GridError, match=words):
        run_grid(function, grid_of(2), tmp_path / "demo.jsonl")


@pytest.mark.parametrize(
    "runs, words",
    [
        ([({"a": 1, "b": 2}, 1), ({"b": 2, "a": 1}, 1)], "Run 1, .* is there twice"),
        ([({"a": {1, 2}}, 1)], "Run 0, .* JSON can hold"),
        ([({"a": float("nan")}, 1)], "Run 0, .* JSON can hold"),
        ([({"a": 1}, 1.5)], "Run 0 has the seed 1.5"),
        ([{"a": 1, "seed": 1, "b": 2}], "Run 0, .* no configuration and seed"),
        ([("lora", 1)], "Run 0, .* no configuration and seed"),
    ],
)
def test_runs_that_cannot_be_recorded_are_refused(tmp_path, runs, words):
    with pytest.raises(GridError, match=words):
        run_grid(CHEAP, runs, tmp_path / "demo.jsonl")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", [{"processes": 0}, {"threads": 0}, {"retries": -1}, {"timeout": 0}])
def test_options_out_of_range_are_refused(tmp_path, option):
    with pytest.raises(GridError, match=f"{next(iter(option))}="):
        run_grid(CHEAP, grid_of(2), tmp_path / "demo.jsonl", **option)


def test_a_file_of_two_experiments_is_refused(tmp_path):
    path = tmp_path / "demo.jsonl"
    for experiment in ("demo", "other"):
        append_record(path, grid_functions.record({"x": 1}, 1, experiment))
    with pytest.raises(GridError, match=r"\['demo', 'other'\]; expected one experiment a file"):
        run_grid(CHEAP, grid_of(2), path)


def test_a_tuple_in_a_configuration_is_the_list_that_a_record_has(tmp_path):
    run_grid(CHEAP, [({"layers": (1, 2)}, 1)], tmp_path / "demo.jsonl", progress=False)
    grid = run_grid(CHEAP, [({"layers": [1, 2]}, 1)], tmp_path / "demo.jsonl", progress=False)
    assert len(grid.records) == len(raw(tmp_path / "demo.jsonl")) == 1


def test_no_runs_are_an_empty_grid(tmp_path):
    assert run_grid(CHEAP, [], tmp_path / "demo.jsonl", progress=False).records == []


def in_main(monkeypatch, **attributes):
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(**attributes))


def test_a_function_of_a_module_started_by_its_name_is_found_by_that_name(tmp_path, monkeypatch):
    in_main(monkeypatch, __spec__=SimpleNamespace(name="grid_functions"), __file__="grid_functions.py")
    monkeypatch.setattr(grid_functions.cheap, "__module__", "__main__")
    assert len(run_grid(grid_functions.cheap, grid_of(2), tmp_path / "demo.jsonl", progress=False).records) == 2
    in_main(monkeypatch)
    with pytest.raises(GridError, match=r"'__main__:cheap' can't be imported .* neither of a notebook"):
        run_grid(grid_functions.cheap, grid_of(2), tmp_path / "demo.jsonl")


def test_a_module_that_starts_a_grid_when_imported_does_not_start_another_in_each_process(tmp_path, monkeypatch):
    in_main(monkeypatch, __file__=SCRIPT)  # as it is in a process of a grid
    with pytest.raises(GridError, match='Put the call behind if __name__ == "__main__":'):
        run_grid(CHEAP, grid_of(2), tmp_path / "demo.jsonl")
