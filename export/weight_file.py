"""Files of weights that ONNX graphs beside them point into, each tensor once."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

_PAGE_BYTES = 4096  # tensors start on a page, so that they can be mapped into memory


class WeightFile:
    """The weight file of the graphs whose names begin like its own: `trunk.weights` of `trunk.*.onnx`.

    Tensors that those graphs already keep in it are found again by content; what an interrupted write left
    behind them is cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets: dict[bytes, int] = {}  # by SHA-256
        path.touch()
        end = 0
        for offset, length in _used(path):
            data = np.memmap(path, np.uint8, "r", offset, length)
            self._offsets[hashlib.sha256(data.data).digest()] = offset
            end = max(end, offset + length)
        os.truncate(path, end)

    def place(self, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
        """Return the tensor as a part of the file, appended unless its bytes are there already."""
        data = tensor.tobytes()
        digest = hashlib.sha256(data).digest()
        if digest not in self._offsets:
            with self.path.open("ab") as stream:
                stream.write(b"\0" * (-stream.tell() % _PAGE_BYTES))
                self._offsets[digest] = stream.tell()
                stream.write(data)
        return ir.ExternalTensor(
            self.path.name,
            self._offsets[digest],
            len(data),
            tensor.dtype,
            shape=ir.Shape(tensor.numpy().shape),
            name=str(tensor.name),
            base_dir=self.path.parent,
        )


def _used(path: Path) -> set[tuple[int, int]]:
    """Return offset and length of what the graphs beside a weight file keep in it."""
    used = set()
    for graph in path.parent.glob(f"{path.stem}.*.onnx"):
        for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
            place = {entry.key: entry.value for entry in tensor.external_data}
            if place.get("location") == path.name:
                used.add((int(place["offset"]), int(place["length"])))
    return used
