"""docs/scale.md: its figures are those measured, and the arithmetic behind them is right."""

import json

import pytest

from geoengine.bench import bulk_cost, bulk_cost_tables
from geoengine.engine.bulk.parts import PartDone
from geoengine.engine.tiles import Tile

TEXT = bulk_cost_tables.DOCUMENT.read_text(encoding="utf-8")


def test_the_figures_are_those_of_the_results():
    assert bulk_cost_tables.render(TEXT) == TEXT, "run `python -m geoengine.bench.bulk_cost --write`"
    assert json.loads(bulk_cost_tables.RESULTS.read_text())["land"] == bulk_cost.land_tiles()


def test_a_missing_block_is_an_error():
    with pytest.raises(ValueError, match="one block <!-- ray -->"):
        bulk_cost_tables.render(TEXT.replace("<!-- ray -->", ""))


def test_tiles_of_a_photo():
    assert bulk_cost_tables.tiles_of_a_photo(0) == 256 + 6 * 256
    assert bulk_cost_tables.tiles_of_a_photo(4) == 6 * 256
    assert bulk_cost_tables.tiles_of_a_photo(14) == 256


def test_groups_share_the_tiles_that_they_have_in_common():
    def beams(x):
        return {4: [Tile(4, x, 0), Tile(4, 9, 9)], 6: [Tile(6, 4 * x, 0)]}

    same, other = beams(1), beams(2)
    assert bulk_cost.tiles_per_photo([same], 1) == 256 + 32
    assert bulk_cost.tiles_per_photo([same, same], 2) == (256 + 32) / 2
    assert bulk_cost.tiles_per_photo([same, other], 2) == (256 + 48) / 2
    assert bulk_cost.tiles_per_photo([same, other], 1) == 256 + 32


def test_rates_count_from_when_all_workers_are_at_work(monkeypatch):
    times = iter([10.0, 11.0, 13.0, 15.0])
    monkeypatch.setattr(bulk_cost.time, "perf_counter", lambda: next(times))
    parts = iter([PartDone(0, 4, 0), PartDone(1, 4, 0), PartDone(2, 3, 1), PartDone(3, 4, 0)])
    assert bulk_cost.steady_rate(parts, 2) == 8 / 4.0


def test_amounts_for_people():
    times = [bulk_cost_tables.hours(seconds) for seconds in (0.19, 1800, 7.2e4, 1e8, 1e9)]
    assert times == ["0.19 s", "30 min", "20 h", "3.2 y", "32 y"]
    assert [bulk_cost_tables.size(b) for b in (1500, 2.5e6, 1.5e11, 3e12)] == [
        "1.5 kB",
        "2.5 MB",
        "150 GB",
        "3.0 TB",
    ]
    assert bulk_cost_tables.power(10**6) == "10⁶ photos"
