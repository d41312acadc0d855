"""cupy.linalg, in part."""

import numpy as _np

from . import _array


class _Functions:
    def norm(x, ord=None, axis=None, keepdims=False): ...
    def qr(a, mode="reduced"): ...
    def svd(a, full_matrices=True, compute_uv=True): ...


globals().update(_array.functions(_Functions, _np.linalg))
