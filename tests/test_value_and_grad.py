"""The path that computes loss and gradient in one pass: chosen exactly where it may be, right wherever autograd goes.

It is chosen where one side alone requires grad, the loss is reduced and the tensors are plain CPU ones in single or
double precision.
"""

import functools
import threading
import warnings

import pytest
import torch
from cases import TRANSFORMS
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import profile
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

CASES = [case for case in TRANSFORMS if case.loss.value_and_grad]
few = pytest.mark.parametrize("case", CASES, ids=str)
one = pytest.mark.parametrize("case", CASES[:1], ids=str)
each_side = pytest.mark.parametrize("side", (0, 1))
close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)


def chosen(loss):
    return "ValueAndGrad" in loss.grad_fn.name()


class Step:
    """One training step: the side that requires grad, the loss, and what its gradient must be."""

    def __init__(self, case, side, *shape, leaf=True, scale=1.0, dtype=torch.float64):
        self.leaves = case.draw(*(shape or (3, 5)), grad=(side,), dtype=dtype)
        self.leaf = self.leaves[side]
        self.inputs = list(self.leaves)
        if not leaf:
            self.inputs[side] = self.leaf * 1
            self.inputs[side].retain_grad()
        self.x = self.inputs[side]
        self.loss = case(*self.inputs, reduction="mean")
        wide = [t.detach().double().requires_grad_(i == side) for i, t in enumerate(self.leaves)]
        (want,) = torch.autograd.grad(case.reference(*wide, reduction="mean") * scale, wide[side])
        self.want = want.to(dtype)
        self.scale = torch.tensor(scale, dtype=self.loss.dtype)


@few
def test_chosen_exactly_where_meant(case):
    for side in case.loss.differentiable:
        for dtype in (torch.float64, torch.float32):
            for reduction in ("mean", "sum"):
                assert chosen(case(*case.draw(3, 5, grad=(side,), dtype=dtype), reduction=reduction))
        for dtype in (torch.bfloat16, torch.float16):
            assert chosen(case(*case.draw(3, 5, grad=(side,), dtype=dtype), reduction="mean")) == case.loss.stores_half
        assert not chosen(case(*case.draw(3, 5, grad=(side,)), reduction="none"))
        assert chosen(case(*case.draw(3, 5, grad=(side,)), reduction="mean", row_weight=torch.ones(3), normalizer=2))
        with torch.no_grad():
            assert case(*case.draw(3, 5, grad=(side,)), reduction="mean").grad_fn is None
    assert not chosen(case(*case.draw(3, 5), reduction="mean"))
    with forward_ad.dual_level():
        x = case.draw(3, 5, grad=(0,))
        assert not chosen(case(forward_ad.make_dual(x[0], torch.ones_like(x[0])), *x[1:], reduction="mean"))


@few
@each_side
@pytest.mark.parametrize("leaf", (True, False))
@pytest.mark.parametrize("scale", (1.0, 3.0))
def test_retain_graph_with_grad_edited_in_between(case, side, leaf, scale):
    step = Step(case, side, leaf=leaf, scale=scale)
    for _ in range(3):
        step.loss.backward(step.scale, retain_graph=True)
        close(step.x.grad, step.want)
        close(step.leaf.grad, step.want)
        step.x.grad.mul_(100)
        step.leaf.grad.add_(7)
        step.leaf.grad = step.x.grad = None
    step.loss.backward(step.scale)
    close(step.leaf.grad, step.want)
    step.leaf.grad.zero_()


@few
@each_side
def test_three_dimensional_logits(case, side):
    for leaf in (True, False):
        for _ in range(2):
            step = Step(case, side, 2, 3, 5, leaf=leaf)
            step.loss.backward()
            close(step.leaf.grad, step.want)


@one
@each_side
def test_nothing_of_the_size_of_the_gradient_is_copied(case, side):
    """Handed over and stolen: backward allocates nothing, at any incoming gradient while 1 is the expected one."""
    for index, scale in enumerate((1.0, 1.0, 1.0, 3.0)):
        inputs = case.draw(64, 32768, grad=(side,), dtype=torch.float32)
        loss, incoming = case(*inputs, reduction="mean"), torch.tensor(scale)
        with profile(profile_memory=True) as prof:
            loss.backward(incoming)
        names = {e.name for e in prof.events()}
        assert not names & {"aten::zeros", "aten::clone", f"torch_divergence::_{case.loss.name}_backward"}
        largest = max((e.nbytes() for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"), default=0)
        settled = index >= 2  # before, the last tests may have taught it another incoming gradient
        assert largest < 4 * 32768 or not settled


@one
@each_side
def test_another_holder_of_the_buffer_is_not_written_to(case, side):
    step = Step(case, side)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (held.append(t), t)[1], lambda t: t):
        loss = case(*step.inputs, reduction="mean")
    before = [t.clone() for t in held]
    loss.backward(torch.tensor(3.0, dtype=torch.float64))
    close(step.leaf.grad, 3 * step.want)
    step.leaf.grad.mul_(9)
    for a, b in zip(before, held, strict=True):
        assert torch.equal(a, b)


@few
@each_side
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_gradients_do_not_depend_on_what_was_expected(case, side, dtype):
    """Not one bit: whether a gradient was stored ready, scaled or computed again."""
    if dtype.itemsize == 2 and not case.loss.stores_half:
        pytest.skip("its half types take the plain pair of operators")
    inputs = case.draw(4, 33, grad=(side,), dtype=dtype)
    seen = {}
    for incoming in (
        1,
        1,
        0.25,
        0.25,
        0.25,
        3,
        3,
        3,
        0.25,
        1,
        65536,
        65536,
        65536,
        0,
        0,
        1,
        -2,
        -2,
        -2,
        0.25,
        0.1,
        0.1,
        0.1,
    ):
        inputs[side].grad = None
        case(*inputs, reduction="mean").backward(torch.tensor(float(incoming)))
        assert torch.equal(inputs[side].grad, seen.setdefault(incoming, inputs[side].grad)), incoming
    assert not seen[0].any()
    if dtype.itemsize > 2:
        assert torch.equal(seen[0.25], 0.25 * seen[1])
        torch.testing.assert_close(seen[0.1], 0.1 * seen[1])
    else:
        torch.testing.assert_close(seen[3].double(), 3 * seen[1].double(), rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


@one
@each_side
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_repeated_incoming_gradient_is_expected(case, side, dtype):
    inputs = case.draw(4, 33, grad=(side,), dtype=dtype)
    for step in range(4):
        inputs[side].grad = None
        loss = case(*inputs, reduction="mean")
        with profile() as prof:
            loss.backward(torch.tensor(4.0))
        work = {e.name for e in prof.events()} & {"aten::mul_", f"torch_divergence::_{case.loss.name}_value_and_grad"}
        assert not work or step < 2


@few
@each_side
def test_accumulates_into_an_existing_grad(case, side):
    step = Step(case, side)
    for _ in range(3):
        case(*step.inputs, reduction="mean").backward()
    close(step.leaf.grad, 3 * step.want)


@few
@each_side
def test_two_uses_of_one_leaf(case, side):
    def run(f):
        leaves = case.draw(3, 5, grad=(side,))
        other = [t.detach() * 0.5 if i != side else t for i, t in enumerate(leaves)]
        (f(*leaves, reduction="mean") + f(*other, reduction="mean")).backward()
        return leaves[side].grad

    close(run(case), run(case.reference))


@few
@each_side
def test_gradients_of_autograd_grad_belong_to_the_caller(case, side):
    step = Step(case, side)
    (g,) = torch.autograd.grad(step.loss, step.leaf, retain_graph=True)
    g.mul_(9)
    (again,) = torch.autograd.grad(step.loss, step.leaf)
    close(again, step.want)


@few
@each_side
def test_direct_call_of_grad_fn(case, side):
    step = Step(case, side)
    results = [t for t in step.loss.grad_fn(torch.ones((), dtype=torch.float64), None, None) if t is not None]
    assert len(results) == 1
    close(results[0], step.want)
    results[0].mul_(5)
    step.loss.backward()
    close(step.leaf.grad, step.want)


@few
@each_side
def test_tensor_hook_that_edits_in_place(case, side):
    step = Step(case, side, leaf=False)
    step.x.register_hook(lambda g: g.mul_(2))
    for _ in range(2):
        step.loss.backward(retain_graph=True)
        close(step.leaf.grad, 2 * step.want)
        step.leaf.grad = None
        step.x.grad = None


@few
@each_side
def test_inputs_argument_and_batched_grads(case, side):
    step = Step(case, side, leaf=False)
    step.loss.backward(inputs=[step.leaf], retain_graph=True)
    close(step.leaf.grad, step.want)
    scales = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    (g,) = torch.autograd.grad(step.loss, step.leaf, scales, is_grads_batched=True)
    close(g, torch.stack([k * step.want for k in (1, 2, 3)]))


@few
@each_side
@pytest.mark.parametrize("scale", (1.0, 3.0))
def test_saved_tensor_hooks(case, side, scale):
    kept = []
    hooks = {
        "identity": (lambda t: t, lambda t: t),
        "list": (lambda t: (kept.append(t), t)[1], lambda t: t),
        "copy": (lambda t: t.detach().clone(), lambda t: t),
        "numpy": (lambda t: t.detach().numpy().copy(), torch.from_numpy),
    }
    for pack, unpack in hooks.values():
        step = Step(case, side, scale=scale)
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            loss = case(*step.inputs, reduction="mean")
        before = [t.detach().clone() for t in kept]
        for _ in range(2):
            loss.backward(step.scale, retain_graph=True)
            close(step.leaf.grad, step.want)
            step.leaf.grad.mul_(9)
            step.leaf.grad = None
        loss.backward(step.scale)
        close(step.leaf.grad, step.want)
        step.leaf.grad.mul_(9)
        assert all(torch.equal(a, b) for a, b in zip(before, kept, strict=True))
    step = Step(case, side)
    with torch.autograd.graph.save_on_cpu():
        loss = case(*step.inputs, reduction="mean")
    loss.backward()
    close(step.leaf.grad, step.want)


@few
@each_side
def test_create_graph_then_plain(case, side):
    def run(f):
        leaves = case.draw(3, 5, grad=(side,))
        loss = f(*leaves, reduction="mean")
        (g,) = torch.autograd.grad(loss, leaves[side], create_graph=True)
        (h,) = torch.autograd.grad(g.pow(2).sum(), leaves[side], retain_graph=True)
        return g.detach(), h, torch.autograd.grad(loss, leaves[side])[0]

    close(run(case), run(case.reference))


@few
@each_side
@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpoint(case, side, reentrant):
    for dtype in (torch.float64, torch.float32):
        step = Step(case, side, dtype=dtype)
        loss = checkpoint(lambda *x: case(*(t * 1 for t in x), reduction="mean"), *step.leaves, use_reentrant=reentrant)
        loss.backward()
        torch.testing.assert_close(step.leaf.grad, step.want)


@few
@each_side
def test_checkpoint_with_retain_graph_create_graph_and_a_policy(case, side):
    def times_one(*x):
        return case(*(t * 1 for t in x), reduction="mean")

    step = Step(case, side)
    loss = checkpoint(times_one, *step.leaves, use_reentrant=False)
    for _ in range(3):
        loss.backward(retain_graph=True)
        close(step.leaf.grad, step.want)
        step.leaf.grad.mul_(3)
        step.leaf.grad = None
    (g,) = torch.autograd.grad(checkpoint(times_one, *step.leaves, use_reentrant=False), step.leaf, create_graph=True)
    close(g.detach(), step.want)
    torch.autograd.grad(g.pow(2).sum(), step.leaf)
    for policy in (
        functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mul.Tensor]),
        functools.partial(create_selective_checkpoint_contexts, lambda *_, **__: CheckpointPolicy.PREFER_SAVE),
    ):
        step = Step(case, side)
        checkpoint(times_one, *step.leaves, use_reentrant=False, context_fn=policy).backward()
        close(step.leaf.grad, step.want)


@one
def test_undefined_incoming_gradient(case):
    class Drop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return None

    step = Step(case, 0)
    Drop.apply(step.loss).backward()
    assert step.leaf.grad is None or not step.leaf.grad.any()


@few
def test_the_storing_operator_is_right_for_every_mask(case):
    """A trace may bake the choice: then the other side, or both, may turn out to need a gradient."""
    for call in case.loss.operators(case):
        if not call.name.endswith("_value_and_grad"):
            continue
        p, q, weight, *static, scale, _, _ = call.args
        wanted = [t for t in (p, q) if t.requires_grad]
        if not wanted:
            continue
        value = call.op(*call.args)[0]
        rows = getattr(torch.ops.torch_divergence, f"_{case.loss.name}").default(p, q, weight, *static)[0]
        close(value, rows.sum() * scale)
        close(torch.autograd.grad(value, wanted), torch.autograd.grad(rows.sum() * scale, wanted))


@few
def test_tracers_do_not_bake_the_choice(case):
    name = "value_and_grad"
    inputs = case.draw(3, 5, grad=(0,))
    f = case.bind(reduction="mean")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(lambda *x: f(*x), inputs)
    assert name not in str(traced.graph)
    both = case.draw(4, 5, seed=1)
    value = traced(*both)
    want = case.reference(*both, reduction="mean")
    close(torch.autograd.grad(value, both), torch.autograd.grad(want, both))
    graph = make_fx(lambda *x: torch.autograd.grad(f(*x), x[0])[0])(*inputs)
    assert name not in graph.code
    close(graph(*inputs), Step(case, 0).want)
    with FakeTensorMode():
        fake = tuple(torch.empty(3, 5).requires_grad_(i == 0) for i in range(len(inputs)))
        f(*fake).backward()
        assert fake[0].grad.shape == (3, 5)


@pytest.mark.slow
@one
def test_export_does_not_bake_the_choice(case):
    class Model(torch.nn.Module):
        def forward(self, *x):
            return case(*x, reduction="mean")

    inputs = case.draw(3, 5, grad=(0,))
    program = torch.export.export(Model(), inputs)
    close(program.module()(*inputs), case.reference(*inputs, reduction="mean"))
    assert "value_and_grad" not in str(program.run_decompositions().graph)


@pytest.mark.slow
@one
@pytest.mark.parametrize("backend", ("eager", "aot_eager", "inductor"))
def test_compile(case, backend):
    for sides in ((0,), (1,), (0, 1)):
        torch._dynamo.reset()
        f = torch.compile(lambda *x: case(*(t * 1 for t in x), reduction="mean") * 2, fullgraph=True, backend=backend)
        for shape in ((3, 5), (4, 5), (6, 7)):
            x = case.draw(*shape, grad=sides)
            wanted = [x[i] for i in sides]
            close(
                torch.autograd.grad(f(*x), wanted),
                torch.autograd.grad(case.reference(*x, reduction="mean") * 2, wanted),
            )


@pytest.mark.slow
@one
@each_side
def test_compiled_autograd(case, side):
    step = Step(case, side)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        step.loss.backward()
    close(step.leaf.grad, step.want)


@few
@each_side
def test_forward_ad_beside_requires_grad(case, side):
    def run(f):
        x = list(case.draw(3, 5, grad=(side,)))
        leaf = x[side]
        with forward_ad.dual_level():
            x[side] = forward_ad.make_dual(leaf, torch.ones_like(leaf) * torch.arange(5))
            value = f(*x, reduction="mean")
            tangent = forward_ad.unpack_dual(value).tangent.detach()
            value.backward()
        return tangent, leaf.grad

    close(run(case), run(case.reference))


@one
def test_threads_share_nothing(case):
    failures = []
    want = Step(case, 0).want

    def work():
        try:
            for _ in range(25):
                step = Step(case, 0)
                step.loss.backward(retain_graph=True)
                step.leaf.grad.mul_(3)
                step.leaf.grad = None
                step.loss.backward()
                close(step.leaf.grad, want)
        except Exception as e:  # a failure in a thread must fail the test
            failures.append(e)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


@one
def test_backward_inside_a_backward(case):
    """An inner backward that frees its graph inside an outer one that keeps its own."""
    want = Step(case, 0).want

    class Outer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            with torch.enable_grad():
                inner = Step(case, 0)
                inner.loss.backward()
            close(inner.leaf.grad, want)
            return g

    step = Step(case, 0)
    outer = Outer.apply(step.loss)
    for _ in range(2):
        outer.backward(retain_graph=True)
        close(step.leaf.grad, want)
        step.leaf.grad.mul_(5)
        step.leaf.grad = None


@one
def test_anomaly_mode(case):
    step = Step(case, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            case(*step.inputs, reduction="mean").backward()
    close(step.leaf.grad, step.want)
