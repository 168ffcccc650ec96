"""How well a level's photos find their tiles among those of the validation photos, and among siblings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from geoengine.training.contrastive import contrastive_loss
from geoengine.training.features import TileFeatures
from geoengine.training.negatives import Keys, family, place_in_family, tile_keys, tiles_of_keys
from geoengine.training.processes import autocast
from geoengine.training.towers import Head

RANKS = (1, 5, 10)
_AT_ONCE = 256  # tiles encoded together


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ValidationSet:
    """Validation photos of a level, unit rows float32[m, d], and the tile of each, uint64[m].

    The first `with_siblings` of them are those of `sibling_similarities`.
    """

    zoom: int
    photos: torch.Tensor
    own: Keys
    with_siblings: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What a validation found; shares are 0 to 1.

    `recall` is the share of photos whose own tile is among the k most similar of all validation photos'
    tiles, for the k of `RANKS`.
    """

    loss: float
    recall: tuple[float, ...]


def embed_tiles(head: Head, features: TileFeatures, zoom: int, keys: Keys, precision: str) -> torch.Tensor:
    """Return the unit embeddings of tiles that exist, float32[n, d] on the head's device."""
    device = head.proj.device
    parts = [torch.empty((0, head.proj.shape[1]), device=device)]
    with torch.no_grad(), autocast(device, precision):
        for start in range(0, len(keys), _AT_ONCE):
            parts.append(head(features.tokens(zoom, keys[start : start + _AT_ONCE]).float()))
    return torch.cat(parts)


def validate(
    head: Head,
    features: TileFeatures,
    valid: ValidationSet,
    *,
    log_scale: torch.Tensor,
    batch: int,
    precision: str,
) -> Figures:
    """Measure a head on validation photos; the loss is the mean over batches of `batch` photos."""
    tiles, own = np.unique(valid.own, return_inverse=True)
    embeddings = embed_tiles(head, features, valid.zoom, tiles, precision)
    column = torch.from_numpy(own.reshape(-1)).to(embeddings.device)
    losses, ranks = [], []
    with torch.no_grad():
        for photos, target in zip(torch.split(valid.photos, batch), torch.split(column, batch), strict=True):
            seen, place = torch.unique(target, return_inverse=True)
            losses.append(float(contrastive_loss(photos, embeddings[seen], place, log_scale)) * len(photos))
            similarity = photos @ embeddings.T
            better = similarity > similarity.gather(1, target[:, None])
            ranks.append(better.sum(1))
    rank = torch.cat(ranks)
    return Figures(
        loss=sum(losses) / len(rank), recall=tuple(float((rank < k).float().mean()) for k in RANKS)
    )


def sibling_similarities(
    head: Head, features: TileFeatures, valid: ValidationSet, precision: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score photos against their own tile and its siblings: cosines float32[m, 16], true columns int64[m].

    This is what the search has to tell apart at every level but the first. A sibling that does not exist has
    cosine -1.
    """
    own = tiles_of_keys(valid.own[: valid.with_siblings])
    if not len(own):
        return torch.empty((0, 16)), torch.empty(0, dtype=torch.int64)
    keys, row = np.unique(tile_keys(family(own)), return_inverse=True)
    there = features.present(valid.zoom, keys)
    tiles = torch.zeros((len(keys), valid.photos.shape[1]), device=valid.photos.device)
    tiles[torch.from_numpy(np.flatnonzero(there))] = embed_tiles(
        head, features, valid.zoom, keys[there], precision
    )
    rows = torch.from_numpy(row.reshape(-1, 16)).to(tiles.device)
    similarity = torch.einsum("md,mcd->mc", valid.photos[: len(own)], F.embedding(rows, tiles))
    absent = torch.from_numpy(~there).to(tiles.device)[rows]
    target = torch.from_numpy(place_in_family(own)).to(tiles.device)
    return similarity.masked_fill(absent, -1.0), target


def sibling_keys(own: Keys) -> Keys:
    """Return the tiles, and all their siblings, that `sibling_similarities` needs; distinct and sorted."""
    keys: npt.NDArray[np.uint64] = np.unique(tile_keys(family(tiles_of_keys(own))))
    return keys
