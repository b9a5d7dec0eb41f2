"""Bulk inference on Ray: the same bytes, after kills and lost machines, in memory that stays flat."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bulk_jobs import job, joined, kill_half_way
from PIL import Image

from narvl_plugin.bulk.commands import predict_shards
from narvl_plugin.bulk.engines import Runner
from narvl_plugin.bulk.folder import SUCCESS
from narvl_plugin.errors import BadRow, InputError, MissingInput

ray = pytest.importorskip("ray", reason="pip install 'narvl[ray]'")
pytestmark = pytest.mark.integration
STORE = 80 << 20
"""Shared memory of a node of the tests, in bytes: about the least that Ray takes."""
BUSY = {"RAY_agent_register_timeout_ms": "120000", "RAY_USAGE_STATS_ENABLED": "0"}
"""Variables with which Ray starts on a busy machine, too."""
QUICK = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 300, "health_check_failure_threshold": 3}
"""Settings with which Ray soon misses a lost machine."""


def local(given: Path, out: Path, **options: Any) -> str:
    """Return what one process writes."""
    predict_shards([str(given)], out, job(**options), Runner(), rows_of_shard=1)
    return joined(out)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in BUSY.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def embedded() -> Iterator[None]:
    """Ray in this process, for all calls of a test."""
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=STORE, log_to_driver=False)
    yield
    ray.shutdown()


def test_both_engines_write_the_same_bytes_and_name_the_same_errors(
    folder: Path, tmp_path: Path, embedded: None
) -> None:
    (folder / "004.png").write_bytes(b"no picture, but a text that is long enough")
    on_ray = Runner("ray", actors=2)
    with pytest.raises(BadRow, match=r"004.png: the image is not readable .* --skip-bad-rows \(now 0\)"):
        predict_shards([str(folder)], tmp_path / "ray", job(), on_ray, rows_of_shard=3)
    for out, runner in ((tmp_path / "ray", on_ray), (tmp_path / "local", Runner())):
        totals, _ = predict_shards([str(folder)], out, job(skip_bad_rows=1), runner, rows_of_shard=3)
        assert totals[:2] == (9, 1)
    names = sorted(file.name for file in (tmp_path / "local").iterdir())
    assert sorted(file.name for file in (tmp_path / "ray").iterdir()) == names and SUCCESS in names
    for name in names:
        if name != "_progress":  # in the order in which shards are done
            assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    with pytest.raises(MissingInput, match=r"--bpe-dir .*gone: no spm\.model"):
        predict_shards([str(folder)], tmp_path / "x", job(bpe_dir=tmp_path / "gone"), on_ray, rows_of_shard=9)
    with pytest.raises(InputError, match=r"an actor takes 3 GPU\(s\), and Ray has 0 GPUs"):
        predict_shards([str(folder)], tmp_path / "y", job(), Runner("ray", gpus_per_actor=3), rows_of_shard=9)


def test_a_job_that_was_killed_on_ray_goes_on(folder: Path, tmp_path: Path) -> None:
    """Ray starts in the program, and ends with it."""
    out = tmp_path / "out"
    kill_half_way(folder, out, "ray", 3)
    totals, _ = predict_shards([str(folder)], out, job(), Runner(), rows_of_shard=1)
    assert totals.rows == 10 and 0 < totals.new <= 8  # one may be written, and not yet noted
    assert joined(out) == local(folder, tmp_path / "whole")


def test_a_machine_that_is_lost_half_way_loses_and_doubles_no_row(folder: Path, tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    for number in range(10, 40):
        Image.new("RGB", (16, 12), (6 * number, 0, 99)).save(folder / f"{number:03}.png")
    out = tmp_path / "out"
    head = {"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False, "_system_config": QUICK}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        machines = [cluster.add_node(num_cpus=1, object_store_memory=STORE) for _ in range(2)]
        ray.init(cluster.address, log_to_driver=False)
        lost = threading.Event()

        def lose() -> None:
            while len(list(out.glob("*.tsv"))) < 10:
                time.sleep(0.01)
            cluster.remove_node(machines[1], allow_graceful=False)
            lost.set()

        threading.Thread(target=lose, daemon=True).start()
        totals, _ = predict_shards([str(folder)], out, job(), Runner("ray", actors=2), rows_of_shard=1)
        assert lost.is_set()
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert totals[:3] == (40, 0, 40)
    assert joined(out) == local(folder, tmp_path / "whole")
