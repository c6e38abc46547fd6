"""The uncompiled engine: two nested `torch.func` levels around the stage, without tracing."""
