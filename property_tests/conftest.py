"""Hypothesis profiles: how many stages the properties are tried on.

    HYPOTHESIS_PROFILE=thorough pytest property_tests

`STAGES` is the total over the families of stages for the main property (test_equivalence.py); the other
properties take a share of it each.
"""

from __future__ import annotations

import os
import warnings

import torch
from hypothesis import HealthCheck, Phase, settings

from funcstage.testing.strategies import FAMILIES

collect_ignore = ["conftest.py"]  # for doctests, as two modules of one name cannot be imported

STAGES = {"dev": 200, "ci": 2_000, "thorough": 50_000}

for _name, _stages in STAGES.items():
    settings.register_profile(
        _name,
        max_examples=-(-_stages // len(FAMILIES)),
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        phases=[phase for phase in Phase if phase is not Phase.explain],
    )
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") == "true" else "dev")
)

# cuDNN's recurrent layers are single kernels that count no FLOPs, round to TensorFloat-32 and refuse
# backward in eval mode; the other kernels of eager compare with ours operation by operation.
torch.backends.cudnn.enabled = False
# Stages are tiny: more threads would only wait for each other.
torch.set_num_threads(1)
warnings.filterwarnings("ignore", message="Complex modules are a new feature")
