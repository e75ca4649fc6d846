"""A stand-in for CuPy that refuses what CuPy refuses, for machines without a GPU.

`StrictArray` keeps its values in host memory but behaves like `cupy.ndarray`: it does not mix with
NumPy arrays, gives 0-d arrays where NumPy gives scalars, and has only CuPy's methods and keywords.
`strict` stands for the `cupy` module. Whatever would make the host wait for the device (`float(x)`,
`x.item()`, a boolean-mask index, ...) raises `SyncError` outside `with synchronisation():`.
The names, parameters and ufunc methods that exist are read from cupy_names.txt.
"""

import collections
import contextlib
import functools
import importlib
import operator
import pathlib
import types

import numpy as np

ATTRIBUTES = {
    "T",
    "mT",
    "shape",
    "dtype",
    "ndim",
    "size",
    "nbytes",
    "itemsize",
    "strides",
    "real",
    "imag",
    "base",
}
ARRAYS = {"T", "mT", "real", "imag", "base"}  # those of them that are arrays
DTYPE_CHARS = "?bBhHiIlLqQefdFD"
SYNC_METHODS = {
    "item",
    "tolist",
    "tobytes",
    "tofile",
    "dump",
    "dumps",
    "nonzero",
    "compress",
    "put",
    "choose",
}
SYNC_FUNCTIONS = {
    "argwhere",
    "bincount",
    "choose",
    "compress",
    "extract",
    "flatnonzero",
    "nonzero",
    "put",
    "unique",
}
UFUNC_KEYWORDS = {"out", "dtype", "casting"}
UNSUPPORTED = {"astype": {"casting", "subok"}, "view": {"type"}}  # parameters that CuPy has but refuses
OPERANDS = {"where": 3, "copyto": 2, "dot": 2, "inner": 2, "kron": 2, "outer": 2, "tensordot": 2, "vdot": 2}
TRUTH_ARRAYS = {"allclose", "array_equal", "array_equiv"}  # a bool in NumPy, a 0-d array in CuPy
ARITHMETIC = [
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "lshift",
    "rshift",
    "and",
    "or",
    "xor",
]
COMPARISONS_AND_UNARY = ["lt", "le", "eq", "ne", "gt", "ge", "neg", "pos", "abs", "invert"]

_syncs = {"depth": 0, "count": 0, "capturing": False}
VIEWS = {"reshape", "transpose", "view"}  # what a capture allows: nothing is queued or allocated


class SyncError(RuntimeError):
    """The host would wait for the device outside `synchronisation()`."""


class CaptureError(RuntimeError):
    """An array operation while a CUDA graph is captured: CuPy would allocate memory that the graph does not
    own."""


@contextlib.contextmanager
def only_views():
    """Refuse array operations, as while a CUDA graph is captured."""
    _syncs["capturing"] = True
    try:
        yield
    finally:
        _syncs["capturing"] = False


def _require_no_capture(what):
    if _syncs["capturing"]:
        raise CaptureError(f"{what} during a capture")


@contextlib.contextmanager
def synchronisation():
    """Allow what waits for the device; each entry adds one to `sync_count()`."""
    _syncs["count"] += 1
    _syncs["depth"] += 1
    try:
        yield
    finally:
        _syncs["depth"] -= 1


def sync_count():
    """How often `synchronisation()` was entered since `reset_syncs()`."""
    return _syncs["count"]


def reset_syncs():
    """Set `sync_count()` back to zero."""
    _syncs["count"] = 0


def _require_sync(what):
    if not _syncs["depth"]:
        raise SyncError(f"{what} waits for the device: do it inside synchronisation()")


def _read_names():
    """The two sections of cupy_names.txt, each as {name: (kind, further words)}."""
    sections = {}
    for line in pathlib.Path(__file__).with_name("cupy_names.txt").read_text().splitlines():
        if line.startswith("["):
            section = sections.setdefault(line.strip("[]"), {})
        elif not line.startswith("#"):
            name, kind, *words = line.split()
            section[name] = (kind, words)
    return sections["cupy"], sections["cupy.ndarray"]


MODULE_NAMES, ARRAY_NAMES = _read_names()


def _host(value, seen):
    """`value` with every StrictArray replaced by its memory, which `seen` maps back to it."""
    if isinstance(value, StrictArray):
        seen[id(value._a)] = value
        return value._a
    if isinstance(value, np.ndarray):
        raise TypeError("a NumPy array does not mix with device arrays: copy it over with asarray()")
    if type(value) in (list, tuple):
        return type(value)(_host(item, seen) for item in value)
    return value


def _device(value, seen):
    """`value` with arrays and scalars wrapped; memory that came in goes out as the same StrictArray."""
    if isinstance(value, np.ndarray):
        return seen[id(value)] if id(value) in seen else StrictArray(value)
    if isinstance(value, np.generic):
        return StrictArray(np.asarray(value))
    if isinstance(value, (list, tuple)):
        items = [_device(item, seen) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value


def _call(function, *args, **kwargs):
    """Call a NumPy function on the memory of the device arrays among its arguments."""
    if getattr(function, "__name__", "") not in VIEWS:
        _require_no_capture(getattr(function, "__name__", str(function)))
    seen = {}
    args = [_host(item, seen) for item in args]
    kwargs = {key: _host(item, seen) for key, item in kwargs.items() if key != "where" or item is not None}
    return _device(function(*args, **kwargs), seen)


def _check_operands(name, operands):
    for operand in operands:
        if not isinstance(operand, (StrictArray, bool, int, float, complex, np.generic)):
            raise TypeError(f"{name}: {type(operand).__name__} does not mix with device arrays")


def _check_out(name, *arrays):
    for array in arrays:
        if array is not None and not isinstance(array, StrictArray):
            raise TypeError(f"{name}: out must be a device array, not {type(array).__name__}")


def _bind(name, words, args, kwargs, array=None):
    """The arguments by parameter, or TypeError for what CuPy does not take.

    The words are the parameters in cupy_names.txt: `a`, `*args`, `=keyword_only`, `**kwargs`.
    """
    positional = [word for word in words if word[0] not in "*="]
    wrong = set(kwargs) - {word.lstrip("=") for word in words}
    if wrong and not any(word.startswith("**") for word in words):
        raise TypeError(f"CuPy's {name} has no parameter {sorted(wrong)}")
    if len(args) > len(positional) and not any(word[0] == "*" and word[1] != "*" for word in words):
        raise TypeError(f"CuPy's {name} takes at most {len(positional)} positional arguments")
    bound = dict(zip(positional, args, strict=False)) | kwargs
    if any(bound.get(key) is not None for key in UNSUPPORTED.get(name, ())):
        raise TypeError(f"CuPy's {name} does not support {sorted(UNSUPPORTED[name])}")
    out = bound.get("out")
    _check_out(name, out)
    if name == "take" and out is not None and out.dtype != getattr(bound.get("a", array), "dtype", None):
        raise TypeError("take: output dtype mismatch")
    return bound


_Pointer = collections.namedtuple("_Pointer", "ptr")


class StrictArray:
    """Wraps the NumPy array `_a`; behaves like `cupy.ndarray` in what it refuses."""

    __slots__ = ("_a",)
    __array_ufunc__ = None  # NumPy's ufuncs raise TypeError, NumPy arrays leave operators to this class
    __hash__ = None

    def __init__(self, host):
        if type(host) is not np.ndarray:
            raise TypeError(f"a StrictArray wraps a NumPy array, not {type(host).__name__}")
        if host.dtype.char not in DTYPE_CHARS and host.dtype.name != "bfloat16":
            raise ValueError(f"Unsupported dtype {host.dtype}")
        self._a = host

    def __array__(self, *args, **kwargs):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Use `.get()` explicitly.")

    def __array_function__(self, func, types, args, kwargs):
        raise TypeError(f"numpy.{func.__name__} was called on a device array: use the array's namespace")

    def __getattr__(self, name):
        kind, words = ARRAY_NAMES.get(name, (None, ()))
        if kind == "method" and hasattr(np.ndarray, name):
            return functools.partial(self._method, name, words)
        raise AttributeError(f"cupy.ndarray.{name} " + ("is not modelled here" if kind else "does not exist"))

    def _method(self, name, words, *args, **kwargs):
        _bind(name, words, args, kwargs, self)
        if name in SYNC_METHODS:
            _require_sync(f".{name}()")
        return _call(getattr(np.ndarray, name), self, *args, **kwargs)

    @property
    def data(self):
        """An object whose `ptr` is the address of the first element."""
        return _Pointer(self._a.__array_interface__["data"][0])

    @property
    def flags(self):
        """The flags that CuPy has: `c_contiguous`, `f_contiguous` and `owndata`."""
        return types.SimpleNamespace(
            **{name: getattr(self._a.flags, name) for name in ("c_contiguous", "f_contiguous", "owndata")}
        )

    def get(self, stream=None, order="C", out=None, blocking=True):
        """A copy on the host, as a NumPy array; a synchronisation."""
        _require_sync(".get()")
        if out is None:
            return self._a.copy(order)
        if out.shape != self.shape or out.dtype != self.dtype:
            raise ValueError("get: out must have the array's shape and dtype")
        out[...] = self._a
        return out

    def set(self, arr, stream=None):
        """Copy a NumPy array of the same shape and dtype into this contiguous array."""
        if not isinstance(arr, np.ndarray) or arr.dtype != self.dtype or arr.shape != self.shape:
            raise TypeError("set: needs a NumPy array of the array's shape and dtype")
        if not (self.flags.c_contiguous or self.flags.f_contiguous):
            raise RuntimeError("Cannot set to non-contiguous array")
        self._a[...] = arr

    def _index(self, key):
        """The NumPy index for `key`, and whether it holds arrays (so that the result is a copy)."""
        parts, advanced = [], False
        for part in key if isinstance(key, tuple) else (key,):
            if isinstance(part, np.ndarray):
                raise TypeError("a NumPy array cannot index a device array")
            if isinstance(part, (list, tuple)):
                part = array(part, dtype=None if part else int)
            if isinstance(part, (StrictArray, bool, np.bool_)):
                advanced = True
                part = np.asarray(getattr(part, "_a", part))
                if part.dtype.kind == "b":
                    _require_sync("a boolean-mask index")
            parts.append(part)
        if not any(part is Ellipsis for part in parts):
            parts.append(Ellipsis)  # then a single element is a 0-d view too
        return tuple(parts), advanced

    def __getitem__(self, key):
        index, advanced = self._index(key)
        if advanced:
            _require_no_capture("an index that copies")
        return StrictArray(self._a[index].copy() if advanced else self._a[index])

    def __setitem__(self, key, value):
        _require_no_capture("setitem")
        _check_operands("setitem", [value])
        self._a[self._index(key)[0]] = _host(value, {})

    def __len__(self):
        return len(self._a)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __repr__(self):
        return f"StrictArray({self._a!r})"

    def __reduce__(self):
        return StrictArray, (self.get(),)

    def __deepcopy__(self, memo):
        return self.copy()


def _operator(name, reflected=False):
    function = getattr(operator, f"__{name}__")

    def method(self, *other):
        _check_operands(name, other)
        return _call(function, *other, self) if reflected else _call(function, self, *other)

    return method


def _conversion(to):
    def method(self):
        _require_sync(f"{to.__name__}()")
        return to(self._a)

    return method


def _add_operators():
    """Give StrictArray the operators of cupy.ndarray, which has no `__imatmul__` and no `__index__`."""
    for name in (*ARITHMETIC, *COMPARISONS_AND_UNARY, "matmul", *(f"i{name}" for name in ARITHMETIC)):
        setattr(StrictArray, f"__{name}__", _operator(name))
    for name in (*ARITHMETIC, "matmul"):
        setattr(StrictArray, f"__r{name}__", _operator(name, reflected=True))
    for to in (bool, int, float, complex):
        setattr(StrictArray, f"__{to.__name__}__", _conversion(to))


def _add_attributes():
    """Give StrictArray the attributes of cupy.ndarray as properties, which are looked up fast."""

    def attribute(name):
        return property(lambda self: _device(getattr(self._a, name), {}))

    def plain(name):  # neither an array nor a scalar
        return property(operator.attrgetter(f"_a.{name}"))

    for name in ATTRIBUTES:
        if ARRAY_NAMES.get(name, ("",))[0] == "attribute":
            setattr(StrictArray, name, (attribute if name in ARRAYS else plain)(name))


_add_operators()
_add_attributes()


def _call_ufunc(name, words, *args, **kwargs):
    """Call a CuPy ufunc: arrays or scalars in; of the keywords only out, dtype and casting."""
    inputs, most = int(words[0]), int(words[1])
    if not inputs <= len(args) <= most or set(kwargs) - UFUNC_KEYWORDS:
        raise TypeError(f"CuPy's {name}: wrong arguments ({len(args)} positional, {sorted(kwargs)})")
    out = kwargs.get("out")
    _check_out(name, *args[inputs:], *(out if isinstance(out, tuple) else (out,)))
    _check_operands(name, args[:inputs])
    return _call(getattr(np, name), *args, **kwargs)


def _call_function(name, words, *args, **kwargs):
    """Call a CuPy function that is no ufunc, with the parameters that CuPy's has."""
    bound = _bind(name, words, args, kwargs)
    if name in SYNC_FUNCTIONS or (name == "where" and len(bound) == 1):
        _require_sync(f"{name}()")
    if name == "einsum" and set(kwargs) - {"dtype", "optimize"}:
        raise TypeError(f"CuPy's einsum takes only dtype= and optimize=, not {sorted(kwargs)}")
    first = bound.get("a", bound.get("x"))
    if ARRAY_NAMES.get(name, ("",))[0] == "method" and not isinstance(first, StrictArray):
        raise TypeError(f"{name} calls the method of a device array, not of {type(first).__name__}")
    _check_operands(name, args[: OPERANDS.get(name, 0)])
    result = _call(getattr(np, name), *args, **kwargs)
    return StrictArray(np.asarray(result)) if name in TRUTH_ARRAYS else result


def array(obj, dtype=None, copy=True, order="K", subok=False, ndmin=0, *, blocking=False):
    """`cupy.array`: takes host data too, and always copies that."""

    def bare(value):
        if isinstance(value, (list, tuple)):
            return [bare(item) for item in value]
        return value._a if isinstance(value, StrictArray) else value

    _require_no_capture("array()")
    copy = True if copy or not isinstance(obj, StrictArray) else None
    host = np.array(bare(obj), dtype=dtype, copy=copy, order=order, ndmin=ndmin)
    return obj if host is getattr(obj, "_a", None) else StrictArray(host)


def asarray(a, dtype=None, order=None, *, copy=None, blocking=False):
    """`cupy.asarray`: a device array that fits already is returned itself."""
    return array(a, dtype, bool(copy), order or "K")


def asnumpy(a, stream=None, order="C", out=None, *, blocking=True):
    """`cupy.asnumpy`: a copy on the host; a synchronisation."""
    return a.get(stream, order, out) if isinstance(a, StrictArray) else np.array(a, order=order)


class StrictModule:
    """Stands for the `cupy` module; `calls` counts the calls by function name."""

    ndarray = StrictArray
    _own = {"array": array, "asarray": asarray, "asanyarray": asarray, "asnumpy": asnumpy}

    def __init__(self):
        self.calls = collections.Counter()

    def __getattr__(self, name):
        kind, words = MODULE_NAMES.get(name, (None, ()))
        if name in self._own:
            return self._counted(name, self._own[name])
        if kind not in ("ufunc", "function", "same") or not hasattr(np, name):
            raise AttributeError(f"cupy.{name} " + ("is not modelled here" if kind else "does not exist"))
        if kind == "same":
            return getattr(np, name)
        call = _call_ufunc if kind == "ufunc" else _call_function
        function = self._counted(name, functools.partial(call, name, words))
        for method in words[2:] if isinstance(getattr(np, name), np.ufunc) and kind == "ufunc" else ():
            of_numpy = getattr(getattr(np, name), method)
            setattr(function, method, self._counted(f"{name}.{method}", functools.partial(_call, of_numpy)))
        return function

    def _counted(self, name, function):
        def counted(*args, **kwargs):
            self.calls[name] += 1
            return function(*args, **kwargs)

        counted.__name__ = name
        return counted


strict = StrictModule()


def names_are_current():
    """The names in cupy_names.txt that the installed CuPy lacks; empty where CuPy is not importable."""
    try:
        cupy = importlib.import_module("cupy")
    except ImportError:
        return set()
    return {f"cupy.{name}" for name in MODULE_NAMES if not hasattr(cupy, name)} | {
        f"cupy.ndarray.{name}" for name in ARRAY_NAMES if not hasattr(cupy.ndarray, name)
    }
