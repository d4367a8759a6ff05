"""Grids through Ray, on a real cluster of one node."""

from __future__ import annotations

import contextlib
import platform
import random
import secrets
import subprocess
import sys
import threading
import time

import psutil
import pytest
from test_grids import CHEAP, TROUBLED, grid_of, raw

from mmqlora import GridError
from mmqlora.cluster import Cluster
from mmqlora.grids import run_grid

INTEL_MAC = sys.platform == "darwin" and platform.machine() == "x86_64"
pytestmark = pytest.mark.skipif(INTEL_MAC, reason="Ray has no wheels for Macs with Intel's processors")

HEAD = """
import sys, ray
for left in (2, 1, 0):  # on a busy machine Ray gives up too early
    try:
        ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False, object_store_memory=100 * 2**20)
        break
    except Exception:
        ray.shutdown()
        if not left:
            raise
print("address", ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def head():
    """A cluster that another process has started, as somebody's cluster is; its process and address."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with pytest.MonkeyPatch.context() as patch:
        # A token of its own for both sides: Ray sends none to an address by itself. Set before Ray is imported here.
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        with subprocess.Popen([sys.executable, "-c", HEAD], **pipes) as process:
            address = next(line.split()[1] for line in process.stdout if line.startswith("address"))
            yield psutil.Process(process.pid), address
            process.stdin.close()


def workers(parent):
    """The processes of Ray that hold a place, and those that make its runs."""
    found = []
    for process in parent.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            words = " ".join(process.cmdline())
            if words.startswith("ray::Place") or "_grid_worker.py" in words:
                found.append(process)
    return found


@pytest.mark.timeout(600)
def test_a_grid_with_workers_killed_at_random_ends_as_a_serial_one_and_runs_nothing_again(head, tmp_path):
    parent, address = head
    runs, path = grid_of(20, sleep=0.5), tmp_path / "demo.jsonl"
    serial = run_grid(CHEAP, runs, tmp_path / "serial.jsonl", processes=1, progress=False)
    chance, over, killed = random.Random(7), threading.Event(), []

    def kill():
        while len(killed) < 5 and not over.wait(chance.uniform(0.2, 0.8)):
            if victims := workers(parent):
                victim = chance.choice(victims)
                with contextlib.suppress(psutil.Error):
                    victim.kill()
                    killed.append(victim)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        grid = run_grid(CHEAP, runs, path, cluster=address, retries=10, progress=False)
    finally:
        over.set()
        killer.join()
    assert len(killed) >= 3
    assert not grid.failures and grid.records == serial.records
    assert len(raw(path)) == len({record["id"] for record in raw(path)}) == 20
    _, left = psutil.wait_procs(workers(parent), timeout=10)
    assert not left, "a place outlived its grid"
    # All is recorded, so nobody is even asked whether he is there.
    assert run_grid(CHEAP, runs, path, cluster="127.0.0.1:1", progress=False) == grid


@pytest.mark.timeout(600)
def test_runs_fail_on_a_cluster_as_they_do_here_and_the_rest_goes_on(head, tmp_path):
    runs = [({"how": how}, 1) for how in ("raise", "not", "exit", "hang", "other run")]
    here = run_grid(TROUBLED, runs, tmp_path / "here.jsonl", timeout=5, progress=False)
    there = run_grid(TROUBLED, runs, tmp_path / "there.jsonl", timeout=5, cluster=head[1], progress=False)
    assert there == here
    assert [failure.attempts for failure in there.failures] == [2, 2, 2, 2] and len(there.records) == 1
    errors = [failure.error for failure in there.failures]
    assert errors[0].endswith("ValueError: no such arm") and errors[2].endswith("The run took longer than 5 s.")


def test_a_run_gets_the_threads_and_gpus_that_were_asked_for(head, tmp_path):
    options = {"cluster": head[1], "threads": 2, "processes": 1, "progress": False}
    (record,) = run_grid("grid_functions:devices", [({}, 1)], tmp_path / "demo.jsonl", gpus=1, **options).records
    assert record["threads"] == "2" and record["devices"] in ("0", "1")


@pytest.mark.timeout(600)
def test_an_interrupted_grid_ends_its_own_cluster_and_keeps_what_is_recorded(tmp_path, monkeypatch, capfd):
    path, runs, before, seen = tmp_path / "demo.jsonl", grid_of(8, sleep=0.5), set(psutil.pids()), set()
    wait = Cluster.wait

    def interrupt(*arguments):
        seen.update(psutil.Process().children(recursive=True))
        if path.exists():
            raise KeyboardInterrupt
        wait(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Cluster, "wait", interrupt)
        run_grid(CHEAP, runs, path, cluster="local", progress=False)
    started = [process for process in seen if process.pid not in before]
    assert len(started) > 3 and not psutil.wait_procs(started, timeout=30)[1]
    assert capfd.readouterr() == ("", "")
    first = raw(path)
    assert 1 <= len(first) <= 2
    run_grid(CHEAP, runs, path, progress=False)
    assert len(raw(path)) == 8 and raw(path)[: len(first)] == first


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nowhere", "ray://nowhere:port"])
def test_a_cluster_that_is_not_there_is_named_soon(tmp_path, address):
    started = time.monotonic()
    with pytest.raises(GridError, match=f"cluster='{address}' does not answer .* Expected 'local'"):
        run_grid(CHEAP, grid_of(2), tmp_path / "demo.jsonl", cluster=address)
    assert time.monotonic() - started < 30


def test_without_ray_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(GridError, match=r"pip install 'ray\[client\]'"):
        run_grid(CHEAP, grid_of(2), tmp_path / "demo.jsonl", cluster="local")


def test_gpus_need_a_cluster(tmp_path):
    with pytest.raises(GridError, match=r"gpus=1, .* and a cluster"):
        run_grid(CHEAP, grid_of(2), tmp_path / "demo.jsonl", gpus=1)
