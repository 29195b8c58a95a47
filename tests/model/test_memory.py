"""Which errors say that memory was short, and what of a failed step is let go of."""

import pytest
import torch

from mrss_provider.model.memory import forget_frames, lacked_memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        # Of a kernel's code, and of a workspace: torch did not ask for these.
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_shortage_is_known_wherever_it_arose(error):
    assert lacked_memory(error)


def test_a_capture_that_a_shortage_spoilt_is_one():
    # What the end of a capture says, raised while the shortage passed by.
    error = RuntimeError("CUDA error: operation failed due to a previous error")
    error.__context__ = torch.OutOfMemoryError("CUDA out of memory")
    assert lacked_memory(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("illegal memory access"), ValueError("out of memory of its words")]
)
def test_another_failure_is_none(error):
    assert not lacked_memory(error)


def test_no_frame_of_a_failure_is_kept():
    def fail():
        try:
            raise torch.OutOfMemoryError
        except torch.OutOfMemoryError as first:
            raise ValueError from first

    with pytest.raises(ValueError) as caught:  # noqa: PT011
        fail()
    failure = caught.value
    assert failure.__cause__.__traceback__ is not None
    forget_frames(failure)
    assert failure.__traceback__ is None
    assert failure.__cause__.__traceback__ is None
