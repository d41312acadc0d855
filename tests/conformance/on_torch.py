"""What the runners on PyTorch share: the vectors in, each case through its operation, the results out."""

import json

import safetensors.torch
import torch


class Masked(torch.nn.Module):
    """Dropout with a mask that is given."""

    def __init__(self, keep, p):
        super().__init__()
        self.keep, self.p = keep, p

    def forward(self, x):
        return x * (self.keep.to(x.dtype) / (1 - self.p))


def linear_of(W, b=None):
    module = torch.nn.Linear(W.shape[1], W.shape[0], bias=b is not None, dtype=W.dtype)
    module.weight = torch.nn.Parameter(W)
    if b is not None:
        module.bias = torch.nn.Parameter(b)
    return module


def rates(schedule_of, t, c):
    """O2 by a schedule of PyTorch's kind."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = schedule_of(optimizer, c["warmup"], c["total"])
    factors = []
    for _ in t["steps"]:
        factors.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return {"factor": torch.tensor(factors)}


def computed(operations, case, t):
    """The tensors that a case asks for."""
    outputs = operations[case["operation"]](t, case["scalars"])
    if outputs is None:
        return {}
    wanted = [name.removeprefix("grad/") for name in case["expected"] if name.startswith("grad/")]
    result = {f"out/{name}": outputs[name] for name in outputs if f"out/{name}" in case["expected"]}
    if wanted:
        seeds = {name: t[f"d{name}"] for name in outputs if f"d{name}" in t}
        seeds = seeds or {"loss": torch.ones_like(outputs["loss"])}
        ends, leaves = [outputs[name] for name in seeds], [t[name] for name in wanted]
        grads = torch.autograd.grad(ends, leaves, list(seeds.values()), allow_unused=True, materialize_grads=True)
        result |= {f"grad/{name}": g for name, g in zip(wanted, grads, strict=True)}
    return {name: value.detach().contiguous().clone() for name, value in result.items()}


def run(operations, vectors, results, dtype="float32"):
    """operations: by name, of tensors and scalars, giving outputs; None where there is no answer."""
    torch.set_num_threads(1)
    results.mkdir()
    files = {}
    for case in json.loads((vectors / "manifest.json").read_text())["cases"]:
        if case["operation"] not in operations:
            continue
        stored = safetensors.torch.load_file(vectors / f"{case['id']}.safetensors")
        t = {name: stored[f"{case['name']}/in/{name}"] for name in case["inputs"]}
        t = {n: torch.nn.Parameter(a.to(getattr(torch, dtype))) if a.is_floating_point() else a for n, a in t.items()}
        found = {f"{case['name']}/{name}": value for name, value in computed(operations, case, t).items()}
        files.setdefault(case["id"], {}).update(found)
    for id, tensors in files.items():
        safetensors.torch.save_file(tensors, results / f"{id}.safetensors")
