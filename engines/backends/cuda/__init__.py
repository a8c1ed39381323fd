"""NVIDIA GPUs through cuda-python: which one there is, its memory, streams of work, and CUDA graphs.

Everything calls `cuda.bindings.runtime`, which since release 12.9.1 releases Python's global lock around each call, so
that a thread waiting for the GPU does not stop the others.
"""

from engines.backends.cuda.buffers import DeviceBuffer, as_device_buffer
from engines.backends.cuda.device import Cuda, CudaDevice, open_cuda
from engines.backends.cuda.discovery import Probe, gpu_uuid, probe
from engines.backends.cuda.graphs import CapturedCalls, CudaGraph, GraphCapture
from engines.backends.cuda.libraries import Library, load_libraries
from engines.backends.cuda.status import MEMORY_IS_FULL, check
from engines.backends.cuda.streams import CudaStream, as_cuda_stream

__all__ = [
    "MEMORY_IS_FULL",
    "CapturedCalls",
    "Cuda",
    "CudaDevice",
    "CudaGraph",
    "CudaStream",
    "DeviceBuffer",
    "GraphCapture",
    "Library",
    "Probe",
    "as_cuda_stream",
    "as_device_buffer",
    "check",
    "gpu_uuid",
    "load_libraries",
    "open_cuda",
    "probe",
]
