"""Run fastembed's own code on pictures from a pipe, with the Python that has it: nothing of ours is needed.

Started as a script with a folder that holds `model.onnx` and `preprocessor_config.json`, and a number of
threads. Input: a line of JSON with a batch's shape, then its uint8 pixels. Output: a line of JSON with the
shape of the embeddings, then float32; the first line says that it is ready.
"""

from __future__ import annotations

import json
import sys
from typing import BinaryIO

import numpy as np

MODEL = "Qdrant/clip-ViT-B-32-vision"
"""The name under which fastembed has CLIP's ViT-B/32; the folder takes the place of its download."""


def serve(folder: str, threads: int, requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer batches until the input ends."""
    from fastembed import ImageEmbedding
    from PIL import Image

    model = ImageEmbedding(MODEL, specific_model_path=folder, threads=threads)
    _send(answers, {"ready": True}, b"")
    while line := requests.readline():
        shape = json.loads(line)["shape"]
        data = requests.read(int(np.prod(shape)))
        pictures = [Image.fromarray(pixels) for pixels in np.frombuffer(data, np.uint8).reshape(shape)]
        rows = np.stack(list(model.embed(pictures, batch_size=len(pictures)))).astype(np.float32)
        _send(answers, {"shape": rows.shape}, rows.tobytes())


def _send(answers: BinaryIO, head: dict[str, object], data: bytes) -> None:
    answers.write(json.dumps(head).encode() + b"\n" + data)
    answers.flush()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), sys.stdin.buffer, sys.stdout.buffer)
