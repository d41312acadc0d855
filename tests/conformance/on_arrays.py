"""What the runners on JAX and MLX share: the vectors in, each case through its operation, the results out."""

import json

import numpy as np
import safetensors.numpy


def computed(operations, case, t, pulled_back):
    """The tensors that a case asks for."""
    operation, scalars = operations[case["operation"]], case["scalars"]
    outputs = operation(t, scalars)
    if outputs is None:
        return {}
    result = {f"out/{name}": outputs[name] for name in outputs if f"out/{name}" in case["expected"]}
    wanted = [name.removeprefix("grad/") for name in case["expected"] if name.startswith("grad/")]
    if wanted and pulled_back:
        ends = [name for name in outputs if f"d{name}" in t] or ["loss"]

        def ends_of(*leaves):
            found = operation({**t, **dict(zip(wanted, leaves, strict=True))}, scalars)
            return [found[name] for name in ends]

        seeds = [t[f"d{name}"] if f"d{name}" in t else np.float32(1) for name in ends]
        grads = pulled_back(ends_of, [t[name] for name in wanted], seeds)
        result |= {f"grad/{name}": g for name, g in zip(wanted, grads, strict=True)}
    return {name: np.array(value, order="C") for name, value in result.items()}


def run(operations, vectors, results, *, array, pulled_back=None):
    """operations: by name, of tensors and scalars, giving outputs; None where there is no answer.

    array: one of theirs from one of NumPy's. pulled_back(f, leaves, seeds): what a function's outputs pull back;
    without it there are no gradients.
    """
    results.mkdir()
    files = {}
    for case in json.loads((vectors / "manifest.json").read_text())["cases"]:
        if case["operation"] not in operations:
            continue
        stored = safetensors.numpy.load_file(vectors / f"{case['id']}.safetensors")
        t = {name: array(stored[f"{case['name']}/in/{name}"]) for name in case["inputs"]}
        found = computed(operations, case, t, pulled_back)
        files.setdefault(case["id"], {}).update({f"{case['name']}/{name}": value for name, value in found.items()})
    for id, tensors in files.items():
        if tensors:
            safetensors.numpy.save_file(tensors, results / f"{id}.safetensors")
