"""How the messages of a pipeline travel: what the ranks want, what their devices can do -> one way for all.

Each rank's offer is a part of its plan. Whoever has all offers comes to the same decision; the rank with
the first stage tells it to the others with what its microbatches look like.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch

from funcstage._torch import symmetric
from funcstage.errors import StructureError

Transport: TypeAlias = Literal["auto", "nccl", "symmetric"]
"""Through the process group, or straight into the memory of the peer; or that where it is possible."""

Place: TypeAlias = "tuple[str, str, tuple[str, ...]] | str"
"""The host and the name of a device and the names of those that it reaches; or why there is none."""


@dataclass(frozen=True, slots=True)
class Medium:
    """Devices of one type, which may reach each other's memory.

    Attributes:
        place: says where a device is.
        open: makes memory that is reached by all ranks of a group: `symmetric.Memory`.
    """

    place: Callable[[torch.device], Place]
    open: Callable[[int, int, Any, torch.device], Any]


MEDIA = {"cuda": Medium(symmetric.place, symmetric.open_memory)}
"""By type of device."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What a rank wants, and can.

    Attributes:
        wants: the transports of its stages.
        place: where its device is.
    """

    wants: frozenset[str]
    place: Place

    @classmethod
    def of(cls, stages: Sequence[Any]) -> Offer:
        """Read the stages of a rank; torch's own want what torch does."""
        wants = frozenset(getattr(stage, "transport", "nccl") for stage in stages)
        device = torch.device(stages[0].device)
        if "nccl" in wants or device.type not in MEDIA:
            return cls(wants, f"its stages are on {device}" if device.type not in MEDIA else "")
        return cls(wants, MEDIA[device.type].place(device))


def is_symmetric(offers: Mapping[int, Offer | None]) -> bool:
    """Decide whether messages are written straight into the memory of peers.

    Args:
        offers: of all ranks, as far as they have told.

    Raises:
        StructureError: if some rank insists on it, and another one cannot or does not want to.
    """
    wanting = [rank for rank, offer in offers.items() if offer and "symmetric" in offer.wants]
    against = [rank for rank, offer in offers.items() if offer and "nccl" in offer.wants]
    reason = f"rank {against[0]} has stages that do not" if against else _unreachable(offers)
    if wanting and reason and len(offers) > 1:
        raise StructureError(
            f"rank {wanting[0]} of the pipeline wants transport='symmetric', but {reason}. Give all stages "
            "transport='auto', or put the ranks on GPUs of one host that reach each other's memory."
        )
    return len(offers) > 1 and not reason


def _unreachable(offers: Mapping[int, Offer | None]) -> str:
    """Why the ranks do not reach each other's memory; nothing if they do."""
    places: dict[int, tuple[str, str, tuple[str, ...]]] = {}
    for rank, offer in offers.items():
        if offer is None:
            return f"rank {rank} has said nothing about its stages"
        if isinstance(offer.place, str):
            return f"rank {rank} cannot: {offer.place}"
        places[rank] = offer.place
    for rank, (host, _, reaches) in places.items():
        for other, (its_host, name, _) in places.items():
            if host != its_host:
                return f"rank {rank} and rank {other} are on two hosts"
            if rank != other and name not in reaches:
                return f"the device of rank {rank} does not reach the memory of rank {other}'s"
    return ""


def check_transport(transport: Transport, device: torch.device) -> Transport:
    """Refuse what is no transport, or none for a device."""
    if transport not in ("auto", "nccl", "symmetric"):
        raise StructureError(f'transport must be "auto", "nccl" or "symmetric", got {transport!r}.')
    if transport == "symmetric" and device.type not in MEDIA:
        raise StructureError(
            f'transport="symmetric" needs CUDA devices that reach each other\'s memory, and this stage is on '
            f'{device}. Leave it at "auto", which takes it where it is possible.'
        )
    return transport
