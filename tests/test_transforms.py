"""Compilers, exporters, functorch and the rest of PyTorch: every loss must be an operator like any of its own."""

import tempfile
import warnings
from functools import partial

import pytest
import torch
import torch_divergence as td
from cases import SLOW, TRANSFORMS
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

few = pytest.mark.parametrize("case", TRANSFORMS, ids=str)
one = pytest.mark.parametrize("case", SLOW, ids=str)
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-10)


def plain(case, *shape, seed=0):
    return case.draw(*shape, grad=(), seed=seed)


def indices(case):
    return case.loss.differentiable


def compare(case, f, *args):
    """f of the library equals f of the composite."""
    got, want = f(case, *args), f(case.reference, *args)
    close(got, want)
    return got


class Model(torch.nn.Module):
    """The loss behind a layer, as it stands in a training step."""

    def __init__(self, case):
        super().__init__()
        self.case = case
        self.linear = torch.nn.Linear(5, 5).double()

    def forward(self, x, *rest):
        space = self.case.options.get("space", "logits")
        y = self.linear(x)
        y = {"logits": lambda v: v, "log_probs": lambda v: v.log_softmax(-1), "probs": lambda v: v.softmax(-1)}[space](
            y
        )
        return self.case(y, *rest, reduction="mean")


# ---- torch.compile


def compiled_equals_composite(case, backend, dynamic=None, reduction="none", sides=None):
    f = torch.compile(
        lambda *x: (case(2 * x[0], *x[1:], reduction=reduction) + 1).sum(),
        fullgraph=True,
        backend=backend,
        dynamic=dynamic,
    )
    for shape in ((3, 5), (4, 5), (6, 7)):
        inputs = case.draw(*shape, grad=sides)
        wanted = [t for t in inputs if t.requires_grad]
        value = f(*inputs)
        want = (case.reference(2 * inputs[0], *inputs[1:], reduction=reduction) + 1).sum()
        close(value, want)
        close(torch.autograd.grad(value, wanted), torch.autograd.grad(want, wanted))


@pytest.mark.slow
@few
@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
@pytest.mark.parametrize("dynamic", (None, True))
def test_compile_fullgraph(case, backend, dynamic):
    compiled_equals_composite(case, backend, dynamic)


@pytest.mark.slow
@one
@pytest.mark.parametrize("reduction", ("mean", "sum"))
def test_compile_reduced_loss_of_each_side(case, reduction):
    for sides in [(i,) for i in indices(case)] + [indices(case)]:
        torch._dynamo.reset()
        compiled_equals_composite(case, "aot_eager", reduction=reduction, sides=sides)


@pytest.mark.slow
@one
def test_compile_inductor(case):
    compiled_equals_composite(case, "inductor")


@pytest.mark.slow
@one
def test_compile_with_weights(case):
    weight, normalizer = torch.tensor([1.0, 0.0, 0.5]), torch.tensor(2.5)
    f = torch.compile(
        lambda *x: case(*x, row_weight=weight, normalizer=normalizer, reduction="mean"),
        fullgraph=True,
        backend="aot_eager",
    )
    inputs = case.draw(3, 5)
    close(f(*inputs), case.reference(*inputs, row_weight=weight, normalizer=normalizer, reduction="mean"))


@pytest.mark.slow
@one
def test_compiled_autograd(case):
    inputs = case.draw(3, 5)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        case(*inputs).sum().backward()
    wanted = [inputs[i] for i in indices(case)]
    close([t.grad for t in wanted], list(torch.autograd.grad(case.reference(*inputs).sum(), wanted)))


@pytest.mark.slow
@one
def test_double_backward_of_a_compiled_graph_is_pytorchs_error(case):
    inputs = case.draw(3, 5)
    f = torch.compile(lambda *x: case(*x).sum(), fullgraph=True, backend="aot_eager")
    (g,) = torch.autograd.grad(f(*inputs), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        torch.autograd.grad(g.pow(2).sum(), inputs[0])


@pytest.mark.slow
@one
def test_compile_of_func_grad(case):
    inputs = plain(case, 3, 5)
    f = torch.func.grad(lambda *x: case(*x).sum())
    close(
        torch.compile(f, fullgraph=True, backend="aot_eager")(*inputs),
        torch.func.grad(lambda *x: case.reference(*x).sum())(*inputs),
    )


@pytest.mark.slow
@one
def test_compile_of_vmap(case):
    inputs = plain(case, 4, 3, 5)
    close(
        torch.compile(torch.func.vmap(lambda *x: case(*x)), fullgraph=True, backend="aot_eager")(*inputs),
        case.reference(*inputs),
    )


@pytest.mark.slow
@one
def test_ddp_and_compiled_ddp_of_one_process(case):
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = torch.nn.parallel.DistributedDataParallel(Model(case))
        inputs = plain(case, 8, 5)
        model(*inputs).backward()
        first = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        torch.compile(model, backend="aot_eager")(*inputs).backward()
        close([p.grad for p in model.parameters()], first)
    finally:
        dist.destroy_process_group()


# ---- export


@pytest.mark.slow
@few
def test_export_with_dynamic_batch(case):
    model, inputs = Model(case), plain(case, 3, 5)
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        model,
        inputs,
        dynamic_shapes=(
            (*({0: batch} for _ in inputs),)
            if len(inputs) == 1
            else ({0: batch}, tuple({0: batch} for _ in inputs[1:]))
        ),
    )
    other = plain(case, 7, 5, seed=1)
    close(program.module()(*other), model(*other))
    close(program.run_decompositions().module()(*other), model(*other))


@pytest.mark.slow
@one
def test_export_save_and_load(case):
    model, inputs = Model(case), plain(case, 3, 5)
    program = torch.export.export(model, inputs)
    with tempfile.TemporaryDirectory() as folder:
        torch.export.save(program, folder + "/model.pt2")
        close(torch.export.load(folder + "/model.pt2").module()(*inputs), model(*inputs))


@pytest.mark.slow
@one
def test_export_joint_training_graph(case):
    from torch.export.experimental import _export_forward_backward

    program = torch.export.export(Model(case), plain(case, 3, 5), strict=False)
    joint = _export_forward_backward(program)
    assert f"_{case.loss.name}_backward" in str(joint.graph)


@pytest.mark.slow
@one
def test_aot_inductor(case):
    model, inputs = Model(case).requires_grad_(False), plain(case, 3, 5)
    program = torch.export.export(model, inputs)
    with tempfile.TemporaryDirectory() as folder:
        package = torch._inductor.aoti_compile_and_package(program, package_path=folder + "/model.pt2")
        close(torch._inductor.aoti_load_package(package)(*inputs), model(*inputs))


@few
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace. is deprecated")
def test_jit_trace(case):
    for reduction in ("none", "mean"):
        for sides in ((), (0,), indices(case)):
            f = case.bind(reduction=reduction)
            traced = torch.jit.trace(lambda *x, f=f: f(*x).sum(), case.draw(3, 5, grad=sides))
            inputs = case.draw(4, 5, seed=1)
            value, want = traced(*inputs), case.reference(*inputs, reduction=reduction).sum()
            close(value, want)
            wanted = [inputs[i] for i in indices(case)]
            close(torch.autograd.grad(value, wanted), torch.autograd.grad(want, wanted))


@few
def test_make_fx(case):
    def gradients(f, *x):
        return list(torch.autograd.grad(f(*x).sum(), [x[i] for i in indices(case)]))

    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(lambda *x: gradients(case, *x), tracing_mode=mode)(*case.draw(3, 5))
        assert f"_{case.loss.name}_backward" in graph.code
        other = case.draw(3, 5, seed=1)
        close(list(graph(*other)), gradients(case.reference, *other))


# ---- torch.func


@few
def test_func_grad(case):
    inputs = plain(case, 3, 5)
    compare(case, lambda f: torch.func.grad(lambda *x: f(*x).sum(), indices(case))(*inputs))


@few
@pytest.mark.parametrize("outer", ("jacrev", "jacfwd", None))
@pytest.mark.parametrize("inner", ("jacrev", "jacfwd"))
def test_jacobians_and_their_nestings(case, inner, outer):
    inputs = plain(case, 2, 4)
    inner = getattr(torch.func, inner)
    outer = getattr(torch.func, outer) if outer else None
    for i in indices(case):
        compare(case, lambda f, i=i: (outer(inner(f, i), i) if outer else inner(f, i))(*inputs))
    if outer:
        compare(case, lambda f: outer(inner(f, indices(case)), indices(case))(*inputs))


@one
def test_three_jacobians(case):
    inputs = plain(case, 1, 3)
    t = torch.func
    for nest in ((t.jacrev, t.jacrev, t.jacrev), (t.jacfwd, t.jacfwd, t.jacfwd), (t.jacfwd, t.jacrev, t.jacfwd)):
        for i in indices(case):
            compare(case, lambda f, i=i, nest=nest: nest[0](nest[1](nest[2](f, i), i), i)(*inputs))


@few
def test_func_jvp_and_vjp(case):
    inputs, tangents = plain(case, 3, 5), plain(case, 3, 5, seed=1)
    compare(case, lambda f: torch.func.jvp(f, inputs, tangents))
    compare(case, lambda f: torch.func.jvp(lambda x: f(x, *inputs[1:]), inputs[:1], tangents[:1]))
    compare(case, lambda f: torch.func.vjp(f, *inputs)[1](torch.linspace(0, 1, 3, dtype=torch.float64)))
    compare(case, lambda f: torch.func.linearize(f, *inputs)[1](*tangents))


@few
def test_hessians(case):
    inputs = plain(case, 1, 5)
    for i in indices(case):

        def scalar(f, i=i):
            return lambda x: f(*(x if n == i else t for n, t in enumerate(inputs))).sum()

        compare(case, lambda f, i=i, scalar=scalar: torch.func.hessian(scalar(f))(inputs[i]))
        compare(case, lambda f, i=i, scalar=scalar: torch.autograd.functional.hessian(scalar(f), inputs[i]))
        compare(
            case,
            lambda f, i=i, scalar=scalar: torch.autograd.functional.hessian(
                scalar(f), inputs[i], vectorize=True, outer_jacobian_strategy="forward-mode"
            ),
        )


@few
def test_func_grad_over_outer_requires_grad(case):
    """A transform inside plain autograd: the levels below keep recording."""
    for i in indices(case):

        def run(f, i=i):
            inputs = case.draw(3, 5, grad=(i,))
            g = torch.func.grad(lambda *x: f(*x).sum(), i)(*inputs)
            return torch.autograd.grad(g.pow(2).sum(), inputs[i])[0]

        compare(case, run)


@few
def test_forward_ad(case):
    inputs, tangents = plain(case, 3, 5), plain(case, 3, 5, seed=1)

    def run(f):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t.clone(), v) for t, v in zip(inputs, tangents, strict=True)]
            first = forward_ad.unpack_dual(f(duals[0], *inputs[1:])).tangent
            both = forward_ad.unpack_dual(f(*duals)).tangent
            return first, both

    compare(case, run)


@few
def test_forward_ad_of_an_input_that_requires_grad(case):
    """The stored-gradient path has no tangent rule: it must not be taken, and the backward must be right still."""

    def run(f):
        inputs = case.draw(3, 5, grad=(0,))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(inputs[0], torch.ones_like(inputs[0]) * torch.arange(5))
            value = f(dual, *inputs[1:], reduction="mean")
            tangent = forward_ad.unpack_dual(value).tangent.detach()
            value.backward()
        return tangent, inputs[0].grad

    compare(case, run)


# ---- vmap, without falling back to a loop


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@few
@pytest.mark.usefixtures("no_warnings")
def test_vmap(case):
    inputs = plain(case, 4, 3, 5)
    n = len(inputs)
    compare(case, lambda f: torch.func.vmap(f)(*inputs))
    compare(case, lambda f: torch.func.vmap(f, 1)(*inputs))
    compare(case, lambda f: torch.func.vmap(f, 1, 1)(*inputs))
    for i in range(n):
        dims = tuple(0 if j == i else None for j in range(n))
        mixed = tuple(t if j == i else t[0] for j, t in enumerate(inputs))
        compare(case, lambda f, dims=dims, mixed=mixed: torch.func.vmap(f, dims)(*mixed))
        dims = tuple(2 if j == i else 0 for j in range(n))
        mixed = tuple(t.movedim(0, 2) if j == i else t for j, t in enumerate(inputs))
        compare(case, lambda f, dims=dims, mixed=mixed: torch.func.vmap(f, dims)(*mixed))


@few
@pytest.mark.usefixtures("no_warnings")
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_vmap_with_options(case, reduction):
    """Reductions are over what the function sees, not over the mapped dimension."""
    inputs = plain(case, 4, 3, 5)
    weight = torch.tensor([[1.0, 0.0, 2.0], [0.5, 0.5, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    compare(case, lambda f: torch.func.vmap(partial(f, reduction=reduction))(*inputs))
    compare(case, lambda f: torch.func.vmap(lambda *x: f(*x, reduction=reduction, row_weight=weight[0]))(*inputs))
    compare(case, lambda f: torch.func.vmap(lambda w, *x: f(*x, reduction=reduction, row_weight=w))(weight, *inputs))
    compare(
        case, lambda f: torch.func.vmap(lambda w: f(*(t[0] for t in inputs), reduction=reduction, row_weight=w))(weight)
    )
    compare(
        case,
        lambda f: torch.func.vmap(lambda *x: f(*(t.movedim(-1, 0) for t in x), dim=0, reduction=reduction))(*inputs),
    )
    wanted = indices(case)
    compare(
        case,
        lambda f: torch.func.vmap(
            torch.func.grad(lambda w, *x: f(*x, reduction=reduction, row_weight=w).sum(), tuple(i + 1 for i in wanted))
        )(weight, *inputs),
    )


@few
@pytest.mark.usefixtures("no_warnings")
def test_vmap_of_inputs_that_require_grad(case):
    for sides in ((0,), indices(case)):
        for reduction in ("none", "mean"):

            def run(f, sides=sides, reduction=reduction):
                inputs = case.draw(4, 3, 5, grad=sides)
                return torch.autograd.grad(
                    torch.func.vmap(partial(f, reduction=reduction))(*inputs).sum(), [inputs[i] for i in sides]
                )

            compare(case, run)


@few
@pytest.mark.usefixtures("no_warnings")
def test_vmap_nestings(case):
    inputs = plain(case, 4, 5)
    cube = plain(case, 4, 3, 5)
    t = torch.func
    compare(case, lambda f: t.vmap(t.grad(lambda *x: f(*x).sum()))(*inputs))
    compare(case, lambda f: t.vmap(t.grad(lambda *x: t.vmap(f)(*x).sum()))(*cube))
    compare(case, lambda f: t.vmap(t.vmap(f))(*cube))
    compare(case, lambda f: t.vmap(t.hessian(lambda *x: f(*x).sum()))(*inputs))
    compare(case, lambda f: t.vmap(t.jacrev(t.jacfwd(lambda *x: f(*x).sum())))(*inputs))
    if len(inputs) == 2:
        other = plain(case, 2, 3, 5, seed=1)
        compare(case, lambda f: t.vmap(t.vmap(f, (None, 0)), (0, None))(cube[0], other[1]))
        compare(
            case,
            lambda f: t.vmap(t.vmap(t.grad(lambda *x: f(*x).sum(), (0, 1)), (None, 0)), (0, None))(cube[0], other[1]),
        )
    compare(
        case,
        lambda f: t.vmap(lambda v: t.jvp(f, inputs, (v, *(torch.zeros_like(x) for x in inputs[1:]))))(
            cube[0].movedim(1, 0)
        ),
    )


@one
@pytest.mark.usefixtures("no_warnings")
def test_vmap_is_one_call_of_the_operator(case):
    """No loop over the mapped dimension: as many operators run for 4 as for 40."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    counts = []
    for batch in (4, 40):
        with Count() as count:
            torch.func.vmap(torch.func.grad(lambda *x: case(*x).sum()))(*plain(case, batch, 3, 5))
        counts.append([n for n in count.names if "torch_divergence" in n])
    assert counts[0] == counts[1] and counts[0]


@few
@pytest.mark.usefixtures("no_warnings")
def test_per_sample_gradients_of_a_model(case):
    model = Model(case)
    inputs = plain(case, 6, 5)
    parameters = dict(model.named_parameters())

    def run(f):
        model.case = f if f is case else Reference(case)
        loss = lambda p, *x: torch.func.functional_call(model, p, x)  # noqa: E731
        return torch.func.vmap(torch.func.grad(loss), (None, *(0 for _ in inputs)))(parameters, *inputs)

    compare(case, run)


class Reference:
    def __init__(self, case):
        self.options, self.reference = case.options, case.reference

    def __call__(self, *x, **options):
        return self.reference(*x, **options)


# ---- the rest of autograd


@few
@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpoint(case, reentrant):
    for reduction in ("none", "mean"):
        for sides in ((0,), indices(case)):

            def run(f, sides=sides, reduction=reduction):
                inputs = case.draw(3, 5, grad=sides)
                value = checkpoint(
                    lambda *x: f(x[0] * 1, *x[1:], reduction=reduction).sum(), *inputs, use_reentrant=reentrant
                )
                return (
                    torch.autograd.grad(value, [inputs[i] for i in sides])
                    if not reentrant
                    else backward(value, inputs, sides)
                )

            compare(case, run)


def backward(value, inputs, sides):
    value.backward()
    return tuple(inputs[i].grad for i in sides)


@few
def test_saved_tensor_hooks(case):
    packed = []
    inputs = case.draw(3, 5)
    other = tuple(t * 1 for t in inputs)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (packed.append(t), t)[1], lambda t: t):
        value = case(*other)
    assert packed
    wanted = [inputs[i] for i in indices(case)]
    close(torch.autograd.grad(value.sum(), wanted), torch.autograd.grad(case.reference(*inputs).sum(), wanted))
    with torch.autograd.graph.save_on_cpu():
        value = case(*inputs)
    close(torch.autograd.grad(value.sum(), wanted), torch.autograd.grad(case.reference(*inputs).sum(), wanted))


@few
def test_saved_size_is_of_the_order_of_rows(case):
    """Besides its inputs a loss saves a few numbers a row."""
    sizes = []
    inputs = case.draw(4, 1000)
    pointers = {t.data_ptr() for t in inputs}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (sizes.append(0 if t.data_ptr() in pointers else t.numel()), t)[1], lambda t: t
    ):
        case(*inputs)
    assert max(sizes) <= 4 * 16


@few
@pytest.mark.parametrize("reduction", ("none", "mean"))
def test_in_place_change_of_a_saved_input_is_detected(case, reduction):
    for sides in ((0,), indices(case)):
        inputs = case.draw(3, 5, grad=sides)
        changed = inputs[0] * 1
        value = case(changed, *inputs[1:], reduction=reduction).sum()
        changed.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace"):
            value.backward()


@few
@pytest.mark.parametrize("reduction", ("none", "mean"))
def test_backward_twice_is_refused(case, reduction):
    for sides in ((0,), indices(case)):
        value = case(*case.draw(3, 5, grad=sides), reduction=reduction).sum()
        value.backward()
        with pytest.raises(RuntimeError, match="second time"):
            value.backward()


@few
def test_no_grad_and_inference_mode(case):
    inputs = case.draw(3, 5)
    want = case.reference(*inputs).detach()
    with torch.no_grad():
        assert case(*inputs).grad_fn is None
        assert case(*inputs, reduction="mean").grad_fn is None
    with torch.inference_mode():
        value = case(*inputs)
        close(value.clone(), want)
        assert not value.requires_grad
        made = tuple(t * 1 for t in inputs)
        close(case(*made).clone(), want)
        close(case(*made, reduction="mean").clone(), want.mean())


@few
@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_meta_tensors(case, dtype, reduction):
    inputs = case.draw(2, 3, 5, dtype=dtype)
    meta = tuple(t.detach().to("meta").requires_grad_(t.requires_grad) for t in inputs)
    value, want = case(*meta, reduction=reduction), case(*inputs, reduction=reduction)
    assert (value.shape, value.dtype, value.device.type) == (want.shape, want.dtype, "meta")
    value.sum().backward()
    for i in indices(case):
        assert (meta[i].grad.shape, meta[i].grad.dtype) == (inputs[i].shape, dtype)
    first = torch.autograd.grad(
        case(*meta, reduction=reduction).sum(), [meta[i] for i in indices(case)], create_graph=True
    )
    second = torch.autograd.grad(sum(g.sum() for g in first), [meta[i] for i in indices(case)])
    assert all(g.shape == (2, 3, 5) and g.dtype == dtype for g in second)


@few
def test_fake_tensors(case):
    with FakeTensorMode() as mode:
        for sides in ((0,), indices(case)):
            inputs = tuple(
                torch.empty(3, 5, dtype=torch.float64).requires_grad_(i in sides) for i in range(len(case.draw(1, 1)))
            )
            case(*inputs, reduction="mean", row_weight=torch.empty(3)).backward()
            assert all(inputs[i].grad.shape == (3, 5) and inputs[i].grad.fake_mode is mode for i in sides)


@few
def test_anomaly_mode_and_multithreaded_engine(case):
    inputs = case.draw(3, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            case(*inputs).sum().backward()
    wanted = [inputs[i] for i in indices(case)]
    close([t.grad for t in wanted], list(torch.autograd.grad(case.reference(*inputs).sum(), wanted)))


@one
def test_grad_fn_has_a_readable_name(case):
    name = case(*case.draw(3, 5)).grad_fn.name()
    assert "Backward" in name and "::" not in name and "<" not in name


@few
def test_subclass_is_not_broken(case):
    """A torch_function subclass and a Parameter pass through."""

    class Logits(torch.Tensor):
        pass

    inputs = plain(case, 3, 5)
    close(case(inputs[0].as_subclass(Logits), *inputs[1:]).as_subclass(torch.Tensor), case.reference(*inputs))
    parameter = torch.nn.Parameter(inputs[0].clone())
    case(parameter, *inputs[1:], reduction="mean").backward()
    assert parameter.grad is not None


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_compile_with_rows_that_the_data_chooses():
    def losses(x, y, w, labels, kept):
        x, y, w, labels = x[kept], y[kept], w[kept], labels[kept]
        return td.kl_div(x, y, row_weight=w), td.js_div(x, y), td.cross_entropy(x, labels)

    inputs = torch.randn(6, 5), torch.randn(6, 5), torch.rand(6), torch.randint(5, (6,))
    kept = torch.tensor([True, False, True, True, False, True])
    torch._dynamo.reset()
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    for mask in (kept, ~kept):
        torch.testing.assert_close(compiled(*inputs, mask), losses(*inputs, mask))
