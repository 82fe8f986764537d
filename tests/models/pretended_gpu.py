"""A pretended GPU: its tensors lie in host memory, say that they are on cuda:0, and are refused together with others.

It finds what a program leaves in host memory before there is a GPU. It knows nothing of kernels, dtypes, NCCL or speed.

    with PretendedGpu():
        model.to("cuda")(input_ids.to("cuda"))     # raises Mixed where a mask was forgotten
"""

import contextlib
from types import TracebackType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_flatten, tree_map

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
Tensor = torch.Tensor
INDEX = {Tensor.__getitem__, Tensor.__setitem__, Tensor.index_put_}  # an index may lie on the CPU
READ = {Tensor.item, Tensor.tolist, Tensor.__len__, Tensor.__bool__, Tensor.__int__, Tensor.__float__}
MOVES = {Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.copy_, Tensor.new_tensor, Tensor.type_as}
META = {torch._has_compatible_shallow_copy_type}


class Mixed(RuntimeError):
    """An operation got tensors of both devices."""


class PretendedGpu(TorchFunctionMode):
    """Within, torch and DeepSpeed take this machine for one with a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self._on_gpu: set[int] = set()
        self._kept: list[Any] = []  # an address must not be used again
        self._ends = contextlib.ExitStack()

    def __enter__(self) -> "PretendedGpu":
        from deepspeed.accelerator import get_accelerator

        accelerator = get_accelerator()
        for owner, name, value in (
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "device_count", lambda: 1),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
            (torch.cuda, "_lazy_init", lambda: None),
            (accelerator, "device_name", lambda *_: "cuda:0"),
            (accelerator, "current_device_name", lambda: "cuda:0"),
            (accelerator, "on_accelerator", lambda tensor: tensor.device.type == "cuda"),
        ):
            self._ends.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, value, trace)
        self._ends.close()

    def is_on_gpu(self, tensor: Tensor) -> bool:
        """Whether a tensor says that it is on the GPU."""
        with torch._C.DisableTorchFunction():
            return tensor.untyped_storage()._cdata in self._on_gpu

    def _mark(self, tensor: Tensor) -> None:
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
        if storage._cdata not in self._on_gpu:
            self._on_gpu.add(storage._cdata)
            self._kept.append(storage)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]  # the getter of a property written in C
            return GPU if self.is_on_gpu(args[0]) else CPU
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return self.is_on_gpu(args[0])
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
        where = [self.is_on_gpu(each) for each in tensors]
        goes_to_gpu = any(where)
        if kwargs.get("device") is not None:
            goes_to_gpu, kwargs["device"] = _is_gpu(kwargs["device"]), CPU
        if func is Tensor.to:
            for each in args[1:]:
                goes_to_gpu = self.is_on_gpu(each) if isinstance(each, Tensor) else _is_gpu(each, goes_to_gpu)
            args = tuple(CPU if _is_device(each) else each for each in args)
            if goes_to_gpu and not where[0]:
                kwargs["copy"] = True
            kwargs.pop("non_blocking", None)
        elif func in (Tensor.cuda, Tensor.cpu):
            goes_to_gpu, func, args, kwargs = func is Tensor.cuda, Tensor.clone, args[:1], {}
        elif func is Tensor.copy_:
            goes_to_gpu = where[0]
        elif torch._C._current_autograd_node() is None and func not in READ | MOVES | META:
            # A scalar in host memory may meet tensors on the GPU; and a setter replaces what a tensor holds.
            is_mixed = goes_to_gpu and not all(gpu or not each.dim() for gpu, each in zip(where, tensors, strict=True))
            name = resolve_name(func) or str(func)
            if is_mixed and not (func in INDEX and where[0]) and not name.endswith("__set__"):
                raise Mixed(f"{name}: {[(str(each.device), tuple(each.shape)) for each in tensors]}")
        kwargs.pop("pin_memory", None)
        result = func(*args, **kwargs)
        if goes_to_gpu and func not in READ:
            tree_map(lambda each: self._mark(each) if isinstance(each, Tensor) else None, result)
        if func == Tensor.data.__set__ and self.is_on_gpu(args[1]):  # type: ignore[attr-defined]
            self._mark(args[0])
        return result


def _is_device(value: object) -> bool:
    return isinstance(value, (str, torch.device)) or (isinstance(value, int) and not isinstance(value, bool))


def _is_gpu(value: Any, otherwise: bool = False) -> bool:
    if not _is_device(value):
        return otherwise
    return isinstance(value, int) or torch.device(value).type == "cuda"
