"""`geoengine evaluate` as a user sees it: a tiny bundle, a folder of tiles, photos in a table."""

import csv
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from command_line import refused, run
from made_photos import encoded
from made_sets import jpeg, write_table
from tiny_bundle import write_tiny_bundle

from geoengine.bench import evaluate_files

PHOTOS = 9


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a bundle, tiles, photos and their table; nothing in it is changed by a test."""
    folder = tmp_path_factory.mktemp("world")
    write_tiny_bundle(folder / "engines", world="earth")
    rng = np.random.default_rng(5)
    for z in (1, 3):
        for x in range(2**z):
            (folder / "tiles" / str(z) / str(x)).mkdir(parents=True)
            for y in range(2**z):
                tile = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                (folder / "tiles" / str(z) / str(x) / f"{y}.png").write_bytes(encoded(tile, "PNG"))
    rows = ["path,lat,lon"]
    for number in range(PHOTOS):
        (folder / f"{number}.jpg").write_bytes(jpeg(25 * number))
        rows.append(f"{number}.jpg,{8 * number - 33},{37 * number - 150}")
    write_table(folder / "set.csv", "\n".join(rows) + "\n")
    return folder


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setenv("GEOENGINE_CACHE", "off")


def order(world, *more, table="set.csv"):
    return ["evaluate", world / table, "--bundle", world / "engines", "--tiles", world / "tiles", *more]


def rows_in(folder):
    with (folder / "photos.csv").open(encoding="utf-8", newline="") as file:
        return [
            {name: cell for name, cell in row.items() if name not in ("seconds", "tiles")}
            for row in csv.DictReader(file)
        ]


@pytest.mark.parametrize("ks", [["--k", "1,2"], ["--k", 1, "--k", 2], ["--k", 1, 2]])
def test_tables_on_stdout_however_beam_widths_are_given(world, ks):
    result = run(*order(world, *ks))
    assert (result.exit_code, result.stderr) == (0, "")
    for text in (
        "set.csv: n = 9 photos",
        "paper score, k=1",
        "paper score, k=2",
        "zoom 3",
        "Table 3 of the paper",
    ):
        assert text in result.stdout


def test_both_scores_side_by_side_as_json(world):
    report = json.loads(
        run(*order(world, "--k", "1,2", "--score", "paper", "--score", "path", "--json")).stdout
    )
    settings = [(result["score"], result["k"]) for result in report["results"]]
    assert settings == [("paper", 1), ("paper", 2), ("path", 1), ("path", 2)]
    assert {result["photos"] for result in report["results"]} == {PHOTOS}
    stated = [point["stated"] for point in report["results"][0]["calibration"]]
    assert stated == pytest.approx(np.arange(1, 20) / 20)
    assert not any(result["radius_calibrated"] for result in report["results"])


def test_a_folder_of_results(world, tmp_path):
    result = run(*order(world, "--k", 2, "--out", tmp_path / "out", "--parquet", "--plots", "png", "--json"))
    assert result.exit_code == 0, result.stderr
    assert result.stderr == f"geoengine: wrote {tmp_path / 'out'}\n"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        *("photos.csv", "photos.parquet", "job.json", "lock", "report.json", "tables.md"),
        *("cumulative.png", "calibration.png", "errors-tiles-paper-k2.png"),
    }
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == json.loads(result.stdout)

    import pyarrow.parquet as pq

    table = pq.read_table(tmp_path / "out" / "photos.parquet").to_pylist()
    for row, cells in zip(table, rows_in(tmp_path / "out"), strict=True):
        assert list(cells) == [name for name in row if name not in ("seconds", "tiles")]
        assert (row["photo"], row["k"], row["lat"]) == (cells["photo"], int(cells["k"]), float(cells["lat"]))
        assert row["rank_z3"] == int(cells["rank_z3"]) and row["problem"] is None


def test_unreadable_photos_are_counted_and_listed(world, tmp_path):
    rows = (world / "set.csv").read_text() + "no.jpg,1,2\nbad.jpg,3,4\n"
    (world / "bad.jpg").write_bytes(b"\xff\xd8\xffnothing")
    write_table(world / "bad.csv", rows)
    result = run(*order(world, "--k", 1, "--out", tmp_path, "--plots", "none", "--parquet", table="bad.csv"))
    assert result.exit_code == 1
    assert "2 photos could not be read and count as misses" in result.stdout
    listed = list(csv.DictReader((tmp_path / "unreadable.csv").read_text().splitlines()))
    assert [row["photo"] for row in listed] == ["no.jpg", "bad.jpg"]
    assert "damaged or cut short" in listed[1]["problem"]
    without = run(*order(world, "--k", 1, table="bad.csv"))
    assert without.exit_code == 1 and without.stderr.count("\n") == 2 and "bad.jpg" in without.stderr
    write_table(world / "only-bad.csv", "path,lat,lon\nbad.jpg,3,4\n")
    assert run(*order(world, "--k", 1, table="only-bad.csv")).exit_code == 2


def test_a_named_set_prints_n_against_what_it_should_have(world, tmp_path):
    rows = ["IMG_ID,AUTHOR,LAT,LON"]
    for number in range(4):
        name = f"10412322{number}_7410c654ba_19_19355699@N00.jpg"
        rows.append(f"{name},me,{10 * number},{20 * number}")
        if number:
            (tmp_path / f"Rome_0000{number}_{name}").write_bytes(jpeg(40 * number))
    write_table(tmp_path / "im2gps_places365.csv", "\n".join(rows) + "\n")
    places = ["--bundle", world / "engines", "--tiles", world / "tiles"]
    result = run("evaluate", "im2gps", "--photos", tmp_path, *places, "--k", 1)
    assert result.exit_code == 1
    assert "IM2GPS: n = 4 of 237 photos" in result.stdout
    assert "1 photos could not be read and count as misses." in result.stdout
    assert "There are 4 places in im2gps_places365.csv, and IM2GPS has 237" in result.stdout
    assert "another data set" not in result.stdout
    assert "10412322" in result.stderr and "there is no such photo in the folder" in result.stderr


def test_a_killed_run_goes_on_and_ends_with_the_same_tables(world, tmp_path):
    many = ["path,lat,lon", *(f"{n % PHOTOS}.jpg,{n % 80},{n % 170}" for n in range(80))]
    lines = [f"p{n}," + line for n, line in enumerate(many[1:])]
    write_table(world / "many.csv", "id," + many[0] + "\n" + "\n".join(lines) + "\n")
    arguments = order(world, "--k", "1,2", "--together", 1, "--plots", "none", "--json", table="many.csv")
    whole = run(*arguments, "--out", tmp_path / "whole")
    assert whole.exit_code == 0, whole.stderr

    command = [sys.executable, "-c", "from geoengine.cli import main; main()"]
    part = tmp_path / "part"
    process = subprocess.Popen([*command, *map(str, arguments), "--out", part], stdout=subprocess.DEVNULL)
    while process.poll() is None and (not (part / "photos.csv").exists() or len(rows_in(part)) < 20):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = (part / "photos.csv").read_bytes()
    assert 20 <= before.count(b"\n") < 160
    assert not (part / "report.json").exists()
    resumed = run(*arguments, "--out", part)
    assert resumed.exit_code == 0, resumed.stderr
    assert (part / "photos.csv").read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert sorted(map(str, rows_in(part))) == sorted(map(str, rows_in(tmp_path / "whole")))

    def figures(result):
        costs = {"seconds_per_photo", "tiles_per_second", "tiles_per_photo"}
        return [
            {k: v for k, v in row.items() if k not in costs} for row in json.loads(result.stdout)["results"]
        ]

    assert figures(resumed) == figures(whole)


def test_embeddings_may_be_reused_which_is_told(world):
    fresh, reused = (
        json.loads(run(*order(world, "--k", "1,2", *more, "--json")).stdout) for more in ((), ["--reuse"])
    )
    assert (fresh["embeddings_reused"], reused["embeddings_reused"]) == (False, True)
    assert [row["within_km"] for row in fresh["results"]] == [row["within_km"] for row in reused["results"]]
    assert "reused: a first search takes longer" in run(*order(world, "--reuse")).stdout


def test_results_of_another_job_are_refused(world, tmp_path):
    assert run(*order(world, "--k", 1, "--out", tmp_path, "--plots", "none")).exit_code == 0
    refused(
        run(*order(world, "--k", 1, "--out", tmp_path, "--within", "0,0,90,60")), "its within is None, now"
    )
    again = run(
        *order(world, "--k", 1, "--out", tmp_path, "--plots", "none", "--within", "0,0,90,60", "--again")
    )
    assert again.exit_code == 0


def test_distances_on_the_ellipsoid_and_a_part_of_the_photos(world):
    report = json.loads(run(*order(world, "--k", 1, "--geodesic", "--count", 4, "--json")).stdout)
    assert report["distance"] == "geodesic on WGS84"
    assert report["data_set"]["photos"] == 4
    assert report["data_set"]["remarks"][0].startswith("4 photos at most, chosen at random with seed 1")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["planet", "--count", 0], "at least one photo, got 0"),
        (["planet", "--k", 0], "k must be at least 1, got 0"),
        (["planet", "--k", "1,1"], "each setting once, got tiles path 1 twice"),
        (["planet", "--k", "1,x"], "beam widths are numbers such as --k 16,32,64, got 1,x"),
        (["planet", "--seed", -1], "seed must be 0 or more, got -1"),
        (["planet", "--seed", 1000], "seeds from 1000 on are for calibrate, got 1000"),
        (["planet", "--seed", 1000, "--seed", 1], "seeds from 1000 on are for calibrate, got 1000"),
        (["planet", "--seed", 2, "--seed", 2], "each seed must be there once, got 2, 2"),
        (["tests", "--seed", 2, "--seed", 3], "several seeds draw several sets of the planet's photos"),
        (["planet", "--together", 0], "--together must be at least 1, got 0"),
        (["planet", "--geodesic"], "the planet is a sphere"),
        (["planet", "--again"], "give it with --out"),
        (["planet", "--parquet"], "give it with --out"),
        (["planet", "--photos", "."], "the planet's photos are drawn"),
        (["im2gps"], "name the folder of its 237 photos with --photos"),
        (
            ["nothing"],
            "no such file or folder, and the sets known by name are planet, im2gps, im2gps3k, yfcc4k",
        ),
        (["planet", "--out", "/dev/null/x"], "/dev/null/x: cannot be written"),
    ],
)
def test_evaluations_that_cannot_be_are_refused(options, sentence):
    refused(run("evaluate", *options), sentence)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("path,lat\n0.jpg,1\n", "no column for the longitude"),
        (
            "path,lat,lon\n0.jpg,1,2\n1.jpg,151.2,-33.8\n",
            "row 3: the latitude 151.2 is not from -90 to 90; are",
        ),
        ("path,lat,lon\n", "without rows|no photo|no rows|there is no"),
    ],
)
def test_tables_that_cannot_be_used_are_refused(world, text, sentence):
    write_table(world / "wrong.csv", text)
    result = run(*order(world, "--k", 1, table="wrong.csv"))
    assert (result.exit_code, result.stdout) == (2, "")
    assert any(words in result.stderr for words in sentence.split("|")), result.stderr


def test_a_photo_of_the_training_is_refused(world, tmp_path):
    write_table(tmp_path / "train.csv", "id,latitude,longitude,author,phash\n3.jpg,1,2,me,00\n")
    result = run(*order(world, "--k", 1, "--training", tmp_path))
    refused(result, "1 photos of")


def test_without_the_plots_package_only_the_plots_are_lost(world, tmp_path, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name)
    )
    refused(
        run(*order(world, "--k", 1, "--out", tmp_path)),
        "needs matplotlib, which is not installed: run `pip install 'geoengine[evaluate]'`, or give --plots",
    )
    assert run(*order(world, "--k", 1, "--out", tmp_path, "--plots", "none")).exit_code == 0


def test_files_that_cannot_be_written_are_said(world, tmp_path, monkeypatch):
    (tmp_path / evaluate_files.REPORT).mkdir()
    refused(
        run(*order(world, "--k", 1, "--out", tmp_path, "--plots", "none")), "report.json: cannot be written"
    )
    assert len(rows_in(tmp_path)) == PHOTOS
