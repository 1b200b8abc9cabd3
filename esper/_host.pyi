from typing_extensions import Buffer

SEED_STATES: dict[str, int]
RAMP_CURVES: dict[str, int]
BYTES_PER_SEED: int
AUTOGRAD_TORCH: str  # the version that _autograd was built with; empty if it was not built

class SeedBlock(Buffer):
    """Zeroed seed bank of ``num_seeds`` seeds, as a structure of arrays in one aligned block.

    ``memoryview(block)`` is writable and gives the block as bytes; what it holds is described by
    :meth:`fields`. Every array has ``capacity`` entries a row, ``num_seeds`` rounded up to a
    multiple of 64.
    """

    def __init__(self, num_seeds: int) -> None:
        """Raise ``ValueError`` unless ``1 <= num_seeds <= 2**24``."""

    @property
    def num_seeds(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def fields(self) -> dict[str, tuple[int, str, tuple[int, ...]]]:
        """Return name -> (offset in bytes, torch dtype, shape)."""

    def state(self, index: int) -> int:
        """Raise ``IndexError`` for an index outside ``[0, num_seeds)``."""

    def set_state(self, index: int, state: int) -> None:
        """Raise ``IndexError`` for a wrong index and ``ValueError`` for a wrong state."""

    def count(self, state: int) -> int:
        """Return how many seeds are in ``state``."""

    def __buffer__(self, flags: int, /) -> memoryview: ...
