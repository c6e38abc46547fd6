"""The engine for stages that only plain autograd can run."""
