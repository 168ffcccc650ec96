"""Accuracy figures: distances, shares and their intervals."""

import json
import math

import numpy as np
import pytest

from geoengine.bench.accuracy import THRESHOLDS_KM, accuracy, errors_km, wilson_share
from geoengine.engine.tiles import LngLat

KM_PER_DEGREE = 2 * math.pi * 6371.0088 / 360


def east(*distances_km):
    return [LngLat(km / KM_PER_DEGREE, 0.0) for km in distances_km]


def test_shares_within_each_distance():
    predicted = east(0.0, 0.999, 1.001, 24.0, 199.0, 749.0, 2499.0, 10_000.0)
    figures = accuracy(errors_km(predicted, [LngLat(0.0, 0.0)] * 8))
    assert [share.hits for share in figures.within_km.values()] == [2, 4, 5, 6, 7]
    assert tuple(figures.within_km) == THRESHOLDS_KM
    assert figures.median_km == pytest.approx((24 + 199) / 2)
    assert figures.photos == 8
    assert figures.within_km[25.0].value == 0.5


def test_a_distance_of_exactly_the_threshold_counts():
    (point,) = east(25.0)
    errors = errors_km([point], [LngLat(0, 0)])
    exact = float(errors[0])
    assert accuracy(errors, (exact,)).within_km[exact].hits == 1
    assert accuracy(errors, (exact * (1 - 1e-12),)).within_km[exact * (1 - 1e-12)].hits == 0


def test_distances_cross_the_antimeridian():
    [error] = errors_km([LngLat(179.99, 0)], [LngLat(-179.99, 0)])
    assert error == pytest.approx(0.02 * KM_PER_DEGREE)


@pytest.mark.parametrize("predicted", [[], east(1.0)])
def test_places_must_pair_up(predicted):
    with pytest.raises(ValueError, match="one true place for each prediction"):
        errors_km(predicted, east(1.0, 2.0)[: 2 * len(predicted) or 1])


def test_no_photos_have_no_accuracy():
    with pytest.raises(ValueError, match="no photos"):
        accuracy(np.empty(0))


def test_a_photo_without_an_answer_is_a_miss_everywhere():
    figures = accuracy(errors_km([*east(0.5, 100.0), None, None], [LngLat(0.0, 0.0)] * 4))
    assert (figures.photos, figures.located) == (4, 2)
    assert [share.hits for share in figures.within_km.values()] == [1, 1, 2, 2, 2]
    assert {share.total for share in figures.within_km.values()} == {4}
    assert figures.median_km == math.inf
    assert figures.mean_km == pytest.approx(50.25)
    written = json.loads(json.dumps(figures.to_dict(), allow_nan=False))
    assert written["median_km"] is None and written["mean_km"] == pytest.approx(50.25)


def test_only_photos_without_an_answer():
    figures = accuracy(errors_km([None, None], [LngLat(0.0, 0.0)] * 2))
    assert figures.located == figures.geoscore == 0
    assert figures.to_dict()["mean_km"] is None


def test_the_median_of_an_odd_number_is_the_middle_one():
    assert accuracy(errors_km([*east(3.0, 7.0), None], [LngLat(0, 0)] * 3)).median_km == pytest.approx(7.0)


def test_the_geoscore_is_that_of_the_game():
    # 5000 points for a hit, 5000/e at 1492.7 km
    assert accuracy(np.array([0.0])).geoscore == 5000
    assert accuracy(np.array([0.0, 1492.7, np.inf])).geoscore == pytest.approx(5000 * (1 + 1 / math.e) / 3)


def test_geodesic_distances_are_those_of_the_ellipsoid():
    # Flinders Peak to Buninyong, the worked example of Vincenty's formulae in the Geocentric Datum of
    # Australia manual: 54 972.271 m (on GRS80, which differs from WGS84 by less than a tenth of a millimetre)
    flinders = LngLat(144 + 25 / 60 + 29.52440 / 3600, -(37 + 57 / 60 + 3.72030 / 3600))
    buninyong = LngLat(143 + 55 / 60 + 35.38390 / 3600, -(37 + 39 / 60 + 10.15610 / 3600))
    [ellipsoid, nothing] = errors_km([buninyong, None], [flinders] * 2, geodesic=True)
    assert ellipsoid == pytest.approx(54.972271, abs=1e-6)
    assert nothing == math.inf
    assert errors_km([buninyong], [flinders])[0] != pytest.approx(ellipsoid, rel=1e-5)


@pytest.mark.parametrize(("hits", "total"), [(0, 10), (10, 10), (5, 10), (120, 200), (1, 1)])
def test_wilson_intervals_end_where_the_score_test_rejects(hits, total):
    share = wilson_share(hits, total)
    p = hits / total
    assert share.value == p
    assert 0 <= share.low <= p <= share.high <= 1
    for end in (share.low, share.high):
        assert abs(p - end) == pytest.approx(
            1.959964 * math.sqrt(end * (1 - end) / total), rel=1e-6, abs=1e-9
        )
    assert (share.low == 0, share.high == 1) == (hits == 0, hits == total)


def test_wilson_intervals_of_none_and_all_end_exactly():
    for total in range(1, 200):
        assert wilson_share(0, total).low == 0.0
        assert wilson_share(total, total).high == 1.0


@pytest.mark.parametrize(("hits", "total"), [(-1, 3), (4, 3), (0, 0)])
def test_impossible_shares(hits, total):
    with pytest.raises(ValueError, match="need 0 <= hits <= total"):
        wilson_share(hits, total)
