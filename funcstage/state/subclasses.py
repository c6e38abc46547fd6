"""Tensors of classes of the user's, which torch tells of its functions, and whose results are of them too.

The levels wrap tensors and hide their classes. A stage that is handed such tensors, or makes some, is split
on a plain autograd tape instead (`funcstage.engines.choose`), where they are what they are.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from funcstage.errors import StructureError


@functools.lru_cache(maxsize=1024)
def is_told(kind: Any) -> bool:
    """Tell whether it is a class of tensors that is told of torch's functions, and not of its kernels."""
    return (
        issubclass(kind, Tensor)
        and kind is not Tensor
        and kind.__torch_function__ is not nn.Parameter.__torch_function__
        and kind.__torch_dispatch__ is Tensor.__torch_dispatch__
    )


def as_told(kind: type, value: Any) -> Any:
    """The same as a tensor of such a class, if it is one, which something that stands for it has hidden."""
    return value.as_subclass(kind) if is_told(kind) else value


def any_told(leaves: Iterable[Any]) -> bool:
    """Tell whether such tensors are among leaves."""
    return any(map(is_told, {*map(type, leaves)}))


def check_parameters(stage: str, parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse parameters of classes that are told of torch's functions, as what stands for them is not.

    Raises:
        StructureError: names the first one.
    """
    for name, parameter in parameters.items():
        kind = type(parameter)
        if is_told(kind) and type(parameter.detach()) is not kind:
            raise StructureError(
                f"{stage}: {name!r} is a {kind.__qualname__}, whose __torch_function__ would not run, as a "
                "stage computes with plain tensors in the place of parameters. Do in the forward what it "
                "does, or in a parametrization (torch.nn.utils.parametrize)."
            )
