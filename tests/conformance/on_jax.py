"""JAX's arrays and derivatives, for the runners of what is built on it."""

import jax
import on_arrays


def run(operations, vectors, results):
    def pulled_back(f, leaves, seeds):
        return jax.vjp(f, *leaves)[1](seeds)

    on_arrays.run(operations, vectors, results, array=jax.numpy.asarray, pulled_back=pulled_back)
