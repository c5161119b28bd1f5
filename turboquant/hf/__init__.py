"""A 4-bit KV cache for Hugging Face models.

Three lines turn a model's ``generate()`` over to it, and one turns it back::

    from turboquant.hf import enable, disable
    print(enable(model))          # what is compressed, and what is not and why
    model.generate(**inputs)      # a fresh TurboQuantCache for every call
    disable(model)

How it works: :class:`TurboQuantCache` compresses keys and values as they arrive and hands the
model small objects that hold the packed tensors. The model passes them on, unopened, to the
attention function ``"turboquant"``, which computes on the packed data. Importing this package
registers that function and its mask function under that one name with transformers; models that
do not ask for the name never meet it.
"""

try:
    import transformers as _transformers
    from packaging.version import Version as _Version
except ImportError as error:
    raise ImportError(
        "turboquant.hf needs transformers: pip install 'turboquant-tq4[hf]'"
    ) from error

if _Version(_transformers.__version__).release < (5, 16):
    raise ImportError(
        f"turboquant.hf needs transformers 5.16 or newer, found {_transformers.__version__}: "
        "pip install -U 'turboquant-tq4[hf]'"
    )

from turboquant.hf.attention import register as _register
from turboquant.hf.cache import TurboQuantCache
from turboquant.hf.patching import disable, enable, enabled
from turboquant.hf.report import LayerReport, Report
from turboquant.hf.support import UnsupportedError, diagnose

# At import, so that `from_pretrained(..., attn_implementation="turboquant")` works too. Both
# registries are dictionaries that everybody adds keys to; no existing entry is touched.
_register()

__all__ = [
    "LayerReport",
    "Report",
    "TurboQuantCache",
    "UnsupportedError",
    "diagnose",
    "disable",
    "enable",
    "enabled",
]
