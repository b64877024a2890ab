"""What the native module offers, for type checkers."""

import numpy as np

PLAN_VERSION: int
SLICE_GROUPS: int
EDGE_CHUNK: int
STAGED_ROWS: int
STAGED_INPUTS: int
WORD_ALIGNMENT: int
MASK_BITS: int

def header_fields() -> list[tuple[str, str]]: ...
def layer_fields() -> list[tuple[str, str]]: ...
def run_fields() -> list[tuple[str, str]]: ...
def rows_fields() -> list[tuple[str, str]]: ...
def build_rows(records: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A plan's layers in compressed rows: their records, int64, and their words, uint32.

    Args:
        records: int64, the records of the plan.
        words: uint32 (words,), the plan.
    """

def ffi_api_version() -> tuple[int, int]: ...
def end_on_abort(descriptor: int, text: str) -> None:
    """Where native code aborts the process from now on, it writes this text, and exits with 1."""

def check_plan_records(records: np.ndarray, words: int) -> None: ...
def check_plan(records: np.ndarray, words: np.ndarray) -> None:
    """Raises ValueError where a plan's records, indices or slots reach outside it; the message names the layer.

    Args:
        records: int64, the records of the plan.
        words: uint32 (words,), the plan.
    """

def parse_table(text: np.ndarray, threads: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Reads lines of two whole numbers and a number with tabs between, up to the first that is malformed or has no end.

    Args:
        text: uint8 (bytes,).
        threads: Threads to use at most.

    Returns:
        int32 (rows,), int32 (rows,), float32 (rows,), and the number of bytes that the rows take.
    """

def handlers() -> dict[str, object]: ...

class LayerOrigin:
    @property
    def edges(self) -> int: ...
    @property
    def merged(self) -> int: ...
    @property
    def constant(self) -> int: ...
    @property
    def unread(self) -> int: ...

class Simplifier:
    def __init__(self, threads: int, hash_mask: int) -> None: ...
    def add(
        self,
        inputs: int,
        indptr: np.ndarray,
        indices: np.ndarray,
        values: np.ndarray,
        bias: np.ndarray,
        lower: float,
        upper: float,
    ) -> None: ...
    def finish(self) -> None: ...
    def take(self) -> tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray, LayerOrigin] | None: ...
    def expansion(self) -> np.ndarray: ...

class PlanBuilder:
    def __init__(self, threads: int, staged_below: float, staged_wider_than: int, single_below: float) -> None: ...
    def add(
        self,
        inputs: int,
        indptr: np.ndarray,
        indices: np.ndarray,
        values: np.ndarray,
        bias: np.ndarray,
        lower: float,
        upper: float,
        origin: LayerOrigin | None = None,
    ) -> None: ...
    def finish(self, expansion: np.ndarray | None = None, merge_features: bool = False) -> np.ndarray: ...
