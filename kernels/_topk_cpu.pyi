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
    kernel: object = None,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]] | None: ...
def kernel_names() -> list[str]: ...
