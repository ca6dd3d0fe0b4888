"""Reads the tensors of a file that `torch.save` wrote, without unpickling it.

Such a file is a zip archive: `data.pkl` says how tensors are made of the numbers in `data/0`, `data/1`, ... The pickle
is read as a list of instructions (`pickletools.genops`), of which this module follows the few that stand for
containers, texts, numbers and tensors. It imports nothing that the file names, and calls nothing. Any other
instruction, and any other name, is refused.
"""

from __future__ import annotations

import pickletools
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
"""Class in torch's pickles -> type of its numbers."""
_TENSOR, _PARAMETER = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
_DICT = "collections OrderedDict"
_MOST_INSTRUCTIONS = 16 * 2**20
"""Bytes of data.pkl: the one of a file of weights has some kB."""


class TorchFileError(ValueError):
    """The file is damaged, or holds something else than tensors, texts and numbers."""


@dataclass(frozen=True)
class _Name:
    """A class or function that the file names. It is compared, never looked up."""

    text: str


@dataclass(frozen=True)
class _Numbers:
    """Numbers of the archive: count of type dtype in the member `key`."""

    dtype: torch.dtype
    key: str
    count: int


def read_torch_file(path: Path) -> Any:
    """Returns the content of a file of `torch.save`: tensors on the CPU in dicts, lists and tuples, texts and numbers.

    Raises TorchFileError, and OSError if the file cannot be read.
    """
    if not zipfile.is_zipfile(path):
        raise TorchFileError("it is no zip archive, as torch.save writes since version 1.6")
    try:
        with zipfile.ZipFile(path) as archive:
            return _Reader(archive).read()
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as fault:
        raise TorchFileError(str(fault)) from fault


@dataclass
class _Reader:
    """Follows the instructions of one archive."""

    archive: zipfile.ZipFile
    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def read(self) -> Any:
        names = [name for name in self.archive.namelist() if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise TorchFileError(f"it has {len(names)} files data.pkl")
        self.folder = names[0].removesuffix("data.pkl")
        if self._has("byteorder") and self._bytes("byteorder") != b"little":
            raise TorchFileError("its numbers are not little-endian")
        try:
            with warnings.catch_warnings(action="ignore"):  # of texts with damaged escapes
                for instruction, argument, _ in pickletools.genops(self._bytes("data.pkl", _MOST_INSTRUCTIONS)):
                    if instruction.name == "STOP":
                        return self.stack.pop()
                    self._follow(instruction.name, argument)
        except (IndexError, KeyError, TypeError, ValueError, RuntimeError, OverflowError) as fault:
            if isinstance(fault, TorchFileError):
                raise
            raise TorchFileError(f"its instructions are damaged ({type(fault).__name__})") from fault
        raise TorchFileError("its instructions have no end")

    def _follow(self, name: str, argument: Any) -> None:
        if name in _PUSHES:
            self.stack.append(argument)
        elif name in _MAKES:
            self.stack.append(_MAKES[name]())
        elif name in ("PROTO", "FRAME"):
            return
        elif name == "MARK":
            self.marks.append(len(self.stack))
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            self.stack.append(self.memo[argument])
        elif name == "GLOBAL":
            self.stack.append(_Name(argument))
        elif name == "STACK_GLOBAL":
            module, attribute = self._take(2)
            self.stack.append(_Name(f"{module} {attribute}"))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            self.stack.append(tuple(self._take(int(name[-1]))))
        elif name == "TUPLE":
            self.stack.append(tuple(self._since_mark()))
        elif name in ("APPEND", "APPENDS"):
            items = self._take(1) if name == "APPEND" else self._since_mark()
            self._top(list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._take(2) if name == "SETITEM" else self._since_mark()
            self._top(dict).update(zip(items[::2], items[1::2], strict=True))
        elif name == "BUILD":  # attributes of a dict, such as a state dict's versions
            self._take(1)
            self._top(dict)
        elif name == "BINPERSID":
            self.stack.append(self._numbers(self.stack.pop()))
        elif name == "REDUCE":
            function, arguments = self._take(2)
            self.stack.append(self._made(function, arguments))
        else:
            raise TorchFileError(f"it holds an object of another kind (instruction {name})")

    def _take(self, count: int) -> list[Any]:
        """Removes and returns the last values of the stack."""
        if count > len(self.stack) - (self.marks[-1] if self.marks else 0):
            raise IndexError
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def _since_mark(self) -> list[Any]:
        start = self.marks.pop()
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def _top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise TorchFileError(f"it changes a {type(self.stack[-1]).__name__} as if it were a {kind.__name__}")
        return self.stack[-1]

    def _numbers(self, reference: Any) -> _Numbers:
        """reference: ("storage", class, key, device, count)."""
        word, storage, key, _, count = reference
        kind = storage.text.removeprefix("torch ") if isinstance(storage, _Name) else ""
        if word != "storage" or kind not in _DTYPES or not isinstance(key, str) or type(count) is not int:
            raise TorchFileError(f"it holds numbers of an unknown type ({kind or word})")
        return _Numbers(_DTYPES[kind], key, count)

    def _made(self, function: Any, arguments: Any) -> Any:
        name = function.text if isinstance(function, _Name) else type(function).__name__
        if name == _TENSOR:
            numbers, offset, size, stride, *_ = arguments
            return self._tensor(numbers, offset, size, stride)
        if name == _PARAMETER and isinstance(arguments[0], Tensor):
            return arguments[0]
        if name == _DICT and arguments == ():
            return {}
        raise TorchFileError(f"it holds an object of another kind ({name.replace(' ', '.')[:80]})")

    def _tensor(self, numbers: _Numbers, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        if len(size) != len(stride) or any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
            raise TorchFileError("a tensor has no valid shape")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if all(size) else -1
        content = self._bytes(f"data/{numbers.key}")
        if len(content) != numbers.count * numbers.dtype.itemsize or last >= numbers.count:
            raise TorchFileError("a tensor is larger than its numbers")
        if not all(size):
            return torch.empty(size, dtype=numbers.dtype)
        flat = torch.frombuffer(bytearray(content), dtype=numbers.dtype)
        return flat.as_strided(size, stride, offset).clone(memory_format=torch.contiguous_format)

    def _has(self, name: str) -> bool:
        return f"{self.folder}{name}" in self.archive.namelist()

    def _bytes(self, name: str, most: int | None = None) -> bytes:
        """A member's bytes. torch stores them uncompressed, so a member is no larger than its file."""
        member = self.archive.getinfo(f"{self.folder}{name}")
        if member.compress_type != zipfile.ZIP_STORED or (most is not None and member.file_size > most):
            raise TorchFileError(f"its member {name} is compressed or too large")
        return self.archive.read(member)


_PUSHES = {
    *("NONE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BININT", "BININT1", "BININT2", "INT"),
    *("LONG", "LONG1", "BINFLOAT", "FLOAT"),
}
"""Instructions whose argument is a value."""
_MAKES: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}
"""Instructions that stand for one value."""
