"""Traces a forward and backward pass to TorchScript and replays it without the GIL, so that threads run in parallel.

A replay runs the same operations on the same numbers: its results are equal to the bit, so a run may start to replay at
any step.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from t2i_adapter.config.tree import Config
from t2i_adapter.errors import first_line

TRACE_AT = 16
"""Calls with inputs of one shape before that shape is traced. Tracing takes as long as two dozen replays save (0.3 s,
13 ms each, `nano` on 2 cores), so a rare shape is not worth it, and a run's first step is not delayed."""
MOST = 16
"""Most shapes that are traced; each trace takes some megabytes."""

Function = Callable[[], Sequence[Tensor]]
Replay = Callable[[Sequence[Tensor]], list[Tensor]]


def is_traceable(config: Config) -> bool:
    """Whether the operations of a step can be traced: not with `torch.compile`, gradient checkpointing, xformers, a
    quantised base or a profile."""
    train = config.train
    plain = not (train.gradient_checkpointing or train.xformers or train.profile) and config.base.quantize == "none"
    return plain and train.compile == "off"


class TraceCache:
    """Calls functions of tensors, and replays a trace instead once their inputs have had one shape often enough.

    A new trace is checked once against the function, on other numbers than it was made with. If the function cannot be
    traced, or the trace does not replay to the bit, functions are called directly from then on and `log` gets one line.
    """

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._calls: Counter[Hashable] = Counter()
        self._unchecked: dict[Hashable, Replay] = {}
        self._replays: dict[Hashable, Replay] = {}
        self._lock, self._is_on = Lock(), True

    def call(self, function: Function, inputs: Sequence[Tensor], setting: Hashable = None) -> Sequence[Tensor]:
        """Returns what the function returns; any thread may call it.

        inputs: the tensors that differ from call to call. Any other tensor that the function reads must be changed in
        place only. setting: a constant that the function uses. Raises what the function raises.
        """
        key = (setting, *map(_layout, inputs))
        replay = self._replays.get(key)
        if replay:
            return replay(inputs)
        if not self._is_on:
            return function()
        with self._lock:  # other threads wait while one traces
            self._calls[key] += 1
            if key in self._unchecked:
                return self._check(key, function, inputs)
            if self._calls[key] == TRACE_AT and len(self._replays) < MOST:
                return self._trace(key, function, inputs)
        return function()

    def _trace(self, key: Hashable, function: Function, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        with Trace(inputs) as trace:
            results = function()
        try:
            self._unchecked[key] = trace.compile(results)
        except Exception as fault:  # any error of torch's compiler
            self._turn_off(first_line(fault))
        return results

    def _check(self, key: Hashable, function: Function, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        replay, results = self._unchecked.pop(key), function()
        try:
            is_equal = all(map(_is_equal, results, replay(inputs)))
        except Exception as fault:  # a constant of the traced call does not fit these inputs
            self._turn_off(first_line(fault))
            return results
        if is_equal:
            self._replays[key] = replay
        else:
            self._turn_off("the trace does not replay to the bit")
        return results

    def _turn_off(self, why: str) -> None:
        self._is_on = False
        self._log(f"The step's operations cannot be traced here ({why}); they run one by one.")


class Trace(TorchDispatchMode):
    """Writes every torch operation that is called inside it, backward passes included, as a line of TorchScript.

    In the script, x[i] is an input, w[i] a tensor that existed before (a weight), v... a result of an operation.
    """

    _NAME = "_name_in_trace"  # torch keeps a tensor's Python attributes while its graph holds the tensor

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self._lines: list[tuple[str, list[str], list[str]]] = []  # a statement; names it writes; names it reads
        self._fixed: list[Tensor] = []  # w: tensors that no operation made, and views of them
        self._names = {id(tensor): f"x[{number}]" for number, tensor in enumerate(inputs)}
        self._inputs = list(inputs)  # a reference, so that no other tensor gets their ids
        self._fault = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._fault:
            self._write(func, args, kwargs or {}, result)
        return result

    def compile(self, results: Iterable[Tensor]) -> Replay:
        """A function: inputs of these shapes -> the results. Raises RuntimeError if the trace cannot be replayed."""
        if self._fault:
            raise RuntimeError(self._fault)
        returned = [self._name_of(result) for result in results]
        statements = self._needed(returned)
        head, last = "def step(x: List[Tensor], w: List[Tensor]) -> List[Tensor]:", f"return [{', '.join(returned)}]"
        unit: Any = torch.jit.CompilationUnit("\n  ".join([head, *statements, last]) + "\n")
        fixed = self._fixed

        def replay(inputs: Sequence[Tensor]) -> list[Tensor]:
            # Below autograd, because the trace has the backward pass already; unoptimised, because fused operations
            # round otherwise. Both settings belong to one thread.
            with torch._C._AutoDispatchBelowAutograd(), torch.jit.optimized_execution(False):
                return unit.step(list(inputs), fixed)

        return replay

    def _write(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        if torch.Tag.data_dependent_output in func.tags:
            self._fault = f"{func} returns a number to Python"
            return
        read = [self._name_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func is torch.ops.aten.detach.default:
            self._set_name(result, read[0])
        elif func.is_view and all(name.startswith("w[") for name in read):
            for view in tree_leaves(result):
                self._fix(view)
        elif func._schema.is_mutable and result is not args[0]:
            self._fault = f"{func} writes into several tensors"
        elif func._schema.is_mutable:  # in place: the tensor keeps its name
            self._lines.append((self._statement(func, args, kwargs), [read[0]], read))
        else:
            self._assign(self._statement(func, args, kwargs), result, read)

    def _statement(self, func: Any, args: Any, kwargs: dict[str, Any]) -> str:
        words = [self._word(value) for value in args]
        words += [f"{name}={self._word(value)}" for name, value in kwargs.items()]
        return f"torch.ops.{func._schema.name.replace('::', '.')}({', '.join(words)})"

    def _assign(self, statement: str, result: Any, read: list[str]) -> None:
        number = len(self._lines)
        if isinstance(result, list):
            self._lines.append((f"v{number} = {statement}", [f"v{number}"], read))
            for place, part in enumerate(result):
                self._assign(f"v{number}[{place}]", part, [f"v{number}"])
            return
        results = result if isinstance(result, tuple) else (result,)
        names = [f"v{number}_{place}" for place in range(len(results))]
        for name, value in zip(names, results, strict=True):
            if isinstance(value, Tensor):
                self._set_name(value, name)
        self._lines.append((f"{', '.join(names)} = {statement}", names, read))

    def _needed(self, returned: list[str]) -> list[str]:
        """The statements that the returned names depend on, in their order."""
        needed, statements = set(returned), []
        for statement, writes, reads in reversed(self._lines):
            if needed & set(writes) or set(writes) & set(reads):  # the latter writes in place
                needed |= set(reads)
                statements.append(statement)
        return statements[::-1]

    def _word(self, value: Any) -> str:
        if isinstance(value, Tensor):
            return self._name_of(value)
        if isinstance(value, torch.device):
            return f'torch.device("{value}")'
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(self._word, value))}]" if value else "torch.jit.annotate(List[int], [])"
        if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
            return str(value)
        return repr(value) if not isinstance(value, float) or math.isfinite(value) else f'float("{value}")'

    def _name_of(self, tensor: Tensor) -> str:
        trace, name = vars(tensor).get(self._NAME, (None, ""))
        if trace is self:
            return name
        if id(tensor) not in self._names:
            self._fix(tensor)
        return self._names[id(tensor)]

    def _set_name(self, tensor: Tensor, name: str) -> None:
        vars(tensor)[self._NAME] = (self, name)

    def _fix(self, tensor: Tensor) -> None:
        self._names[id(tensor)] = f"w[{len(self._fixed)}]"
        self._fixed.append(tensor)


def _is_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal to the bit; NaN equals NaN."""
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _layout(tensor: Tensor) -> Hashable:
    return tensor.shape, tensor.stride(), tensor.dtype
