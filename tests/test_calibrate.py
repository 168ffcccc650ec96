"""Calibrating a bundle: the fits, the radii, the file, and the command."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from command_line import run
from test_engine import NoiseTiles, photo
from tiny_bundle import write_tiny_bundle

from geoengine.bench.calibrate import LEAST_PHOTOS, KnownPhotos, calibrate
from geoengine.bench.fitting import Seen, conditional_logit, fit_levels, fit_radius, level_losses
from geoengine.engine.bundle import EngineBundle
from geoengine.engine.calibration import (
    CALIBRATION,
    STATED_SHARES,
    Among,
    Calibration,
    Fit,
    LevelFit,
    RadiusFit,
)
from geoengine.engine.engine import GeoEngine
from geoengine.engine.errors import BundleError, GeoEngineError
from geoengine.engine.index.building import build_index
from geoengine.engine.manifest import encoder_hash
from geoengine.engine.regions import parse_region
from geoengine.engine.results import Level, ScoredTile
from geoengine.engine.scoring.kinds import Objective, Score
from geoengine.engine.scoring.mass import Mass, by_mass_within, softmax_shares
from geoengine.engine.search import SearchConfig
from geoengine.engine.tiles import (
    EARTH_RADIUS_KM,
    LngLat,
    Tile,
    bounds,
    center,
    great_circle_km,
    half_diagonal_km,
    tile_at,
)

# --- fitting weights --------------------------------------------------------------------------------------


def drawn_examples(weights, count, seed=0, n=12):
    """Examples whose true candidates were drawn with the softmax of features @ weights."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        features = rng.normal(size=(n, len(weights)))
        shares = np.exp(features @ weights)
        yield features, int(rng.choice(n, p=shares / shares.sum()))


def test_weights_that_drew_the_examples_are_found_again():
    true = np.array([2.0, 0.5, 1.0])
    found, loss = conditional_logit(list(drawn_examples(true, 1200)), np.zeros(3), np.full(3, 1e-6))
    np.testing.assert_allclose(found, true, atol=0.2)
    assert loss < math.log(12) - 0.5


def test_a_weight_that_would_be_negative_is_0_and_the_others_are_still_best():
    examples = list(drawn_examples(np.array([1.5, -1.0]), 400))
    found, loss = conditional_logit(examples, np.array([0.5, 0.5]), np.full(2, 1e-6))
    assert found[1] == 0
    alone, alone_loss = conditional_logit([(x[:, :1], y) for x, y in examples], np.zeros(1), np.full(1, 1e-6))
    assert found[0] == pytest.approx(alone[0], abs=1e-3)
    assert loss == pytest.approx(alone_loss, abs=1e-6)


def test_what_the_examples_leave_open_stays_where_it_was():
    examples = [(np.column_stack([x, np.ones(len(x))]), y) for x, y in drawn_examples(np.ones(1), 200)]
    found, _ = conditional_logit(examples, np.array([0.0, 0.7]), np.array([1e-6, 1e-2]))
    assert found[1] == pytest.approx(0.7)
    assert conditional_logit([], np.array([3.0]), np.ones(1))[0] == [3.0]


def test_examples_that_are_always_right_have_a_finite_fit():
    examples = [(np.array([[1.0], [0.0]]), 0)] * 50
    found, _ = conditional_logit(examples, np.array([1.0]), np.array([1e-2]))
    assert 1 < found[0] < 50


def seen_photos(scales, inherited, count, seed=0, among=Among.candidates):
    """Photos whose true tiles were drawn by a path score with these scales and this inheritance."""
    rng = np.random.default_rng(seed)
    photos = []
    for _ in range(count):
        levels, scores = [], None
        for zoom, scale in scales.items():
            above = np.full(16, -1) if scores is None else np.repeat(np.argsort(-scores)[:4], 16)
            cosines = rng.normal(size=len(above)) * 0.1
            parents = np.maximum(above, 0)
            logits = scale * cosines
            if among is Among.siblings and scores is not None:
                logits = np.log(np.exp(logits) / np.bincount(parents, np.exp(logits))[parents])
            logits = logits + (0 if scores is None else inherited * scores[above])
            scores = logits - np.log(np.exp(logits).sum())
            truth = int(rng.choice(len(scores), p=np.exp(scores)))
            levels.append(
                Seen(zoom=zoom, cosines=cosines, parents=parents, above=above, evidence={}, truth=truth)
            )
        photos.append(levels)
    return photos


def test_scales_and_what_is_inherited_are_found_again():
    photos = seen_photos({4: 30.0, 6: 50.0}, 0.6, 600)
    fits = fit_levels(photos, {4: 20.0, 6: 20.0})
    assert {zoom: fit.among for zoom, fit in fits.items()} == dict.fromkeys((4, 6), Among.candidates)
    assert fits[4].scale == pytest.approx(30.0, rel=0.1)
    assert fits[6].scale == pytest.approx(50.0, rel=0.15)
    assert fits[6].inherited == pytest.approx(0.6, abs=0.2)


def test_the_softmax_under_which_the_truth_is_likelier_is_taken():
    photos = seen_photos({4: 30.0, 6: 60.0}, 1.0, 400, among=Among.siblings)
    fits = fit_levels(photos, {4: 20.0, 6: 20.0})
    assert fits[6].among is Among.siblings
    assert fits[6].scale == pytest.approx(60.0, rel=0.15)
    assert fits[6].weight == pytest.approx(1.0, abs=0.2)
    worse = {zoom: LevelFit(scale=20.0) for zoom in (4, 6)}
    assert level_losses(photos, fits)[6] < level_losses(photos, worse)[6] - 0.1


def test_a_level_without_photos_keeps_its_scale():
    fits = fit_levels(seen_photos({4: 30.0}, 0.0, 60), {4: 20.0, 6: 33.0})
    assert fits[6].scale == 33.0


# --- the mass around an answer ----------------------------------------------------------------------------


def level_of(*tiles, scores=None):
    scores = scores or [-0.1 * i for i in range(len(tiles))]
    beam = tuple(ScoredTile(tile=t, score=s) for t, s in zip(tiles, scores, strict=True))
    return Level(zoom=tiles[0].z, candidates=len(beam), missing=0, beam=beam)


def drawn_place(rng, tile):
    box = bounds(tile)
    return LngLat(rng.uniform(box.west, box.east), rng.uniform(box.south, box.north))


def test_a_single_tile_is_spread_evenly():
    tile = tile_at(LngLat(10, 50), 16)
    mass = Mass.around(center(tile), level_of(tile), np.ones(1))
    rng = np.random.default_rng(0)
    far = np.array([great_circle_km(center(tile), drawn_place(rng, tile)) for _ in range(4000)])
    for share in (0.2, 0.5, 0.8, 0.95):
        assert (far <= mass.radius_km(share)).mean() == pytest.approx(share, abs=0.03)
    assert mass.share(2 * half_diagonal_km(tile)) == pytest.approx(1.0)
    assert mass.radius_km(1.0) <= 1.2 * half_diagonal_km(tile)


def test_radii_reach_the_other_tiles_by_their_shares():
    near, far = tile_at(LngLat(10, 50), 16), tile_at(LngLat(40, 50), 16)
    mass = Mass.around(center(near), level_of(near, far), np.array([0.7, 0.3]))
    apart = great_circle_km(center(near), center(far))
    assert mass.radius_km(0.69) < half_diagonal_km(near) * 1.2
    assert mass.radius_km(0.71) == pytest.approx(apart, rel=0.01)
    assert mass.share(apart / 2) == pytest.approx(0.7)


def test_what_lies_elsewhere_is_spread_over_the_world():
    tile = tile_at(LngLat(10, 50), 16)
    mass = Mass.around(center(tile), level_of(tile), np.ones(1), elsewhere=0.2)
    half_the_world = math.pi / 2 * EARTH_RADIUS_KM
    assert mass.share(half_the_world) == pytest.approx(0.9)
    assert mass.radius_km(0.9) == pytest.approx(half_the_world, rel=1e-6)
    assert mass.radius_km(1.0) == pytest.approx(math.pi * EARTH_RADIUS_KM, rel=1e-3)
    for share in (0.05, 0.5, 0.79, 0.85, 0.99):
        assert mass.share(mass.radius_km(share)) == pytest.approx(share, abs=1e-6)


def overconfident(rng, count):
    """Last beams that say less than half of how often they are wrong, and places drawn by the truth."""
    found, places = [], []
    for _ in range(count):
        first = tile_at(LngLat(rng.uniform(-170, 170), rng.uniform(-60, 60)), 14)
        tiles = [first, *(Tile(14, (first.x + 40 * i) % 2**14, first.y) for i in (1, 2, 3))]
        logits = np.sort(rng.normal(size=4))[::-1]
        shares = np.exp(logits) / np.exp(logits).sum()
        tile = tiles[int(rng.choice(4, p=shares))]
        lost = LngLat(rng.uniform(-180, 180), rng.uniform(-80, 80))
        places.append(lost if rng.uniform() < 0.07 else drawn_place(rng, tile))
        found.append((level_of(*tiles, scores=(5 * logits).tolist()),))
    return found, places


def covered(fit, found, places, share):
    inside = 0
    for levels, place in zip(found, places, strict=True):
        last = levels[-1]
        point = center(last.beam[0].tile)
        mass = Mass.around(point, last, softmax_shares(last, fit.sharpness), elsewhere=fit.elsewhere)
        radius = mass.radius_km(fit.shares[STATED_SHARES.index(share)])
        inside += great_circle_km(point, place) <= radius
    return inside / len(places)


def test_fitted_radii_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(5)
    fit = fit_radius(*overconfident(rng, 300), 4, 1.0)
    assert fit.k == 4
    assert fit.sharpness == pytest.approx(0.2, rel=0.3)
    assert 0.03 < fit.elsewhere < 0.12
    assert list(fit.shares) == sorted(fit.shares)
    fresh = overconfident(rng, 300)
    for share in (0.3, 0.5, 0.8, 0.9):
        assert covered(fit, *fresh, share) == pytest.approx(share, abs=0.07)


def test_an_objective_prefers_the_centre_of_most_probability():
    lone = tile_at(LngLat(100, 10), 16)
    near = [tile_at(LngLat(10 + 0.05 * i, 50), 16) for i in range(3)]  # 3.6 km from each to the next
    level = level_of(lone, *near, scores=[math.log(s) for s in (0.4, 0.25, 0.2, 0.15)])
    shares = softmax_shares(level, 1.0)
    assert by_mass_within(level, shares, 1.0).tolist() == [0, 1, 2, 3]
    assert by_mass_within(level, shares, 4.0).tolist() == [2, 1, 0, 3]  # all three; two; itself; two
    assert by_mass_within(level, shares, 30000.0).tolist() == [0, 1, 2, 3]


def test_an_objective_does_not_leave_the_best_tile_for_a_trifle():
    tiles = [tile_at(LngLat(10 + 0.05 * i, 50), 16) for i in range(3)]
    level = level_of(*tiles, scores=[math.log(s) for s in (0.9, 0.096, 0.004)])
    assert by_mass_within(level, softmax_shares(level, 1.0), 4.0).tolist() == [0, 1, 2]


# --- the file ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    return write_tiny_bundle(tmp_path / "tiny")


def made_calibration(folder):
    radius = RadiusFit(k=4, sharpness=1.5, elsewhere=0.01, shares=STATED_SHARES)
    levels = {z: LevelFit(scale=21.5, inherited=0.25, evidence={"geoclip": 0.5}) for z in (1, 3)}
    fit = Fit(levels=levels, radii={Score.path: (radius,), Score.paper: ()})
    return Calibration(
        fits={"plain": fit, "centred": fit},
        means={z: np.float32([0.1, -0.2, 0.3, 0, 0, 1e-8]) for z in (1, 3)},
        encoders=encoder_hash(EngineBundle.open(folder).manifest),
        dataset="planet",
        identity="planet photos of seed 1000",
        photos=400,
        seed=1000,
    )


def test_a_calibration_is_read_as_it_was_written(folder):
    assert EngineBundle.open(folder).calibration is None
    made = made_calibration(folder)
    opened = EngineBundle.open(folder)
    made.write(folder)
    opened.check_unchanged()  # a running search is not disturbed
    read = EngineBundle.open(folder).calibration
    assert read.fits == made.fits
    assert read.fitted
    assert (read.dataset, read.identity, read.photos, read.seed) == (
        "planet",
        "planet photos of seed 1000",
        400,
        1000,
    )
    for zoom, mean in made.means.items():
        np.testing.assert_array_equal(read.means[zoom], mean)
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda data: data["fits"]["plain"]["levels"]["1"].update(scale=99.0), "its checksum is not the one"),
        (lambda data: data.update(schema=2), "reads schema 1, got 2"),
        (lambda data: data.pop("means"), "its checksum is not"),
    ],
)
def test_a_damaged_calibration_is_refused(folder, change, match):
    made_calibration(folder).write(folder)
    data = json.loads((folder / CALIBRATION).read_text())
    change(data)
    (folder / CALIBRATION).write_text(json.dumps(data))
    with pytest.raises(BundleError, match=match) as caught:
        EngineBundle.open(folder)
    assert "run `geoengine calibrate` again, or delete that file" in str(caught.value)
    assert EngineBundle.open(folder, calibrated=False).calibration is None


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema": 1}'])
def test_a_file_that_is_no_calibration_is_refused(folder, text):
    (folder / CALIBRATION).write_text(text)
    with pytest.raises(BundleError, match=r"calibration\.json cannot be used"):
        EngineBundle.open(folder)


def test_a_calibration_of_other_encoders_is_refused(folder, tmp_path):
    made_calibration(folder).write(folder)
    other = write_tiny_bundle(tmp_path / "other", levels=(1, 3, 5))
    (other / CALIBRATION).write_bytes((folder / CALIBRATION).read_bytes())
    with pytest.raises(BundleError, match="fitted for other encoders"):
        EngineBundle.open(other)


# --- the whole of it --------------------------------------------------------------------------------------


def known_photos(engine, count, seed=0):
    rng = np.random.default_rng(seed)
    places = [LngLat(rng.uniform(-180, 180), rng.uniform(-80, 80)) for _ in range(count)]
    embeddings = engine.embed_photos([photo(i) for i in range(count)])
    return KnownPhotos(embeddings=embeddings, places=places, dataset="made up", seed=seed)


@pytest.fixture
def engine(folder, tmp_path):
    with GeoEngine.open(folder, NoiseTiles(), threads=1, row_cache=tmp_path / "rows") as opened:
        yield opened


def test_a_calibrated_bundle_searches_by_path_and_knows_its_radii(engine, folder):
    steps = []
    made = calibrate(
        engine, known_photos(engine, 60), ks=(4, 2), progress=lambda done, total: steps.append((done, total))
    )
    assert set(made.fits) == {"plain", "centred"}
    assert [radius.k for radius in made.fits["plain"].radii[Score.path]] == [2, 4]
    assert set(made.means) == {1, 3}
    assert steps[-1][0] == steps[-1][1]
    made.write(folder)
    with GeoEngine.open(folder, NoiseTiles(), threads=1) as calibrated:
        config = SearchConfig(k=4, levels=(1, 3))
        (location,) = calibrated.locate([photo(1)], config=config)
        assert (location.scoring.score, location.scoring.calibrated) == ("path", True)
        assert (location.radius_share, location.radius_calibrated) == (0.8, True)
        assert location.radius_for(0.8) == location.radius_km
        assert list(location.radii_km) == sorted(location.radii_km)
        for changed in ({"k": 3}, {"quota": 1}, {"objective": Objective(25.0)}):
            (other,) = calibrated.locate(
                [photo(1)], config=SearchConfig(**{"k": 4, "levels": (1, 3)} | changed)
            )
            assert not other.radius_calibrated
        (paper,) = calibrated.locate([photo(1)], config=SearchConfig(k=4, levels=(1, 3), score=Score.paper))
        assert paper.radius_calibrated
        assert not paper.scoring.calibrated
        (centred,) = calibrated.locate([photo(1)], config=SearchConfig(k=4, levels=(1, 3), centred=True))
        assert centred.scoring.centred
        with pytest.raises(ValueError, match="radii are known for the shares"):
            location.radius_for(0.33)


def test_radii_are_of_the_levels_that_were_calibrated(tmp_path):
    """A search that leaves out a level between has other beams than those that the radii were fitted to."""
    bundle = write_tiny_bundle(tmp_path / "three", levels=(1, 2, 3))
    with GeoEngine.open(bundle, NoiseTiles(), threads=1, row_cache=tmp_path / "rows") as engine:
        calibrate(engine, known_photos(engine, 60), ks=(4,)).write(bundle)
    with GeoEngine.open(bundle, NoiseTiles(), threads=1) as engine:
        for levels in ((1, 2, 3), (1, 3), (1, 2)):
            (location,) = engine.locate([photo(1)], config=SearchConfig(k=4, levels=levels))
            assert location.radius_calibrated == (levels == (1, 2, 3))


def test_searches_of_part_of_the_world_and_of_whole_levels_have_no_calibrated_radius(tmp_path):
    """They drop the truth less often than the beams that the radii were fitted to."""
    bundle = write_tiny_bundle(tmp_path / "two", levels=(1, 3))
    with GeoEngine.open(bundle, NoiseTiles(), threads=1, row_cache=tmp_path / "rows") as engine:
        calibrate(engine, known_photos(engine, 60), ks=(4,)).write(bundle)
        build_index(tmp_path / "first", engine.bundle, engine.source, engine.backend, zooms=(1,))
        build_index(tmp_path / "both", engine.bundle, engine.source, engine.backend, zooms=(1, 3))
    config = SearchConfig(k=4, levels=(1, 3))
    near = replace(config, within=parse_region("0,0,90,60"))
    for index, given, calibrated in (
        (None, config, True),
        (None, near, False),
        ("first", config, True),  # which every search scores whole
        ("both", config, False),
    ):
        folder = None if index is None else tmp_path / index
        with GeoEngine.open(bundle, NoiseTiles(), threads=1, index=folder) as engine:
            (location,) = engine.locate([photo(1)], config=given)
        assert location.radius_calibrated == calibrated, (index, given)


def test_an_engine_with_an_index_is_refused(engine):
    class Known:
        index = object()

    engine.known = Known()
    with pytest.raises(GeoEngineError, match="without a tile index"):
        calibrate(engine, known_photos(engine, 50), ks=(1,))


def test_the_means_are_those_of_the_tiles_that_were_met(engine):
    made = calibrate(engine, known_photos(engine, 60), ks=(1,))
    (batch,) = engine.source.read(1, np.array([(0, 0), (0, 1), (1, 0), (1, 1)]))
    rows = engine.backend.encode("z01", batch.pixels)
    np.testing.assert_allclose(made.means[1], rows.mean(axis=0), atol=2e-3)


def test_without_kept_rows_there_is_no_centring(folder):
    with GeoEngine.open(folder, NoiseTiles(), threads=1) as engine:
        made = calibrate(engine, known_photos(engine, 50), ks=(1,))
    assert set(made.fits) == {"plain"}
    made.write(folder)
    with (
        GeoEngine.open(folder, NoiseTiles(), threads=1) as engine,
        pytest.raises(GeoEngineError, match="`geoengine calibrate` computes them"),
    ):
        engine.locate([photo(1)], config=SearchConfig(k=2, levels=(1, 3), centred=True))


def test_too_few_photos(engine, folder):
    with pytest.raises(GeoEngineError, match="at least 50 photos with known places, got 49"):
        calibrate(engine, known_photos(engine, LEAST_PHOTOS - 1))
    with (
        GeoEngine.open(folder, NoiseTiles(deepest=-1), threads=1) as empty,
        pytest.raises(GeoEngineError, match="has no tile of zoom 1"),
    ):
        calibrate(empty, known_photos(empty, 50))


def test_photos_outside_the_tiles(folder):
    class West(NoiseTiles):
        def read(self, z, xy):
            keep = np.flatnonzero(xy[:, 0] < 2 ** (z - 1))
            for batch in super().read(z, xy[keep]) if len(keep) else ():
                yield type(batch)(keep[batch.positions], batch.pixels)

    with GeoEngine.open(folder, West(), threads=1) as engine:
        photos = known_photos(engine, 60)
        with pytest.raises(GeoEngineError, match=r"only \d+ of 60 photos lie where noise has tiles"):
            calibrate(engine, photos, ks=(1,))


# --- the command ------------------------------------------------------------------------------------------


def test_the_command_calibrates_a_bundle_of_the_planet(folder):
    done = run("calibrate", "--bundle", folder, "--count", 50, "--k", "2", "--threads", 1)
    assert done.exit_code == 0, done.stderr
    assert "plain searches, fitted on 50 photos of planet" in done.stdout
    assert "inherited" in done.stdout
    calibration = EngineBundle.open(folder).calibration
    assert (calibration.seed, calibration.identity) == (1000, "planet photos of seed 1000")
    first = (folder / CALIBRATION).read_bytes()
    again = run("calibrate", "planet", "--bundle", folder, "--count", 50, "--k", "2", "--threads", 1)
    assert again.exit_code == 0, again.stderr
    assert (folder / CALIBRATION).read_bytes() == first


def test_the_command_replaces_a_calibration_that_cannot_be_read(folder):
    (folder / CALIBRATION).write_text("{")
    done = run("calibrate", "--bundle", folder, "--count", 50, "--k", "1", "--threads", 1)
    assert done.exit_code == 0, done.stderr
    assert EngineBundle.open(folder).calibration.photos == 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["im2gps"], "im2gps is a test set"),
        (["planet", "--seed", "1"], "seeds below 1000 are for training and evaluation, got seed 1"),
        (["planet", "--k", "a"], "beam widths are numbers such as --k 4,16, got a"),
        (["planet", "--k", "0", "--count", "50"], "must be 1 or more"),
        (["planet", "--count", "10"], "at least 50 photos"),
        (["planet", "--split", "valid"], "planet has no splits"),
        (["nowhere.csv"], "nowhere.csv"),
        (["planet", "--max-megapixels", "0"], "above 0"),
    ],
)
def test_what_the_command_refuses(folder, arguments, message):
    done = run("calibrate", *arguments, "--bundle", folder)
    assert done.exit_code == 2
    assert message in done.stderr
    assert not (folder / CALIBRATION).exists()


def test_splits_for_training_and_tests_are_refused(folder, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "splits.json").write_text(json.dumps({"schema": 1, "splits": {"train": {}, "test": {}}}))
    for split in ("train", "test"):
        done = run("calibrate", data, "--split", split, "--bundle", folder)
        assert done.exit_code == 2
        assert f"the {split} split of" in done.stderr
    done = run("calibrate", data, "--bundle", folder)
    assert "has no split valid, only train, test" in done.stderr
    (data / "splits.json").write_text("{")
    assert "splits.json cannot be read" in run("calibrate", data, "--bundle", folder).stderr
