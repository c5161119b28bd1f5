"""TurboQuant: attention over a KV cache stored in 4 bits a number.

Start with :class:`TurboQuantKVCache` in a model of your own, or with :mod:`turboquant.hf` for a
Hugging Face model; the ops below are what both are made of.
"""

from turboquant._C import __version__
from turboquant.cache import TurboQuantKVCache, replace_kv_cache
from turboquant.constants import codebook, rotation
from turboquant.ops import compress, decompress, tq4_attention, tq4_sdpa, update_

__all__ = [
    "TurboQuantKVCache",
    "__version__",
    "codebook",
    "compress",
    "decompress",
    "replace_kv_cache",
    "rotation",
    "tq4_attention",
    "tq4_sdpa",
    "update_",
]
