"""Layout, differentiation and batching rules shared by the operators' Python side."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import Function

ops = torch.ops.dnl_ext


def accumulate_type(dtype: torch.dtype) -> torch.dtype:
    """Type of sums and softmax statistics: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


#: Types of devices that have no float64: Apple's GPUs. Of Intel's some have it.
WITHOUT_FLOAT64 = ("mps",)


def sum_type(x: torch.Tensor) -> torch.dtype:
    """Type of means and other O(N) sums: float64 where the device of `x` has it, else float32."""
    kind = x.device.type
    has = kind not in WITHOUT_FLOAT64 and (kind != "xpu" or torch.xpu.get_device_properties(x.device).has_fp64)
    return torch.float64 if has else torch.float32


def memory_order(x: torch.Tensor) -> list[int]:
    """The dimensions of `x` from the slowest in memory to the fastest; those of stride 0 keep their place."""
    order = list(range(x.dim()))
    for i in range(1, x.dim()):
        j = i
        while j > 0:
            outer, inner = order[j - 1], order[j]
            outer_stride, inner_stride = x.stride(outer), x.stride(inner)
            if outer_stride == 0 or inner_stride == 0 or outer_stride >= inner_stride:
                break
            if x.size(outer) == 1 or x.size(inner) == 1:
                break
            order[j - 1], order[j] = inner, outer
            j -= 1
    return order


def empty_like_layout(x: torch.Tensor, sizes: Sequence[int], dtype: torch.dtype | None = None) -> torch.Tensor:
    """A dense tensor of `sizes` whose dimensions are ordered in memory as those of `x` (same number of dimensions).

    The same rule as `empty_like_layout` in csrc/core/operator.h.
    """
    strides, step = [0] * x.dim(), 1
    for dim in reversed(memory_order(x)):
        strides[dim] = step
        step *= max(sizes[dim], 1)
    return torch.empty_strided(sizes, strides, dtype=dtype or x.dtype, device=x.device)


def without_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context in which torch's products on the device of `x` keep the types they are given."""
    kind = x.device.type
    if kind in ("cpu", "cuda"):  # not asked of torch, since Dynamo of 2.10 cannot trace the question
        return torch.autocast(kind, enabled=False)
    if not torch.amp.is_autocast_available(kind):
        kind = "cpu"
    elif kind == torch._C._get_privateuse1_backend_name() and not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()  # torch.autocast asks a backend for more than it must have
    return torch.autocast(kind, enabled=False)


def save(ctx: Any, *tensors: torch.Tensor | None) -> None:
    """Keep `tensors` for both modes of differentiation. (vmap wants one list; torch.compile knows no forward mode.)"""
    ctx.save_for_backward(*tensors)
    if not torch.compiler.is_compiling() and in_transform():
        ctx.save_for_forward(*tensors)


def in_transform() -> bool:
    """Whether a transform of torch.func or forward mode is at work."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def gradient_by(name: str, function: type[Function]) -> Callable[..., Any]:
    """What a backward calls for its gradient: operator `name`, or `function` around it if it may be differentiated.

    In a backward, grad mode is create_graph. Of a graph of torch.compile nobody takes a second derivative.
    """
    operator = getattr(ops, name).default

    def run(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return operator(*args)
        if torch.is_grad_enabled() or in_transform():
            return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    return run


#: What operators, and torch on the way to them, raise of arguments that they do not take. No other error may be caught:
#: hooks of saved tensors end a call by one, as torch.utils.checkpoint's do once they have what they need.
REFUSED = (AttributeError, IndexError, NotImplementedError, TypeError, ValueError)

#: Types of arguments that have no say in what becomes of a call.
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))


def at_once(*tensors: torch.Tensor | None) -> bool:
    """Whether a call may take the short way to its operator, which checks its arguments itself.

    Not where it is traced or transformed, nor for tensors of a type that wants a word in it. Whoever calls an operator
    so makes the checks of `_checks` after all where it raises: they know better what is wrong.
    """
    if torch.compiler.is_compiling() or in_transform() or torch.jit.is_tracing():
        return False
    return _PLAIN.issuperset(map(type, tensors)) and not any(x is not None and x.is_nested for x in tensors)


def mark_constant(ctx: Any, *outputs: torch.Tensor) -> None:
    """Mark `outputs` as what nobody differentiates; in transforms a jvp gives them zeros.

    (Marks are lost under vmap, and forward mode wants a tangent of an output exactly where there is no mark.)
    """
    if torch.compiler.is_compiling() or not in_transform():
        ctx.mark_non_differentiable(*outputs)


def add(first: Sequence[torch.Tensor] | None, second: Sequence[torch.Tensor] | None) -> Sequence[torch.Tensor] | None:
    """The sum of two tuples of tensors, either of which may be None for zero."""
    if first is None or second is None:
        return second if first is None else first
    return tuple(x + y for x, y in zip(first, second, strict=True))


def traceable(function: type[Function]) -> type[Function]:
    """`function`, a Function, without its jvp: torch.compile traces none that has one."""
    return type(f"Traced{function.__name__}", (function,), {"jvp": staticmethod(Function.jvp)})


class Product(Function):
    """a @ b (..., N, M) of a (..., N, K) and b (..., K, M), and its derivatives, in the inputs' type under autocast."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if at_once(a, b) and a.is_cpu and not torch.is_autocast_enabled("cpu"):
            return a @ b
        with without_autocast(a):
            return a @ b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
        save(ctx, *inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        a, b = ctx.saved_tensors
        need_a, need_b = ctx.needs_input_grad
        return product(grad, b.mT) if need_a else None, product(a.mT, grad) if need_b else None

    @staticmethod
    def jvp(ctx: Any, tangent_a: torch.Tensor, tangent_b: torch.Tensor) -> torch.Tensor:
        a, b = ctx.saved_tensors
        return product(tangent_a, b) + product(a, tangent_b)


TracedProduct = traceable(Product)


class DirectProduct(Function):
    """Product in the old style, which costs half, for arguments that are :func:`at_once`."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a, b)
        return Product.forward(a, b)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return Product.backward(ctx, grad)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b of one dtype and the same leading dimensions; autocast changes neither it nor its derivatives.

    A context alone would not do for these: they run under the autocast of whoever calls backward.
    """
    if at_once(a, b):
        differentiated = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
        return DirectProduct.apply(a, b) if differentiated else Product.forward(a, b)
    if torch.jit.is_tracing():  # a trace holds operators alone
        return Product.forward(a, b)
    return (TracedProduct if torch.compiler.is_compiling() else Product).apply(a, b)


def last_derivative(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    """The function that runs `function`; asking for a derivative of its result raises, naming `what` is missing.

    torch's ``once_differentiable`` cuts the graph behind the result, and then a caller who allows unused inputs gets
    None for a derivative that is not zero. Here the graph goes on to every input and raises at this node.
    """
    message = f"dnl_ext: {what} are not implemented"

    class LastDerivative(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args):
            return function(*args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, *grads):
            raise NotImplementedError(message)

        @staticmethod
        def jvp(ctx, *tangents):
            raise NotImplementedError(message)

    return LastDerivative.apply


class Differentiable:
    """Operator `name`, differentiated as `function`, an autograd Function around it.

    The derivative is registered with the operator, for exported programs and traced graphs hold operators alone.
    torch.func's transforms and torch.compile differentiate Functions only, and forward mode passes a registered
    derivative by without a word; all three get `function`. A call :func:`at_once` gets a Function of the old style,
    which costs half of what the dispatcher makes of a registered one.
    """

    def __init__(self, name: str, function: type[Function], *, constants: bool = False) -> None:
        """`constants`: all outputs of the Function but the first are constants; :meth:`direct` leaves them out."""
        operator = getattr(ops, name).default
        torch.library.register_autograd(f"dnl_ext::{name}", function.backward, setup_context=function.setup_context)
        self._operator = operator
        self._function = function
        self._traced = traceable(function)

        def forward(ctx, *args):
            with torch._C._AutoDispatchBelowAutograd():
                output = operator(*args)
            function.setup_context(ctx, args, output)
            return output[0] if constants else output

        parts = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
        self._direct: Any = type(f"dnl_ext_{name}", (Function,), parts).apply
        self._constants = constants

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            if torch.autograd.forward_ad._current_level >= 0:  # in a graph an operator has no tangent, and says nothing
                torch._dynamo.graph_break("dnl_ext: forward mode does not work in a graph")
                return torch.compiler.disable(self._function.apply)(*args)
            return self._traced.apply(*args)
        if in_transform():
            return self._function.apply(*args)
        return self._operator(*args)

    def direct(self, differentiated: bool, *args: Any) -> Any:
        """The same for arguments that are :func:`at_once`; of operators with constants the first output alone."""
        if differentiated:
            return self._direct(*args)
        with torch._C._AutoDispatchBelowAutograd():
            output = self._operator(*args)
        return output[0] if self._constants else output


def register_batching(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register `function` as the vmap rule of operator `name`: the new dimension becomes the first leading one.

    Every tensor argument of the operators here has leading dimensions, so moving the mapped dimension to the front
    (expanding tensors that are not mapped) is all there is to do.
    """

    def register(function):
        def rule(info, in_dims, *args):
            def lead(x, dim):
                if not isinstance(x, torch.Tensor):
                    return x
                return x.movedim(dim, 0) if dim is not None else x.expand(info.batch_size, *x.shape)

            result = function(*(lead(x, dim) for x, dim in zip(args, in_dims, strict=True)))
            return result, (tuple(0 for _ in result) if isinstance(result, tuple) else 0)

        torch.library.register_vmap(name, rule)
        return function

    return register
