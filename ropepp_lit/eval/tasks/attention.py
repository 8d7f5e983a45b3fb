"""Task for the distribution of attention weights by distance, with attention maps."""

from __future__ import annotations

import io

from ropepp_lit.errors import UsageError
from ropepp_lit.eval import probes
from ropepp_lit.eval.models import Model
from ropepp_lit.eval.results import Measurement
from ropepp_lit.eval.tasks.base import Request, Task

TEXTS = 4
"""Maximum number of documents."""


class Attention(Task):
    """Shares of the attention weights of real and imaginary heads, and a map of them."""

    task = "attention"
    needs_text = True

    def check(self, model: Model, request: Request) -> None:
        """Raise UsageError if a length is longer than every document."""
        longest = max(map(len, request.documents), default=0)
        for length in request.lengths:
            if longest < length:
                raise UsageError(
                    f"text: attention at {length:,} tokens needs a document of this length, the longest has {longest:,}"
                )

    def num_tokens(self, request: Request) -> int:
        """Return the tokens of the documents that are read."""
        return min(TEXTS, len(request.documents)) * (request.length or 0)

    def measure(self, model: Model, request: Request) -> list[Measurement]:
        """See :func:`~ropepp_lit.eval.probes.measure_attention`."""
        assert request.length is not None
        long_enough = [ids for ids in request.documents if len(ids) >= request.length][:TEXTS]
        measurements, maps = probes.measure_attention(
            model, long_enough, length=request.length, progress=request.progress
        )
        png = io.BytesIO()
        title = f"{model.name}, {request.length:,} tokens"
        probes.draw_maps(maps, model.decoder.scheme.head_kinds, title).savefig(png, format="png", dpi=110)
        request.images.append(png.getvalue())
        return measurements
