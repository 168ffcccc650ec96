"""A small GeoCLIP package of random weights, and a small CLIP for it."""

import json

import numpy as np
import open_clip
import torch

from geoengine.export.geoclip_package import read_package

FEATURES, DIM, POINTS = 24, 16, 300
SMALL_CLIP = "tiny-geoclip-test"


def write_package(folder, *, seed=0, points=None, features=FEATURES):
    """The package's files with other sizes: three capsules of 8 frequencies, and a gallery of 300 points."""
    generator = torch.Generator().manual_seed(seed)

    def dense(outputs, inputs):
        weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        return {"weight": weight, "bias": 0.1 * torch.randn(outputs, generator=generator)}

    def named(layers):
        return {f"{name}.{part}": value for name, layer in layers.items() for part, value in layer.items()}

    location = {}
    for number, sigma in enumerate((1.0, 16.0, 256.0)):
        start = f"LocEnc{number}."
        location[f"{start}capsule.0.b"] = sigma * torch.randn(8, 2, generator=generator)
        layers = {"capsule.1": dense(32, 16), "capsule.3": dense(32, 32), "capsule.5": dense(32, 32)}
        layers["head.0"] = dense(DIM, 32)
        location |= {start + name: value for name, value in named(layers).items()}
    (folder / "model" / "weights").mkdir(parents=True)
    (folder / "model" / "gps_gallery").mkdir()
    weights = folder / "model" / "weights"
    torch.save(location, weights / "location_encoder_weights.pth")
    torch.save(
        named({"0": dense(20, features), "2": dense(DIM, 20)}), weights / "image_encoder_mlp_weights.pth"
    )
    torch.save(torch.tensor(3.0), weights / "logit_scale_weights.pth")
    if points is None:
        points = np.random.default_rng(seed).uniform((-180, -60), (180, 75), (POINTS, 2))
    lines = ["LAT,LON", *(f"{lat:.6f},{lng:.6f}" for lng, lat in points)]
    (folder / "model" / "gps_gallery" / "coordinates_100K.csv").write_text("\n".join(lines) + "\n")
    return folder


def register_small_clip(folder):
    """Tell open_clip of a CLIP with a vision tower of three small blocks; returns its name."""
    sizes = {"image_size": 16, "layers": 3, "width": 32, "head_width": 8, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 16, "width": 8, "heads": 2, "layers": 1}
    config = {"embed_dim": FEATURES, "quick_gelu": True, "vision_cfg": sizes, "text_cfg": text}
    (folder / f"{SMALL_CLIP}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{SMALL_CLIP}.json")
    return SMALL_CLIP


def use_small_geoclip(monkeypatch, folder, **options):
    """Make `build_geoclip` find a small package and a small CLIP."""
    package = read_package(write_package(folder / "geoclip", **options))
    monkeypatch.setattr("geoengine.export.geoclip.read_package", lambda: package)
    monkeypatch.setattr("geoengine.export.geoclip.CLIP_MODEL", register_small_clip(folder))
    return package
