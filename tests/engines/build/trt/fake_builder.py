"""The parts of TensorRT's builder that TensorRT for RTX lacks: its timing cache, which lists kernels by name here."""

from __future__ import annotations

from collections.abc import Iterable

GPU = b"this GPU"
SEPARATOR = b"\n"


class ITimingCache:
    """Of one GPU, whose name is its first line; the others are kernels."""

    def __init__(self, content: bytes) -> None:
        self.gpu, *kernels = content.split(SEPARATOR) if content else [GPU]
        self.kernels = dict.fromkeys(kernels)

    def serialize(self) -> bytes | None:
        return SEPARATOR.join((self.gpu, *self.kernels))

    def queryKeys(self) -> list[bytes]:  # noqa: N802 - TensorRT's name
        return list(self.kernels)


class IBuilderConfig:
    def __init__(self) -> None:
        self.timing_cache: ITimingCache | None = None

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache | None:
        return None if serialized_timing_cache.startswith(b"\0") else ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        fits = ignore_mismatch or cache.gpu == GPU
        self.timing_cache = cache if fits else self.timing_cache
        return fits

    def build(self, kernels: Iterable[bytes]) -> list[bytes]:
        """Take the time of `kernels`. Returns those that were measured, since the cache did not know them."""
        assert self.timing_cache
        measured = [kernel for kernel in kernels if kernel not in self.timing_cache.kernels]
        self.timing_cache.kernels |= dict.fromkeys(measured)
        return measured
