"""Reads and writes the files of `torch.save` without torch, and without running anything that is in them.

Layout (pytorch, docs/source/notes/serialization.rst, and torch/serialization.py): a zip whose members are stored, not
compressed, below one folder: `data.pkl`, a pickle of protocol 2 in which a tensor is a call of
`torch._utils._rebuild_tensor_v2` on a storage named by a persistent id; `data/KEY`, the bytes of a storage;
`byteorder`; `version`.

A pickle is a program, and unpickling runs it. So it is not unpickled: the few opcodes that a dict of tensors is made
of are interpreted here, and of the functions that a pickle may name two are known, both of them ours.
"""

from __future__ import annotations

import collections
import errno
import io
import math
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from deptjax.errors import UserError

_STORAGES: dict[str, Any] = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_STORAGE_OF = {dtype: name for name, dtype in _STORAGES.items()}
# What a damaged zip or a broken pickle raises; RuntimeError of zips that are encrypted or of another version.
_BROKEN = (
    *(KeyError, ValueError, IndexError, TypeError, AttributeError, EOFError),
    *(struct.error, OverflowError, RuntimeError),
)
_MAX_PICKLE = 64 << 20  # of the pickle alone, which holds names and shapes


class _Global(NamedTuple):
    name: str


class _Tensor(NamedTuple):
    """A tensor as the pickle describes it; offsets and strides count elements."""

    key: str
    dtype: Any
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Storage(NamedTuple):
    key: str
    dtype: Any
    size: int


class _Foreign(Exception):
    """What is in the file is not made of tensors; the text says what was found."""


def read_torch(path: str | os.PathLike[str]) -> dict[str, np.ndarray] | np.ndarray:
    """Returns what `torch.save` wrote: a dict of tensors by name, or a single tensor, as read-only numpy arrays.

    bfloat16 comes as `ml_dtypes.bfloat16`. Tensors that share a storage share memory.

    Raises `UserError`, in one line that names the file, for one that is no such zip, is truncated or compressed, comes
    from a version of torch before 1.6, names any function or class but those of tensors, or holds anything else.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as file:
            return _read(file, path)
    except zipfile.BadZipFile:
        raise UserError(f"{path}: {_not_a_zip(path)}") from None
    except _Foreign as error:
        raise UserError(
            f"{path}: {error}; give a file that holds tensors alone, or convert it to safetensors"
        ) from None
    except (*_BROKEN, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # that of a member at a place below 0
            raise
        raise UserError(f"{path}: the file is damaged ({type(error).__name__}: {error}); fetch it again") from None


def _not_a_zip(path: Path) -> str:
    with open(path, "rb") as file:
        head = file.read(2)
    if head[:1] == b"\x80":
        return "a pickle of torch before 1.6, which is not read; torch.load it and torch.save it again"
    if head == b"PK":
        return "the file is truncated or damaged; fetch it again"
    return "not a file that torch.save wrote; give a .bin or .pt file of torch, or safetensors"


def _read(file: zipfile.ZipFile, path: Path) -> dict[str, np.ndarray] | np.ndarray:
    members = {info.filename: info for info in file.infolist()}
    pickles = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1 or len(members) != len(file.infolist()):
        raise _Foreign("the zip is not one that torch.save wrote (it holds no single data.pkl)")
    if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
        raise _Foreign("the zip is compressed, which torch.save never does")
    if sum(info.file_size for info in members.values()) > path.stat().st_size:
        raise _Foreign("the zip's members are larger than the zip")
    folder = pickles[0].removesuffix("data.pkl")
    if members[pickles[0]].file_size > _MAX_PICKLE:
        raise _Foreign(f"its pickle has {members[pickles[0]].file_size} bytes, more than names and shapes can be")
    big = folder + "byteorder" in members and file.read(folder + "byteorder") == b"big"
    value = _interpret(file.read(pickles[0]))
    storages: dict[str, bytes] = {}

    def array(tensor: _Tensor) -> np.ndarray:
        if tensor.key not in storages:
            storages[tensor.key] = file.read(f"{folder}data/{tensor.key}")
        return _view(storages[tensor.key], tensor, big)

    if isinstance(value, _Tensor):
        return array(value)
    if not isinstance(value, dict):
        raise _Foreign(f"it holds a {type(value).__name__.strip('_').lower()}, not a dict of tensors")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, _Tensor):
            raise _Foreign(f"its entry {str(name)[:80]!r} is not a tensor")
    return {name: array(tensor) for name, tensor in value.items()}


def _view(storage: bytes, tensor: _Tensor, big: bool) -> np.ndarray:
    """Returns the tensor as a view of its storage, once nothing of it lies outside."""
    dtype = tensor.dtype.newbyteorder(">") if big and tensor.dtype.itemsize > 1 else tensor.dtype
    flat = np.frombuffer(storage, dtype)
    count = math.prod(tensor.shape)
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    if tensor.offset < 0 or min((*tensor.shape, *tensor.strides), default=0) < 0:
        raise ValueError("a tensor with a negative size")
    if count and (last >= len(flat) or count > len(flat)):  # a repeated row (stride 0) could stand for terabytes
        raise ValueError(f"a tensor of shape {tensor.shape} in a storage of {len(flat)} numbers")
    if not count:
        return np.zeros(tensor.shape, tensor.dtype)
    strides = tuple(stride * flat.itemsize for stride in tensor.strides)
    return np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, strides, writeable=False)


def _interpret(program: bytes) -> Any:
    """Returns the value that a pickle describes: dicts, lists, tuples, plain values and `_Tensor`s."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        values = stack[start:]
        del stack[start:]
        return values

    def push_tuple(count: int) -> None:
        values = tuple(stack[-count:])
        del stack[-count:]
        stack.append(values)

    def put_items(values: list[Any]) -> None:
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, (str, int)):  # the hash of a tuple in a tuple in a tuple ... ends the process
                raise _Foreign(f"its pickle has a dict with a {type(key).__name__} as key")
            stack[-1][key] = value

    def strings_to_global() -> None:
        name, module = stack.pop(), stack.pop()
        stack.append(_known(f"{module}.{name}"))

    def build() -> None:
        stack.pop()  # the attributes of a dict (`_metadata` of a module's state): nothing that a tensor needs
        if not isinstance(stack[-1], collections.OrderedDict):
            raise _Foreign("its pickle sets the state of an object")

    handlers: dict[str, Callable[[Any], Any]] = {
        "MARK": lambda _: marks.append(len(stack)),
        "EMPTY_DICT": lambda _: stack.append({}),
        "EMPTY_LIST": lambda _: stack.append([]),
        "EMPTY_TUPLE": lambda _: stack.append(()),
        "NONE": lambda _: stack.append(None),
        "NEWTRUE": lambda _: stack.append(True),
        "NEWFALSE": lambda _: stack.append(False),
        "TUPLE": lambda _: stack.append(tuple(since_mark())),
        "TUPLE1": lambda _: push_tuple(1),
        "TUPLE2": lambda _: push_tuple(2),
        "TUPLE3": lambda _: push_tuple(3),
        "APPEND": lambda _: stack[-2].append(stack.pop()),
        "APPENDS": lambda _: (lambda values: stack[-1].extend(values))(since_mark()),
        "SETITEM": lambda _: put_items([stack.pop(-2), stack.pop()]),
        "SETITEMS": lambda _: put_items(since_mark()),
        "GLOBAL": lambda name: stack.append(_known(name.replace(" ", "."))),
        "STACK_GLOBAL": lambda _: strings_to_global(),
        "BINPERSID": lambda _: stack.append(_storage(stack.pop())),
        "REDUCE": lambda _: (lambda arguments: stack.append(_call(stack.pop(), arguments)))(stack.pop()),
        "BUILD": lambda _: build(),
        "MEMOIZE": lambda _: memo.__setitem__(len(memo), stack[-1]),
    }
    handlers |= dict.fromkeys(("PROTO", "FRAME"), lambda _: None)
    handlers |= dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda key: memo.__setitem__(key, stack[-1]))
    handlers |= dict.fromkeys(("BINGET", "LONG_BINGET"), lambda key: stack.append(memo[key]))
    plain = "BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE".split()
    handlers |= dict.fromkeys(plain, stack.append)

    for opcode, argument, _ in pickletools.genops(program):
        if opcode.name == "STOP":
            return stack.pop()
        if opcode.name not in handlers:
            raise _Foreign(f"its pickle has the instruction {opcode.name}, which tensors do not need")
        handlers[opcode.name](argument)
    raise EOFError("no end")


def _known(name: str) -> _Global:
    """Returns a name that may be spoken of; what it names is never looked up."""
    module, _, last = name.rpartition(".")
    if name in ("collections.OrderedDict", "torch._utils._rebuild_tensor_v2") or (
        module == "torch" and last in _STORAGES
    ):
        return _Global(name)
    raise _Foreign(f"its pickle asks for '{name}', which is not run")


def _call(function: Any, arguments: Any) -> Any:
    if function == _Global("collections.OrderedDict"):
        return collections.OrderedDict(*arguments)
    if function != _Global("torch._utils._rebuild_tensor_v2"):
        raise _Foreign("its pickle calls something that is no function")
    storage, offset, shape, strides = arguments[:4]
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or len(shape) > 32 or not all(isinstance(n, int) for n in numbers):
        raise _Foreign("its pickle describes a tensor that is none")
    if offset + math.prod(shape) > storage.size and math.prod(shape):
        raise ValueError(f"a tensor of shape {tuple(shape)} in a storage of {storage.size} numbers")
    return _Tensor(storage.key, storage.dtype, offset, tuple(shape), tuple(strides))


def _storage(reference: Any) -> _Storage:
    kind, of, key, _, size = reference
    named = isinstance(of, _Global) and of.name.endswith("Storage")
    if kind != "storage" or not named or not isinstance(key, str) or not isinstance(size, int):
        raise _Foreign("its pickle refers to something that is no storage")
    return _Storage(key, _STORAGES[of.name.rpartition(".")[2]], size)


def torch_bytes(value: np.ndarray | Mapping[str, np.ndarray]) -> bytes:
    """Returns the bytes of a file that `torch.load(weights_only=True)` reads as a tensor, or as a dict of tensors.

    The same arrays give the same bytes. Raises `ValueError` for a dtype that torch has no storage for.
    """
    arrays = [value] if isinstance(value, np.ndarray) else list(value.values())
    arrays = [np.ascontiguousarray(array).reshape(array.shape) for array in arrays]
    tensors = [_pickled_tensor(array, str(i)) for i, array in enumerate(arrays)]
    if isinstance(value, np.ndarray):
        body = tensors[0]
    else:
        items = b"".join(_pickled_text(name) + tensor for name, tensor in zip(value, tensors, strict=True))
        body = b"}(" + items + b"u"
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as file:
        members = {"data.pkl": b"\x80\x02" + body + b".", "byteorder": b"little"}
        members |= {f"data/{i}": array.tobytes() for i, array in enumerate(arrays)}
        for name, data in {**members, "version": b"3\n"}.items():
            file.writestr(zipfile.ZipInfo(f"archive/{name}", (1980, 1, 1, 0, 0, 0)), data)
    return out.getvalue()


def _pickled_tensor(array: np.ndarray, key: str) -> bytes:
    """Returns the pickle of a tensor: `_rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())`."""
    if array.dtype not in _STORAGE_OF:
        raise ValueError(f"torch has no storage of {array.dtype}")
    strides = [stride // array.itemsize for stride in array.strides]
    kind = f"ctorch\n{_STORAGE_OF[array.dtype]}\n".encode()
    reference = b"(" + _pickled_text("storage") + kind + _pickled_text(key) + _pickled_text("cpu")
    reference += _pickled_int(array.size) + b"tQ"
    shape, steps = (b"(" + b"".join(map(_pickled_int, numbers)) + b"t" for numbers in (array.shape, strides))
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + reference + b"K\x00" + shape + steps + b"\x89" + hooks + b"tR"


def _pickled_text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _pickled_int(number: int) -> bytes:
    if number < 1 << 31:
        return b"J" + struct.pack("<i", number)
    return b"\x8a\x08" + struct.pack("<q", number)
