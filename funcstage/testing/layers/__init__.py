"""The vocabulary of generated stages: every layer that a stage may be composed of.

Each entry of `LAYERS` says where its layer fits (shape, dtype, mode), which options it has, what shape
comes out and how it is built. Stages are composed by `stages`; nothing here knows of Hypothesis.
Conditions are those of eager torch: a layer fits wherever eager itself runs it forward and backward.
"""

from funcstage.testing.layers import dense, image, sequence, weights
from funcstage.testing.layers.base import Layer, Place

__all__ = ["LAYERS", "Layer", "Place"]

LAYERS: dict[str, Layer] = {**dense.LAYERS, **weights.LAYERS, **image.LAYERS, **sequence.LAYERS}
"""Every layer by name."""
