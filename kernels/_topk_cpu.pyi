import numpy as np
import numpy.typing as npt

def cosine_topk(
    embeddings: npt.NDArray[np.float32] | npt.NDArray[np.float16],
    queries: npt.NDArray[np.float32],
    k: int,
    *,
    threads: int,
    kernel: str | None,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]: ...
def kernel_names() -> list[str]: ...
