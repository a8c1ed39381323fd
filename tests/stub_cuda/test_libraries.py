"""That ONNX Runtime finds CUDA's libraries in a folder that is not its own, and that what is missing is said."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.stub_cuda.conftest import Stub
from tests.stub_cuda.libraries import CUDART

pytestmark = pytest.mark.stub_cuda

OPEN = """
import sys
from pathlib import Path
from unittest.mock import patch
from engines.backends import onnxruntime_cuda
from engines.backends.cuda import Cuda
from engines.errors import EngineError
from tests.stub_cuda.runtime import StubRuntime
import onnxruntime as ort
if sys.argv[2:]:
    ort.__version__ = sys.argv[2]
with patch.object(onnxruntime_cuda, "open_cuda", lambda: (Cuda(StubRuntime(Path(sys.argv[1]))), None)):
    try:
        device = onnxruntime_cuda.open_device(threads=0)
    except EngineError as error:
        sys.exit(f"refused: {error}")
device.load(Path("engines/demo/onnx/denoise_shallow.onnx"), device.stream("steps"))
sys.stdout.write(device.name)
"""
PLAIN = """
import sys
import onnxruntime as ort
ort.preload_dlls()
session = ort.InferenceSession("engines/demo/onnx/denoise_shallow.onnx", providers=["CUDAExecutionProvider"])
sys.stdout.write(",".join(session.get_providers()))
"""


def test_libraries_in_another_folder_than_onnx_runtime_are_found(stub: Stub) -> None:
    assert stub.python("-c", OPEN, str(stub.libraries / CUDART)).endswith("cuda, ONNX Runtime 1.31.1")


def test_onnx_runtime_alone_does_not_find_them(stub: Stub) -> None:
    providers = stub.python("-c", PLAIN).splitlines()[-1]
    assert providers == "CPUExecutionProvider"


def test_a_missing_library_is_named(stub: Stub, tmp_path: Path) -> None:
    part = tmp_path / "part"
    shutil.copytree(stub.libraries, part)
    (part / "nvidia" / "cudnn" / "lib" / "libcudnn.so.9").unlink()
    (part / "nvidia" / "cu13" / "lib" / "libcurand.so.10").unlink()
    with pytest.raises(
        AssertionError, match=r"refused: onnxruntime-gpu 1\.31\.1 needs libcurand\.so\.10, libcudnn\.so\.9, in"
    ):
        Stub(part, tmp_path).python("-c", OPEN, str(part / CUDART))


def test_an_older_onnx_runtime_is_refused(stub: Stub) -> None:
    with pytest.raises(
        AssertionError, match=r"refused: onnxruntime-gpu 1\.30\.0 is older than 1\.31, before which CUDA"
    ):
        stub.python("-c", OPEN, str(stub.libraries / CUDART), "1.30.0")
