"""Several threads in the library at once: what each computes alone is what it computes among others, to the bit."""

import threading

import pytest
import torch
from cases import TRANSFORMS

few = pytest.mark.parametrize("case", TRANSFORMS, ids=str)


def work(case, seed, teacher, reduction, grad):
    student = case.draw(96, 2000, dtype=torch.float32, grad=(0,), seed=seed)[0]
    target = teacher.clone().requires_grad_(1 in grad) if 1 in grad else teacher
    wanted = [student, target][: len(grad)]
    loss = case(student, target, reduction=reduction)
    first = torch.autograd.grad(loss.sum(), wanted, create_graph=True)
    second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), student, retain_graph=True)
    loss.sum().backward()
    return [t.detach().clone() for t in (loss, *first, *second, student.grad)]


@few
@pytest.mark.parametrize("threads", (2, 4))
@pytest.mark.parametrize("reduction, grad", (("mean", (0,)), ("mean", (0, 1)), ("none", (0,))))
def test_backward_in_threads(case, threads, reduction, grad):
    teacher = case.draw(96, 2000, dtype=torch.float32, grad=(), seed=99)[1]
    torch.set_num_threads(1)
    alone = [work(case, seed, teacher, reduction, grad) for seed in range(threads)]
    failures = []
    start = threading.Barrier(threads)

    def run(seed):
        try:
            torch.set_num_threads(1)
            start.wait()
            for _ in range(5):
                for got, want in zip(work(case, seed, teacher, reduction, grad), alone[seed], strict=True):
                    assert torch.equal(got, want)
        except BaseException as e:
            failures.append(e)

    running = [threading.Thread(target=run, args=(seed,)) for seed in range(threads)]
    for t in running:
        t.start()
    for t in running:
        t.join()
    if failures:
        raise failures[0]


@few
def test_threads_accumulate_into_one_leaf(case):
    """Hogwild training: one leaf, as many graphs as threads."""
    leaf, target = case.draw(8, 50, grad=(0,))
    threads = [
        threading.Thread(target=lambda: [case(leaf, target, reduction="mean").backward() for _ in range(10)])
        for _ in range(4)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    want = torch.autograd.grad(case.reference(leaf, target, reduction="mean"), leaf)[0]
    torch.testing.assert_close(leaf.grad, 40 * want)
