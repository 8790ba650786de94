"""Barriers and warps of the CUDA emulation: right under every order of threads, and each planted fault is found."""

import pytest
import torch
from emulation_faults import SEEDS, block_sums, planted_faults


@pytest.fixture(scope="module")
def faults():
    return planted_faults()


@pytest.fixture(params=SEEDS)
def seed(request, monkeypatch):
    monkeypatch.setenv("EVKERNELS_EMULATION_SEED", str(request.param))
    return request.param


def test_block_reduction_is_right(faults, seed):
    assert block_sums(faults, 0)


def test_missing_barrier_is_found(faults, monkeypatch):
    wrong = 0
    for value in SEEDS:
        monkeypatch.setenv("EVKERNELS_EMULATION_SEED", str(value))
        wrong += not block_sums(faults, 1)
    assert wrong > 0


def test_order_follows_the_seed(faults, monkeypatch):
    orders = []
    for value in (1, 1, 2):
        monkeypatch.setenv("EVKERNELS_EMULATION_SEED", str(value))
        order = torch.zeros(512, dtype=torch.int32)
        faults.order(torch.zeros(1, dtype=torch.int32), order)
        assert torch.equal(order.sort().values, torch.arange(512, dtype=torch.int32))
        orders.append(order)
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


def test_divergent_barrier_is_reported(faults, seed):
    with pytest.raises(RuntimeError, match=r"block_sum_kernel.*block \(\d, 0, 0\), thread \(\d+, 0, 0\)") as error:
        block_sums(faults, 2)
    assert "100 wait at __syncthreads" in str(error.value)
    assert "156 wait at __syncthreads" in str(error.value)
    assert block_sums(faults, 0), "the next launch must not be disturbed"


@pytest.mark.parametrize("count", [0, 1, 100, 256])
def test_early_return_before_a_barrier(faults, count):
    out = torch.zeros(256, dtype=torch.int32)
    faults.early_return(out, count)
    assert torch.equal(out, torch.cat([torch.full((count,), count), torch.zeros(256 - count)]).int())


def test_warp_and_block_operations(faults, seed):
    out = torch.zeros(64, 12, dtype=torch.int32)
    faults.operations(out, 0)
    thread = torch.arange(64)
    lane, warp = thread % 32, thread // 32 * 32
    position = lane % 16
    expected = [
        warp + 5,
        thread // 8 * 8 + 3,
        torch.where(position >= 3, thread - 3, thread),
        torch.where(position + 3 < 16, thread + 3, thread),
        thread ^ 9,
        torch.full((64,), sum(1 << i for i in range(0, 32, 3)) - 2**32 * (30 % 3 == 0 and 31 % 3 == 0)),
        torch.where(thread < 32, 0, 3),
        torch.where(lane < 16, thread ^ 1, thread ^ 2),
        torch.full((64,), 13),
        torch.full((64,), 1),
        thread ^ 1,
        torch.where(lane < 16, -1, 0),
    ]
    for column, values in enumerate(expected):
        assert out[:, column].tolist() == values.tolist(), f"column {column}"


def test_missing_warp_barrier_is_found(faults, monkeypatch):
    """Fresh values for every order: shared memory still holds the launch before's, which would hide the fault."""
    for value in SEEDS:
        monkeypatch.setenv("EVKERNELS_EMULATION_SEED", str(value))
        for fault in (0, 1):
            x, out = torch.randperm(256).int(), torch.zeros(256, dtype=torch.int32)
            faults.reverse(x, out, fault)
            assert torch.equal(out, x.view(8, 32).flip(1).flatten()) == (fault == 0)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (1, r"32 wait at __shfl_sync\(0xffffffff\).*32 wait at __syncwarp\(0xffffffff\)"),
        (2, r"calling lane is not in its own mask"),
        (3, r"power of two up to 32, got 12"),
        (4, r"2 wait at __shfl_sync\(0x00000003\).*2 wait at __shfl_sync\(0x00000007\)"),
    ],
)
def test_wrong_warp_operations_are_reported(faults, seed, fault, message):
    with pytest.raises(RuntimeError, match=message):
        faults.operations(torch.zeros(64, 12, dtype=torch.int32), fault)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_tensor_cores(faults, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(-8, 9, (4, rows, 16), generator=generator).to(dtype) for rows in (16, 8))
    out = torch.randint(-100, 100, (4, 16, 8), generator=generator).float()
    expected = out + 2 * a.float() @ b.float().mT
    faults.multiply(a, b, out, dtype == torch.float16, 0)
    assert torch.equal(out, expected)


def test_a_lane_that_stays_away_from_a_product_is_reported(faults, seed):
    a, b, out = torch.zeros(4, 16, 16).half(), torch.zeros(4, 8, 16).half(), torch.zeros(4, 16, 8)
    with pytest.raises(RuntimeError, match=r"mma.sync: a lane of the warp has returned"):
        faults.multiply(a, b, out, True, 1)
