"""Overlap: messages start before what reads them, and are waited for behind what else is computed.

A trace has each message where its module sends it, and the wait for it next to it: FSDP's weights are all
gathered before the forward, and its gradients reduced behind the backward. Here

- a message of computed values is sent as soon as they are computed;
- a wait, and copies of what came, stand where they are first read, or, if all of that are results, where
  the next message is sent;
- a message of inputs alone is sent when the one before it has come, as each takes memory: a layer's
  weights travel while the layer before computes.

All ranks run the same program, so they still send the same messages in the same order.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch.fx import Graph, Node

from funcstage._torch.operators import OpOverload
from funcstage.engines.graph.nodes import is_cheap


def is_message(node: Node) -> bool:
    """Tell whether a node sends something, and what it receives is there only after another, which waits."""
    return _name(node).startswith("_c10d_functional") and not is_wait(node)


def is_on_its_way(node: Node) -> bool:
    """Tell whether a node's value is what a message receives, or one of several things that it does."""
    return is_message(node) or (node.target is operator.getitem and is_message(node.all_input_nodes[0]))


def is_wait(node: Node) -> bool:
    """Tell whether a node waits for a value."""
    return "::wait_tensor" in _name(node)


def awaits_message(node: Node) -> bool:
    """Tell whether it waits for what a message of the same program brings."""
    return is_wait(node) and is_on_its_way(node.all_input_nodes[0])


def _message_of(wait: Node) -> Node:
    source = wait.all_input_nodes[0]
    return source if is_message(source) else source.all_input_nodes[0]


def overlap(graph: Graph) -> None:
    """Order the operations of a program so that others run while its messages travel."""
    for message in filter(is_message, [*graph.nodes]):
        _leave_out_unread(graph, message)
    order = [*graph.nodes]
    if not any(map(is_message, order)):
        return
    for reordered in (_sent_when_computed, _waited_for_when_read, _sent_ahead):
        order = reordered(order)
    *others, output = order
    for node in others:
        output.prepend(node)


def _leave_out_unread(graph: Graph, message: Node) -> None:
    """Send only what is read: nobody waits until the rest has left, and its memory might serve again."""
    parts = message.args[0]
    if not isinstance(parts, (list, tuple)):
        return
    read: dict[Node, Any] = {user: user.args[1] for user in message.users}
    kept = sorted({*read.values()})
    if len(kept) < len(parts):
        message.args = ([parts[i] for i in kept], *message.args[1:])
        message.meta["val"] = [message.meta["val"][i] for i in kept]
        for user, i in read.items():
            user.args = (message, kept.index(i))


def _sent_when_computed(order: Sequence[Node]) -> list[Node]:
    place = {node: i for i, node in enumerate(order)}
    behind: dict[Node, list[Node]] = defaultdict(list)
    moved: set[Node] = set()
    for message in filter(is_message, order):
        copies, sources = _made_of(message)
        computed = [source for source in sources if source.op == "call_function"]
        if computed:
            last = max(computed, key=place.__getitem__)
            group = {node for node in copies if place[node] > place[last]} - moved
            group |= _parts_of(message)
            behind[last] += sorted(group, key=place.__getitem__)
            moved |= group
    return _moved(order, moved, behind=behind)


def _waited_for_when_read(order: Sequence[Node]) -> list[Node]:
    place = {node: i for i, node in enumerate(order)}
    messages = [node for node in order if is_message(node)]
    following = dict(zip(messages, [*messages[1:], order[-1]], strict=True))
    before: dict[Node, list[Node]] = defaultdict(list)
    moved: set[Node] = set()
    for wait in filter(awaits_message, order):
        group = _copies_of(wait)
        readers = {user for copy in group for user in copy.users if user not in group}
        first = min(readers, key=place.__getitem__, default=order[-1])
        if first.op == "output":
            first = following[_message_of(wait)]
        before[first] += group
        moved.update(group)
    return _moved(order, moved, before=before)


def _sent_ahead(order: Sequence[Node]) -> list[Node]:
    place = {node: i for i, node in enumerate(order)}
    waits: dict[Node, Node] = {}
    for wait in filter(awaits_message, order):
        waits.setdefault(_message_of(wait), wait)  # once one part has come, so have all
    behind: dict[Node, list[Node]] = defaultdict(list)
    moved: set[Node] = set()
    last = [node for node in order if node.op == "placeholder"][-1]
    for message, wait in sorted(waits.items(), key=lambda pair: place[pair[1]]):
        copies, sources = _made_of(message)
        if any(source.op != "placeholder" for source in sources):
            continue
        group: set[Node] = set()
        for node in sorted((copies | _parts_of(message)) - moved, key=place.__getitem__, reverse=True):
            if all(user in group or place[user] > place[last] for user in node.users):
                group.add(node)  # nobody reads it before
        behind[last] += sorted(group, key=place.__getitem__)
        moved |= group
        last = wait
    return _moved(order, moved, behind=behind)


def _parts_of(message: Node) -> set[Node]:
    """The several things that a message receives, which stand directly behind it."""
    return {user for user in message.users if user.target is operator.getitem}


def _made_of(message: Node) -> tuple[set[Node], set[Node]]:
    """A message with the copies that it is made of, and what those are made of."""
    copies, sources = {message}, set()
    stack = [message]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source.op == "placeholder" or (source.op == "call_function" and not is_cheap(source)):
                sources.add(source)
            elif source not in copies:
                copies.add(source)
                stack.append(source)
    return copies, sources


def _copies_of(wait: Node) -> dict[Node, None]:
    """A wait, and the operations that copy what came and read nothing else that is computed, in order."""
    copies: dict[Node, None] = {wait: None}
    stack = [wait]
    while stack:
        for user in stack.pop().users:
            known = (source in copies or source.op == "placeholder" for source in user.all_input_nodes)
            if user not in copies and (is_cheap(user) or is_wait(user)) and all(known):
                copies[user] = None
                stack.append(user)
    return copies


def _moved(
    order: Iterable[Node],
    moved: set[Node],
    before: Mapping[Node, Sequence[Node]] | None = None,
    behind: Mapping[Node, Sequence[Node]] | None = None,
) -> list[Node]:
    """Put nodes directly before others, or directly behind."""
    found: list[Node] = []
    stack = [node for node in order if node not in moved][::-1]
    while stack:
        node = stack.pop()
        found += (before or {}).get(node, ())
        found.append(node)
        stack += reversed((behind or {}).get(node, ()))
    return found


def _name(node: Node) -> str:
    return node.target.name() if isinstance(node.target, OpOverload) else ""
