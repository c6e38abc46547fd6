"""The table of rules: every operation that an engine must not run as it comes, and what is done about it.

Both modes look here, once for each operation that reaches them: that of the levels (`levels/mode.py`) and
that of the trace (`graph/separable.py`). Whoever adds an operation adds a line to `RULES`.
"""

from __future__ import annotations

from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from funcstage._torch import operators as ops
from funcstage.engines.rules import (
    attention,
    autocast,
    composites,
    custom_functions,
    dtypes,
    flex,
    group_norm,
    norms,
    recurrent,
)
from funcstage.engines.rules.base import Call, Rule, traced, under_levels

RULES: dict[Any, tuple[Rule, ...]] = {
    # Composites that reach a mode whole.
    torch.Tensor.__deepcopy__: (Rule(under_levels, composites.deepcopy),),
    torch.meshgrid: (Rule(under_levels, composites.meshgrid),),
    ops.pack_padded_sequence: (Rule(under_levels, composites.pack_padded_sequence),),
    ops.pad_packed_sequence: (Rule(under_levels, composites.pad_packed_sequence),),
    ops.sobol_engine_draw: (Rule(under_levels, composites.sobol_engine_draw),),
    **{
        function: (Rule(under_levels, composites.writing_below_levels(function)),)
        for function in ops.SOBOL_ENGINE_WRITES
    },
    torch.ctc_loss: (Rule(composites.is_mean_over_listed_lengths, composites.ctc_loss),),
    torch.lstm: recurrent.LSTM,
    torch.gru: recurrent.layers(recurrent.gru_step),
    torch.rnn_tanh: recurrent.layers(recurrent.tanh_step),
    torch.rnn_relu: recurrent.layers(recurrent.relu_step),
    torch.lstm_cell: recurrent.cells(recurrent.lstm_step),
    torch.gru_cell: recurrent.cells(recurrent.gru_step),
    torch.rnn_tanh_cell: recurrent.cells(recurrent.tanh_step),
    torch.rnn_relu_cell: recurrent.cells(recurrent.relu_step),
    # torch.func has a dropout of its own, which draws other masks than the eager one.
    torch.dropout: (Rule(under_levels, composites.dropout()),),
    torch.dropout_: (Rule(under_levels, composites.dropout(in_place=True)),),
    torch.feature_dropout: (Rule(under_levels, composites.dropout(features=True)),),
    torch.feature_dropout_: (Rule(under_levels, composites.dropout(features=True, in_place=True)),),
    torch.alpha_dropout: (Rule(under_levels, composites.dropout(alpha=True)),),
    torch.alpha_dropout_: (Rule(under_levels, composites.dropout(alpha=True, in_place=True)),),
    torch.feature_alpha_dropout: (Rule(under_levels, composites.dropout(features=True, alpha=True)),),
    torch.feature_alpha_dropout_: (
        Rule(under_levels, composites.dropout(features=True, alpha=True, in_place=True)),
    ),
    # Norms: their kernels write statistics and do not say so, or crash in a backward that is split.
    torch.batch_norm: (Rule(traced, norms.batch_norm, norms.STATISTICS, whole=True),),
    torch.instance_norm: (Rule(traced, norms.instance_norm, norms.STATISTICS, whole=True),),
    **{
        function: (Rule(group_norm.crashes, partial(group_norm.contiguous_group_norm, function)),)
        for function in group_norm.GROUP_NORMS
        if not group_norm.SURVIVES
    },
    # Autocast acts on these as a whole, above the levels.
    ops.scaled_dot_product_attention: attention.remembering(
        autocast.first(torch.ops.aten.scaled_dot_product_attention.default)
    ),
    ops.cdist: autocast.first(torch.ops.aten.cdist.default),
    torch.bilinear: autocast.within("bilinear"),
    torch.linalg.pinv: autocast.within("pinv"),
    torch.pinverse: autocast.within("pinverse"),
    torch.Tensor.pinverse: autocast.within("pinverse"),
    **({torch.linalg.polar: autocast.within("polar")} if hasattr(torch.linalg, "polar") else {}),
    # Fake tensors get another dtype than real ones.
    F.linear: (Rule(traced, dtypes.linear, whole=True),),
    F.one_hot: (Rule(traced, composites.one_hot, whole=True),),
    # Python functions around those above, which a trace does not open otherwise.
    **{
        function: (Rule(traced, composites.opened_body(function)),)
        for function in (F.batch_norm, F.instance_norm, F.multi_head_attention_forward)
    },
}

HIGHER_ORDER: dict[str, Any] = {"flex_attention": flex.rules}
"""Rules of higher-order operators, by the names that torch has them under: importing them takes long."""


class Known(NamedTuple):
    """What is known of an operation.

    Attributes:
        opened: what runs instead under the levels, whatever its operands; None for most.
        at_levels: what to ask in each call under the levels, in this order.
        in_trace: what to ask in each call that is recorded.
        written: which operands it writes into, by its schemas.
        statistics: positions and names of operands that it writes into besides.
        may_have_formula: whether it is an operator of somebody else's, which may have an autograd formula.
    """

    opened: Any
    at_levels: tuple[Rule, ...]
    in_trace: tuple[Rule, ...]
    written: ops.Written
    statistics: tuple[tuple[int, str], ...]
    may_have_formula: bool

    def instead(self, call: Call) -> Rule | None:
        """The first rule that applies to a call."""
        return next(
            (rule for rule in (self.in_trace if call.traced else self.at_levels) if rule.when(call)), None
        )


def known(function: Any) -> Known:
    """Look up what is known of an operation: the one place where engines do."""
    found = _KNOWN.get(function)
    if found is None:
        if torch.compiler.is_dynamo_compiling():  # which reads this for the branches of torch.cond
            rules = RULES.get(function, ())
            return Known(None, rules, rules, ops.NO_WRITES, (), False)
        found = _KNOWN[function] = _found_out(function)
    return found


_KNOWN: dict[Any, Known] = {}


def _found_out(function: Any) -> Known:
    rules = RULES.get(function, ())
    if isinstance(function, ops.HigherOrderOperator) and (make := HIGHER_ORDER.get(function.name())):
        rules = make(function)
    opened = next((rule.body for rule in rules if rule.when is under_levels), None)
    if opened is None and type(function) is FunctionType:
        opened = composites.opened(function)
    return Known(
        opened,
        tuple(rule for rule in rules if rule.when not in (under_levels, traced)),
        tuple(rule for rule in rules if rule.when is not under_levels),
        ops.written_by(function),
        tuple(operand for rule in rules for operand in rule.writes),
        custom_functions.may_have_formula(function),
    )
