"""What else than map tiles may say where a photo was taken."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class TileEvidence(Protocol):
    """Gives tiles a probability for each photo of a search; it enters the path score.

    A tile's score grows by `weight * log softmax(log_probability)`, the softmax taken over the tiles of one
    parent, at first over all of the level. What the evidence said
    of coarser levels stays in the score, so a weight may fall to 0 where the evidence has no more to say.
    """

    @property
    def name(self) -> str:
        """What calibrations and results call it."""
        ...

    def weight(self, zoom: int) -> float:
        """Return the weight of a zoom for which the calibration has none; at 0 it is not asked about it."""
        ...

    def log_probability(
        self, photos: NDArray[np.int64], zoom: int, xy: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Return the natural logarithm of the probability of tiles int64[n, 2], float32[p, n], all finite.

        `photos` are rows of the search's photos, int64[p]. A constant for each photo and zoom may be added.
        It is called for one photo's candidates at a time: what does not depend on the photo is worth keeping.
        """
        ...
