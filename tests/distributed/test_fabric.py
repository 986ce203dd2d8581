"""Processes that Lightning Fabric starts, in the place of torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed as dist

HERE = Path(__file__).parent
PROGRAM = """
import rank_cases
from lightning_fabric import Fabric
from torch import distributed

fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
fabric.launch()
assert (fabric.world_size, distributed.get_world_size()) == (2, 2)
rank_cases.compare(*rank_cases.MODELS["gcn"], fabric.global_rank, fabric.world_size)
distributed.destroy_process_group()
open(f"passed {fabric.global_rank}", "w").close()
"""


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")
def test_fabric_starts_processes_too(tmp_path):
    pytest.importorskip("lightning_fabric")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    paths = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": paths}
    found = subprocess.run(
        [sys.executable, program], cwd=tmp_path, env={**os.environ, **settings}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert {path.name for path in tmp_path.glob("passed*")} == {"passed 0", "passed 1"}
