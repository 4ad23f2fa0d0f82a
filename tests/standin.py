"""A device that is not the CPU: tensors on "chip" act as a GPU's do, and tell what they cost.

Their numbers lie in the CPU's memory. But an operation on tensors of both devices fails, as it does
on a GPU; each operation is noted in Chip.launches (views, which launch nothing, left out), and in
Chip.waits if the host has to wait for its result: item(), a copy without non_blocking, an operation
with a result whose shape depends on the data. With Chip.allow_double = False there is no float64,
as on mps. Registered with PyTorch as its backend "privateuseone", once in a process.
"""

import contextlib

import torch
from torch.utils import backend_registration

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount"}
WAITS |= {"unique_consecutive", "equal", "_linalg_eigh", "_to_sparse"}
HALF = ("linear", "matmul", "conv1d", "conv2d", "bmm", "addmm", "scaled_dot_product_attention")


def leaves(values) -> list:
    """What is in lists, tuples and dictionaries."""
    if isinstance(values, dict):
        values = list(values.values())
    if not isinstance(values, list | tuple):
        return [values]
    return [leaf for value in values for leaf in leaves(value)]


def mapped(kind: type, function, values):
    """The same lists, tuples and dictionaries, with function(v) for each v of a kind."""
    if isinstance(values, kind):
        return function(values)
    if isinstance(values, dict):
        return {key: mapped(kind, function, value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)([mapped(kind, function, value) for value in values])
    return values


class Chip(torch.Tensor):
    """A tensor on the device: raw is the tensor of the CPU that holds its numbers."""

    launches: list = []
    waits: list = []
    allow_double = True

    @staticmethod
    def __new__(cls, raw: torch.Tensor):
        if raw.dtype == torch.float64 and not cls.allow_double:
            raise TypeError("Cannot convert a tensor to float64: the device does not have it")
        how = {"strides": raw.stride(), "dtype": raw.dtype, "device": "chip:0"}
        self = torch.Tensor._make_wrapper_subclass(cls, raw.shape, **how)
        self.raw = raw
        return self

    def __repr__(self):
        return f"Chip({self.raw})"

    def tolist(self):
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol):  # saved as a tensor of the CPU
        return self.detach().cpu().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        return Chip(self.raw.clone()).requires_grad_(self.requires_grad)

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), op.overloadpacket.__name__
        where = kwargs.get("device")
        away = where is not None and torch.device(where).type != "chip"
        if where is not None and not away:
            kwargs["device"] = torch.device("cpu")
        values = [v for v in leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
        others = [v for v in values if not isinstance(v, Chip)]
        index = name in ("index", "index_put_", "index_put", "_index_put_impl_")
        cls.note(op, name, args, kwargs, others, away)
        pointwise = torch.Tag.pointwise in op.tags or name == "fill_" or index
        allowed = name == "copy_" or (index and values and isinstance(values[0], Chip))
        if not allowed and any(v.ndim or not pointwise for v in others):
            raise RuntimeError(f"{name}: expected all tensors on one device, found chip and cpu")
        random = [v for v in leaves(kwargs) if isinstance(v, torch._C.Generator)]
        if any(v._cdata not in Generator.of_chip for v in random):
            raise RuntimeError(f"{name}: expected a generator of the chip, found one of the CPU")

        raw_args, raw_kwargs = mapped(Chip, lambda v: v.raw, (args, kwargs))
        try:
            out = op(*raw_args, **raw_kwargs)
        except NotImplementedError:  # in half precision: what the CPU lacks and a GPU has
            half = next(v.dtype for v in values if v.dtype in (torch.bfloat16, torch.float16))
            out = op(*mapped(torch.Tensor, torch.Tensor.float, raw_args), **raw_kwargs)
            out = mapped(torch.Tensor, lambda v: v.to(half), out)
        if away:
            return out
        if name == "copy_":
            return args[0]
        same = {id(v.raw): v for v in values if isinstance(v, Chip)}
        for v in same.values():
            if v.shape != v.raw.shape:
                raise NotImplementedError(f"{name} changes the shape of a tensor of the chip")
        wrap = lambda v: same[id(v)] if id(v) in same else Chip(v)  # noqa: E731
        return mapped(torch.Tensor, wrap, out)

    @classmethod
    def note(cls, op, name, args, kwargs, others, away):
        if not op.is_view:
            cls.launches.append(name)
        masks = name.startswith("index") and any(
            v.dtype in (torch.bool, torch.uint8) or any(v is other for other in others)
            for v in leaves(args[1])
            if isinstance(v, torch.Tensor)
        )
        blocking = not (
            kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        )
        away = away and torch.device(kwargs["device"]).type == "cpu"
        across = away if name == "_to_copy" else name == "copy_" and others and blocking
        if name in WAITS or masks or across:
            cls.waits.append(name)


class Generator(torch._C.Generator):
    """torch.Generator that can also be one of the chip."""

    of_chip: set = set()

    def __new__(cls, device="cpu"):
        self = super().__new__(cls, "cpu")
        change = cls.of_chip.add if torch.device(device).type == "chip" else cls.of_chip.discard
        change(self._cdata)
        return self


class _Module(backend_registration._DummyBackendModule):
    """What torch.chip has to offer, besides tensors."""

    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: torch.set_rng_state(state))
    device = staticmethod(lambda device=None: contextlib.nullcontext())

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]


def _autocast(name: str):
    """The operation in half precision, which autocast chooses for it on a GPU."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def lower(*args, **kwargs):
        dtype = torch.get_autocast_dtype("chip")

        def cast(v):
            return v.to(dtype) if v.dtype == torch.float32 else v

        with torch._C._ExcludeDispatchKeyGuard(keys):
            op = getattr(torch.ops.aten, name)
            return op(*mapped(torch.Tensor, cast, args), **kwargs)

    return lower


def register() -> list:
    """Make "chip" known to PyTorch. Returns what has to be kept as long as it is used.

    An empty list: this version of PyTorch takes no backend written in Python.
    """
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        return []
    backend_registration._setup_privateuseone_for_python_backend("chip", backend_module=_Module())
    aten = torch.library.Library("aten", "IMPL")
    any_op = torch.library.Library("_", "IMPL")

    def make(function):
        def kernel(*args, dtype=None, layout=None, device=None, pin_memory=None, **kwargs):
            Chip.launches.append(function.__name__)
            kwargs.pop("memory_format", None)
            return Chip(function(*args, dtype=dtype, device="cpu", **kwargs))

        return kernel

    aten.impl("empty.memory_format", make(torch.empty), "PrivateUse1")
    aten.impl("empty_strided", make(torch.empty_strided), "PrivateUse1")
    for overload in ("arange", "arange.start", "arange.start_step"):
        aten.impl(overload, make(torch.arange), "PrivateUse1")
    aten.impl("_efficientzerotensor", make(torch.zeros), "PrivateUse1")
    aten.impl("eye", make(torch.eye), "PrivateUse1")

    def from_host(raw, chip, non_blocking=False):  # of new_tensor()
        Chip.launches.append("copy_")
        Chip.waits.extend([] if non_blocking else ["copy_"])
        chip.raw.copy_(raw)
        return chip

    aten.impl("_copy_from", from_host, "PrivateUse1")
    any_op.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in HALF:
        aten.impl(name, _autocast(name), "AutocastPrivateUse1")
    return [aten, any_op]
