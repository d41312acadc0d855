"""The stand-in's arrays: NumPy storage behind a wall, as device memory is behind a bus.

An `ndarray` here is not a NumPy array and never turns into one unasked. Host arrays do not get in unasked either.
What crosses the wall is counted in `copies`.
"""

import functools
import inspect
import sys
from collections import namedtuple

import numpy as np


class Copies:
    """How often data crossed between host and device since the last reset.

    to_device: host arrays sent. A scalar or 0-d array is not counted: CuPy passes it with the kernel.
    to_host: arrays fetched, by get() and by all that needs a value on the host: float(a), `if a:`, print(a).
    syncs: waits for the device without an array fetched: the size of what a mask or nonzero() selects.
    """

    def __init__(self):
        self.reset()

    def reset(self):
        self.to_device = self.to_host = self.syncs = 0

    def __repr__(self):
        return f"Copies(to_device={self.to_device}, to_host={self.to_host}, syncs={self.syncs})"


copies = Copies()
SCALARS = (int, float, complex, np.generic)
Flags = namedtuple("Flags", "c_contiguous f_contiguous owndata")


# ---- through the wall: what goes to NumPy, and what comes back ----


def memory(value):
    """The storage of a device array. Nothing else will do."""
    if type(value) is not ndarray:
        raise TypeError(f"Unsupported type {type(value)}")
    return value._memory


def operand(value):
    """The storage of a device array; a scalar as it is."""
    if type(value) is ndarray:
        return value._memory
    if isinstance(value, SCALARS):
        return value
    raise TypeError(f"Unsupported type {type(value)}")


def optional(value):
    return None if value is None else operand(value)


def setting(value):
    """An axis, a shape, a dtype: anything but an array of the host. (NumPy itself refuses arrays of the device.)"""
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}")
    return value


def part(value):
    """A part of an index. A mask makes the host wait for a size; a list is sent to the device."""
    if type(value) is ndarray:
        copies.syncs += value._memory.dtype.kind == "b"
        return value._memory
    if isinstance(value, list):
        copies.to_device += 1
    elif not (value is None or value is Ellipsis or isinstance(value, (slice, int, np.integer))):
        raise TypeError(f"Unsupported type {type(value)} in an index")
    return value


def parts(key):
    return tuple(map(part, key)) if isinstance(key, tuple) else (part(key),)


def wrap(value):
    """NumPy's result as the device would give it: a scalar becomes a 0-d array."""
    if value is None:
        return None
    if isinstance(value, (tuple, list)):
        return (list if isinstance(value, list) else tuple)(map(wrap, value))
    array = object.__new__(ndarray)
    array._memory = np.asarray(value)
    return array


# ---- functions and methods, from their signatures ----

TAKES_ARRAYS = """
    A a a1 a2 a_max a_min array ary b condition dst fill_value indices m max min out prototype self src v val value
    weights x y
"""
ARRAYS = frozenset(TAKES_ARRAYS.split())  # the parameters of these names


def device(stub, function, answer=wrap):
    """NumPy's `function` with the signature of `stub`, on device arrays.

    The first parameter must be a device array if it takes arrays at all. A result in `out`, or one that is the first
    argument itself, comes back as the very object that was passed.
    """
    names = list(inspect.signature(stub).parameters)
    opens = {name: optional if name in ARRAYS else setting for name in names}
    if names[0] in ARRAYS:
        opens[names[0]] = memory
    elif names[0] == "tup":
        opens["tup"] = lambda arrays: [memory(a) for a in arrays]
    opens_by_position = list(opens.values())

    @functools.wraps(stub)
    def call(*args, **kwargs):
        stub(*args, **kwargs)  # raises where the signature does not fit
        positional = [opened(value) for opened, value in zip(opens_by_position, args, strict=False)]
        result = function(*positional, **{name: opens[name](value) for name, value in kwargs.items()})
        if kwargs.get("out") is not None:
            return kwargs["out"]
        if positional and result is positional[0]:
            return args[0]
        return answer(result)

    return call


def functions(table, source, answer=wrap):
    """The functions of `source` (a module or class of NumPy's) that the stubs in the class `table` name."""
    stubs = {name: stub for name, stub in vars(table).items() if not name.startswith("_")}
    return {name: device(stub, getattr(source, name), answer) for name, stub in stubs.items()}


class ufunc:
    """An elementwise function with CuPy's keywords; `at` for add alone."""

    # NumPy has these loops for complex numbers, CuPy has not.
    NOT_COMPLEX = frozenset({"logical_and", "logical_or", "logical_xor", "logical_not"})
    # What the device can add atomically: not complex numbers.
    ATOMIC = frozenset({"int32", "int64", "float16", "float32", "float64", "uint32", "uint64"})

    def __init__(self, function):
        self._function = function
        self._not_complex = function.__name__ in self.NOT_COMPLEX

    def __call__(self, *args, out=None, dtype=None, casting="same_kind"):
        if len(args) > self._function.nin:
            *args, out = args
        inputs = list(map(operand, args))
        if self._not_complex and any(map(np.iscomplexobj, inputs)):
            raise TypeError(f"cupy.{self._function.__name__} has no loop for complex numbers")
        into = None if out is None else memory(out)
        result = self._function(*inputs, out=into, dtype=dtype, casting=casting)
        return wrap(result) if out is None else out

    def at(self, a, indices, b=None):
        if self._function is not np.add:
            raise NotImplementedError(f"`cupy_{self._function.__name__}.at` is not supported yet")
        if memory(a).dtype.name not in self.ATOMIC:
            raise TypeError(f"cupy.add.at only supports {', '.join(sorted(self.ATOMIC))} as data type")
        np.add.at(a._memory, parts(indices), operand(b))


# ---- the array ----


class ndarray:
    __slots__ = ("__weakref__", "_memory")
    __hash__ = None
    __array_ufunc__ = None  # NumPy's own ufuncs raise; its operators leave the operation to the ones below

    def __init__(self, shape, dtype=float):
        self._memory = np.empty(shape, dtype)

    @property
    def flags(self):
        """Read-only facts. CuPy has no writeable flag."""
        return Flags(*(getattr(self._memory.flags, name) for name in Flags._fields))

    def reshape(self, *shape, order="C"):
        return wrap(self._memory.reshape(*shape, order=order))

    def transpose(self, *axes):
        return wrap(self._memory.transpose(*axes))

    def __len__(self):
        return len(self._memory)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __getitem__(self, key):
        key = parts(key)
        found = self._memory[key]
        return wrap(found if isinstance(found, np.ndarray) else self._memory[(*key, ...)])  # one element: a 0-d view

    def __setitem__(self, key, value):
        self._memory[parts(key)] = operand(value)

    # To the host, each a copy. There is no __index__, as in CuPy.

    def get(self):
        copies.to_host += 1
        return self._memory.copy()

    def item(self):
        return self.get().item()

    def tolist(self):
        return self.get().tolist()

    def __bool__(self):
        return bool(self.get())

    def __int__(self):
        return int(self.get())

    def __float__(self):
        return float(self.get())

    def __complex__(self):
        return complex(self.get())

    def __repr__(self):
        return repr(self.get())

    def __str__(self):
        return str(self.get())

    def __format__(self, spec):
        return format(self.get(), spec)

    def __reduce__(self):
        return from_host, (self.get(),)

    # From the host.

    def set(self, arr):
        if type(arr) is not np.ndarray or (arr.shape, arr.dtype) != (self.shape, self.dtype):
            raise TypeError("set() takes a NumPy array of the same shape and dtype")
        copies.to_device += 1
        self._memory[...] = arr

    # On the device.

    def __copy__(self):
        return wrap(self._memory.copy())

    def __deepcopy__(self, memo):
        return wrap(self._memory.copy())

    def __pos__(self):
        return self

    def nonzero(self):
        copies.syncs += 1
        return wrap(self._memory.nonzero())

    # Refused.

    def __array__(self, dtype=None, copy=None):
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` to construct a NumPy array explicitly."
        )

    def __array_function__(self, function, types, args, kwargs):
        raise TypeError(f"numpy.{function.__name__} does not take device arrays: call xp.{function.__name__}")


class Methods:
    """Signatures of the methods that NumPy can answer. Where CuPy's order differs from NumPy's, names are required."""

    def all(self, axis=None, *, out=None, keepdims=False): ...
    def any(self, axis=None, *, out=None, keepdims=False): ...
    def argmax(self, axis=None, *, out=None, keepdims=False): ...
    def argmin(self, axis=None, *, out=None, keepdims=False): ...
    def argsort(self, axis=-1): ...
    def astype(self, dtype, order="K", *, copy=True): ...
    def clip(self, min=None, max=None, *, out=None): ...
    def conj(self): ...
    def conjugate(self): ...
    def copy(self, order="C"): ...
    def cumprod(self, axis=None, dtype=None, *, out=None): ...
    def cumsum(self, axis=None, dtype=None, *, out=None): ...
    def diagonal(self, offset=0, axis1=0, axis2=1): ...
    def dot(self, b, *, out=None): ...
    def fill(self, value): ...
    def flatten(self, order="C"): ...
    def max(self, axis=None, *, out=None, keepdims=False): ...
    def mean(self, axis=None, dtype=None, *, out=None, keepdims=False): ...
    def min(self, axis=None, *, out=None, keepdims=False): ...
    def prod(self, axis=None, dtype=None, *, out=None, keepdims=False): ...
    def ravel(self, order="C"): ...
    def repeat(self, repeats, axis=None): ...
    def sort(self, axis=-1): ...
    def squeeze(self, axis=None): ...
    def std(self, axis=None, dtype=None, *, out=None, ddof=0, keepdims=False): ...
    def sum(self, axis=None, dtype=None, *, out=None, keepdims=False): ...
    def swapaxes(self, axis1, axis2): ...
    def take(self, indices, axis=None, *, out=None): ...
    def trace(self, offset=0, axis1=0, axis2=1, dtype=None, *, out=None): ...
    def var(self, axis=None, dtype=None, *, out=None, ddof=0, keepdims=False): ...
    def view(self, dtype): ...


OPERATORS = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "truediv": np.true_divide,
    "floordiv": np.floor_divide,
    "mod": np.remainder,
    "pow": np.power,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "lshift": np.left_shift,
    "rshift": np.right_shift,
    "matmul": np.matmul,
}
COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
UNARY = {"neg": np.negative, "abs": np.absolute, "invert": np.invert}


def _operators():
    """The dunder methods of the tables above. CuPy has no __imatmul__: `a @= b` makes a new array."""

    def forward(function):
        return lambda self, other: wrap(function(self._memory, operand(other)))

    def reflected(function):
        return lambda self, other: wrap(function(operand(other), self._memory))

    def in_place(function):
        def update(self, other):
            function(self._memory, operand(other), out=self._memory)
            return self

        return update

    def unary(function):
        return lambda self: wrap(function(self._memory))

    for name, function in OPERATORS.items():
        yield f"__{name}__", forward(function)
        yield f"__r{name}__", reflected(function)
        if name != "matmul":
            yield f"__i{name}__", in_place(function)
    for name, function in COMPARISONS.items():
        yield f"__{name}__", forward(function)
    for name, function in UNARY.items():
        yield f"__{name}__", unary(function)


def _properties():
    def fact(name):
        return property(lambda self: getattr(self._memory, name))

    def view(name):
        return property(lambda self: wrap(getattr(self._memory, name)))

    yield from ((name, fact(name)) for name in ("shape", "dtype", "ndim", "size", "nbytes", "itemsize", "strides"))
    yield from ((name, view(name)) for name in ("T", "mT", "real", "imag"))


for _name, _member in {**functions(Methods, np.ndarray), **dict(_operators()), **dict(_properties())}.items():
    setattr(ndarray, _name, _member)


# ---- between host and device ----


def from_host(obj, dtype=None, order="K", ndmin=0):
    """A host array, a scalar or lists of scalars, sent to the device."""
    values = np.array(obj, dtype=dtype, order=order, ndmin=ndmin)
    if values.dtype.char not in "?bhilqBHILQefdFD":
        raise ValueError(f"Unsupported dtype {values.dtype}")
    copies.to_device += values.ndim > 0
    return wrap(values)


def array(obj, dtype=None, copy=True, order="K", *, ndmin=0):
    if type(obj) is not ndarray:
        return from_host(obj, dtype, order, ndmin)
    values = np.array(obj._memory, dtype=dtype, copy=copy or None, order=order, ndmin=ndmin)
    return obj if values is obj._memory else wrap(values)


def asarray(a, dtype=None):
    return array(a, dtype, copy=False)


def asnumpy(a):
    return a.get() if type(a) is ndarray else np.asarray(a)


def get_array_module(*args):
    return sys.modules[__package__] if any(type(x) is ndarray for x in args) else np


# ---- what fits no table ----


def nonzero(a):
    return a.nonzero()


def result_type(*arrays_and_dtypes):
    return np.result_type(*(x.dtype if type(x) is ndarray else setting(x) for x in arrays_and_dtypes))
