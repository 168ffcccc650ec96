"""The planet's tables in the guides are those of the reports."""

import json

from geoengine.bench import planet_tables


def test_the_figures_are_those_of_the_reports():
    for document, text in planet_tables.rendered().items():
        assert document.read_text(encoding="utf-8") == text, "run `make readme`"


def test_seeds_are_pooled(tmp_path):
    def report(seed, recipe, hits, photos):
        share = {"share": hits / photos, "hits": hits, "total": photos}
        within = dict.fromkeys(("1", "25", "200", "750"), share)
        result = {"score": "paper", "k": 16, "photos": photos, "within_km": within}
        file = tmp_path / f"recipe-{recipe}-seed-{seed}.json"
        file.write_text(json.dumps({"results": [result]}))

    report(1, "paper", 3, 10)
    report(2, "paper", 9, 30)
    report(1, "geoengine", 5, 10)
    text = planet_tables.recipes_table(tmp_path)
    assert "| paper | paper | 16 | 40 | 30.0 % | 30.0 % |" in text
    assert "| 30.0 % / 30.0 % |" in text
    assert "| geoengine | paper | 16 | 10 | 50.0 % |" in text


def test_radii_that_are_not_calibrated_are_left_out():
    shares = [
        {"stated": stated, "share": 0.75, "hits": 3, "total": 4, "ci95": [0.3, 0.95]}
        for stated in planet_tables.STATED
    ]
    result = {"score": "path", "k": 4, "photos": 4, "radius_calibrated": True, "calibration": shares}
    other = result | {"k": 64, "radius_calibrated": False}
    text = planet_tables.radius_table([result, other])
    assert "| path | 4 | 4 | 75.0 % | 75.0 % | 75.0 % | 30.0 % – 95.0 % |" in text
    assert "| 64 |" not in text
