"""Preparation on a Dask cluster: the local bytes, and a sentence for each failure of the cluster."""

import json
import os
import sys
import threading
import time

import pytest

from memdlm_dist.data.corpus import Segment, Source
from memdlm_dist.data.preparation import prepare, workers
from memdlm_dist.data.preparation.jobs import Job
from memdlm_dist.data.preparation.request import PrepareConfig
from memdlm_dist.data.preparation.units import Unit
from memdlm_dist.data.shards import Card
from memdlm_dist.errors import UserError


@pytest.fixture(autouse=True)
def in_root(root, monkeypatch):
    monkeypatch.chdir(root)
    monkeypatch.setenv("PYTHONPATH", str(root))  # for worker processes


def address(cluster) -> str:
    return cluster.scheduler_address.replace("tcp://", "dask://")


def local_cluster(processes: bool):
    from distributed import LocalCluster

    return LocalCluster(
        n_workers=2, threads_per_worker=1, processes=processes, protocol="tcp", dashboard_address=None, silence_logs=50
    )


def jobs(number: int) -> list[Job]:
    units = [Unit(n, (Segment(Source(f"/in/{n}.jsonl", 1, ""), 1),)) for n in range(number)]
    return [Job(PrepareConfig("o", 8), unit, ("o", "f"), "", Card(8, 9, 0, 1), "scratch") for unit in units]


def test_a_cluster_writes_the_local_bytes(tmp_path):
    rows = [{"text": f"row {i % 30}: the quick brown fox jumps over the lazy dog. " * 3} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trees = []
    with local_cluster(processes=False) as cluster:
        for name, where in (("local", None), ("cluster", address(cluster))):
            config = PrepareConfig(
                tmp_path / name, 32, (str(tmp_path / "rows.jsonl"),), train_tokenizer=300, unit_size=2000, workers=1,
                deduplicate=True, cluster=where, scratch=str(tmp_path / "scratch"),
            )  # fmt: skip
            assert prepare.prepare(config).duplicates == 10
            files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
            trees.append({path.relative_to(tmp_path / name): path.read_bytes() for path in files})
    assert trees[0] == trees[1] and len(trees[0]) > 10


def wait(job: Job) -> None:
    time.sleep(0.5)


def test_a_cluster_that_goes_away_is_named(capfd):
    with local_cluster(processes=False) as cluster:
        timer = threading.Timer(1, cluster.close)
        timer.start()
        with pytest.raises(UserError, match=rf"^The cluster {address(cluster)} failed \(.*\); look at its log. Fin"):
            list(workers.results(wait, jobs(20), 1, address(cluster)))
        timer.join()
    assert "Traceback" not in capfd.readouterr().err


def test_a_cluster_that_cannot_be_used_is_named(monkeypatch):
    monkeypatch.setattr(workers, "_CONNECTING", 0.5)
    with pytest.raises(UserError, match=r"^The cluster dask://127.0.0.1:9 failed \(.*connect.*\); look at its log"):
        list(workers.results(wait, jobs(1), 1, "dask://127.0.0.1:9"))
    with pytest.raises(
        UserError, match=r"^--cluster tcp://node:8786 is not the address of a cluster; give dask://HOST"
    ):
        workers.check_cluster("tcp://node:8786")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UserError, match=r"^--cluster dask://node:1 needs a package that is not installed \(.*\); pip"):
        workers.check_cluster("dask://node:1")


def end_at_unit_3(job: Job) -> int:
    if job.unit.number == 3:
        time.sleep(0.5)
        os._exit(1)
    return job.unit.number


@pytest.mark.slow
def test_the_unit_that_ends_workers_is_named():
    """Dask itself blames every job that the worker had taken."""
    with (
        local_cluster(processes=True) as cluster,
        pytest.raises(UserError, match=r"^Unit 3 \(/in/3.jsonl\) was int"),
    ):
        list(workers.results(end_at_unit_3, jobs(8), 1, address(cluster)))
