"""DistributedDataParallel over frames: two processes give the gradients of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ddp_worker import CASES, Model, batch, gradients
from frames_zoo import assert_same
from torch import distributed

WORKER = Path(__file__).with_name("ddp_worker.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return for each process the gradients of each case."""
    folder = tmp_path_factory.mktemp("ddp")
    outputs = [folder / f"{rank}.pt" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), "2", str(folder / "store"), str(output)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, output in enumerate(outputs)
    ]
    try:
        logs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(logs)
    return [torch.load(output) for output in outputs]


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="this PyTorch has no gloo")
@pytest.mark.parametrize("case", range(len(CASES)), ids=str)
def test_two_processes_give_the_gradients_of_one(results, case):
    expected = gradients(Model(*CASES[case][:2]), batch())
    for result in results:
        actual = result[case]
        assert list(actual) == list(expected)
        names = [name for name in expected if not name.startswith("spare")]
        assert_same([actual[n] for n in names], [expected[n] for n in names])
        for name in set(expected) - set(names):  # DDP leaves what nobody reached without a gradient, or at zero
            assert actual[name] is None or not actual[name].any()
