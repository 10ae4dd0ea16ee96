"""Whether an error says that memory ran out, whatever runtime it comes from."""

from __future__ import annotations

__all__ = ["out_of_memory"]

_WORDS = (
    "out of memory",  # torch on CUDA, MPS and XPU
    "status_alloc_failed",  # cuBLAS and cuDNN, which take memory of their own
    "can't allocate memory",  # torch on a CPU
    "unable to allocate",  # MLX
    "resource limit (",  # MLX on Metal, of the number of arrays
    "allowed buffer size",  # MLX on Metal, of the size of one
    "insufficient memory",  # Metal
)


def out_of_memory(error: BaseException) -> bool:
    """True for MemoryError, torch's OutOfMemoryError, and the RuntimeErrors by which runtimes say the same."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)
