def topk(
    *,
    device: int,
    stream: int,
    dtype: str,
    embeddings: int,
    n: int,
    d: int,
    row_stride: int,
    scales: int,
    queries: int,
    query_dtype: str,
    m: int,
    rows: int,
    segments: int,
    rows_count: int,
    longest: int,
    k: int,
    normalized: bool,
    scores: int,
    indices: int,
    workspace: int,
    workspace_bytes: int,
) -> None: ...
def workspace_bytes(
    *,
    device: int,
    dtype: str,
    n: int,
    d: int,
    query_dtype: str,
    m: int,
    has_rows: bool,
    has_segments: bool,
    rows_count: int,
    longest: int,
    k: int,
    normalized: bool,
) -> int: ...
def device_count() -> int: ...
def driver_problem() -> str | None: ...
def device_of(pointer: int) -> int: ...
def allocate(bytes: int, device: int, stream: int) -> int: ...
def free(pointer: int, device: int, stream: int) -> None: ...
def wait(device: int, stream: int, other: int) -> None: ...
