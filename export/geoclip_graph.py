"""GeoCLIP's location encoder as an ONNX graph, and as plain PyTorch to hold the graph to."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from geoengine.engine.manifest import Variant
from geoengine.export.drawing import Drawing
from geoengine.export.geoclip_package import Capsule, GeoClipPackage
from geoengine.export.onnx_graphs import save_graph
from geoengine.export.towers import Dense
from geoengine.export.weight_file import WeightFile

# The Equal Earth projection (Savric, Patterson and Jenny 2018), and GeoCLIP's scale for it.
A1, A2, A3, A4 = 1.340264, -0.081106, 0.000893, 0.003796
_SCALE = 66.50336 / 180


def write_location_encoder(package: GeoClipPackage, file: Path) -> None:
    """Write the graph: "points" float32[n, 2], longitude and latitude in degrees, to "embedding"[n, d].

    Embeddings are of unit length. Matrices are stored in float16 and multiplied in float32: the projection
    and the Fourier features must stay float32, for phases reach 4400 radians, and a float16 of that size is
    off by a radian and more.
    """
    drawing = Drawing(Variant.fp32, "points", ir.DataType.FLOAT, (2,))
    plane = _project(drawing)
    total = None
    for number, capsule in enumerate(package.capsules):
        drawing.prefix = f"capsules.{number}."
        features = _capsule(drawing, capsule, plane)
        total = features if total is None else drawing.op("Add", total, features)
    assert total is not None  # a package has capsules
    drawing.prefix = ""
    length = drawing.op("ReduceL2", total, drawing.integers(-1), keepdims=1)
    unit = drawing.op("Div", total, drawing.with_number("Max", length, 1e-12))
    model = drawing.finish(unit, "embedding", (package.embed_dim,))
    save_graph(model, WeightFile(file.with_name("location.weights")), file)


def _project(drawing: Drawing) -> ir.Value:
    """Longitude and latitude in degrees to the plane of the Equal Earth projection, x from -1 to 1."""
    radians = drawing.with_number("Mul", drawing.input, math.pi / 180)
    longitude, latitude = drawing.part(radians, 0, 1), drawing.part(radians, 1, 2)
    sine = drawing.with_number("Mul", drawing.op("Sin", latitude), math.sqrt(3) / 2)
    theta = drawing.op("Asin", sine)
    square = drawing.op("Mul", theta, theta)

    def polynomial(*coefficients: float) -> ir.Value:
        """Give c0 + c1 theta^2 + c2 theta^6 + c3 theta^8, by Horner's rule."""
        c0, c1, c2, c3 = coefficients
        inner = drawing.with_number("Add", drawing.with_number("Mul", square, c3), c2)
        for c in (0.0, c1, c0):
            inner = drawing.op("Mul", inner, square)
            inner = drawing.with_number("Add", inner, c) if c else inner
        return inner

    denominator = drawing.with_number("Mul", polynomial(A1, 3 * A2, 7 * A3, 9 * A4), 3.0)
    x = drawing.op("Mul", drawing.with_number("Mul", longitude, 2 * math.sqrt(3)), drawing.op("Cos", theta))
    x = drawing.op("Div", x, denominator)
    y = drawing.op("Mul", theta, polynomial(A1, A2, A3, A4))
    return drawing.with_number("Mul", drawing.op("Concat", x, y, axis=1), _SCALE)


def _capsule(drawing: Drawing, capsule: Capsule, plane: ir.Value) -> ir.Value:
    """Random Fourier features of a plane's points, and the dense layers."""
    turns = drawing.op("MatMul", plane, drawing.weight("frequencies", capsule.frequencies.T))
    # Whole turns do not count, and taking them off is exact; not every machine's sine bears large arguments.
    turns = drawing.op("Sub", turns, drawing.op("Floor", turns))
    phases = drawing.with_number("Mul", turns, 2 * math.pi)
    x = drawing.op("Concat", drawing.op("Cos", phases), drawing.op("Sin", phases), axis=1)
    for number, (weight, bias) in enumerate(capsule.layers):
        x = drawing.op("Relu", x) if number else x
        x = drawing.dense(str(number), Dense(weight.half().float(), bias), x)
    return x


def reference_locations(package: GeoClipPackage, points: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return the unit embeddings, float32[n, d], in PyTorch with float64, of points in degrees, lng and lat.

    Formulas as in the package's own PyTorch, which computes in float32.
    """
    longitude, latitude = torch.from_numpy(np.radians(points)).T
    theta = torch.asin(math.sqrt(3) / 2 * torch.sin(latitude))
    denominator = 3 * (9 * A4 * theta**8 + 7 * A3 * theta**6 + 3 * A2 * theta**2 + A1)
    x = 2 * math.sqrt(3) * longitude * torch.cos(theta) / denominator
    y = A4 * theta**9 + A3 * theta**7 + A2 * theta**3 + A1 * theta
    plane = torch.stack([x, y], dim=1) * _SCALE
    total: Tensor = sum((_reference_capsule(capsule, plane) for capsule in package.capsules), torch.zeros(1))
    return np.asarray(torch.nn.functional.normalize(total, dim=1).float().numpy())


def _reference_capsule(capsule: Capsule, plane: Tensor) -> Tensor:
    phases = 2 * math.pi * plane @ capsule.frequencies.double().T
    x = torch.cat([torch.cos(phases), torch.sin(phases)], dim=1)
    for number, (weight, bias) in enumerate(capsule.layers):
        x = torch.relu(x) if number else x
        x = x @ weight.double().T + bias.double()
    return x
