"""For Transformers users: a cache that holds packed keys and values, and attention that reads them.

Importing it registers `attn_implementation="powerquant"`.
"""

from .attention import powerquant_attention
from .cache import LayerMemory, MemoryReport, PowerQuantCache
from .patch import LayerSupport, ModelSupport, check_model, patch, unpatch

__all__ = [
    "LayerMemory",
    "LayerSupport",
    "MemoryReport",
    "ModelSupport",
    "PowerQuantCache",
    "check_model",
    "patch",
    "powerquant_attention",
    "unpatch",
]
