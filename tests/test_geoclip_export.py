"""Making GeoCLIP's bundle: what is read of the package, the location encoder, and the gates of a build."""

import importlib
import json
import shutil
import sys
import types
import warnings
from importlib import metadata

import numpy as np
import pytest
import torch
from command_line import refused, run
from made_builds import save_set
from made_geoclip import POINTS, use_small_geoclip, write_package
from tiny_bundle import write_tiny_bundle

from geoengine.engine.bundle import EngineBundle
from geoengine.engine.errors import BundleError, ExportError, MissingExtraError
from geoengine.engine.geoclip import GeoClip
from geoengine.engine.geoclip.locations import LocationEncoder
from geoengine.export import geoclip, geoclip_package
from geoengine.export.build import build_engines
from geoengine.export.check import verify_bundle
from geoengine.export.config import BuildConfig
from geoengine.export.geoclip_check import check_points
from geoengine.export.geoclip_graph import reference_locations, write_location_encoder
from geoengine.export.geoclip_package import read_package
from geoengine.export.staging import check_target
from geoengine.export.work import file_entry

torch.set_num_threads(1)


def cosines(one, other):
    return (one.astype(np.float64) * other).sum(axis=1)


def encoder_of(package, folder):
    """The location encoder's graph in ONNX Runtime."""
    import onnxruntime

    write_location_encoder(package, folder / "location.fp32.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        folder / "location.fp32.onnx", options, providers=["CPUExecutionProvider"]
    )
    return LocationEncoder(lambda points: session.run(None, {"points": points})[0], package.embed_dim)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The published package's weights, and our graph of its location encoder."""
    try:
        metadata.distribution("geoclip")
    except metadata.PackageNotFoundError:
        pytest.skip("needs the published weights: pip install 'geoengine[geoclip]'")
    package = read_package()
    return package, encoder_of(package, tmp_path_factory.mktemp("location"))


def published_embeddings(points):
    """What the package's own location encoder says, of its modules that need neither network nor CLIP."""
    folder = metadata.distribution("geoclip").locate_file("geoclip")
    for name, path in (("geoclip", folder), ("geoclip.model", folder / "model")):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(path)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about torch.jit
            encoder = importlib.import_module("geoclip.model.location_encoder").LocationEncoder()
            with torch.inference_mode():
                found = encoder.eval()(torch.from_numpy(points[:, ::-1].copy()).float())
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "geoclip"]:
            del sys.modules[name]
    return torch.nn.functional.normalize(found, dim=1).numpy()


def test_the_location_encoder_agrees_with_the_packages_own(real):
    package, encoder = real
    points = np.concatenate([check_points(), package.gallery[::500]])
    expected = published_embeddings(points)
    assert cosines(encoder.embed_plain(points), expected).min() >= 0.9999
    assert cosines(reference_locations(package, points), expected).min() >= 0.9999


def test_the_seam_at_the_antimeridian_is_mended(real):
    """Two points 2 km apart are as alike across it as elsewhere, where the plain encoder sees strangers."""
    _, encoder = real
    for latitude in (-17.0, 52.0, 66.0):
        degrees = 1 / 111.195 / np.cos(np.radians(latitude))
        across = np.array([[180 - degrees, latitude], [-180 + degrees, latitude]])
        plain, mended = (
            cosines(*np.split(embed(across), 2)) for embed in (encoder.embed_plain, encoder.embed)
        )
        elsewhere = encoder.embed(across + np.array([[-5.0, 0.0], [355.0, 0.0]]))
        alike = cosines(*np.split(elsewhere, 2))[0]
        assert plain[0] < 0.7
        assert mended[0] > 0.95
        assert mended[0] == pytest.approx(alike, abs=0.03)


def test_the_mending_is_seamless(real):
    """A point at 180 is the one at -180, and nothing jumps where the mending begins."""
    _, encoder = real
    ends = encoder.embed(np.array([[180.0, 10.0], [-180.0, 10.0], [540.0, 10.0]]))
    np.testing.assert_array_equal(ends[0], ends[1])
    np.testing.assert_array_equal(ends[0], ends[2])
    begins = 180 - 100 / 111.19508
    edge = encoder.embed(np.array([[begins - 1e-4, 0.0], [begins + 1e-4, 0.0]]))
    assert cosines(edge[:1], edge[1:])[0] > 0.999


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A small GeoCLIP in a folder without a bundle: the folder, the package, and the report."""
    folder = tmp_path_factory.mktemp("geoclip")
    with pytest.MonkeyPatch.context() as patch:
        package = use_small_geoclip(patch, folder)
        config = BuildConfig(out=folder / "engines", precisions=("fp32", "fp16", "int8"))
        report = geoclip.build_geoclip(config, "none")
    return folder, package, report


def test_what_a_build_leaves(built):
    folder, package, report = built
    bundle = EngineBundle.open(folder / "engines")
    assert bundle.path == folder / "engines" / "geoclip"
    assert (bundle.levels, bundle.world, bundle.embed_dim) == ((), "earth", package.embed_dim)
    files = bundle.manifest.geoclip
    assert files.logit_scale == pytest.approx(np.exp(3.0))
    assert {files.location, files.points, files.embeddings} < set(bundle.manifest.files)
    assert bundle.manifest.parity["location"]["min_cosine"] >= 0.9999
    assert [row.artifact for row in report.rows if row.artifact.startswith("gallery")]
    assert report.bytes == sum(file.stat().st_size for file in bundle.path.rglob("*") if file.is_file())
    assert [entry.name for entry in (folder / "engines").iterdir()] == ["geoclip"]


def test_the_gallery_is_the_packages_points_in_order_and_their_embeddings(built):
    folder, package, _ = built
    gallery = GeoClip.open(EngineBundle.open(folder / "engines")).gallery
    assert len(gallery.points) == POINTS
    assert set(map(tuple, gallery.points)) == set(map(tuple, package.gallery))
    assert (np.diff(gallery.ids.astype(np.float64)) >= 0).all()
    far = np.abs(gallery.points[:, 0]) < 178
    expected = reference_locations(package, gallery.points[far])
    assert cosines(gallery.embeddings[far].astype(np.float32), expected).min() > 0.999


def test_a_build_is_verified_and_damage_is_found(built, tmp_path):
    folder, _, report = built
    again = verify_bundle(folder / "engines")
    assert [row.artifact for row in again.rows] == [row.artifact for row in report.rows]
    gallery = folder / "engines" / "geoclip" / "gallery.embeddings.npy"
    whole = gallery.read_bytes()
    try:
        gallery.write_bytes(whole[:-2] + b"\0\0")
        with pytest.raises(
            BundleError, match=r"gallery\.embeddings\.npy is damaged.*build-engines --geoclip"
        ):
            verify_bundle(folder / "engines")
        manifest_file = gallery.with_name("manifest.json")
        manifest = manifest_file.read_text()
        other = np.load(gallery)[::-1]
        np.save(gallery, other)  # the right size, and signed with its own checksum
        entry = json.loads(manifest)
        entry["files"]["gallery.embeddings.npy"] = file_entry(gallery)
        manifest_file.write_text(json.dumps(entry))
        with pytest.raises(ExportError, match="the gallery does not agree with the location encoder"):
            verify_bundle(folder / "engines")
    finally:
        gallery.write_bytes(whole)
        manifest_file.write_text(manifest)


def test_an_interrupted_build_goes_on(built, tmp_path, monkeypatch):
    use_small_geoclip(monkeypatch, tmp_path)
    config = BuildConfig(out=tmp_path / "engines", precisions=("fp32",))

    def until_gallery(done, total, following):
        if following.startswith("embed the gallery"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        geoclip.build_geoclip(config, "none", until_gallery)
    with pytest.raises(BundleError):
        EngineBundle.open(tmp_path / "engines")
    steps = []
    geoclip.build_geoclip(config, "none", lambda done, total, following: steps.append(following))
    assert any(step.startswith("embed the gallery") for step in steps)
    assert not any("export" in step for step in steps)
    assert EngineBundle.open(tmp_path / "engines").manifest.geoclip is not None


def test_a_bundle_that_is_built_again_keeps_geoclip(built, tmp_path):
    """And GeoCLIP does not stand in the way of a first bundle beside it."""
    out = tmp_path / "engines"
    shutil.copytree(built[0] / "engines", out)
    check_target(out)
    config = BuildConfig(encoder_folder=save_set(tmp_path / "set"), out=out, precisions=("fp32",))
    build_engines(config)
    bundle = EngineBundle.open(out)
    assert bundle.path == out
    assert bundle.geoclip().path == out / "geoclip"
    verified = {row.artifact for row in verify_bundle(out).rows}
    assert {"onnx/trunk.16.fp32.onnx", "geoclip/onnx/location.fp32.onnx"} < verified
    (out / "other").touch()
    (out / "manifest.json").unlink()
    with pytest.raises(ExportError, match="is not an engine bundle"):
        check_target(out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, g: (w / "location_encoder_weights.pth").unlink(), "location_encoder_weights.pth does not"),
        (
            lambda w, g: torch.save({"a": torch.ones(1)}, w / "image_encoder_mlp_weights.pth"),
            "lacks the tensor",
        ),
        (lambda w, g: torch.save(print, w / "logit_scale_weights.pth"), "does not hold a single number"),
        (lambda w, g: torch.save(torch.tensor(99.0), w / "logit_scale_weights.pth"), "above 0 and below"),
        (lambda w, g: g.write_text("LATITUDE,LON\n1,2\n"), "cannot be read: KeyError"),
        (lambda w, g: g.write_text("LAT,LON\n97,2\n"), "latitudes to 90"),
        (lambda w, g: g.write_text("LAT,LON\n"), "must hold longitudes"),
    ],
)
def test_a_package_of_another_form_is_refused(tmp_path, change, message):
    folder = write_package(tmp_path / "geoclip")
    change(folder / "model" / "weights", folder / "model" / "gps_gallery" / "coordinates_100K.csv")
    with pytest.raises(ExportError, match=message):
        read_package(folder)


def test_unknown_tensors_and_numbers_that_are_none_are_refused(tmp_path):
    folder = write_package(tmp_path / "geoclip")
    file = folder / "model" / "weights" / "location_encoder_weights.pth"
    state = torch.load(file, weights_only=True)
    torch.save(state | {"LocEnc7.capsule.0.b": torch.ones(1)}, file)
    with pytest.raises(ExportError, match=r"not known here, such as LocEnc7.*geoclip 1\.2 and 1\.3"):
        read_package(folder)
    state["LocEnc1.head.0.bias"][0] = np.nan
    torch.save(state, file)
    with pytest.raises(ExportError, match="not finite"):
        read_package(folder)


def test_repeated_points_of_the_gallery_are_taken_once(tmp_path):
    points = [(1.0, 2.0), (3.0, 4.0), (1.0, 2.0)]
    package = read_package(write_package(tmp_path / "geoclip", points=points))
    assert package.gallery.tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_clip_must_fit_the_image_head(tmp_path, monkeypatch):
    package = use_small_geoclip(monkeypatch, tmp_path, features=25)
    with pytest.raises(ExportError, match="gives 24 numbers, and GeoCLIP's image head takes 25"):
        geoclip.geoclip_encoders(package, "none")
    for other in (str(tmp_path / "lost.safetensors"), "dfn2b"):
        with pytest.raises(ExportError, match=r"takes openai .* a file of them, or none, and .* is none of"):
            geoclip.geoclip_encoders(package, other)


def test_the_package_must_be_there(monkeypatch):
    monkeypatch.setattr(geoclip_package, "PACKAGE", "no-such-package")
    with pytest.raises(MissingExtraError, match=r"pip install 'geoengine\[geoclip\]'"):
        read_package()


def test_a_planet_gets_no_geoclip(tmp_path):
    write_tiny_bundle(tmp_path / "planet")
    with pytest.raises(ExportError, match="GeoCLIP knows Earth"):
        geoclip.build_geoclip(BuildConfig(out=tmp_path / "planet"), "none")


def test_options_of_other_encoders_are_refused():
    refused(run("build-engines", "--geoclip", "--levels", "4,6"), "--geoclip exports nothing but GeoCLIP")
