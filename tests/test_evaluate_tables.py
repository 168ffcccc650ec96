"""Tables and plots of made-up evaluations, beside what was published."""

import io
from dataclasses import replace

import numpy as np
import pytest

from geoengine.bench.accuracy import errors_km, wilson_share
from geoengine.bench.evaluate_plots import (
    _line,
    _thinned,
    _unbroken,
    beam_plot,
    calibration_plot,
    error_map,
    write_plots,
)
from geoengine.bench.evaluate_report import Report, figures_of
from geoengine.bench.evaluate_rows import PhotoRow, Setting
from geoengine.bench.evaluate_tables import markdown, sheets, terminal_text
from geoengine.bench.published import of_table, published
from geoengine.engine.render.files import OutputError
from geoengine.engine.tiles import LngLat

SETTINGS = [Setting("tiles", "paper", 4), Setting("tiles", "path", 4), Setting("tiles", "path", 16)]


def row(number, setting, *, miss_lng=0.0, problem=""):
    true = LngLat(20.0 * number - 90, 10.0 * number - 40)
    if problem:
        return PhotoRow(
            photo=f"p{number}", setting=setting, true=true, ranks={}, radii_km={}, problem=problem
        )
    place = LngLat(true.lng + miss_lng, true.lat)
    return PhotoRow(
        photo=f"p{number}",
        setting=setting,
        true=true,
        place=place,
        error_km=float(errors_km([place], [true])[0]),
        radius_km=100.0,
        radii_km={0.5: 1.0, 0.8: 300.0},
        calibrated=setting.score == "path",
        ranks={4: 1, 6: 0 if miss_lng else 2},
        scored=90,
        wanted=100,
        tiles=100.0,
        seconds=0.25 * setting.k,
    )


def made_report(settings=SETTINGS, **changes):
    """Ten photos: seven right, one 2 degrees off, one 60, one unreadable."""
    rows = []
    for setting in settings:
        rows += [row(n, setting) for n in range(7)]
        rows += [
            row(7, setting, miss_lng=2.0),
            row(8, setting, miss_lng=60.0),
            row(9, setting, problem="torn"),
        ]
    report = Report(
        data_set="mine",
        title="mine.csv",
        world="earth",
        wanted=None,
        remarks=("made for a test",),
        model="tiny",
        tiles="folder",
        attribution="somebody",
        backend="oracle exact",
        together=25,
        geodesic=False,
        reused=False,
        job={},
        results=tuple(figures_of(s, [r for r in rows if r.setting == s], False) for s in settings),
        rows=tuple(rows),
    )
    return replace(report, **changes)


# --- published figures ------------------------------------------------------------------------------------


def test_published_shares_are_whole_numbers_of_photos():
    for one in published():
        for percent, share in zip(one.percent, one.within, strict=True):
            # derived numbers of photos must give back what was printed, rounded or cut
            if one.note:
                assert abs(100 * share.value - percent) < 0.1, one
        assert list(one.percent) == sorted(one.percent)
        assert one.source and one.photos > 0


def test_the_papers_tables_are_complete():
    table_1 = [row for row in published() if 1 in row.tables]
    assert [(row.photos, row.seconds_per_photo) for row in table_1] == [(237, 518), (63, 1248), (73, 1833)]
    names = [row.method for row in of_table(2, "im2gps")]
    assert {"ISNs", "TransLocator", "GeoDecoder", "PIGEOTTO", "Kim et al., as in Table 2"} <= set(names)
    assert [row.percent[0] for row in of_table(3, "im2gps")] == [17.3, 14.29]


def test_a_set_with_figures_of_its_own_is_compared_with_those():
    assert {row.data_set for row in of_table(2, "im2gps3k")} == {"im2gps3k"}
    assert {row.data_set for row in of_table(3, "yfcc4k")} == {"yfcc4k"}
    assert {row.data_set for row in of_table(2, "planet")} == {"im2gps"}


# --- tables -----------------------------------------------------------------------------------------------


def test_the_first_tables_are_these():
    text = markdown(made_report(SETTINGS[:1]))
    before_table_1 = text[: text.index("## Table 1")]
    assert before_table_1 == GOLDEN


GOLDEN = """\
mine.csv: n = 10 photos

Encoders: tiny, oracle exact. Tiles: folder.

Distances: great circle, R = 6371.0088 km; a photo at exactly a distance counts. Intervals: Wilson, 95 %.

1 photos could not be read and count as misses.

Made for a test.

Tiles by somebody

## Photos placed within

| search | n | 1 km | 25 km | 200 km | 750 km | 2,500 km |
| ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| paper score, k=4 | 10 | 70.0 % (39.7–89.2) | 70.0 % (39.7–89.2) \
| 80.0 % (49.0–94.3) | 80.0 % (49.0–94.3) | 80.0 % (49.0–94.3) |

## Errors and cost

| search | n | median error | mean error | GeoScore | time a photo | tiles a photo | coverage |
| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| paper score, k=4 | 10 | 0 m | 578 km | 3957 | 1.00 s | 100 | 90.0% |

Times are wall time with 25 photos located together, which share their tiles. The mean error is over the \
photos that could be read.

## True tile in the beam

| search | n | zoom 4 | zoom 6 |
| ---: | ---: | ---: | ---: |
| paper score, k=4 | 10 | 90.0 % (59.6–98.2) | 70.0 % (39.7–89.2) |

## Photos inside the radius that is said to hold

| search | n | 50% | 80% |
| ---: | ---: | ---: | ---: |
| paper score, k=4 (not calibrated) | 9 | 77.8 % (45.3–93.7) | 88.9 % (56.5–98.0) |

Calibrated are radii in which as many of the photos lie as the heading of the column says.

"""


def test_published_and_measured_rows_stand_apart_and_say_of_what_they_are():
    [table_1] = [sheet for sheet in sheets(made_report()) if sheet.title.startswith("Table 1")]
    assert [row[1:4] for row in table_1.rows] == [
        ["published", "IM2GPS", "237"],
        ["published", "IM2GPS", "about 63"],
        ["published", "IM2GPS", "about 73"],
        *[["measured", "mine.csv", "10"]] * 3,
    ]
    assert [row[-1] for row in table_1.rows] == ["8'38\"", "20'48\"", "30'33\"", "1.00 s", "1.00 s", "4.00 s"]
    assert table_1.rows[0][4] == "5.91 % (3.6–9.7)"
    assert any("another data set than mine.csv: do not compare" in note for note in table_1.notes)
    assert any("k=32: about 63 of 237 photos; n is not stated" in note for note in table_1.notes)
    of_im2gps = made_report(data_set="im2gps", title="IM2GPS", wanted=237)
    for sheet in sheets(of_im2gps):
        assert not any("another data set" in note for note in sheet.notes)
    assert "IM2GPS: n = 10 of 237 photos" in markdown(of_im2gps)


def test_table_3_has_the_methods_that_were_run():
    nothing = sheets(made_report())[-1]
    assert nothing.notes[-1].startswith("Ours was not run: give --method geoclip")
    methods = [Setting("geoclip", "path", 16), Setting("joined", "paper", 16), SETTINGS[0]]
    sheet = sheets(made_report(methods))[-1]
    assert [row[0] for row in sheet.rows[2:]] == [
        "geoengine, GeoCLIP alone",
        "geoengine, joined, paper score, k=16",
    ]
    assert not any("not run" in note for note in sheet.notes)


def test_minutes_are_full_before_seconds_reach_60():
    report = made_report()
    slow = replace(report.results[0], seconds_per_photo=119.7)
    text = markdown(replace(report, results=(slow, *report.results[1:])))
    assert "2'00\"" in text and "'60\"" not in text


def test_a_terminal_gets_the_same_figures():
    page = io.StringIO()
    text = terminal_text(made_report(), page)
    assert "70.0 % (39.7–89.2)" in text and "published" in text and "measured" in text
    assert max(map(len, text.splitlines())) < 300


def test_a_narrow_terminal_has_intervals_below(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    text = terminal_text(made_report(), Terminal())
    first = text[: text.index("Errors and cost")]
    assert "70.0 % (" not in first and "(39.7–89.2)" in first
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for cell in {cell for sheet in sheets(made_report()) for row in sheet.rows for cell in row}:
        assert all(part in text for part in cell.split(" (")), cell


# --- plots ------------------------------------------------------------------------------------------------


def test_plots_are_the_same_each_time(tmp_path):
    (tmp_path / "again").mkdir()
    names = sorted(path.name for path in write_plots(made_report(SETTINGS[:2]), tmp_path))
    maps = ["errors-tiles-paper-k4.svg", "errors-tiles-path-k4.svg"]
    assert names == ["calibration.svg", "cumulative.svg", *maps]
    write_plots(made_report(SETTINGS[:1]), tmp_path / "again")
    assert (tmp_path / maps[0]).read_bytes() == (tmp_path / "again" / maps[0]).read_bytes()


def test_the_error_map_has_a_dot_for_each_photo_in_its_class():
    report = made_report(SETTINGS[:1])
    [axis] = error_map(report, report.results[0]).axes
    lines = [len(part.get_segments()) for part in axis.collections if hasattr(part, "get_segments")]
    assert lines[0] > 1000  # the coasts
    assert sum(lines[1:]) == 9
    _, names = axis.get_legend_handles_labels()
    counts = {name.rpartition(": ")[0]: int(name.rpartition(": ")[2]) for name in names}
    assert counts == {
        "≤ 1 km": 7,
        "≤ 25 km": 0,
        "≤ 200 km": 1,
        "≤ 750 km": 0,
        "≤ 2,500 km": 0,
        "> 2,500 km": 1,
    }
    assert axis.get_title(loc="left") == "mine.csv: paper score, k=4, n=10, 1 unreadable"


def test_the_other_plots_draw_the_figures():
    report = made_report()
    axes = beam_plot(report).axes
    assert len(axes) == 5
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes[0].lines}
    assert lines == {"paper score": [[4, 0.7]], "path score": [[4, 0.7], [16, 0.7]]}
    [axis] = calibration_plot(report).axes
    assert axis.lines[1].get_xydata().tolist() == pytest.approx(np.array([[0.5, 7 / 9], [0.8, 8 / 9]]))


def test_lines_go_the_short_way():
    def between(lng, lng2):
        made = row(0, SETTINGS[0])
        return _line(replace(made, true=LngLat(lng, 0.0), place=LngLat(lng2, 1.0)))

    assert between(10.0, 20.0) == [[(10.0, 0.0), (20.0, 1.0)]]
    assert between(170.0, -170.0) == [[(170.0, 0.0), (190.0, 1.0)], [(-190.0, 0.0), (-170.0, 1.0)]]
    assert between(-170.0, 170.0) == [[(-170.0, 0.0), (-190.0, 1.0)], [(190.0, 0.0), (170.0, 1.0)]]


def test_outlines_keep_their_ends():
    arc = np.column_stack([np.linspace(0, 1, 500), np.linspace(0, 2, 500)])
    thin = _thinned(arc, 0.25)
    assert 5 < len(thin) < 30
    assert thin[0].tolist() == [0, 0] and thin[-1].tolist() == [1, 2]


def test_outlines_do_not_cross_the_map():
    arc = np.array([[179.0, 0], [180.0, 1], [-180.0, 1], [-179.0, 2], [179.5, 3]])
    assert [piece.tolist() for piece in _unbroken(arc)] == [[[179, 0], [180, 1]], [[-180, 1], [-179, 2]]]
    assert _unbroken(arc[:2])[0].tolist() == arc[:2].tolist()


def test_plots_that_cannot_be_written(tmp_path):
    with pytest.raises(OutputError, match=r"cumulative\.svg: cannot be written"):
        write_plots(made_report(SETTINGS[:1]), tmp_path / "no")


def test_nothing_but_unreadable_photos_is_drawn_too(tmp_path):
    rows = [row(n, SETTINGS[0], problem="torn") for n in range(3)]
    report = made_report(results=(figures_of(SETTINGS[0], rows, False),), rows=tuple(rows))
    write_plots(report, tmp_path)
    assert "–" in markdown(report)


def test_intervals_are_wilsons():
    share = wilson_share(7, 10)
    assert f"{100 * share.low:.1f}–{100 * share.high:.1f}" == "39.7–89.2"
