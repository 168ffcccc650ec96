"""Locating photos with GeoCLIP: its gallery, what it says of tiles, and the methods that ask it."""

import io
import json
import shutil
import sys
import threading

import jsonschema
import numpy as np
import pytest
import torch
from command_line import refused, run
from made_geoclip import use_small_geoclip
from PIL import Image
from test_engine import NoiseTiles
from tiny_bundle import write_tiny_bundle

from geoengine.engine.bundle import GEOCLIP, EngineBundle
from geoengine.engine.engine import GeoEngine
from geoengine.engine.errors import BundleError, GeoEngineError, SourceError
from geoengine.engine.geoclip import GeoClip
from geoengine.engine.geoclip.evidence import FLOOR
from geoengine.engine.geoclip.gallery import Gallery
from geoengine.engine.photos import Photo
from geoengine.engine.preprocess import to_square
from geoengine.engine.regions import RegionError, parse_region
from geoengine.engine.render.geojson import feature_collection
from geoengine.engine.render.html_map import html_map
from geoengine.engine.render.json_lines import json_object, schema_text
from geoengine.engine.render.table import table_text
from geoengine.engine.scoring.kinds import Method, Score
from geoengine.engine.search import SearchConfig
from geoengine.engine.tiles import LngLat, all_xy, children, great_circle_km, parent, tile_at
from geoengine.export.config import BuildConfig
from geoengine.export.geoclip import build_geoclip

torch.set_num_threads(1)
TREE = SearchConfig(k=3, levels=(2, 4), top=4)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder with a small GeoCLIP and nothing else."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        use_small_geoclip(patch, folder)
        build_geoclip(BuildConfig(out=folder / "engines", precisions=("fp32",)), "none")
    return folder / "engines"


@pytest.fixture(scope="module")
def both(alone, tmp_path_factory):
    """A tiny bundle of Earth, whose encoders take pictures of another size, with that GeoCLIP in it."""
    folder = write_tiny_bundle(tmp_path_factory.mktemp("both") / "engines", levels=TREE.levels, world="earth")
    (folder / GEOCLIP).symlink_to(alone / GEOCLIP)
    return folder


@pytest.fixture
def geoclip(alone):
    opened = GeoClip.open(EngineBundle.open(alone), backend="onnxruntime-cpu", threads=1)
    yield opened
    opened.close()


@pytest.fixture
def engine(both):
    with GeoEngine.open(both, NoiseTiles("earth"), backend="onnxruntime-cpu", threads=1) as opened:
        yield opened


def photos(count=2, seed=0):
    rng = np.random.default_rng(seed)
    return [Photo(f"{i}.jpg", rng.integers(0, 256, (30, 40 + i, 3), np.uint8)) for i in range(count)]


def queries(count=2, seed=0):
    rows = np.random.default_rng(seed).normal(size=(count, 16)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_the_best_points_are_those_of_an_exhaustive_comparison(geoclip):
    asked = queries(3)
    table = geoclip.gallery.embeddings.astype(np.float64)
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    for query, matches in zip(asked, geoclip.best(asked, 5), strict=True):
        cosines = table @ query
        best = np.argsort(-cosines)[:5]
        np.testing.assert_array_equal(matches.points, geoclip.gallery.points[best])
        np.testing.assert_allclose(matches.scores, cosines[best], atol=1e-6)
        shares = np.exp(geoclip.logit_scale * cosines)
        np.testing.assert_allclose(matches.shares, shares[best] / shares.sum(), rtol=1e-4)


def test_a_photo_is_answered_as_if_it_were_alone(geoclip):
    embeddings = geoclip.embed(photos(3))
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
    together = geoclip.best(embeddings, 4)
    for i, one in enumerate(together):
        np.testing.assert_array_equal(one.shares, geoclip.best(embeddings[i : i + 1], 4)[0].shares)


def test_the_radius_holds_its_share_of_the_gallery_and_reaches_the_next_point(geoclip):
    query = queries(1)
    [matches] = geoclip.best(query, 1)
    _, [shares] = geoclip.gallery.shares(query, geoclip.logit_scale)
    first = LngLat(*matches.points[0])
    distances = np.array([great_circle_km(first, LngLat(*point)) for point in geoclip.gallery.points])
    for share in (0.05, 2 / 3, 0.95):
        radius = matches.radius_km(share)
        assert shares[distances <= radius + 1e-9].sum() >= share - 1e-9
        assert shares[distances < radius - 1e-6].sum() < share or radius == pytest.approx(
            np.sort(distances)[1]
        )
    assert matches.radius_km(1e-9) == pytest.approx(np.sort(distances)[1])


def test_points_near_a_better_one_are_left_out_and_their_shares_kept(geoclip):
    query = queries(1)
    [every] = geoclip.best(query, len(geoclip.gallery.points))
    [apart] = geoclip.best(query, 400, apart_km=2000.0)
    kept = [LngLat(*point) for point in apart.points]
    assert tuple(kept[0]) == tuple(every.points[0])
    assert len(kept) < 100
    assert min(great_circle_km(a, b) for i, a in enumerate(kept) for b in kept[:i]) >= 2000
    assert apart.shares.sum() == pytest.approx(1)
    owner = [
        next(i for i, place in enumerate(kept) if great_circle_km(place, LngLat(*point)) < 2000)
        for point in every.points
    ]
    np.testing.assert_allclose(apart.shares, np.bincount(owner, every.shares), rtol=1e-9)
    assert (np.diff(apart.scores) <= 0).all()


def test_only_points_of_the_region_are_compared(geoclip):
    region = parse_region("0,0,60,60")
    [matches] = geoclip.best(queries(1), 500, within=region)
    inside = ((geoclip.gallery.points >= 0) & (geoclip.gallery.points <= 60)).all(axis=1)
    assert sorted(map(tuple, matches.points)) == sorted(map(tuple, geoclip.gallery.points[inside]))
    assert matches.shares.sum() == pytest.approx(1)
    with pytest.raises(RegionError, match="GeoCLIP has no point within"):
        geoclip.best(queries(1), 5, within=parse_region("0,80,1,81"))


def test_tiles_get_the_share_of_the_gallery_inside_them(geoclip):
    asked = queries(2)
    evidence = geoclip.evidence(asked)
    _, shares = geoclip.gallery.shares(asked, geoclip.logit_scale)
    for zoom in (2, 4, 8):
        xy = (
            all_xy(zoom)
            if zoom < 8
            else np.array([tile_at(LngLat(*p), 8)[1:] for p in geoclip.gallery.points])
        )
        found = np.exp(evidence.log_probability(np.array([0, 1]), zoom, xy).astype(np.float64))
        tiles = [tile_at(LngLat(*point), zoom)[1:] for point in geoclip.gallery.points]
        for row in range(2):
            mass = dict.fromkeys(map(tuple, xy.tolist()), 0.0)
            for tile, share in zip(tiles, shares[row], strict=True):
                mass[tile] += share
            expected = [(1 - FLOOR) * mass[tile] + FLOOR / 4**zoom for tile in map(tuple, xy.tolist())]
            np.testing.assert_allclose(found[row], expected, rtol=1e-5, atol=1e-9)
        if zoom < 8:
            np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)


def test_a_tile_has_what_its_children_have(geoclip):
    evidence = geoclip.evidence(queries(1))

    def probability(tiles):
        xy = np.array([tile[1:] for tile in tiles])
        return np.exp(evidence.log_probability(np.array([0]), tiles[0].z, xy)[0].astype(np.float64))

    tile = tile_at(LngLat(*geoclip.gallery.points[7]), 4)
    assert probability(children(tile)).sum() == pytest.approx(probability([tile])[0], rel=1e-4)


def test_finer_tiles_are_scored_at_their_centres_and_the_finest_not_at_all(geoclip):
    asked = queries(2)
    evidence = geoclip.evidence(asked)
    tiles = [tile_at(LngLat(lng, 50.0), 12) for lng in (-120.0, 3.0, 100.0)]
    xy = np.array([tile[1:] for tile in tiles])
    at_centres = geoclip.locations.embed(np.array([[-120.0, 50.0], [3.0, 50.0], [100.0, 50.0]]))
    found = evidence.log_probability(np.array([1]), 12, xy)
    # The tiles' centres are up to 3 km from the points.
    np.testing.assert_allclose(found, geoclip.logit_scale * asked[1:] @ at_centres.T, atol=3)
    assert found.std() > 0.1
    assert not evidence.log_probability(np.array([0, 1]), 14, xy).any()
    assert [evidence.weight(zoom) for zoom in (4, 8, 10, 12, 14)] == [1, 1, 0.5, 0.5, 0]
    assert evidence.log_probability(np.array([0]), 10, np.empty((0, 2), np.int64)).shape == (1, 0)


@pytest.mark.parametrize("on_disk", [False, True])
def test_centres_are_computed_once_and_kept(alone, tmp_path, monkeypatch, on_disk):
    """In any order and company, from many threads, and with a folder in the next process too."""
    cache = tmp_path if on_disk else None
    opened = GeoClip.open(EngineBundle.open(alone), backend="onnxruntime-cpu", cache=cache, threads=1)
    asked = []
    plain = opened.locations.embed
    monkeypatch.setattr(opened.locations, "embed", lambda points: asked.append(len(points)) or plain(points))
    xy = all_xy(4)
    centres = opened._centres
    first = centres.embed(4, xy[:40])
    with_repeats = centres.embed(4, xy[[50, 3, 50, 39, 60]])
    assert asked == [40, 2]
    np.testing.assert_array_equal(with_repeats[[1, 3]], first[[3, 39]])
    np.testing.assert_array_equal(with_repeats[0], with_repeats[2])
    results = {}
    threads = [
        threading.Thread(target=lambda i=i: results.update({i: centres.embed(4, xy[i::3])})) for i in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(asked) == len(xy)
    np.testing.assert_array_equal(results[0][1], first[3])
    if cache is None:
        return
    again = GeoClip.open(EngineBundle.open(alone), backend="onnxruntime-cpu", cache=cache, threads=1)
    monkeypatch.setattr(again.locations, "embed", lambda points: pytest.fail("computed again"))
    np.testing.assert_array_equal(again._centres.embed(4, xy[:40]), first)


def test_geoclip_alone_needs_no_tiles(alone):
    with GeoEngine.open(alone, backend="onnxruntime-cpu", threads=1) as engine:
        found = engine.locate(photos(2), config=SearchConfig(top=3), method="geoclip")
        best = engine.geoclip().best(engine.geoclip().embed(photos(2)), 3, apart_km=25)
        for location, matches in zip(found, best, strict=True):
            assert location.levels == ()
            assert [tuple(c.point) for c in location.candidates] == list(map(tuple, matches.points))
            assert all(c.tile == tile_at(c.point, 16) == c.path[0].tile for c in location.candidates)
            assert location.radius_km == matches.radius_km(2 / 3)
            assert location.radius_for(0.5) == matches.radius_km(0.5)
            assert location.model.startswith("GeoCLIP")
        with pytest.raises(GeoEngineError, match="a method is tiles, geoclip, joined, fused, got 'geo'"):
            engine.locate(photos(1), method="geo")
        with pytest.raises(BundleError, match="no map encoders: locate with --method geoclip"):
            engine.locate(photos(1))


def test_a_search_needs_tiles_even_with_geoclip(both):
    with GeoEngine.open(both, backend="onnxruntime-cpu", threads=1) as engine:
        assert (
            engine.locate(photos(1), config=SearchConfig(method=Method.geoclip, levels=(2,)))[0].levels == ()
        )
        for method in (Method.tiles, Method.joined, Method.fused):
            with pytest.raises(SourceError, match="no tile source given"):
                engine.locate(photos(1), config=SearchConfig(method=method, levels=(2, 4)))


def test_each_encoder_sees_the_whole_photo_at_its_own_size(engine):
    """The tiny bundle takes 8 pixels and GeoCLIP 16: what is kept of a waiting photo serves both."""
    [photo] = photos(1)
    kept = engine.prepare(photo, method=Method.joined)
    np.testing.assert_array_equal(kept.pixels, to_square(photo.pixels, 8))
    np.testing.assert_array_equal(engine.geoclip().square(kept), to_square(photo.pixels, 16))
    assert engine.prepare(kept, method=Method.joined) is kept
    config = SearchConfig(k=3, levels=(2, 4), method=Method.joined)
    assert (
        engine.locate([kept], config=config)[0].candidates
        == engine.locate([photo], config=config)[0].candidates
    )


def test_geoclips_tile_joins_every_beam(engine):
    config = SearchConfig(k=1, levels=(2, 4), top=4, method=Method.joined)
    found = engine.locate(photos(6), config=config)
    best = engine.geoclip().best(engine.geoclip().embed(photos(6)), 1)
    plain = engine.locate(photos(6), config=SearchConfig(k=1, levels=(2, 4), top=4))
    joined = 0
    for location, matches, alone in zip(found, best, plain, strict=True):
        tile = tile_at(LngLat(*matches.points[0]), 4)
        for level, before in zip(location.levels, alone.levels, strict=True):
            kept = {scored.tile for scored in level.beam}
            assert parent(tile, level.zoom) in kept
            assert len(kept) <= 2
            joined += before.beam[0].tile in kept and len(kept) == 2
        assert location.scoring.method == "joined"
        assert " with GeoCLIP" in location.model
    assert joined


def test_fusion_adds_what_geoclip_says_to_the_path_score(engine):
    config = SearchConfig(k=256, levels=(2, 4), top=1, score=Score.path)
    [tiles] = engine.locate(photos(1), config=config)
    [fused] = engine.locate(photos(1), config=SearchConfig(k=256, levels=(2, 4), top=1, method=Method.fused))
    assert (fused.scoring.method, fused.scoring.score) == ("fused", "path")
    evidence = engine.geoclip().evidence(engine.geoclip().embed(photos(1)))
    before = {scored.tile: scored.score for scored in tiles.levels[0].beam}
    xy = all_xy(2)
    said = evidence.log_probability(np.array([0]), 2, xy)[0].astype(np.float64)
    said -= np.log(np.exp(said).sum())
    place = {tuple(row): number for number, row in enumerate(xy.tolist())}
    added = [scored.score - before[scored.tile] for scored in fused.levels[0].beam]
    expected = [said[place[scored.tile[1:]]] for scored in fused.levels[0].beam]
    assert np.ptp(expected) > 1
    # Up to a constant, for probabilities sum to 1.
    np.testing.assert_allclose(np.subtract(added, added[0]), np.subtract(expected, expected[0]), atol=1e-3)


def test_results_of_the_gallery_suit_every_writer(engine):
    [location] = engine.locate(photos(1), config=SearchConfig(levels=(2, 4), method=Method.geoclip))
    record = json_object(location)
    jsonschema.validate(json.loads(json.dumps(record)), json.loads(schema_text()))
    assert (record["levels"], record["tiles"]) == ([], "")
    assert record["scoring"]["method"] == "geoclip"
    kinds = {feature["properties"]["kind"] for feature in feature_collection([location])["features"]}
    assert kinds == {"candidate"}
    text = table_text([location], sys.stdout)
    assert "no map tiles" in text
    assert "k=" not in text
    assert '"levels":[]' in html_map([location])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": Score.path}, "a score is for"),
        ({"quota": 2, "centred": True}, "a quota, centring is for"),
    ],
)
def test_what_is_only_for_tiles_is_refused(options, message):
    with pytest.raises(GeoEngineError, match=message):
        SearchConfig(method=Method.geoclip, **options)


def test_fusion_is_of_the_path_score():
    with pytest.raises(GeoEngineError, match="leave out the score paper"):
        SearchConfig(method=Method.fused, score=Score.paper)


def test_a_bundle_without_geoclip_says_how_to_add_it(tmp_path):
    folder = write_tiny_bundle(tmp_path / "engines", levels=(2, 4), world="earth")
    with (
        GeoEngine.open(folder, NoiseTiles("earth"), backend="onnxruntime-cpu") as engine,
        pytest.raises(BundleError, match="has no GeoCLIP: `geoengine build-engines --geoclip --out"),
    ):
        engine.locate(photos(1), config=SearchConfig(levels=(2, 4), method=Method.fused))
    with pytest.raises(SourceError, match="no tile source given"):
        GeoEngine.open(folder)


def test_a_gallery_out_of_order_is_refused(alone, tmp_path):
    shutil.copytree(alone, tmp_path / "engines")
    bundle = EngineBundle.open(tmp_path / "engines")
    points = bundle.path / bundle.manifest.geoclip.points
    np.save(points, np.load(points)[::-1])
    with pytest.raises(BundleError, match="not in order"):
        Gallery.open(bundle)
    np.save(points, np.load(points)[:-1])
    with pytest.raises(BundleError, match="do not fit"):
        Gallery.open(bundle)


def test_the_weights_of_fusion_are_fitted(both, tmp_path, monkeypatch):
    """By `geoengine calibrate`, together with the levels', wherever the bundle has GeoCLIP."""
    monkeypatch.setenv("GEOENGINE_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    tiles, pictures = tmp_path / "tiles", tmp_path / "photos"
    for zoom in TREE.levels:
        for x, y in all_xy(zoom).tolist():
            file = tiles / str(zoom) / str(x) / f"{y}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(file)
    pictures.mkdir()
    rows = ["path,lat,lng"]
    for i in range(50):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(pictures / f"{i}.png")
        rows.append(f"{i}.png,{rng.uniform(-60, 70):.4f},{rng.uniform(-180, 180):.4f}")
    (pictures / "places.csv").write_text("\n".join(rows) + "\n")
    bundle = tmp_path / "engines"
    shutil.copytree(both, bundle, symlinks=True)
    common = ("--bundle", bundle, "--tiles", tiles, "--backend", "onnxruntime-cpu", "--threads", "1")
    done = run("calibrate", pictures / "places.csv", "--k", "2", *common)
    assert done.exit_code == 0, done.stderr
    assert "plain+geoclip searches" in done.stdout
    fit = EngineBundle.open(bundle).calibration.fit(centred=False, evidence=["geoclip"])
    assert all(level.evidence["geoclip"] >= 0 for level in fit.levels.values())
    done = run("locate", pictures / "1.png", "--method", "fused", "--levels", "2,4", "--json", *common)
    assert json.loads(done.stdout)["scoring"]["calibrated"]


@pytest.mark.parametrize("kind", ["alone", "both"])
def test_a_service_without_tiles_asks_geoclip(kind, request):
    """Whether it has map encoders or not; what it offers says so."""
    import httpx
    from served import listening

    from geoengine.service.app import create_app
    from geoengine.service.settings import Settings

    folder = request.getfixturevalue(kind)
    file = io.BytesIO()
    Image.fromarray(photos(1)[0].pixels).save(file, "PNG")
    app = create_app(Settings(bundle=str(folder), backend="onnxruntime-cpu", threads=1))
    with listening(app) as url, httpx.Client(base_url=url, timeout=20) as client:
        about = client.get("/v1/about").json()
        assert (about["choices"]["method"], about["defaults"]["method"]) == (["geoclip"], "geoclip")
        assert about["tiles"]["reason"] == "there are no map tiles here"
        sent = {"content": file.getvalue(), "headers": {"Content-Type": "image/png"}}
        found = client.post("/v1/locate", **sent)
        assert found.status_code == 200, found.text
        assert found.json()["scoring"]["method"] == "geoclip"
        refusal = client.post("/v1/locate?method=fused", **sent)
        assert refusal.status_code == 422
        assert "there are geoclip" in refusal.text
        assert client.get("/v1/tiles/2/1/1").status_code == 404


def test_the_command(alone, both, tmp_path, monkeypatch):
    """GeoCLIP alone, without tiles; and refusals that say what to do."""
    monkeypatch.setenv("GEOENGINE_CACHE", str(tmp_path / "cache"))
    photo = tmp_path / "photo.png"
    Image.fromarray(photos(1)[0].pixels).save(photo)
    done = run(
        "locate", photo, "--bundle", alone, "--method", "geoclip", "--json", "--backend", "onnxruntime-cpu"
    )
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["scoring"]["method"] == "geoclip"
    page = tmp_path / "map.html"
    done = run("locate", photo, "--bundle", both, "--method", "geoclip", "--map", page, "--top", "2")
    assert done.exit_code == 0, done.stderr
    assert page.exists()
    refused(run("locate", photo, "--bundle", alone), "no map encoders: locate with --method geoclip")
    refused(run("locate", photo, "--bundle", both, "--method", "joined"), "give the map tiles to search")
    refused(
        run("locate", photo, "--demo", "--method", "fused"),
        "GeoCLIP knows Earth",
    )


def test_evaluation_of_every_method(alone, both, tmp_path, monkeypatch):
    """Table 3 has GeoCLIP alone, joined and fused; what was done for one method is not done again."""
    monkeypatch.setenv("GEOENGINE_CACHE", "off")
    rng = np.random.default_rng(3)
    for zoom in TREE.levels:
        for tile in all_xy(zoom).tolist():
            file = tmp_path / "tiles" / str(zoom) / str(tile[0]) / f"{tile[1]}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(file)
    lines = ["path,lat,lon"]
    for number, photo in enumerate(photos(3)):
        Image.fromarray(photo.pixels).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{10 * number},{20 * number}")
    (tmp_path / "set.csv").write_text("\n".join(lines) + "\n")
    order = ["evaluate", tmp_path / "set.csv", "--plots", "none", "--json"]

    done = run(*order, "--bundle", alone, "--method", "geoclip")
    assert done.exit_code == 0, done.stderr
    [figures] = json.loads(done.stdout)["results"]
    assert (figures["method"], figures["score"], figures["k"]) == ("geoclip", "gallery", 0)
    assert figures["recall"] == {} and figures["coverage"] is None

    many = [*order, "--bundle", both, "--tiles", tmp_path / "tiles", "--out", tmp_path / "out", "--k", "2,3"]
    done = run(*many, "--method", "tiles", "--score", "paper")
    assert done.exit_code == 0, done.stderr
    before = (tmp_path / "out" / "photos.csv").read_text()
    methods = [word for method in Method for word in ("--method", method.value)]
    done = run(*many, *methods, "--score", "paper", "--score", "path")
    assert done.exit_code == 0, done.stderr
    settings = [(row["method"], row["score"], row["k"]) for row in json.loads(done.stdout)["results"]]
    assert settings == [
        *(("tiles", score, k) for score in ("paper", "path") for k in (2, 3)),
        ("geoclip", "gallery", 0),
        *(("joined", score, k) for score in ("paper", "path") for k in (2, 3)),
        *(("fused", "path", k) for k in (2, 3)),
    ]
    assert (tmp_path / "out" / "photos.csv").read_text().startswith(before)
    tables = (tmp_path / "out" / "tables.md").read_text()
    assert "| geoengine, GeoCLIP alone | measured |" in tables
    assert "| geoengine, fused, path score, k=3 | measured |" in tables
