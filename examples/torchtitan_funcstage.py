"""torchtitan on funcstage's pipeline stages: its own trainer and its own options, one line in between.

    torchrun --nproc-per-node 4 examples/torchtitan_funcstage.py \\
        --module torchtitan_funcstage --config llama3_debugmodel \\
        --hf_assets_path ./tests/assets/tokenizer --parallelism.pipeline_parallel_degree 4

torchtitan cuts the model, shards the parts and runs torch's schedule; what differs is how a stage runs
forward and backward. `CONFIG` says which schedule, and how stages are compiled. torchtitan's own
`compile.enable` may be on: the blocks are compiled with their stage, or run as written where that is not.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from funcstage.pipelining import FunctionalPipelineStage


class Config(NamedTuple):
    """How torchtitan's pipelines run.

    Attributes:
        schedule: the name of one of torch's schedules.
        compile: as `FunctionalPipelineStage` takes it: `True` for Inductor, options, or `False`.
    """

    schedule: str
    compile: bool | dict[str, Any]


CONFIG = Config(schedule="ZBVZeroBubble", compile=True)


def use_functional_stages(compile: bool | dict[str, Any]) -> None:
    """Let torchtitan make `FunctionalPipelineStage`s from now on.

    Args:
        compile: as `FunctionalPipelineStage` takes it.
    """
    from torchtitan.distributed import pipeline_parallel

    pipeline_parallel.PipelineStage = partial(FunctionalPipelineStage, compile=compile)  # the one line


def llama3_debugmodel() -> Any:
    """torchtitan's configuration of this name, with the schedule of `CONFIG`."""
    from torchtitan.models.llama3 import config_registry

    return with_schedule(config_registry.llama3_debugmodel())


def deepseek_v3_debugmodel() -> Any:
    """Likewise, with a mixture of experts."""
    from torchtitan.models.deepseek_v3 import config_registry

    return with_schedule(config_registry.deepseek_v3_debugmodel())


def with_schedule(config: Any) -> Any:
    """A configuration of torchtitan's trainer with the schedule, and without CUDA graphs of its own."""
    config.parallelism.pipeline_parallel_schedule = CONFIG.schedule
    config.training.disable_cuda_graphs = True
    return config


if __name__ == "__main__":
    from torchtitan.train import main

    use_functional_stages(CONFIG.compile)
    main()
