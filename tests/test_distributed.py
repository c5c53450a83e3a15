"""Two gloo processes with unequal numbers of kept rows train as one process does, by `normalizer`."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import SLOW

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")]

WORLD = 2


def model_and_data():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 9)).double()
    x, teacher = torch.randn(12, 6, dtype=torch.float64), torch.randn(12, 9, dtype=torch.float64)
    keep = torch.tensor([1, 1, 1, 1, 1, 0, 0, 0, 1, 0, 0, 0], dtype=torch.bool)  # 5 kept rows, and 1
    return model, x, teacher, keep


def train(rank: int, case: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=WORLD)
    model, x, teacher, keep = model_and_data()
    model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    rows = slice(rank * 6, (rank + 1) * 6)
    kept = keep[rows].sum()
    dist.all_reduce(kept)
    for _ in range(3):
        optimizer.zero_grad()
        # DDP averages over the processes: the denominator is the mean number of kept rows
        loss = SLOW[case](
            model(x[rows]), teacher[rows], row_weight=keep[rows], normalizer=kept / WORLD, reduction="mean"
        )
        loss.backward()
        optimizer.step()
    torch.save([p.detach() for p in model.parameters()], f"{path}/{rank}.pt")
    # A process that leaves while the other still uses the group takes it down with it.
    dist.barrier()
    del model, optimizer
    dist.destroy_process_group()


@pytest.mark.parametrize("case", range(len(SLOW)), ids=[str(c) for c in SLOW])
def test_two_processes_equal_one(case, tmp_path):
    mp.spawn(train, args=(case, str(tmp_path)), nprocs=WORLD, join=True)
    model, x, teacher, keep = model_and_data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(3):
        optimizer.zero_grad()
        SLOW[case](model(x), teacher, row_weight=keep, reduction="mean").backward()
        optimizer.step()
    for rank in range(WORLD):
        for got, want in zip(torch.load(tmp_path / f"{rank}.pt"), model.parameters(), strict=True):
            torch.testing.assert_close(got, want.detach(), rtol=1e-12, atol=1e-14)
