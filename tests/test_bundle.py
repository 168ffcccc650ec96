"""Opening engine bundles, whole and damaged."""

import copy
import hashlib
import json
import re
import shutil

import pytest

from geoengine.engine import bundle as bundle_module
from geoengine.engine.bundle import PLANET, EngineBundle, resolve_bundle
from geoengine.engine.errors import BundleError
from geoengine.engine.manifest import Variant, encoder_name

FILES = {
    "onnx/trunk.224.fp32.onnx": b"trunk",
    "onnx/trunk.256.fp32.onnx": b"trunk with a resize",
    "onnx/head_photo.fp32.onnx": b"photo head",
    "onnx/head_z04.fp32.onnx": b"z04 head",
    "onnx/head_z10.fp32.onnx": b"z10 head",
    "onnx/weights.bin": bytes(range(256)) * 10,
}
TRUNKS = {"224": "onnx/trunk.224.fp32.onnx", "256": "onnx/trunk.256.fp32.onnx"}
HEADS = {name: f"onnx/head_{name}.fp32.onnx" for name in ("photo", "z04", "z10")}
MANIFEST = {
    "schema": 2,
    "geoengine": "0.1.0",
    "model": "ViT-B-32-quickgelu",
    "pretrained": "openai",
    "world": "earth",
    "levels": [4, 10],
    "embed_dim": 512,
    "image_size": 224,
    "mean": [0.5, 0.4, 0.3],
    "std": [0.25, 0.25, 1],
    "resize_mode": "shortest",
    "logit_scale": {"z04": 100.0, "z10": 50},
    "graphs": {"fp32": {"trunks": TRUNKS, "heads": HEADS}},
    "preferred": {"onnxruntime-cuda": "fp16-attention"},
    "weights": "12ab",
    "files": {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in FILES.items()
    },
    "tools": {"torch": "2.8.0"},
    "parity": {"photo": {"min_cosine": 0.99999}},
}


def graphs(*, trunks=None, heads=HEADS):
    """The manifest's graphs with something changed."""
    return {"graphs": {"fp32": {"trunks": TRUNKS if trunks is None else trunks, "heads": heads}}}


@pytest.fixture
def folder(tmp_path):
    for name, data in FILES.items():
        file = tmp_path / "engines" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    write(tmp_path / "engines", MANIFEST)
    return tmp_path / "engines"


def write(folder, manifest):
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_whole_bundle(folder):
    bundle = EngineBundle.open(folder)
    assert (bundle.world, bundle.levels, bundle.embed_dim, bundle.image_size) == ("earth", (4, 10), 512, 224)
    assert bundle.variants == (Variant.fp32,)
    assert bundle.trunk_path(256, Variant.fp32) == folder / "onnx/trunk.256.fp32.onnx"
    assert bundle.trunk_path(512, Variant.fp32) is None
    assert bundle.head_path("z10", Variant.fp32) == folder / "onnx/head_z10.fp32.onnx"
    assert bundle.manifest.mean == (0.5, 0.4, 0.3)
    assert bundle.manifest.logit_scale == {"z04": 100.0, "z10": 50.0}
    assert EngineBundle.open(str(folder)).manifest == bundle.manifest


def test_fields_of_later_versions_are_ignored(folder):
    write(folder, MANIFEST | {"calibration": {"z04": 1.0}})
    assert EngineBundle.open(folder).levels == (4, 10)


def test_encoder_names():
    assert [encoder_name(z) for z in (4, 16)] == ["z04", "z16"]


def test_unknown_encoders_and_variants_name_those_there_are(folder):
    bundle = EngineBundle.open(folder)
    with pytest.raises(BundleError, match=r"has no encoder 'z06'; it has photo, z04, z10$"):
        bundle.head_path("z06", Variant.fp32)
    for ask, what in ((bundle.head_path, "z04"), (bundle.trunk_path, 224)):
        with pytest.raises(BundleError, match=r"has no int8 graphs; it has fp32$"):
            ask(what, Variant.int8)


# --- damage -----------------------------------------------------------------------------------------------


def refused(folder, match):
    with pytest.raises(BundleError, match=match) as caught:
        EngineBundle.open(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


def test_no_manifest(folder):
    (folder / "manifest.json").unlink()
    message = refused(folder, "is no engine bundle")
    assert f"geoengine build-engines --out {folder}" in message


def test_a_missing_file(folder):
    (folder / "onnx/head_z10.fp32.onnx").unlink()
    assert "build-engines" in refused(folder, r"onnx/head_z10\.fp32\.onnx is missing")


def test_a_truncated_file(folder):
    (folder / "onnx/weights.bin").write_bytes(FILES["onnx/weights.bin"][:-1])
    refused(folder, r"onnx/weights\.bin is damaged: it has 2559 bytes instead of 2560")


def test_a_flipped_bit(folder):
    data = bytearray(FILES["onnx/weights.bin"])
    data[1000] ^= 4
    (folder / "onnx/weights.bin").write_bytes(data)
    refused(folder, r"onnx/weights\.bin is damaged: its SHA-256")
    assert EngineBundle.open(folder, verify=False).levels == (4, 10)


def test_a_file_larger_than_a_chunk_of_the_checksum(folder, monkeypatch):
    monkeypatch.setattr(bundle_module, "_HASH_CHUNK", 100)
    assert EngineBundle.open(folder).levels == (4, 10)


def test_a_newer_schema_says_who_wrote_it(folder):
    newer = {"schema": 3, "geoengine": "0.9.3", "anything": "else"}
    write(folder, newer)
    message = refused(folder, "schema 3 was written by geoengine 0.9.3")
    assert "update geoengine" in message


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/hostname", "onnx/../../outside", "a\\..\\b", "C:/x", "", "."]
)
def test_a_path_that_leaves_the_folder(folder, name):
    (folder.parent / "outside").write_bytes(b"trunk")
    manifest = copy.deepcopy(MANIFEST)
    manifest["files"][name] = manifest["files"]["onnx/trunk.224.fp32.onnx"]
    write(folder, manifest)
    refused(folder, re.escape(f'"files" has a path that leaves the folder: {name!r}'))


def test_a_link_that_leaves_the_folder(folder):
    outside = folder.parent / "outside"
    outside.write_bytes(b"trunk")
    (folder / "onnx/trunk.224.fp32.onnx").unlink()
    (folder / "onnx/trunk.224.fp32.onnx").symlink_to(outside)
    refused(folder, r"onnx/trunk\.224\.fp32\.onnx leads out of the folder")


@pytest.mark.parametrize("field", MANIFEST)
def test_every_field_is_needed(folder, field):
    write(folder, {name: value for name, value in MANIFEST.items() if name != field})
    refused(folder, f'"{field}" is missing')


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"schema": True}, '"schema" must be an integer, got True'),
        ({"schema": 0}, '"schema" must be at least 1, got 0'),
        ({"model": 3}, '"model" must be a string, got 3'),
        ({"world": "mars"}, "\"world\" must be one of earth, planet, got 'mars'"),
        ({"levels": [10, 4]}, r'"levels" must increase strictly, got \[10, 4\]'),
        ({"levels": []}, '"levels" must increase strictly'),
        ({"levels": ["4"]}, '"levels" must be an integer'),
        ({"levels": [4, 6, 10]}, '"heads" of fp32 lacks the encoder z06'),
        (graphs(heads={"z04": "onnx/head_z04.fp32.onnx"}), '"heads" of fp32 lacks the encoder photo'),
        (graphs(heads=HEADS | {"z12": "onnx/none.onnx"}), r'"files" lacks onnx/none\.onnx'),
        ({"logit_scale": {"z04": 100.0}}, '"logit_scale" lacks the encoder z10'),
        ({"logit_scale": {"z04": float("nan"), "z10": 1.0}}, '"logit_scale" must hold finite numbers'),
        ({"logit_scale": {"z04": "big", "z10": 1.0}}, '"logit_scale" must hold numbers'),
        ({"logit_scale": {"z04": 10**400, "z10": 1.0}}, "manifest.json cannot be used"),
        ({"mean": [0.5, 0.5]}, '"mean" must have 3 numbers, got 2'),
        ({"embed_dim": 0}, '"embed_dim" must be at least 1'),
        (graphs(trunks={"256": "onnx/trunk.256.fp32.onnx"}), "lacks the image size, 224"),
        (
            graphs(trunks={"large": "onnx/trunk.256.fp32.onnx"}),
            '"trunks" must map sides in pixels',
        ),
        (graphs(trunks=[]), '"trunks" must be an object'),
        ({"graphs": {}}, '"graphs" is empty'),
        ({"graphs": {"fp8": {}}}, "unknown variant 'fp8': update geoengine"),
        ({"resize_mode": "pad"}, "\"resize_mode\" must be one of shortest, squash, got 'pad'"),
        ({"schema": 1}, "this version reads schema 2: build the bundle again"),
        ({"files": {"onnx/weights.bin": {"bytes": 3}}}, '"sha256" is missing'),
        ({"files": {"onnx/weights.bin": {"bytes": -1, "sha256": ""}}}, '"bytes" must be at least 0'),
    ],
)
def test_a_manifest_that_makes_no_sense(folder, change, match):
    write(folder, MANIFEST | change)
    refused(folder, match)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"null", b"[" * 100_000])
def test_a_manifest_that_is_no_manifest(folder, text):
    (folder / "manifest.json").write_bytes(text)
    refused(folder, r"manifest\.json cannot be used")


# --- which bundle -----------------------------------------------------------------------------------------


def test_the_packages_own_bundle_is_named_planet(tmp_path, monkeypatch):
    monkeypatch.setattr(bundle_module, "PLANET", tmp_path / "planet")
    assert resolve_bundle("planet") == tmp_path / "planet"
    with pytest.raises(BundleError, match=r"planet is no engine bundle .*: install geoengine again$"):
        EngineBundle.open("planet")


def test_a_given_bundle_is_taken(tmp_path):
    assert resolve_bundle(tmp_path / "x") == tmp_path / "x"
    assert resolve_bundle(str(tmp_path / "x")) == tmp_path / "x"


def test_engines_here_then_the_users_data_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    with pytest.raises(BundleError) as caught:
        resolve_bundle(None)
    assert "`geoengine build-engines --out engines/`" in str(caught.value)
    assert "`geoengine locate --demo PHOTO`" in str(caught.value)

    users = tmp_path / "data/geoengine/engines"
    (tmp_path / "engines").mkdir()  # a folder without a manifest is no bundle
    users.mkdir(parents=True)
    (users / "manifest.json").touch()
    assert resolve_bundle(None) == users

    (tmp_path / "engines/manifest.json").touch()
    assert resolve_bundle(None).resolve() == tmp_path / "engines"


def test_the_users_data_folder_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    users = tmp_path / ".local/share/geoengine/engines"
    users.mkdir(parents=True)
    (users / "manifest.json").touch()
    assert resolve_bundle(None) == users


def test_a_bundle_of_the_planet_is_never_taken_by_itself(tmp_path, monkeypatch):
    """Or a photo of Earth would be placed on an imaginary planet without anybody having asked for it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(PLANET, tmp_path / "engines")
    with pytest.raises(BundleError, match="engines is for the built-in planet, not for Earth: use --demo"):
        resolve_bundle(None)
    assert resolve_bundle("engines").name == "engines"
