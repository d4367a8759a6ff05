from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmqlora import RecordError
from mmqlora.records import append_record, as_table, environment, fingerprint, make_record, read_records, run_id

RECORD = {"id": "a", "config": {"rank": 8}, "metrics": {"wer": 0.5}, "items": [[1, 2]]}


def test_what_is_appended_is_read_back_in_order(tmp_path):
    path = tmp_path / "new" / "runs.jsonl"
    records = [{**RECORD, "id": str(n)} for n in range(5)]
    for record in records:
        append_record(path, record)
    assert read_records(path) == records


def test_a_run_recorded_twice_counts_once_with_its_latest_record(tmp_path):
    path = tmp_path / "runs.jsonl"
    append_record(path, RECORD)
    append_record(path, {**RECORD, "metrics": {"wer": 0.25}})
    assert [r["metrics"]["wer"] for r in read_records(path)] == [0.25]


@given(cut=st.integers(1, 60))
def test_an_unfinished_line_is_left_out_and_cut_off_by_the_next_record(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("records") / "runs.jsonl"
    append_record(path, RECORD)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:cut])
    assert read_records(path) == [RECORD]
    append_record(path, {**RECORD, "id": "b"})
    assert [r["id"] for r in read_records(path)] == ["a", "b"]
    assert path.read_bytes().startswith(whole + b"{")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), {1, 2}, object()])
def test_what_is_no_json_is_refused_and_nothing_is_written(tmp_path, bad):
    path = tmp_path / "runs.jsonl"
    append_record(path, RECORD)
    before = path.read_bytes()
    with pytest.raises(RecordError, match="not JSON"):
        append_record(path, {**RECORD, "metrics": {"wer": bad}})
    assert path.read_bytes() == before


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "runs.jsonl"
    append_record(path, RECORD)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
        with pytest.raises(RecordError, match="could not be written"):
            append_record(path, {**RECORD, "id": "b"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert path.read_bytes() == before


def _append_many(path, name, count):
    for n in range(count):
        append_record(path, {**RECORD, "id": f"{name}-{n}", "filler": "x" * 20000})


def test_processes_that_write_at_once_and_one_that_is_killed_lose_and_double_nothing(tmp_path):
    path = tmp_path / "runs.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append_many, args=(path, name, 40)) for name in "ab"]
    victim = context.Process(target=_append_many, args=(path, "victim", 10**6))
    for process in [*writers, victim]:
        process.start()
    while not path.exists() or path.stat().st_size < 200_000:
        time.sleep(0.01)
    os.kill(victim.pid, signal.SIGKILL)
    for process in [*writers, victim]:
        process.join(60)
    append_record(path, RECORD)
    ids = [json.loads(line)["id"] for line in path.read_text().splitlines()]
    assert len(ids) == len(set(ids))
    assert {f"{name}-{n}" for name in "ab" for n in range(40)} <= set(ids)


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "runs.jsonl"
    append_record(path, RECORD)
    path.write_bytes(path.read_bytes() + b'{"no": "id"}\n')
    with pytest.raises(RecordError, match="line 2"):
        read_records(path)


def test_a_missing_file_says_what_is_there(tmp_path):
    append_record(tmp_path / "other.jsonl", RECORD)
    with pytest.raises(RecordError, match=r"other\.jsonl"):
        read_records(tmp_path / "runs.jsonl")


def test_a_run_is_named_by_experiment_configuration_and_seed():
    first = run_id("e", {"a": 1, "b": 2}, 0)
    assert first == run_id("e", {"b": 2, "a": 1}, 0)
    assert len({first, run_id("f", {"a": 1, "b": 2}, 0), run_id("e", {"a": 1, "b": 3}, 0), run_id("e", {}, 1)}) == 4


def test_a_fingerprint_depends_on_bytes_and_on_where_they_are_split(tmp_path):
    file = tmp_path / "data"
    file.write_bytes(b"ab")
    assert fingerprint(file) == fingerprint(b"ab") == fingerprint("ab")
    assert fingerprint("a", "b") != fingerprint("ab") != fingerprint("ba")


def test_a_record_says_what_it_ran_on_and_is_a_row(tmp_path):
    record = make_record("e", {"rank": 8}, 3, data="d", measured={"metrics": {"wer": 0.1}, "items": [1]})
    append_record(tmp_path / "runs.jsonl", record)
    assert record["versions"]["torch"] == environment()["versions"]["torch"]
    row = as_table(read_records(tmp_path / "runs.jsonl")).iloc[0]
    assert (row["config.rank"], row["seed"], row["metrics.wer"]) == (8, 3, 0.1)
    assert "items" not in row
