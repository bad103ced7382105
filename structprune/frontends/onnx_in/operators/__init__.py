"""One file a family of operators; each registers its functions in the table."""

from structprune.frontends.onnx_in.operators import (
    attention,
    contraction,
    elementwise,
    indexing,
    layout,
    normalization,
    recurrent,
    reduction,
    resize,
    spatial,
)

__all__ = ["attention", "contraction", "elementwise", "indexing", "layout", "normalization", "recurrent", "reduction", "resize", "spatial"]
