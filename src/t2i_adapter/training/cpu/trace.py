"""Operations recorded and replayed without the interpreter, for threads that would wait for their turn in it.

The same operations on the same numbers: results are the same to the bit, so a run may begin to replay at any step.
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
"""Uses of a shape before it is recorded. Recording takes as long as two dozen replays save (0.3 s against 13 ms,
`nano` on 2 cores), so a shape that is seldom met is not worth it, and a run's first step is not kept waiting."""
MOST = 16
"""Shapes that are recorded; each takes some megabytes."""

Function = Callable[[], Sequence[Tensor]]
Replay = Callable[[Sequence[Tensor]], list[Tensor]]


def is_traceable(config: Config) -> bool:
    """Whether a step is made of plain operations, on a CPU: not compiled, no activations forgotten, no narrow layers,
    and no profile that looks into its modules."""
    train = config.train
    plain = not (train.gradient_checkpointing or train.xformers or train.profile) and config.base.quantize == "none"
    return plain and train.compile == "off"


class TraceCache:
    """Calls functions of tensors, and replays them where inputs of their shapes have come often enough.

    A recording is tried once beside the function, on other numbers than it was made of. What cannot be recorded, or
    does not replay to the bit, is called as it is from then on, and `say` gets one line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._uses: Counter[Hashable] = Counter()
        self._on_trial: dict[Hashable, Replay] = {}
        self._replays: dict[Hashable, Replay] = {}
        self._lock, self._on = Lock(), True

    def call(self, function: Function, inputs: Sequence[Tensor], setting: Hashable = None) -> Sequence[Tensor]:
        """What the function returns, for any thread.

        inputs: the tensors that differ from call to call; all others that it reads are written in place or not at
        all. setting: what else decides what it does. Raises what the function raises.
        """
        key = (setting, *map(_kind, inputs))
        replay = self._replays.get(key)
        if replay:
            return replay(inputs)
        if not self._on:
            return function()
        with self._lock:  # the others wait for the one that records
            self._uses[key] += 1
            if key in self._on_trial:
                return self._try(key, function, inputs)
            if self._uses[key] == TRACE_AT and len(self._replays) < MOST:
                return self._record(key, function, inputs)
        return function()

    def _record(self, key: Hashable, function: Function, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        with Tape(inputs) as tape:
            found = function()
        try:
            self._on_trial[key] = tape.compile(found)
        except Exception as fault:  # whatever torch finds that it cannot compile
            self._off(first_line(fault))
        return found

    def _try(self, key: Hashable, function: Function, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        replay, found = self._on_trial.pop(key), function()
        try:
            same = all(map(_same, found, replay(inputs)))
        except Exception as fault:  # a value of the first call that does not suit these
            self._off(first_line(fault))
            return found
        if same:
            self._replays[key] = replay
        else:
            self._off("they do not replay to the bit")
        return found

    def _off(self, why: str) -> None:
        self._on = False
        self._say(f"The step's operations cannot be recorded here ({why}); they run one by one.")


class Tape(TorchDispatchMode):
    """Writes down every operation of torch's that is called inside it, those of backward passes too, as TorchScript."""

    _NAME = "_name_on_tape"  # torch keeps a tensor's Python attributes, also while only its graph holds the tensor

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self._lines: list[tuple[str, list[str], list[str]]] = []  # a statement; what it makes; what it reads
        self._fixed: list[Tensor] = []  # what none of the operations has made, and views of it
        self._names = {id(tensor): f"x[{number}]" for number, tensor in enumerate(inputs)}
        self._kept = list(inputs)  # their ids stay theirs
        self._fault = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not self._fault:
            self._write(func, args, kwargs or {}, made)
        return made

    def compile(self, results: Iterable[Tensor]) -> Replay:
        """Inputs like those it was made with -> the results. Raises RuntimeError where they cannot be replayed."""
        if self._fault:
            raise RuntimeError(self._fault)
        returned = [self._name_of(result) for result in results]
        statements = self._needed(returned)
        head, last = "def step(x: List[Tensor], w: List[Tensor]) -> List[Tensor]:", f"return [{', '.join(returned)}]"
        unit: Any = torch.jit.CompilationUnit("\n  ".join([head, *statements, last]) + "\n")
        fixed = self._fixed

        def replay(inputs: Sequence[Tensor]) -> list[Tensor]:
            # The backward pass is recorded too; fused operations would round otherwise. Both are a thread's settings.
            with torch._C._AutoDispatchBelowAutograd(), torch.jit.optimized_execution(False):
                return unit.step(list(inputs), fixed)

        return replay

    def _write(self, func: Any, args: Any, kwargs: dict[str, Any], made: Any) -> None:
        if torch.Tag.data_dependent_output in func.tags:
            self._fault = f"{func} gives a number to the interpreter"
            return
        read = [self._name_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func is torch.ops.aten.detach.default:
            self._give_name(made, read[0])
        elif func.is_view and all(name.startswith("w[") for name in read):
            for view in tree_leaves(made):
                self._fix(view)
        elif func._schema.is_mutable and made is not args[0]:
            self._fault = f"{func} writes into several tensors"
        elif func._schema.is_mutable:  # in place: it keeps its name
            self._lines.append((self._statement(func, args, kwargs), [read[0]], read))
        else:
            self._assign(self._statement(func, args, kwargs), made, read)

    def _statement(self, func: Any, args: Any, kwargs: dict[str, Any]) -> str:
        words = [self._word(value) for value in args]
        words += [f"{name}={self._word(value)}" for name, value in kwargs.items()]
        return f"torch.ops.{func._schema.name.replace('::', '.')}({', '.join(words)})"

    def _assign(self, statement: str, made: Any, read: list[str]) -> None:
        number = len(self._lines)
        if isinstance(made, list):
            self._lines.append((f"v{number} = {statement}", [f"v{number}"], read))
            for place, part in enumerate(made):
                self._assign(f"v{number}[{place}]", part, [f"v{number}"])
            return
        results = made if isinstance(made, tuple) else (made,)
        names = [f"v{number}_{place}" for place in range(len(results))]
        for name, result in zip(names, results, strict=True):
            if isinstance(result, Tensor):
                self._give_name(result, name)
        self._lines.append((f"{', '.join(names)} = {statement}", names, read))

    def _needed(self, returned: list[str]) -> list[str]:
        """The statements without those that make nothing that is wanted."""
        wanted, found = set(returned), []
        for statement, makes, reads in reversed(self._lines):
            if wanted & set(makes) or set(makes) & set(reads):  # or it writes in place
                wanted |= set(reads)
                found.append(statement)
        return found[::-1]

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
        tape, name = vars(tensor).get(self._NAME, (None, ""))
        if tape is self:
            return name
        if id(tensor) not in self._names:
            self._fix(tensor)
        return self._names[id(tensor)]

    def _give_name(self, tensor: Tensor, name: str) -> None:
        vars(tensor)[self._NAME] = (self, name)

    def _fix(self, tensor: Tensor) -> None:
        self._names[id(tensor)] = f"w[{len(self._fixed)}]"
        self._fixed.append(tensor)


def _same(one: Tensor, other: Tensor) -> bool:
    """To the bit; a step whose gradient is no number is one like any other."""
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _kind(tensor: Tensor) -> Hashable:
    return tensor.shape, tensor.stride(), tensor.dtype
