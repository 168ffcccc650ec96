"""The path score, quotas, joined tiles and centring, each beside a second way to compute it."""

import math

import numpy as np
import pytest
from fakes import AddressTiles, HostEncoders
from test_search import hashed_encode, picture, random_photos

from geoengine.engine import search as search_module
from geoengine.engine.calibration import Among, Calibration, Fit, LevelFit
from geoengine.engine.errors import GeoEngineError
from geoengine.engine.index.segments import tile_ids, tiles_of_ids
from geoengine.engine.index.tile_index import Table
from geoengine.engine.regions import parse_region
from geoengine.engine.scoring.kinds import Objective, Score
from geoengine.engine.scoring.path import log_softmax
from geoengine.engine.scoring.selection import select
from geoengine.engine.search import SearchConfig
from geoengine.engine.tiles import LngLat, Tile, all_xy, descendants, parent, tile_at

LEVELS = (2, 4, 5)


def calibration(levels=LEVELS, *, means=None, evidence=None, among=Among.candidates):
    fits = {
        zoom: LevelFit(
            scale=3.0 + zoom,
            weight=1.0 / (1 + i),
            inherited=1.0 - 0.3 * i,
            among=among,
            evidence=evidence or {},
        )
        for i, zoom in enumerate(levels)
    }
    fit = Fit(levels=fits)
    return Calibration(fits={"plain": fit, "centred": fit} if means else {"plain": fit}, means=means or {})


def search(queries, source=None, *, k=3, levels=LEVELS, fits=None, score=Score.path, **settings):
    asked = {name: settings.pop(name) for name in ("quota", "centred", "within") if name in settings}
    config = SearchConfig(k=k, levels=levels, score=score, **asked)
    encoders = HostEncoders(hashed_encode, 32)
    fits = fits or calibration(levels)
    source = source or AddressTiles(shuffle=1, chunk=9)
    return search_module.search(queries, source, encoders, config, calibration=fits, **settings)


def log_shares(logits):
    total = math.log(sum(math.exp(logit) for logit in logits)) if logits else 0.0
    return [logit - total for logit in logits]


def brute_force(query, k, fits, levels=LEVELS, *, missing=lambda tile: False, quota=None, more=None):
    """One photo, one tile at a time: [(zoom, [(tile, score)])], the scores as the docstring has them."""
    n = 2 ** levels[0]
    groups = [(0.0, [Tile(levels[0], x, y) for x in range(n) for y in range(n)])]
    result = []
    for zoom in levels:
        fit, ranked = fits.fits["plain"].level(zoom), []
        for place, (before, tiles) in enumerate(groups):
            there = [tile for tile in tiles if not missing(tile)]
            logits = [fit.scale * float(hashed_encode("", picture(tile))[0] @ query) for tile in there]
            if fit.among is Among.siblings:
                logits = log_shares(logits)
            scores = [fit.inherited * before + fit.weight * logit for logit in logits]
            if more is not None:
                extra = log_shares([more(tile) for tile in there])
                scores = [s + fit.evidence["more"] * e for s, e in zip(scores, extra, strict=True)]
            ranked += [(tile, score, place) for tile, score in zip(there, scores, strict=True)]
        whole = log_shares([score for _, score, _ in ranked])
        ranked = [(tile, score, place) for (tile, _, place), score in zip(ranked, whole, strict=True)]
        ranked.sort(key=lambda entry: -entry[1])
        if quota is not None and zoom != levels[0]:
            counts, first, rest = {}, [], []
            for entry in ranked:
                counts[entry[2]] = counts.get(entry[2], 0) + 1
                (first if counts[entry[2]] <= quota else rest).append(entry)
            ranked = sorted((first + rest)[:k], key=lambda entry: -entry[1])
        kept = [(tile, score) for tile, score, _ in ranked[:k]]
        if not kept:
            break
        result.append((zoom, kept))
        deeper = levels[levels.index(zoom) + 1 :]
        groups = [(score, list(descendants(tile, deeper[0]))) for tile, score in kept] if deeper else []
    return result


def assert_same(levels, expected):
    assert [level.zoom for level in levels] == [zoom for zoom, _ in expected]
    for level, (_, kept) in zip(levels, expected, strict=True):
        assert [scored.tile for scored in level.beam] == [tile for tile, _ in kept]
        assert [scored.score for scored in level.beam] == pytest.approx([s for _, s in kept], abs=1e-5)


# --- the path score ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "levels"), [(1, (1, 2)), (3, LEVELS), (16, (2, 4)), (5, (3, 6, 7)), (999, (1, 3, 4))]
)
@pytest.mark.parametrize("among", Among)
def test_equals_brute_force(k, levels, among):
    queries, fits = random_photos(3), calibration(levels, among=among)
    for found, query in zip(search(queries, k=k, levels=levels, fits=fits), queries, strict=True):
        assert_same(found, brute_force(query, k, fits, levels))


@pytest.mark.parametrize("among", Among)
def test_scores_are_probabilities(among):
    fits = calibration((1, 3), among=among)
    (levels,) = search(random_photos(1), k=64, levels=(1, 3), fits=fits)
    for level in levels:  # all tiles are kept, so that their probabilities sum to 1
        assert sum(math.exp(scored.score) for scored in level.beam) == pytest.approx(1.0)


@pytest.mark.parametrize("among", Among)
def test_missing_tiles_are_left_out_of_the_softmax(among):
    fits = calibration(among=among)
    source = AddressTiles(missing=lambda z, x, y: (3 * x + y) % 4 == 1)
    queries = random_photos(2, seed=8)
    for found, query in zip(search(queries, source, fits=fits), queries, strict=True):
        assert_same(found, brute_force(query, 3, fits, missing=lambda t: (3 * t.x + t.y) % 4 == 1))


def test_an_area_leaves_the_others_out_of_the_softmax():
    fits, region = calibration(), parse_region("-170,-60,20,70")
    (found,) = search(random_photos(1), fits=fits, within=region)
    inside = {z: {tuple(row) for row in region.tiles(z).tolist()} for z in LEVELS}
    query = random_photos(1)[0]
    assert_same(found, brute_force(query, 3, fits, missing=lambda t: t[1:] not in inside[t.z]))


def test_photos_do_not_influence_each_other():
    queries = random_photos(5, seed=4)
    together = search(queries, k=4, quota=2)
    assert together == [search(query[None], k=4, quota=2)[0] for query in queries]


def test_a_tile_inherits_what_its_parents_scored():
    """The paper's score forgets a level as soon as it is ranked; the path score does not."""
    good, bad = Tile(1, 0, 0), Tile(1, 1, 1)
    alike = {good: 0.9, bad: 0.1}  # of zoom 1; below, one tile of the bad one is a little better than all

    def encode(encoder, pixels):
        rows = []
        for z, x, y in np.ascontiguousarray(pixels).reshape(len(pixels), 12).view(np.int32).tolist():
            tile = Tile(z, x, y)
            cosine = alike.get(tile, 0.0) if z == 1 else 0.5 + 0.02 * (tile == Tile(3, 7, 7))
            cosine += 0.01 * (tile == Tile(3, 0, 0))
            rows.append([cosine, math.sqrt(1 - cosine**2)])
        return np.float32(rows)

    fits = Calibration(fits={"plain": Fit(levels={z: LevelFit(scale=10.0) for z in (1, 3)})})
    answers = {}
    for score in Score:
        config = SearchConfig(k=4, levels=(1, 3), score=score)
        query, tiles = np.float32([[1, 0]]), AddressTiles()
        encoders = HostEncoders(encode, 32)
        (levels,) = search_module.search(query, tiles, encoders, config, calibration=fits)
        answers[score] = levels[-1].beam[0].tile
    assert answers == {Score.paper: Tile(3, 7, 7), Score.path: Tile(3, 0, 0)}


def test_equal_scores_keep_the_order_of_the_candidates():
    fits = calibration((1, 3))
    config = SearchConfig(k=5, levels=(1, 3), score=Score.path)
    flat = HostEncoders(lambda encoder, pixels: np.tile(np.float32([0.6, 0.8]), (len(pixels), 1)), 32)
    (levels,) = search_module.search(
        np.float32([[0.6, 0.8]]), AddressTiles(shuffle=3, chunk=2), flat, config, calibration=fits
    )
    assert [s.tile for s in levels[1].beam] == list(descendants(Tile(1, 0, 0), 3))[:5]


def test_log_softmax_of_large_logits_and_empty_groups():
    logits, groups = np.array([1e4, 1e4 - 1, -1e4]), np.array([2, 2, 0])
    values = log_softmax(logits, groups)
    assert values == pytest.approx([-math.log(1 + math.exp(-1)), -1 - math.log(1 + math.exp(-1)), 0.0])
    assert log_softmax(np.empty(0), np.empty(0, np.int64)).shape == (0,)


# --- evidence, joined tiles -------------------------------------------------------------------------------


class More:
    """Evidence that some tiles are likelier; remembers which zooms it was asked about."""

    name = "more"

    def __init__(self, default=1.0):
        self.default, self.asked = default, set()

    def weight(self, zoom):
        return self.default

    def log_probability(self, photos, zoom, xy):
        self.asked.add((zoom, *photos.tolist()))
        values = [self.value(Tile(zoom, x, y)) for x, y in xy.tolist()]
        return np.tile(np.float32(values), (len(photos), 1))

    @staticmethod
    def value(tile):
        return float(np.float32(math.sin(tile.x + 3 * tile.y + tile.z)))


def test_evidence_enters_with_its_weight():
    queries, fits, more = random_photos(2), calibration(evidence={"more": 0.7}), More()
    for found, query in zip(search(queries, fits=fits, evidence=[more]), queries, strict=True):
        assert_same(found, brute_force(query, 3, fits, more=More.value))
    assert more.asked == {(zoom, photo) for zoom in LEVELS for photo in (0, 1)}


def test_evidence_of_weight_zero_is_not_asked():
    more = More(default=0.0)
    assert search(random_photos(1), evidence=[more]) == search(random_photos(1))
    assert not more.asked


def test_evidence_needs_the_path_score():
    with pytest.raises(GeoEngineError, match="use --score path"):
        search(random_photos(1), score=Score.paper, evidence=[More()])


@pytest.mark.parametrize("score", Score)
def test_the_tile_of_a_joined_point_stays_at_every_level(score):
    point = LngLat(-60.0, -20.0)
    alone, joined = (
        search(random_photos(2), score=score),
        search(random_photos(2), score=score, joined=[None, point]),
    )
    assert joined[0] == alone[0]
    for level in joined[1]:
        true = tile_at(point, level.zoom)
        tiles = [scored.tile for scored in level.beam]
        assert true in tiles
        assert len(tiles) <= 4
        scores = [scored.score for scored in level.beam]
        assert scores == sorted(scores, reverse=True)
    assert tile_at(point, 5) not in {scored.tile for scored in alone[1][-1].beam}


def test_a_joined_point_without_a_tile_is_left_out():
    point = LngLat(100.0, 50.0)
    source = AddressTiles(missing=lambda z, x, y: (z > 2) & (x >= 2 ** (z - 1)))
    (levels,) = search(random_photos(1), source, joined=[point])
    kept = [tile_at(point, level.zoom) in {s.tile for s in level.beam} for level in levels]
    assert kept == [True, False, False]


# --- quotas -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quota", [1, 2, 5])
def test_quotas_equal_brute_force(quota):
    queries, fits = random_photos(3, seed=2), calibration()
    for found, query in zip(search(queries, k=6, fits=fits, quota=quota), queries, strict=True):
        assert_same(found, brute_force(query, 6, fits, quota=quota))


def test_a_quota_spreads_the_papers_beam_too():
    (levels,) = search(random_photos(1, seed=3), k=8, score=Score.paper, quota=2)
    for level, before in zip(levels[1:], levels[:-1], strict=True):
        parents = [parent(scored.tile, before.zoom) for scored in level.beam]
        assert max(map(parents.count, parents)) <= 2


def test_a_quota_that_leaves_too_few_is_filled_up():
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.1])
    groups = np.array([0, 0, 0, 0, 1])
    assert select(scores, 4, groups=groups, quota=1).tolist() == [0, 1, 2, 4]
    assert select(scores, 2, groups=groups, quota=1).tolist() == [0, 4]
    assert select(scores, 9, groups=groups, quota=1).tolist() == [0, 1, 2, 3, 4]
    assert select(scores, 2, groups=groups, quota=1, joined=2).tolist() == [0, 2, 4]


# --- centring ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", Score)
def test_centred_cosines_are_those_of_centred_rows(score):
    rng = np.random.default_rng(7)
    means = {zoom: (0.3 * rng.normal(size=8)).astype(np.float32) for zoom in (1, 3)}
    fits = calibration((1, 3), means=means)
    query = random_photos(1, seed=9)
    seen = {}

    def note(scored):
        seen[scored.zoom] = (scored.xy, scored.cosines)

    search(query, k=2, levels=(1, 3), fits=fits, score=score, centred=True, observe=note)
    for zoom, (xy, cosines) in seen.items():
        rows = np.concatenate([hashed_encode("", picture(Tile(zoom, *place))) for place in xy.tolist()])
        rows = rows.astype(np.float64) - means[zoom]
        direct = rows @ query[0].astype(np.float64) / np.linalg.norm(rows, axis=1)
        np.testing.assert_allclose(cosines, direct, atol=2e-6)
    assert set(seen) == {1, 3}


def test_a_tile_that_equals_the_mean_scores_finitely():
    row = hashed_encode("", picture(Tile(1, 0, 0)))[0]
    fits = calibration((1,), means={1: row})
    (levels,) = search(random_photos(1), levels=(1,), fits=fits, score=Score.paper, centred=True)
    assert all(math.isfinite(scored.score) for scored in levels[0].beam)


def test_centring_needs_means():
    with pytest.raises(GeoEngineError, match="`geoengine calibrate` computes them"):
        search(random_photos(1), centred=True)


# --- choices ----------------------------------------------------------------------------------------------


def test_objectives_read_and_written():
    assert Objective.parse("25km") == Objective(25.0)
    assert [str(Objective.parse(text)) for text in ("best-tile", "25km", "0.5 km")] == [
        "best-tile",
        "25km",
        "0.5km",
    ]
    for bad in ("", "km", "25", "-1km", "0km", "nan km", "25miles"):
        with pytest.raises(GeoEngineError, match=r"objective"):
            Objective.parse(bad)


def test_a_quota_below_one_is_refused():
    with pytest.raises(GeoEngineError, match="quota must be at least 1, got 0"):
        SearchConfig(quota=0)


def test_the_path_score_needs_a_calibration():
    config = SearchConfig(score=Score.path)
    with pytest.raises(GeoEngineError, match="needs a calibration"):
        search_module.search(random_photos(1), AddressTiles(), HostEncoders(hashed_encode), config)


# --- levels in an index -----------------------------------------------------------------------------------


class Indexed:
    """What a search knows of tiles: all tiles of some zooms, but for some that are missing."""

    width = 8

    def __init__(self, zooms, missing=lambda tile: False):
        self.tables = {}
        for zoom in zooms:
            xy = all_xy(zoom)
            xy = xy[[not missing(Tile(zoom, *place)) for place in xy.tolist()]]
            order = np.argsort(tile_ids(xy))
            rows = np.concatenate([hashed_encode("", picture(Tile(zoom, *p))) for p in xy[order].tolist()])
            lacking = 4**zoom - len(xy)
            self.tables[zoom] = Table(tile_ids(xy)[order], rows.astype(np.float16), None, lacking)

    def refresh(self):
        pass

    def table(self, zoom, area):
        return self.tables.get(zoom)

    def look_up(self, zoom, ids):
        nothing = np.zeros(len(ids), dtype=bool)
        return np.zeros((len(ids), self.width), np.float16), nothing, nothing

    def keep(self, zoom, ids, rows):
        pass


def whole_scores(known, query, fits, zooms):
    """The path scores of all tiles of each zoom, {zoom: {tile: score}}, one tile at a time."""
    scores = {}
    for depth, zoom in enumerate(zooms):
        table, fit = known.tables[zoom], fits.fits["plain"].level(zoom)
        tiles = [Tile(zoom, *place) for place in tiles_of_ids(table.ids).tolist()]
        unit = query / np.linalg.norm(query)
        cosines = [float(row @ unit / np.linalg.norm(row)) for row in table.matrix.astype(np.float64)]
        logits = [fit.weight * fit.scale * cosine for cosine in cosines]
        if depth:
            before = scores[zooms[depth - 1]]
            mean = sum(before.values()) / len(before)
            logits = [
                logit + fit.inherited * before.get(parent(tile, zooms[depth - 1]), mean)
                for tile, logit in zip(tiles, logits, strict=True)
            ]
        scores[zoom] = dict(zip(tiles, log_shares(logits), strict=True))
    return scores


@pytest.mark.parametrize("missing", [lambda tile: False, lambda tile: tile in (Tile(1, 1, 1), Tile(3, 2, 5))])
def test_all_tiles_of_an_index_are_scored_with_their_parents(missing):
    known, fits = Indexed((1, 3), missing), calibration((1, 3, 5))
    queries = random_photos(3, seed=6)
    found = search(queries, k=4, levels=(1, 3, 5), fits=fits, known=known)
    for levels, query in zip(found, queries, strict=True):
        expected = whole_scores(known, query.astype(np.float64), fits, (1, 3))
        for level, zoom in zip(levels, (1, 3), strict=False):
            best = sorted(expected[zoom].items(), key=lambda pair: -pair[1])[:4]
            assert level.exhaustive
            assert [scored.tile for scored in level.beam] == [tile for tile, _ in best]
            assert [s.score for s in level.beam] == pytest.approx([score for _, score in best], abs=2e-4)
        # Ancestors of the answers that are not in the beams have their path scores too.
        for level in levels[:2]:
            for scored in level.ancestors:
                assert scored.score == pytest.approx(expected[level.zoom][scored.tile], abs=2e-4)
        assert [level.zoom for level in levels] == [1, 3, 5]
        assert {parent(s.tile, 3) for s in levels[2].beam} <= {s.tile for s in levels[1].beam}


def test_a_joined_tile_and_a_quota_in_an_index():
    known, point = Indexed((1, 3)), LngLat(100.0, -40.0)
    (levels,) = search(
        random_photos(1, seed=6),
        k=4,
        levels=(1, 3, 5),
        known=known,
        fits=calibration((1, 3, 5)),
        joined=[point],
        quota=2,
    )
    for level in levels:
        assert tile_at(point, level.zoom) in {scored.tile for scored in level.beam}
    parents = [parent(s.tile, 1) for s in levels[1].beam if s.tile != tile_at(point, 3)]
    assert max(map(parents.count, parents)) <= 2
