"""The ablation of the search: cells are kept, and pooled into a table."""

import json

import pytest
from tiny_bundle import write_tiny_bundle

from geoengine.bench import ablation_search
from geoengine.bench.ablation_search import PRIORS, VARIANTS, Plan, markdown, run, table
from geoengine.bench.calibrate import KnownPhotos, calibrate
from geoengine.bench.truth import PlanetPhotos
from geoengine.engine.engine import GeoEngine
from geoengine.engine.scoring.density import PriorError, open_prior


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="module")
def engine(folder, tmp_path_factory):
    rows = tmp_path_factory.mktemp("rows")
    with GeoEngine.open(folder, "planet", threads=1, row_cache=rows) as opened:
        truth = list(PlanetPhotos(50, 1000))
        embeddings = opened.embed_photos([opened.prepare(photo.read()) for photo in truth])
        photos = KnownPhotos(embeddings=embeddings, places=[p.place for p in truth], dataset="planet")
        calibrate(opened, photos, ks=(2,)).write(folder)
    with GeoEngine.open(folder, "planet", threads=1, row_cache=rows) as opened:
        yield opened


def test_cells_are_measured_once_and_pooled(engine, tmp_path, monkeypatch):
    plan = Plan(variants=list(VARIANTS), photos={1: 3, 2: 3}, seeds=[1, 2])
    data = run(engine, plan, tmp_path / "cells.json")
    assert len(data["cells"]) == len(VARIANTS) * 4
    text = table(data)
    assert text.count("\n") == 2 + len(VARIANTS) * 2
    assert "| path, quota 2 | 2 | 6 |" in text and markdown(data).endswith(text)
    paper = [cell for cell in data["cells"] if cell["variant"] == "paper" and cell["k"] == 2]
    assert [cell["seed"] for cell in paper] == [1, 2]
    assert all(len(cell["errors_km"]) == cell["photos"] == 3 for cell in paper)
    assert paper[0]["in_radius"] is not None
    quota = next(cell for cell in data["cells"] if cell["variant"] == "path, quota 2" and cell["k"] == 2)
    assert quota["in_radius"] is None  # its radii were not fitted
    monkeypatch.setattr(ablation_search, "_cell", lambda *given: pytest.fail("measured again"))
    assert run(engine, plan, tmp_path / "cells.json") == data


def test_cells_of_another_bundle_are_thrown_away(engine, tmp_path):
    plan = Plan(variants=["paper"], photos={1: 1}, seeds=[1])
    out = tmp_path / "cells.json"
    data = run(engine, plan, out)
    out.write_text(json.dumps(data | {"bundle": "another", "cells": data["cells"] * 2}))
    assert len(run(engine, plan, out)["cells"]) == 1


def test_more_photos_are_measured_again(engine, tmp_path):
    out = tmp_path / "cells.json"
    run(engine, Plan(variants=["paper"], photos={1: 1}, seeds=[1]), out)
    (cell,) = run(engine, Plan(variants=["paper"], photos={1: 2}, seeds=[1]), out)["cells"]
    assert cell["photos"] == 2


def test_priors_of_the_planet_count_its_training_places(tmp_path):
    for zoom in PRIORS.values():
        prior = open_prior(str(ablation_search._prior(zoom, tmp_path)), "planet")
        assert (prior.zoom, prior.counts.sum()) == (zoom, ablation_search.PRIOR_PLACES)
        with pytest.raises(PriorError, match="of the world 'planet'"):
            open_prior(str(tmp_path / f"planet-zoom-{zoom}.npz"), "earth")
