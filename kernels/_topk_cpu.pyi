from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

def cosine_topk(
    embeddings: object,
    queries: object,
    k: object,
    rows: object = None,
    segments: object = None,
    normalized: object = False,
    out: object = None,
    threads: object = None,
    scales: object = None,
    bfloat16: bool = False,
    scan: object = None,
    kernel: object = None,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]] | None: ...
def quantize_rows(
    embeddings: npt.NDArray[np.generic],
    bfloat16: bool,
    values: npt.NDArray[np.int8],
    scales: npt.NDArray[np.float32],
    errors: npt.NDArray[np.float32],
    lengths: npt.NDArray[np.float32],
) -> None: ...
def read_dlpack(
    capsule: object,
) -> tuple[object, int, tuple[int, ...], tuple[int, ...], int, int, int, int]: ...
def make_dlpack(
    owner: object,
    pointer: int,
    shape: Sequence[int],
    kind: int,
    bits: int,
    device_type: int,
    device: int,
) -> object: ...
def kernel_names() -> list[str]: ...
