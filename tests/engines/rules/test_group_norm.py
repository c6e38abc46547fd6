"""Output masks of backward operations are split only where the kernel survives it.

In processes of their own, as a kernel that does not takes its process down.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from masked_backwards import ELSEWHERE, RUN, masked_operations

pytestmark = pytest.mark.slow

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
def test_every_mask_gives_the_gradients_of_none(device: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.support.masked_backwards", device], capture_output=True, text=True
    )
    lines = ran.stdout.splitlines()
    assert ran.returncode == 0, f"{lines[-1]}: exit {ran.returncode}\n{ran.stderr[-1000:]}"
    assert len(lines) > 500
    assert [line for line in lines if line.startswith("DIFFERS")] == []


def test_every_operation_that_torch_gives_an_output_mask_is_run_or_has_a_reason() -> None:
    assert masked_operations() == RUN | set(ELSEWHERE)


GROUP_NORM = """
import itertools, sys, torch
import torch.nn.functional as F
import funcstage as fs

class Keywords(torch.nn.GroupNorm):
    def forward(self, x):
        return F.group_norm(input=x, num_groups=2, weight=self.weight, bias=self.bias)

device = sys.argv[1]
forms = {4: torch.channels_last, 5: torch.channels_last_3d}
engines = ("closures", "aten", "autograd")
kinds = (torch.nn.GroupNorm, Keywords)
for dim, engine, argnums, kind in itertools.product((4, 5), engines, ((0,), ()), kinds):
    torch.manual_seed(0)
    module = kind(2, 4).double().to(device)
    x = torch.randn([2, 4, 6, 6, 5][:dim], dtype=torch.float64, device=device)
    x = x.to(memory_format=forms[dim])
    leaf = x.clone().requires_grad_()
    expected = module(leaf)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, [leaf, *module.parameters()], grad)
    if engine == "autograd":
        leaf = x.clone().requires_grad_()
        output, parameters = module(leaf), list(module.parameters())
        (dx,), groups = fs.autograd.stage_backward_input([output], [grad], [leaf], iter(parameters))
        grads = fs.autograd.stage_backward_weight(iter(parameters), groups)
    else:
        apply, params, buffers = fs.functionalize(module)
        stage = apply if engine == "closures" else fs.compile(apply, backend=engine)
        output, _, pullback = fs.stage_vjp(stage, params, buffers, x, argnums=argnums)
        (dx,), weight_pullback = pullback(grad)
        grads = weight_pullback().values()
    assert output.stride() == expected.stride()
    torch.testing.assert_close([*grads], [*wanted[1:]])
    torch.testing.assert_close(dx, wanted[0]) if dx is not None else None
"""


@pytest.mark.parametrize("device", DEVICES)
def test_affine_group_norm_in_channels_last_survives_in_all_engines(device: str) -> None:
    code = f"import funcstage.autograd\n{GROUP_NORM}"
    ran = subprocess.run([sys.executable, "-c", code, device], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]


WITHOUT_DX = """
import torch
import funcstage as fs
from funcstage.engines.rules.group_norm import SURVIVES

class Inner(torch.nn.GroupNorm):
    def forward(self, x):
        return super().forward(x) + torch.func.grad(lambda p: super(Inner, self).forward(p).square().sum())(x)

def found(module, x, stage):
    leaf = x.contiguous().requires_grad_()
    expected = torch.autograd.grad(module(leaf).sum(), list(module.parameters()))
    torch.testing.assert_close([*stage(module, x)], [*expected])

def uncompiled(module, x):
    apply, params, buffers = fs.functionalize(module)
    output, _, pullback = fs.stage_vjp(apply, params, buffers, x, argnums=())
    return pullback(torch.ones_like(output))[1]().values()

def on_a_tape(module, x):
    output, parameters = module(x), list(module.parameters())
    _, groups = fs.autograd.stage_backward_input([output], [torch.ones_like(output)], [], iter(parameters))
    return fs.autograd.stage_backward_weight(iter(parameters), groups)

x = torch.randn(2, 4, 6, 6, dtype=torch.float64).to(memory_format=torch.channels_last)
found(Inner(2, 4).double(), x, uncompiled)
try:
    found(torch.nn.GroupNorm(2, 4).double(), x, on_a_tape)
except fs.StructureError as error:
    assert not SURVIVES and "group norm on the CPU" in str(error), error
found(torch.nn.GroupNorm(2, 4).double(), x.contiguous(), on_a_tape)
"""


def test_affine_group_norm_of_what_requires_no_grad_survives_or_is_refused() -> None:
    code = f"import funcstage.autograd\n{WITHOUT_DX}"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
