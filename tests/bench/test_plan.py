"""The plan of a large job: sums by hand, and a sample that is measured."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from narvl_plugin.bench.plan import Costs, Plan
from narvl_plugin.bench.sample import describe, measure, table
from narvl_plugin.cli.bench import app
from narvl_plugin.errors import MissingInput

COSTS = Costs(device_ms=4, core_ms=10, image_bytes=160_000, output_bytes=100, start_seconds=3)


def test_a_device_takes_images_that_many_cores_read() -> None:
    assert COSTS.images_per_second == pytest.approx(250)
    assert COSTS.cores == pytest.approx(2.5)
    assert COSTS.megabytes_per_second == pytest.approx(40)


def test_whole_shards_are_done_in_rounds() -> None:
    """10,500 images are 11 shards of 4 s. On four devices the last of three rounds has three shards."""
    plan = Plan(COSTS, images=10_500, devices=4, shard_rows=1000)
    assert plan.shards == 11 and plan.busy == 4
    assert plan.shard_seconds == pytest.approx(4)
    assert plan.seconds == pytest.approx(3 + 3 * 4)
    assert plan.hours == pytest.approx(15 / 3600)
    assert plan.waiting == pytest.approx(1 - 42 / 60)  # 42 s of work in 4 devices times 15 s
    assert plan.writer_ms == pytest.approx(1000)
    assert plan.gigabytes_per_second == pytest.approx(0.16)
    assert plan.cores == pytest.approx(10)


def test_more_devices_than_shards_have_nothing_to_do() -> None:
    plan = Plan(COSTS, images=2000, devices=8, shard_rows=1000)
    assert plan.busy == 2 and plan.seconds == pytest.approx(3 + 4)
    assert plan.cores == pytest.approx(5)
    assert plan.waiting == pytest.approx(1 - 8 / 56)


def test_a_lost_machine_costs_each_device_a_start_and_a_shard() -> None:
    plan = Plan(COSTS, images=10_500, devices=4, shard_rows=1000)
    assert plan.repeated_seconds == pytest.approx(7)


def test_impossible_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="device_ms must be above 0"):
        Costs(0, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="devices"):
        Plan(COSTS, images=1, devices=0, shard_rows=1)


def test_the_table_has_a_row_for_each_number_of_devices() -> None:
    lines = table([Plan(COSTS, 10_500, count, 1000) for count in (1, 4)]).splitlines()
    assert len(lines) == 4
    assert lines[3] == "| 4 | 0.00 | 30.0 % | 0.160 | 10.0 | 1,000.0 | 7.0 |"
    assert "250.0 images/s, 40.00 MB/s, 2.50 cores" in describe(COSTS)


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """Give a folder with two images."""
    for name, colour in (("a.jpg", "red"), ("b.jpg", "blue")):
        Image.new("RGB", (80, 60), colour).save(tmp_path / name)
    return tmp_path


def test_a_sample_is_measured(sample: Path) -> None:
    costs, images = measure([str(sample)], batch_size=3, repeats=1, device="cpu")
    assert images == 2
    assert costs.image_bytes == sum(file.stat().st_size for file in sample.iterdir()) / 2
    assert costs.device_ms > 0 and costs.core_ms > 0 and costs.start_seconds > 0
    assert costs.output_bytes > len("a.jpg\t\n")


def test_the_command_prints_the_plan(sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("narvl_plugin.bench.sample.measure", lambda *given, **options: (COSTS, 2))
    done = CliRunner().invoke(app, ["plan", str(sample), "--images", "100e6", "--gpus", "1,8"])
    assert done.exit_code == 0, done.output
    text = done.output
    assert "100,000,000 images: 16.000 TB to read, 10.000 GB to write, 100,000 shards of 4.0 s each" in text
    assert [line.split(" | ")[1] for line in text.splitlines() if line.startswith(("| 1 ", "| 8 "))] == [
        "111.11",
        "13.89",
    ]


def test_images_that_are_not_there_are_an_error() -> None:
    with pytest.raises(MissingInput, match="gone"):
        measure(["gone"])


@pytest.mark.parametrize("number", ["0", "nan", "inf"])
def test_a_number_of_images_that_cannot_be_is_refused(number: str, sample: Path) -> None:
    done = CliRunner().invoke(app, ["plan", str(sample), "--images", number])
    assert done.exit_code == 2
    assert "Invalid value for '--images'" in done.output
