"""A make-believe accelerator on the CPU: what would make the host wait for a device is found.

A CPU build of torch knows one device, so that nothing there tells a read that would wait for a
device from one that would not. `DeviceWatch` makes the difference up. ``cpu:0`` is the device,
``cpu`` the host: torch computes with both alike, and does not look at the index. Every storage that
was made on ``cpu:0``, moved there, or computed from such a one is known as the device's, two modes
keep the books:

- a `TorchFunctionMode` sees Python's calls: factories and ``to`` with a device, which move data
  between the two (a copy each way, as between real ones), ``tensor.device``, which tells the truth
  about the two, and reads that never reach an operator (``tolist``, ``numpy``);
- a `TorchDispatchMode` sees operators, those of backward passes and of C++ included: reads of a
  scalar, and results whose shape depends on values.

Operators of this package are seen from outside: their kernels on CUDA do not read, and are tested
elsewhere.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("cpu:0")
HOST = torch.device("cpu")
aten = torch.ops.aten

READS = {
    aten._local_scalar_dense.default: "reads a scalar",
    aten.equal.default: "compares tensors",
    aten.allclose.default: "compares tensors",
    aten.is_nonzero.default: "reads a scalar",
    aten.item.default: "reads a scalar",
    aten.nonzero.default: "a shape that depends on values",
    aten.masked_select.default: "a shape that depends on values",
    aten.unique_consecutive.default: "a shape that depends on values",
    aten.unique_dim.default: "a shape that depends on values",
    aten._unique.default: "a shape that depends on values",
    aten._unique2.default: "a shape that depends on values",
    aten.bincount.default: "a shape that depends on values",
    # Without a check of the probabilities there is one on CUDA too.
    aten.multinomial.default: "checks its probabilities",
    aten.isin.Tensor_Tensor: "may sort and count",
    # LAPACK's return codes are looked at, or the solver is one that waits.
    aten._linalg_eigh.default: "waits for a solver",
    aten.linalg_eig.default: "waits for a solver",
    aten._linalg_svd.default: "waits for a solver",
    aten._linalg_check_errors.default: "looks at a solver's return code",
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
INDEXING |= {aten._index_put_impl_.default, aten._unsafe_index.Tensor}
COPIES = {aten.copy_.default}
JOINS = {aten.cat.default, aten.stack.default}
# Heights and widths may be on the host, as their docstrings say.
TAKE_BOTH = {"fastcil::cam_boxes", "fastcil::salient_masks"}
PYTHON_READS = {Tensor.tolist, Tensor.numpy, Tensor.__array__}
TORCH = os.path.dirname(torch.__file__)
THE_DEVICE = Tensor.device.__get__  # made anew whenever it is asked for
MOVES = {Tensor.to, Tensor.cpu}
FROM_PYTHON = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _from_torch(wanted: object) -> bool:
    """Whether torch's own Python moves to a device that C++ named, which knows no make-believe."""
    caller = sys._getframe(3)
    return isinstance(wanted, torch.device) and caller.f_code.co_filename.startswith(TORCH)


def _plain(tensor: Tensor) -> Tensor:
    """What a transform of `torch.func` wraps."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def _place() -> str:
    """The line of this package that is being run."""
    frames = [f for f in traceback.extract_stack() if "/fastcil/" in f.filename]
    place = frames[-1] if frames else traceback.extract_stack()[0]
    name = place.filename.rpartition("/fastcil/")[2]
    return f"{name}:{place.lineno} {place.line}"


class DeviceWatch:
    """Books of what lives on the make-believe device, and of what waited for it in a step.

    Attributes:
        waits: What waited while `counting`: a reason and the line of this package it came from.
        mixes: What computed with tensors of both at any time, which CUDA refuses; likewise.
    """

    def __init__(self) -> None:
        self.waits: list[tuple[str, str]] = []
        self.mixes: list[tuple[str, str]] = []
        self._count = False
        self._held: dict[int, StorageWeakRef] = {}
        self._inherit = False

    @contextmanager
    def running(self) -> Iterator[DeviceWatch]:
        """Keeps the books of all that happens meanwhile."""
        with _Calls(self), _Operators(self):
            yield self

    @contextmanager
    def counting(self, on: bool = True) -> Iterator[None]:
        """Notes what waits for the device meanwhile, or does not."""
        before, self._count = self._count, on
        try:
            yield
        finally:
            self._count = before

    def has(self, tensor: Tensor) -> bool:
        """Whether it lives on the device."""
        return _plain(tensor).untyped_storage()._cdata in self._held

    def take(self, values: Any) -> Any:
        """Notes that tensors live on the device; hands them back."""
        for tensor in _tensors((values,)):
            storage = _plain(tensor).untyped_storage()
            if storage._cdata not in self._held:
                # A weak reference keeps the address from being used again.
                self._held[storage._cdata] = StorageWeakRef(storage)
        return values

    def drop(self, tensor: Tensor) -> Tensor:
        """Notes that a tensor lives on the host; hands it back."""
        self._held.pop(_plain(tensor).untyped_storage()._cdata, None)
        return tensor

    def note(self, reason: str) -> None:
        """Counts a wait."""
        if self._count:
            self.waits.append((reason, _place()))

    def note_mix(self, reason: str) -> None:
        """Counts a computation that CUDA refuses."""
        self.mixes.append((reason, _place()))


class _Calls(TorchFunctionMode):
    """Sees Python's calls."""

    def __init__(self, watch: DeviceWatch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        watch, kwargs = self.watch, kwargs or {}
        if func == THE_DEVICE:
            return DEVICE if watch.has(args[0]) else func(*args)
        if func in MOVES:
            return self._move(func, args, kwargs)
        if func in PYTHON_READS and watch.has(args[0]):
            watch.note(f"Tensor.{func.__name__}")
            return func(*args, **kwargs)
        mine = any(watch.has(t) for t in _tensors((*args, *kwargs.values())))
        if func is F.one_hot and len(args) + len(kwargs) > 1:
            # Only on the CPU does it look at the labels where it knows the number of classes.
            with watch.counting(False), self._inheriting(mine):
                return func(*args, **kwargs)
        if func is Tensor.__setitem__ and mine and not isinstance(args[2], Tensor):
            return self._set(*args)
        if func is Tensor.new_tensor and mine and "device" not in kwargs:
            kwargs = {**kwargs, "device": DEVICE}
        wanted = kwargs.get("device")
        if wanted is not None and torch.device(wanted).type == "cpu":
            kwargs = {**kwargs, "device": HOST}
            there = torch.device(wanted) == DEVICE
            if func in FROM_PYTHON and there and (func is Tensor.new_tensor or not mine):
                watch.note(f"{func.__name__} copies from the host and waits")
                return watch.take(func(*args, **kwargs).clone())
            out = func(*args, **kwargs)
            return watch.take(out) if there else out
        with self._inheriting(mine):
            out = func(*args, **kwargs)
        if func is Tensor.__deepcopy__ and mine:
            watch.take(out)
        return out

    @contextmanager
    def _inheriting(self, mine: bool) -> Iterator[None]:
        """What operators make out of nothing lives where the call's arguments do."""
        before, self.watch._inherit = self.watch._inherit, mine
        try:
            yield
        finally:
            self.watch._inherit = before

    def _set(self, tensor: Tensor, index: object, value: object) -> None:
        """Sets some entries to a number; on CUDA that is no copy only where a mask says which."""
        indices = [t for t in _tensors((index,)) if t.ndim and t.dtype != torch.bool]
        if indices:
            self.watch.note("copies a number from the host and waits")
        with self.watch.counting(False):
            tensor[index] = value  # type: ignore[index]

    def _move(self, func, args, kwargs):  # type: ignore[no-untyped-def]
        tensor, rest, kwargs = args[0], list(args[1:]), dict(kwargs)
        if func is Tensor.cpu:
            wanted = HOST
        elif rest and isinstance(rest[0], Tensor):
            wanted = DEVICE if self.watch.has(rest[0]) else HOST
            rest[0] = rest[0].dtype
        elif rest and (rest[0] is None or isinstance(rest[0], str | torch.device)):
            wanted = rest.pop(0)
            if rest and isinstance(rest[0], bool):
                rest.insert(0, None)
        else:
            wanted = kwargs.pop("device", None)
        names = ("dtype", "non_blocking", "copy")
        kwargs = {**dict(zip(names, rest, strict=False)), **kwargs, "device": None}
        here = self.watch.has(tensor)
        there = here if wanted is None else torch.device(wanted) == DEVICE
        out = func(tensor, **kwargs) if func is Tensor.to else tensor
        if here == there:
            return out
        if here:
            if _from_torch(wanted):
                return out
            self.watch.note("copies to the host")
        elif not kwargs.get("non_blocking"):
            self.watch.note("copies from the host and waits")
        out = out.clone() if out is tensor else out
        return self.watch.drop(out) if here else self.watch.take(out)


class _Operators(TorchDispatchMode):
    """Sees operators."""

    def __init__(self, watch: DeviceWatch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        watch, kwargs = self.watch, kwargs or {}
        given = _tensors((*args, *kwargs.values()))
        held = [watch.has(tensor) for tensor in given]
        mine = any(held) if given else watch._inherit
        if mine and not all(held):
            self._check_mix(func, args, given, held)
        if mine and watch._count:
            self._check(func, args, kwargs, given, held)
        out = func(*args, **kwargs)
        return watch.take(out) if mine else out

    def _check(self, func, args, kwargs, given, held):  # type: ignore[no-untyped-def]
        watch = self.watch
        if func in READS:
            watch.note(f"{func.name()} {READS[func]}")
        elif func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
            watch.note(f"{func.name()} has a shape that depends on values")
        elif func in INDEXING:
            for index in _tensors((args[1],)):
                if index.dtype in (torch.bool, torch.uint8):
                    watch.note(f"{func.name()} by a mask has a shape that depends on values")
                elif not watch.has(index) and index.ndim:
                    watch.note(f"{func.name()} copies its index from the host and waits")
        elif func in COPIES and not all(held):
            goes_on = watch.has(args[0]) and len(args) > 2 and args[2]
            if not goes_on:
                watch.note(f"{func.name()} copies between device and host and waits")

    def _check_mix(self, func, args, given, held):  # type: ignore[no-untyped-def]
        """Only copies and indexing take tensors of both, and single numbers but for joining."""
        if func in COPIES or func.name() in TAKE_BOTH:
            return
        if func in INDEXING and self.watch.has(args[0]):
            # Indices may be on the host; values of more than one number may not.
            given = [args[0], *(t for t in args[2:] if isinstance(t, Tensor))]
            held = [self.watch.has(tensor) for tensor in given]
        odd = [t for t, there in zip(given, held, strict=True) if not there]
        if func not in JOINS:
            odd = [t for t in odd if t.ndim]
        if odd:
            shapes = [tuple(t.shape) for t in odd]
            self.watch.note_mix(f"{func.name()} with {shapes} on the host")
