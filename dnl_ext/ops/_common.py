"""Layout, differentiation and batching rules shared by the operators' Python side."""

import torch
from torch.autograd import Function

ops = torch.ops.dnl_ext


def accumulate_type(dtype):
    """Type of sums and softmax statistics: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def memory_order(x):
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


def empty_like_layout(x, sizes, dtype=None):
    """A dense tensor of `sizes` whose dimensions are ordered in memory as those of `x` (same number of dimensions).

    The same rule as `empty_like_layout` in csrc/core/operator.h.
    """
    strides, step = [0] * x.dim(), 1
    for dim in reversed(memory_order(x)):
        strides[dim] = step
        step *= max(sizes[dim], 1)
    return torch.empty_strided(sizes, strides, dtype=dtype or x.dtype, device=x.device)


def first_derivative(operator):
    """The function that runs a backward operator; asking for the derivative of its result raises NotImplementedError.

    torch's ``once_differentiable`` cuts the graph behind the result, and then a caller who allows unused inputs gets
    None for a second derivative that is not zero. Here the graph goes on to every input and raises at this node.
    """

    class FirstDerivative(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args):
            return operator(*args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, *grads):
            raise NotImplementedError("dnl_ext: second derivatives are not implemented")

    def run(*args):
        # A compiled graph has no second derivative to guard (torch.compile raises by itself), and no nested Functions.
        return operator(*args) if torch.compiler.is_compiling() else FirstDerivative.apply(*args)

    return run


def differentiable(name, function):
    """The function that runs operator `name` and is differentiated as `function`, an autograd Function around it.

    The derivative is registered with the operator, for exported programs and traced graphs hold operators alone, and it
    costs half a Function. torch.func's transforms and torch.compile differentiate Functions only, and forward mode,
    which is not implemented, passes a registered derivative by without a word; all three get `function`.
    """
    operator = getattr(ops, name).default
    torch.library.register_autograd(f"dnl_ext::{name}", function.backward, setup_context=function.setup_context)

    def run(*args):
        if (
            torch.compiler.is_compiling()
            or torch._C._are_functorch_transforms_active()
            or torch.autograd.forward_ad._current_level >= 0
        ):
            return function.apply(*args)
        return operator(*args)

    return run


def register_batching(name):
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
