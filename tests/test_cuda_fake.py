"""The CUDA branches without a GPU: do shapes, dtypes, devices and arguments fit? See cuda_fake.py."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cuda_fake import CASES, SIZES
from helpers import ENVIRONMENT, ROOT
from transformers import AutoConfig

import rollout
import session
from config import Config
from distributed import start
from distributed.weights import skeleton
from kernel.norms import fuse_norms

# PyTorch's CPU build has no CUDA device, and what autograd asks of one: that it is there, and a stream.
DEVICE = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace at {
struct CUDAHooks : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)

const Device gpu(kCUDA, 0);
struct Guard : c10::impl::NoOpDeviceGuardImpl<kCUDA> {
  Device getDevice() const override { return gpu; }
  Device exchangeDevice(Device) const override { return gpu; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, gpu); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, gpu); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
};
static c10::impl::DeviceGuardImplRegistrar guard(kCUDA, new Guard());
}
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, str]:
    """What went wrong in every case of cuda_fake.py, in a process of its own: no other test must see CUDA."""
    if torch.version.cuda or not shutil.which("g++"):
        pytest.skip("needs a CPU build of PyTorch, and g++")
    folder, home = tmp_path_factory.mktemp("device"), Path(torch.__file__).parent
    (folder / "device.cpp").write_text(DEVICE)
    words = "g++ -shared -fPIC -std=c++20 device.cpp -o device.so -ltorch_cpu -lc10".split()
    subprocess.run([*words, f"-I{home}/include", f"-L{home}/lib"], cwd=folder, check=True)
    done = subprocess.run(
        [sys.executable, ROOT / "tests/cuda_fake.py", folder / "device.so"], env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, check=True, timeout=900,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_what_cuda_is_asked_for_fits(case, outcomes):
    assert not outcomes[case], outcomes[case]


@pytest.mark.parametrize("kind, plain", [("qwen3", True), ("olmo2", True), ("gemma2", False)])
def test_norms_are_fused_where_they_are_plain(kind, plain):
    """Gemma's multiply by 1 + weight. The weights may be anywhere, here on the meta device."""
    model = skeleton(AutoConfig.for_model(kind, **SIZES), torch.float32)
    fuse_norms(model)
    found = [vars(part) for part in model.modules() if type(part).__name__.endswith("RMSNorm")]
    assert found and {"forward" in attributes for attributes in found} == {plain}


OWN = {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}


@pytest.mark.parametrize("before, after", [
    ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}), (OWN, OWN),
])
def test_segments_grow_unless_the_user_says_otherwise(before, after, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(before))
    start.allow_growing_segments()
    assert os.environ == after


def test_a_steps_peak_of_memory_is_its_own(monkeypatch):
    peak = {"allocated": 3 * 2**30, "reserved": 5 * 2**30}
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.update(allocated=0, reserved=0))
    for name in peak:
        monkeypatch.setattr(torch.cuda, f"max_memory_{name}", lambda name=name: peak[name])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    ranks = SimpleNamespace(device=torch.device("cuda"), sum=list, watchdog=None)
    work = rollout.Work([], [], 0, 1, {"rollout": 1.0, "update": 1.0, "reference": 1.0})
    for expected in ((3.0, 5.0), (0.0, 0.0)):
        metrics = rollout.speed_metrics(work, Config(), ranks)
        assert (metrics["memory/peak_gib"], metrics["memory/reserved_gib"]) == expected
        session.start_step(SimpleNamespace(ranks=ranks, state={"step": 0}))
