"""transformers in float64 throughout, for whatever family: what it computes in float32 itself is float64 there."""

from contextlib import contextmanager

import pytest

torch = pytest.importorskip("torch", reason="a peer of the parity tests: the extra peers")


@contextmanager
def in_float64():
    """While it lasts, models are made, and run, in float64.

    transformers asks for float32 by name, wherever a model computes in another dtype: rotary angles, norms, softmax,
    buckets of distance. Its name for it means float64 here, and so does the default.
    """
    patch, default = pytest.MonkeyPatch(), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with patch.context() as patched:
        double = torch.float64
        patched.setattr(torch, "float32", double)
        patched.setattr(torch, "float", double)
        patched.setattr(torch.Tensor, "float", torch.Tensor.double)
        try:
            yield
        finally:
            torch.set_default_dtype(default)
