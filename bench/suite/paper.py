"""The paper's procedure, Algorithm 1 in PyTorch: one tile at a time is read, preprocessed, encoded, compared.

Encoders have the size of the bundle's and random weights: time does not depend on what they have learnt. One
encoder stands for all, since a search uses one at a time.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geoengine.engine.manifest import PHOTO, Manifest
from geoengine.engine.photos import Photo
from geoengine.engine.sources import TileSource
from geoengine.engine.tiles import all_xy, descendants_xy

_NEEDED = ("torch", "open_clip")
_WARM_UP = 3


def missing() -> str | None:
    """Return the command that installs what the procedure needs, None where it is there."""
    there = all(importlib.util.find_spec(name) is not None for name in _NEEDED)
    return None if there else "pip install 'geoengine[export]'"


@dataclass(frozen=True, slots=True)
class Tower:
    """An open_clip vision tower, in float32 and eval mode, and what open_clip puts pictures through first."""

    module: Any
    transform: Any
    device: str

    def embed(self, pixels: NDArray[np.uint8]) -> Any:  # noqa: ANN401 - torch is imported late
        """Return the unit embedding, float32[d] on the device, of a picture uint8[H, W, 3]."""
        import torch
        from PIL import Image

        with torch.inference_mode():
            picture = self.transform(Image.fromarray(pixels)).unsqueeze(0).to(self.device)
            return torch.nn.functional.normalize(self.module(picture), dim=-1)[0]

    def about(self) -> dict[str, Any]:
        """Say what runs the tower."""
        import torch

        return {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": self.device}


def open_tower(manifest: Manifest, *, on_gpu: bool) -> Tower:
    """Return a tower like those of a bundle; `on_gpu` takes a GPU if PyTorch sees one.

    Raises ExportError for a model that open_clip does not know.
    """
    import torch
    from open_clip.transform import image_transform  # type: ignore[import-untyped]

    device = "cuda" if on_gpu and torch.cuda.is_available() else "cpu"
    transform = image_transform(
        manifest.image_size,
        is_train=False,
        mean=manifest.mean,
        std=manifest.std,
        resize_mode=manifest.resize_mode,
        interpolation="bicubic",
    )
    tower = Tower(_module(manifest).to(device).eval(), transform, device)
    for _ in range(_WARM_UP):
        tower.embed(np.zeros((manifest.image_size, manifest.image_size, 3), dtype=np.uint8))
    return tower


def _module(manifest: Manifest) -> Any:  # noqa: ANN401 - torch is imported late
    if manifest.world == "planet":
        from geoengine.training.planet import VISION

        return VISION.build().requires_grad_(False)
    from geoengine.export.checkpoints import RANDOM, load_clip_encoders

    return load_clip_encoders(model=manifest.model, pretrained=RANDOM, levels=()).towers[PHOTO]


class Procedure:
    """A search under way, of one photo again and again; `work` goes on with it for a while.

    `tiles` and `seconds` are those so far, the photo's own embedding left out.
    """

    def __init__(self, tower: Tower, source: TileSource, photo: Photo, k: int, levels: Sequence[int]) -> None:
        self.tiles, self.seconds = 0, 0.0
        self._tower, self._source, self._k, self._levels = tower, source, k, levels
        self._query = tower.embed(photo.pixels)
        self._steps = self._search()

    def work(self, seconds: float) -> None:
        """Go on for so long, and to the end of a tile."""
        start = time.perf_counter()
        while (spent := time.perf_counter() - start) < seconds:
            next(self._steps)
            self.tiles += 1
        self.seconds += spent

    def measured(self) -> dict[str, Any] | None:
        """Return tiles and seconds, JSON-ready; None before the first tile."""
        return {"tiles": self.tiles, "seconds": self.seconds} if self.tiles else None

    def _search(self) -> Iterator[None]:
        """Run Algorithm 1 for ever; stops after each tile that there is."""
        while True:
            xy = all_xy(self._levels[0])
            for above, zoom in zip((self._levels[0], *self._levels), self._levels, strict=False):
                if zoom != above:
                    xy = descendants_xy(xy.tolist(), above, zoom)
                scores = np.full(len(xy), -np.inf)
                for row in range(len(xy)):
                    there = list(self._source.read(zoom, xy[row : row + 1]))
                    if there:
                        scores[row] = float(self._query @ self._tower.embed(there[0].pixels[0]))
                        yield
                xy = xy[np.argsort(-scores, kind="stable")[: self._k]]
