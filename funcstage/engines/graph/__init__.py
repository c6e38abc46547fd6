"""Engine 2: the split by tracing a stage once and partitioning the graph three ways."""

from funcstage.engines.graph.compile import CompiledStage, compile

__all__ = ["CompiledStage", "compile"]
