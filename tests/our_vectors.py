"""The conformance vectors, made once for all tests that look at them."""

from functools import cache

from lora_np.vectors.files import made


@cache
def ours():
    """All of them."""
    return made()


def of(id):
    """The cases of an id, each with its answers."""
    return [one for one in ours().cases if one[0].id == id]
