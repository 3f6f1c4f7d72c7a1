"""Beam search whose bookkeeping is one kernel a step: the tokens and scores of `generation.search.BeamSearch`."""

import dataclasses
from typing import Any

from torch import Tensor

from florence2.fast.cuda.kernels.availability import are_plain, why_no_kernel
from florence2.generation.search import BeamSearch
from florence2.generation.state import SearchState
from florence2.model.trace import NO_TRACE, Trace

MOST_BEAMS = 20  # the program that ranks 3·K hypotheses keeps (3·K)² comparisons


class FusedBeamSearch(BeamSearch):
    """Stands in for `BeamSearch`; see `fuse`."""

    def settle(
        self, sums: Tensor, parents: Tensor, tokens: Tensor, chosen: Tensor, trace: Trace = NO_TRACE
    ) -> BeamSearch:
        """Settle the candidates by the kernel, or as the parent does where that cannot run or a trace looks on."""
        possible = trace is NO_TRACE and self.newest.shape[1] <= MOST_BEAMS and are_plain(sums, chosen)
        if not possible or why_no_kernel(sums.device, sums.dtype) is not None:
            return super().settle(sums, parents, tokens, chosen, trace)
        from florence2.fast.cuda.kernels.settle import Beams, settle

        options = self.options
        at_limit = options.early_stopping == "never" and options.length_penalty > 0
        beams = settle(
            Beams(*(getattr(self, name) for name in Beams._fields)),
            self.powers,
            (sums, parents, tokens, chosen),
            self.ids.end,
            options.early_stopping is True,
            options.max_new_tokens if at_limit else 0,
        )
        return dataclasses.replace(self, **beams._asdict())


def fuse(state: SearchState) -> SearchState:
    """Return the same state, as one that keeps its books by a kernel where there is one for it."""
    if type(state) is not BeamSearch:
        return state
    fields: dict[str, Any] = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return FusedBeamSearch(**fields)
