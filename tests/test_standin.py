"""The strict device stand-in refuses what CuPy refuses, counts what crosses, and offers nothing that CuPy lacks."""

import copy
import importlib.util
import inspect
import itertools
import operator
import pickle
import sys
from pathlib import Path

import cupy_names
import numpy as np
import pytest

needs_cupy = pytest.mark.skipif(not cupy_names.real_cupy_installed(), reason="real CuPy is not installed")


def load_standin():
    """The stand-in under a name of its own, so that these tests run whatever `cupy` is."""
    folder = str(cupy_names.STANDIN / "cupy")
    path = f"{folder}/__init__.py"
    spec = importlib.util.spec_from_file_location("_standin", path, submodule_search_locations=[folder])
    module = sys.modules["_standin"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


xp = load_standin()


@pytest.fixture(autouse=True)
def fresh_counters():
    xp.copies.reset()


@pytest.fixture
def a():
    return xp.arange(12.0).reshape(3, 4)


def counted():
    return xp.copies.to_device, xp.copies.to_host, xp.copies.syncs


# ---- what it refuses ----

HOST = np.ones((3, 4))
MIXTURES = {
    "device + host": lambda a: a + HOST,
    "host + device": lambda a: HOST + a,
    "host += device": lambda a: operator.iadd(HOST.copy(), a),
    "device -= host": lambda a: operator.isub(a, HOST),
    "device @ host": lambda a: a @ HOST.T,
    "host @ device": lambda a: HOST.T @ a,
    "device == host": lambda a: a == HOST,
    "host < device": lambda a: HOST < a,  # noqa: SIM300
    "device + list": lambda a: a + [1.0] * 4,
    "device == None": lambda a: a == None,  # noqa: E711
    "index": lambda a: a[np.array([0, 1])],
    "index in a tuple": lambda a: a[:, np.array([0, 1])],
    "mask": lambda a: a[HOST > 0],
    "device[...] = host": lambda a: operator.setitem(a, ..., HOST),
    "device[...] = list": lambda a: operator.setitem(a, ..., [1.0] * 4),
    "host[...] = device": lambda a: operator.setitem(HOST.copy(), ..., a),
    "host[device]": lambda a: HOST[a.astype(int)],
    "out=host": lambda a: xp.exp(a, out=HOST.copy()),
    "sum(out=host)": lambda a: xp.sum(a, axis=0, out=np.zeros(4)),
    "matmul(out=host)": lambda a: xp.matmul(a, a.T, out=np.zeros((3, 3))),
    "ufunc": lambda a: xp.maximum(a, HOST),
    "ufunc of host alone": lambda a: xp.exp(HOST),
    "function": lambda a: xp.sum(HOST),
    "function of a list": lambda a: xp.sum([1.0]),
    "where": lambda a: xp.where(a > 0, a, HOST),
    "where, condition": lambda a: xp.where(HOST > 0, a, a),
    "concatenate": lambda a: xp.concatenate([a, HOST]),
    "stack": lambda a: xp.stack((HOST, a)),
    "take": lambda a: xp.take(a, np.array([0, 1])),
    "repeat": lambda a: xp.repeat(a, np.array([1, 2, 3]), axis=0),
    "linalg": lambda a: xp.linalg.norm(HOST),
    "method": lambda a: a.dot(HOST.T),
    "add.at": lambda a: xp.add.at(a, np.array([0]), 1.0),
    "add.at, values": lambda a: xp.add.at(a, xp.arange(3), HOST),
    "set, of another dtype": lambda a: a.set(HOST.astype("float32")),
}
TO_NUMPY = {
    "asarray": lambda a: np.asarray(a),
    "array of a list": lambda a: np.array([a, a]),
    "ufunc": lambda a: np.add(a, 1.0),
    "ufunc, both": lambda a: np.add(a, HOST),
    "sum": lambda a: np.sum(a),
    "stack": lambda a: np.stack([a, a]),
    "concatenate": lambda a: np.concatenate([HOST, a]),
    "linalg": lambda a: np.linalg.norm(a),
    "testing": lambda a: np.testing.assert_array_equal(a, a),
    "zeros of its shape": lambda a: np.zeros_like(a),
    "a size": lambda a: range(a.sum()),
    "a slice": lambda a: a[: a.argmax()],
}


NO_DEVICE_ARRAY = r"Implicit conversion to a NumPy array is not allowed|operand 'ndarray' does not support ufuncs"
NO_HOST_ARRAY = (
    r"Unsupported type <class '(numpy\.ndarray|list|NoneType)'>|set\(\) takes a NumPy array of the same shape"
)
NO_NUMBER = r"'ndarray' object cannot be interpreted as an integer|slice indices must be integers"
NO_FUNCTION = r"numpy\.\w+ does not take device arrays: call xp\."


@pytest.mark.parametrize("mix", MIXTURES.values(), ids=MIXTURES)
def test_host_and_device_do_not_mix(a, mix):
    with pytest.raises(TypeError, match=f"^({NO_DEVICE_ARRAY}|{NO_HOST_ARRAY})"):
        mix(a)
    assert counted() == (0, 0, 0)


@pytest.mark.parametrize("use", TO_NUMPY.values(), ids=TO_NUMPY)
def test_no_device_array_becomes_a_numpy_array_unasked(a, use):
    with pytest.raises(TypeError, match=f"^({NO_DEVICE_ARRAY}|{NO_FUNCTION}|{NO_NUMBER})"):
        use(a)
    assert counted() == (0, 0, 0)


def test_the_message_is_cupys(a):
    with pytest.raises(TypeError, match="Implicit conversion to a NumPy array is not allowed"):
        a.__array__()
    with pytest.raises(TypeError, match=r"Unsupported type <class 'numpy\.ndarray'>"):
        a * HOST


@pytest.mark.parametrize("name", ["errstate", "frompyfunc", "geterr", "nditer", "vecdot", "no_such_name"])
def test_names_that_cupy_lacks(name):
    assert not hasattr(xp, name)


def test_keywords_that_cupy_lacks(a):
    for call in (
        lambda: xp.sum(a, where=a > 0),
        lambda: xp.max(a, initial=0.0),
        lambda: a.sum(where=a > 0),
        lambda: a.max(initial=0.0),
        lambda: a.argmax(dtype=int),
        lambda: xp.exp(a, where=a > 0),
        lambda: xp.add(a, 1.0, order="C"),
        lambda: xp.take(a, xp.arange(2), mode="clip"),
        lambda: xp.matmul(a, a.T, where=True),
        lambda: xp.matmul(a, a.T, a),
    ):
        with pytest.raises(TypeError, match=r"^\S+ (got an unexpected keyword argument|takes .* positional argument)"):
            call()


def test_arrays_have_no_writeable_flag(a):
    assert a.flags.c_contiguous
    assert not a.T.flags.c_contiguous
    assert not hasattr(a, "setflags")
    assert not hasattr(a.flags, "writeable")
    with pytest.raises(AttributeError):
        a.flags.writeable = False


def test_what_the_device_cannot_do(a):
    with pytest.raises(TypeError, match=r"add\.at only supports"):
        xp.add.at(a.astype(complex), xp.arange(3), 1.0)
    with pytest.raises(NotImplementedError):
        xp.multiply.at(a, xp.arange(3), 2.0)
    with pytest.raises(TypeError, match="complex"):
        xp.logical_not(a.astype(complex))
    with pytest.raises(ValueError, match="Unsupported dtype"):
        xp.asarray(np.array(["text"]))
    with pytest.raises(TypeError, match="integer"):
        xp.zeros(a.argmax())
    with pytest.raises(TypeError, match="unhashable"):
        hash(a)


# ---- what it counts ----


def test_copies_are_counted(a):
    b = xp.asarray(HOST)
    xp.array([1.0, 2.0])
    assert counted() == (2, 0, 0)
    b.set(HOST)
    assert counted() == (3, 0, 0)
    for fetch in (a.get, a.tolist, lambda: xp.asnumpy(a), lambda: str(a), lambda: repr(a), lambda: pickle.dumps(a)):
        fetch()
    assert counted() == (3, 6, 0)
    one = a[0, 1]
    assert (float(one), int(one), complex(one), bool(one), one.item(), f"{one:.1f}") == (1, 1, 1, True, 1, "1.0")
    assert counted() == (3, 12, 0)


def test_masks_wait_for_the_device(a):
    assert a[a > 5].shape == (6,)
    a[a > 5] = 0.0
    xp.nonzero(a)
    assert counted() == (0, 0, 3)


def test_what_stays_on_the_device_is_not_counted(a):
    xp.asarray(a)
    xp.asarray(1.5)  # CuPy fills a 0-d array with it: no copy
    b = (2.0 * a + np.float32(1)) @ xp.ones((4, 2))
    b[1:] += xp.where(b[1:] > 0, b[1:], 0.0).sum(axis=0)
    b[xp.asarray(0)] = b.max()
    xp.add.at(a, (xp.arange(3), slice(1, 2)), 1.0)
    xp.linalg.svd(copy.deepcopy(a))
    assert [row.shape for row in a] == [(4,)] * 3
    assert counted() == (0, 0, 0)


def test_host_memory_is_not_shared():
    host = np.zeros(3)
    b = xp.asarray(host)
    b += 1
    fetched = b.get()
    fetched += 1
    assert host.tolist() == [0] * 3
    assert b.tolist() == [1] * 3


# ---- what it gives back ----


def test_scalars_are_0d_device_arrays(a):
    for result in (
        a.sum(),
        xp.max(a),
        a[0, 0],
        a[0][0],
        xp.argmax(a),
        xp.count_nonzero(a),
        xp.array_equal(a, a),
        abs(a[1, 1]),
    ):
        assert type(result) is xp.ndarray
        assert result.shape == ()


def test_views_share_memory_and_in_place_stays_in_place(a):
    kept = a
    a += 1
    a[1:] += 1
    a[0, 0] += 5
    a.T[3, 2] = -1.0
    a[0][1] = 9.0
    assert a is kept
    assert a.tolist() == [[6, 9, 3, 4], [6, 7, 8, 9], [10, 11, 12, -1]]
    out = xp.empty((3, 4))
    assert xp.exp(a, out=out) is out
    assert xp.multiply(a, 2.0, a) is a
    assert xp.sum(a, axis=0, out=out[0]).shape == (4,)
    assert xp.asarray(a) is a
    assert a.astype("float64", copy=False) is a


def test_a_numpy_scalar_works_on_either_side(a):
    for result in (np.float64(2) * a, a * np.float64(2), np.float64(2) - a, np.float64(2) < a):
        assert type(result) is xp.ndarray
    a32 = a.astype("float32")
    assert (2.0 * a32).dtype == "float32"
    assert (np.float64(2) * a32).dtype == "float64"


OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "lt", "le", "gt", "ge", "eq", "ne")


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_compute_what_numpy_computes(a, name):
    host, apply = a.get(), getattr(operator, name)
    for theirs, ours in ((host + 1, a + 1), (3.0, 3.0)):
        np.testing.assert_array_equal(apply(a, ours).get(), apply(host, theirs))
        np.testing.assert_array_equal(apply(ours, a + 2).get(), apply(theirs, host + 2))


def test_get_array_module(a):
    assert xp.get_array_module(HOST, a) is xp
    assert xp.get_array_module(HOST) is np
    assert xp.cuda.is_available()
    assert xp.cuda.runtime.getDeviceCount() == 1
    xp.cuda.Device().synchronize()
    xp.cuda.Stream.null.synchronize()


# ---- nothing that real CuPy lacks ----


def public(owner):
    return {name: getattr(owner, name) for name in dir(owner) if not name.startswith("_")}


def offered():
    """Each name that the stand-in has, with its parameters as (positional, keywords)."""
    own = {"copies"}
    found = {}
    for name, value in public(xp).items():
        if name in own:
            continue
        found[name] = [], []
        if isinstance(value, xp.ufunc):
            inputs = ["x"] if value._function.nin == 1 else ["x1", "x2"]
            found[name] = [*inputs, "out"], list(inspect.signature(value).parameters)[1:]
        elif inspect.isfunction(value):
            found[name] = cupy_names._parameters(value)
    for folder in ("linalg", "cuda", "cuda.runtime", "cuda.Event", "ndarray"):
        for name, value in public(operator.attrgetter(folder)(xp)).items():
            found[f"{folder}.{name}"] = cupy_names._parameters(value) if inspect.isfunction(value) else ([], [])
    found["add.at"] = cupy_names._parameters(xp.ufunc.at)
    return found


@needs_cupy
def test_every_name_and_keyword_exists_in_cupy():
    uses = {(name, frozenset(keywords) - {"*"}) for name, (_, keywords) in offered().items()}
    assert len(uses) > 200
    assert cupy_names.missing_in_cupy(uses) == []


@needs_cupy
def test_positional_parameters_are_cupys():
    ours = {name: positional for name, (positional, _) in offered().items() if positional}
    theirs = cupy_names.ask_cupy(ours)
    for name, positional in ours.items():
        order = theirs[name]["positional"]
        assert order[: len(positional)] == positional or order[0] == "*", name


@needs_cupy
def test_ufuncs_give_the_dtypes_of_cupy():
    """Whatever the stand-in computes has a loop in CuPy, whose result has the same dtype."""
    ufuncs = {name: value for name, value in public(xp).items() if isinstance(value, xp.ufunc)}
    said = {name: [loop.split("->") for loop in about["loops"]] for name, about in cupy_names.ask_cupy(ufuncs).items()}
    # Beside ml_dtypes, CuPy has loops for bfloat16 too, which is no dtype of NumPy's.
    known = set(np.typecodes["All"])
    loops = {name: [(ins, out) for ins, out in pairs if known.issuperset(ins + out)] for name, pairs in said.items()}
    for name, ufunc in ufuncs.items():
        for chars in itertools.product("?bBhHiIlLefdFD", repeat=ufunc._function.nin):
            try:
                ours = ufunc(*(xp.ones(1, char) for char in chars)).dtype
            except TypeError:
                continue  # refused here: narrower than CuPy, or the same
            fits = [out for ins, out in loops[name] if all(map(np.can_cast, chars, ins))]
            assert fits, f"cupy.{name} has no loop for {chars}"
            assert ours == np.dtype(fits[0]), f"cupy.{name} of {chars}"


@needs_cupy
def test_missing_names_are_found():
    uses = [
        ("sum", frozenset({"axis", "where"})),
        ("exp", frozenset({"where", "out"})),
        ("linalg.svd", frozenset({"hermitian"})),
        ("ndarray.astype", frozenset({"dtype", "copy"})),
        ("ndarray.setflags", frozenset()),
        ("add.at", frozenset({"indices"})),
        ("vecdot", frozenset()),
    ]
    assert cupy_names.missing_in_cupy(uses) == [
        "cupy.exp takes no where=",
        "cupy.linalg.svd takes no hermitian=",
        "cupy has no ndarray.setflags",
        "cupy.sum takes no where=",
        "cupy has no vecdot",
    ]


# ---- reading a package ----


def test_xp_uses(tmp_path: Path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "module.py").write_text(
        "y = xp.sum(x.T, axis=1, out=None) + xp.pi\nbackend.xp.linalg.svd(y, full_matrices=False)\n"
        "xp.add.at(y, 0, **z)\nother.exp(x)\nxp.zeros(3).mean(axis=0)\n"
    )
    called = {(name, keywords) for name, keywords in cupy_names.xp_uses(tmp_path) if keywords}
    assert called == {("sum", frozenset({"axis", "out"})), ("linalg.svd", frozenset({"full_matrices"}))}
    names = {name for name, _ in cupy_names.xp_uses(tmp_path)}
    assert names == {"sum", "pi", "linalg", "linalg.svd", "add", "add.at", "zeros"}
