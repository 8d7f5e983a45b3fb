"""Where the weights of attention go, by distance, and maps of them."""

from __future__ import annotations

import io

from ropepp_lit.errors import UsageError
from ropepp_lit.eval import probes
from ropepp_lit.eval.models import Model
from ropepp_lit.eval.results import Measurement
from ropepp_lit.eval.tasks.base import Request, Task

TEXTS = 4
"""Documents that are read."""


class Attention(Task):
    """Shares of the weights of real and imaginary heads, and a map of them."""

    task = "attention"
    needs_text = True

    def check(self, model: Model, request: Request) -> None:
        """Raise UsageError where no document is as long as a length."""
        longest = max(map(len, request.documents), default=0)
        for length in request.lengths:
            if longest < length:
                raise UsageError(
                    f"text: attention at {length:,} tokens needs a document as long, and the longest has {longest:,}"
                )

    def num_tokens(self, request: Request) -> int:
        """Of the documents that are read."""
        return min(TEXTS, len(request.documents)) * (request.length or 0)

    def measure(self, model: Model, request: Request) -> list[Measurement]:
        """See :func:`~ropepp_lit.eval.probes.measure_attention`."""
        assert request.length is not None
        long_enough = [ids for ids in request.documents if len(ids) >= request.length][:TEXTS]
        found, maps = probes.measure_attention(model, long_enough, length=request.length, progress=request.progress)
        drawn = io.BytesIO()
        title = f"{model.name}, {request.length:,} tokens"
        probes.draw_maps(maps, model.decoder.scheme.head_kinds, title).savefig(drawn, format="png", dpi=110)
        request.images.append(drawn.getvalue())
        return found
