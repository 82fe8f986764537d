"""A pretended GPU: its tensors lie in host memory, say that they are on a GPU, and are refused together with others.

What it shows is that nothing is left on the wrong device, by all that torch's dispatcher sees, backward passes and
bitsandbytes' operations included. It knows nothing of kernels, dtypes, streams, NCCL's transport or speed.

    with PretendedGpu() as gpu:
        model.to("cuda")(input_ids.to("cuda"))     # raises Mixed where a mask was forgotten
    gpu.checked                                    # operations that were looked at

Torch and DeepSpeed take the machine for one with a GPU. As there

- an operation takes tensors of one device, but for scalars in host memory and what is indexed with;
- a collective of a group that was not made for gloo takes tensors on the GPU alone, as NCCL;
- only what lies in host memory can be pinned or become an array of numpy;
- what is copied to host memory without waiting is not read there before the program has waited for the GPU.

Threads that the program starts are not seen: read weights with HF_DEACTIVATE_ASYNC_LOAD=1.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace, TracebackType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import varlen
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.doubles.flash_attention import FlashAttention

CPU = torch.device("cpu")
Tensor = torch.Tensor
aten = torch.ops.aten
# Copy from one device to another; a tensor may take the shape or the dtype of one elsewhere.
MOVES = {aten.copy_, aten._to_copy, aten._foreach_copy_, aten._foreach_copy}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
# Kernels that read step counts too where the weights are.
SCALARS_TOO = {aten._fused_adamw_, aten._fused_adam_, aten.cat, aten.stack}
WHERE = {"device", "is_cuda", "is_cpu"}


class Mixed(RuntimeError):
    """An operation got a tensor of the wrong device."""


class PretendedGpu(TorchFunctionMode):
    """Within, this process has one GPU of this compute capability."""

    def __init__(self, *, capability: tuple[int, int] = (9, 0)) -> None:
        super().__init__()
        self.device = torch.device("cuda", 0)
        self.checked: Counter[str] = Counter()
        """How often each operation was looked at that had a tensor on the GPU."""
        self._capability = capability
        self._places = _Places()
        self._pinned = _Places()
        self._arriving = _Places()
        """What is being copied to host memory."""
        self._results: list[bool] = []
        """Whether the running calls' new tensors are on the GPU."""
        self._gloo: set[str] = set()
        self._ends = contextlib.ExitStack()

    def __enter__(self) -> "PretendedGpu":
        for owner, name, value in self._replaced():
            self._ends.enter_context(mock.patch.object(owner, name, value))
        self._ends.enter_context(_Checks(self))
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
            return tensor.device.type == "cpu" and tensor in self._places

    def wait(self) -> None:
        """Wait until the GPU has done all that it was given."""
        self._arriving = _Places()

    def _replaced(self) -> Iterator[tuple[Any, str, Any]]:
        import bitsandbytes.functional
        from deepspeed.accelerator import real_accelerator
        from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

        yield real_accelerator, "ds_accelerator", CUDA_Accelerator()
        number = {"device_count": 1, "current_device": 0, "memory_allocated": 0, "memory_reserved": 0}
        number |= {"max_memory_allocated": 0, "max_memory_reserved": 0}
        for name, value in {
            **number,
            "is_available": True,
            "is_initialized": True,
            "get_device_capability": self._capability,
            "get_device_name": "a pretended GPU",
            "get_device_properties": SimpleNamespace(total_memory=80 << 30, name="a pretended GPU"),
            "mem_get_info": (70 << 30, 80 << 30),
            "memory_stats": {},
            "is_bf16_supported": self._capability >= (8, 0),
            **dict.fromkeys(["_lazy_init", "set_device", "empty_cache", "manual_seed", "set_stream"]),
            **dict.fromkeys(["manual_seed_all", "set_rng_state", "reset_peak_memory_stats"]),
        }.items():
            yield torch.cuda, name, lambda *_, _value=value, **__: _value
        yield torch.cuda, "synchronize", lambda *_: self.wait()
        yield torch.cuda, "get_rng_state", lambda *_: torch.get_rng_state()
        for name in ("Stream", "Event", "current_stream", "default_stream"):
            yield torch.cuda, name, lambda *_, **__: _Stream(self.wait)
        for name in ("stream", "device"):
            yield torch.cuda, name, lambda *_: contextlib.nullcontext()
        yield torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda _: None
        yield torch.autograd, "_engine_run_backward", self._within(torch.autograd._engine_run_backward)
        init = saved_tensors_hooks.__init__
        yield saved_tensors_hooks, "__init__", lambda hooks, *pair: init(hooks, *map(self._within, pair))
        yield Tensor, "record_stream", lambda tensor, _: self._record_stream(tensor)
        yield varlen, "varlen_attn", FlashAttention().varlen_attn
        yield dist, "new_group", self._remembering_gloo(dist.new_group)
        yield bitsandbytes.functional, "get_paged", self._paged
        yield bitsandbytes.functional, "fill", lambda tensor, value, *_, **__: tensor.fill_(value)
        yield bitsandbytes.functional, "prefetch_tensor", lambda *_, **__: None

    def _record_stream(self, tensor: Tensor) -> None:
        if not self.is_on_gpu(tensor):
            raise Mixed("a tensor in host memory belongs to no stream")

    def _remembering_gloo(self, new_group: Any) -> Any:
        def remembering(*arguments: Any, **options: Any) -> Any:
            group = new_group(*arguments, **options)
            if options.get("backend") == "gloo":
                self._gloo.add(group.group_name)
            return group

        return remembering

    def _paged(self, *shape: int, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
        """CUDA's unified memory, which is read on the GPU."""
        paged: Any = torch.zeros(shape, dtype=dtype, device="cuda")
        paged.is_paged, paged.page_deviceid = True, 0
        return paged

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        of = getattr(func, "__self__", None)  # the property that this getter or setter is of
        if of is not None and getattr(of, "__objclass__", None) is torch._C.TensorBase:
            return self._attribute(of.__name__, func, args, kwargs)
        if func in (Tensor.numpy, Tensor.__array__):
            if self.is_on_gpu(args[0]):
                raise Mixed("can't convert a tensor on the GPU to numpy")
            self.require_arrived(args[0])
        if func in (Tensor.pin_memory, Tensor.is_pinned):
            return self._pin(func, args[0])
        if func is Tensor.get_device:
            return 0 if self.is_on_gpu(args[0]) else -1
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        waits = not kwargs.get("non_blocking")
        comes = tensors[1 if func is Tensor.copy_ else 0 :][:1]  # what a copy is of
        to_gpu, args, kwargs = self._destination(func, tensors, args, kwargs)
        if func in (Tensor.cuda, Tensor.cpu):
            func, args, kwargs = Tensor.to, (args[0], CPU), {}
        pins = kwargs.pop("pin_memory", False)
        if pins and to_gpu:
            raise Mixed("only tensors in host memory can be pinned")
        with self._making(any(map(self.is_on_gpu, tensors)) if to_gpu is None else to_gpu):
            result = func(*args, **kwargs)
            if to_gpu is not None:
                result = tree_map(lambda leaf: self._placed(leaf, to_gpu) if isinstance(leaf, Tensor) else leaf, result)
        if func is Tensor.__deepcopy__ and self.is_on_gpu(args[0]):
            self._places.add(result)  # its storage is copied past the dispatcher
        if pins:
            self._pinned.add(result)
        if func in (Tensor.to, Tensor.copy_) and any(map(self.is_on_gpu, comes)) and not self.is_on_gpu(result):
            self.wait() if waits else self._arriving.add(result)
        return result

    def require_arrived(self, tensor: Tensor) -> None:
        if tensor in self._arriving:
            raise Mixed(f"{tuple(tensor.shape)} in host memory is read while the GPU copies it there")

    def _attribute(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """A getter or setter of a tensor's attribute."""
        is_set = func.__name__ == "__set__"
        if name in WHERE and not is_set and self.is_on_gpu(args[0]):
            return {"device": self.device, "is_cuda": True, "is_cpu": False}[name]
        is_gradient = name == "grad" and is_set and isinstance(args[1], Tensor)
        if is_gradient and self.is_on_gpu(args[0]) != self.is_on_gpu(args[1]):
            raise Mixed("a gradient is assigned to a tensor of another device")
        return func(*args, **kwargs)

    def _destination(
        self, func: Any, tensors: list[Tensor], args: Any, kwargs: dict[str, Any]
    ) -> tuple[bool | None, Any, dict[str, Any]]:
        """Whether a call asks for results on the GPU, None where it names no device, and its arguments without it."""
        if func in (Tensor.cuda, Tensor.cpu):
            return func is Tensor.cuda, args, kwargs
        to_gpu = None
        if kwargs.get("device") is not None and _is_real(kwargs["device"]):
            to_gpu, kwargs = _is_gpu(kwargs["device"]), {**kwargs, "device": CPU}
        if func is Tensor.to:
            kwargs.pop("non_blocking", None)
            for other in args[1:]:
                if isinstance(other, Tensor):
                    to_gpu = self.is_on_gpu(other)
                elif _is_device(other) and _is_real(other):
                    to_gpu = _is_gpu(other)
            args = tuple(CPU if _is_device(argument) and _is_real(argument) else argument for argument in args)
        elif func is Tensor.type_as:
            to_gpu = self.is_on_gpu(args[1])
        return to_gpu, args, kwargs

    @contextlib.contextmanager
    def _making(self, on_gpu: bool) -> Iterator[None]:
        self._results.append(on_gpu)
        try:
            yield
        finally:
            self._results.pop()

    def _placed(self, tensor: Tensor, on_gpu: bool) -> Tensor:
        """A result on the device that was asked for: a copy of what a real move would have copied."""
        if tensor.device.type != "cpu" or self.is_on_gpu(tensor) == on_gpu:
            return tensor
        with torch._C.DisableTorchFunction():
            tensor = tensor.clone()
        (self._places.add if on_gpu else self._places.remove)(tensor)
        return tensor

    def _pin(self, func: Any, tensor: Tensor) -> Any:
        if func is Tensor.is_pinned:
            return tensor in self._pinned
        if self.is_on_gpu(tensor):
            raise Mixed("only tensors in host memory can be pinned")
        if tensor in self._pinned:
            return tensor
        pinned = tensor.clone()
        self._pinned.add(pinned)
        return pinned

    def _within(self, run: Any) -> Any:
        """A function that runs as pretended also within another call of torch's, where the mode is not in force: a
        backward pass's hooks and recomputed layers, and what a forward pass saves."""

        def running(*arguments: Any, **options: Any) -> Any:
            super(PretendedGpu, self).__enter__()
            try:
                return run(*arguments, **options)
            finally:
                super(PretendedGpu, self).__exit__(None, None, None)

        return running


class _Checks(TorchDispatchMode):
    """Looks at every operation, and keeps where its results are."""

    def __init__(self, gpu: PretendedGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        gpu, packet = self._gpu, func.overloadpacket
        tensors = [
            leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.device.type == "cpu"
        ]
        where = [tensor in gpu._places for tensor in tensors]
        if func.namespace == "c10d":
            self._check_collective(func, args, tensors, where)
            return func(*args, **kwargs)
        makes = gpu._results[-1] if gpu._results else False
        if packet is aten._local_scalar_dense and any(where):
            gpu.wait()
        is_view = any(returned.alias_info and not returned.alias_info.is_write for returned in func._schema.returns)
        if not (makes or is_view or packet in MOVES):
            for tensor in tensors:
                gpu.require_arrived(tensor)
        if packet in MOVES:
            on_gpu = makes
        else:
            on_gpu = any(where) if tensors else makes
            if any(where):
                gpu.checked[packet.__name__] += 1
                self._check(func, packet, args, tensors, where)
        result = func(*args, **kwargs)
        written = {id(tensor) for tensor in _written(func, args)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu" and id(leaf) not in written:
                if on_gpu:
                    gpu._places.add(leaf)
                elif packet is aten._to_copy:
                    gpu._places.remove(leaf)
        return result

    def _check(self, func: Any, packet: Any, args: Any, tensors: list[Tensor], where: list[bool]) -> None:
        seen = list(zip(tensors, where, strict=True))
        if packet in INDEXED and where[0]:
            indices = {id(index) for index in args[1] if index is not None}
            seen = [(tensor, on_gpu) for tensor, on_gpu in seen if id(tensor) not in indices]
        is_strict = packet in SCALARS_TOO
        left = any(not on_gpu and tensor.numel() and (tensor.dim() or is_strict) for tensor, on_gpu in seen)
        if left or any(tensor not in self._gpu._places for tensor in _written(func, args)):
            raise Mixed(f"{func}: {_described(tensors, where)}")

    def _check_collective(self, func: Any, args: Any, tensors: list[Tensor], where: list[bool]) -> None:
        groups = [argument for argument in args if isinstance(argument, torch.ScriptObject)]
        name = dist.ProcessGroup.unbox(groups[0]).group_name if groups else ""
        if name not in self._gpu._gloo and "barrier" not in str(func):
            self._gpu.checked[str(func)] += 1
            if not all(where):
                raise Mixed(f"NCCL's {func}: {_described(tensors, where)}")


class _Places:
    """Tensors by the memory that they view."""

    def __init__(self) -> None:
        self._storages: dict[int, StorageWeakRef] = {}
        """By address, which is not used again while there is a reference."""
        self._most = 1000

    def __contains__(self, tensor: Tensor) -> bool:
        with torch._C.DisableTorchFunction():
            return tensor.untyped_storage()._cdata in self._storages

    def add(self, tensor: Tensor) -> None:
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
            self._storages.setdefault(storage._cdata, StorageWeakRef(storage))
        if len(self._storages) > self._most:
            self._storages = {key: kept for key, kept in self._storages.items() if not kept.expired()}
            self._most = 2 * len(self._storages) + 1000

    def remove(self, tensor: Tensor) -> None:
        with torch._C.DisableTorchFunction():
            self._storages.pop(tensor.untyped_storage()._cdata, None)


class _Stream:
    """Of torch.cuda's streams and events, what a program calls."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self.synchronize = synchronize

    def elapsed_time(self, _: Any) -> float:
        return 1.0

    def query(self) -> bool:
        return True

    def _nothing(self, *_: Any) -> None:
        pass

    record = wait = wait_stream = wait_event = record_event = _nothing


def _described(tensors: list[Tensor], where: list[bool]) -> str:
    return ", ".join(f"{'GPU' if on_gpu else 'CPU'} {tuple(t.shape)}" for t, on_gpu in zip(tensors, where, strict=True))


def _written(func: Any, args: Any) -> list[Tensor]:
    """The tensors in host memory that an operation writes into."""
    written = [
        argument
        for argument, schema in zip(args, func._schema.arguments, strict=False)
        if schema.alias_info and schema.alias_info.is_write
    ]
    return [tensor for tensor in tree_leaves(written) if isinstance(tensor, Tensor) and tensor.device.type == "cpu"]


def _is_device(value: object) -> bool:
    return isinstance(value, (str, torch.device)) or (isinstance(value, int) and not isinstance(value, bool))


def _is_real(device: Any) -> bool:
    """Whether it is no device such as meta."""
    return isinstance(device, int) or torch.device(device).type in ("cpu", "cuda")


def _is_gpu(device: Any) -> bool:
    return isinstance(device, int) or torch.device(device).type == "cuda"
