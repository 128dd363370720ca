"""An optimizer whose state belongs to parameters: the identity layer, around any ``torch.optim.Optimizer``."""

from __future__ import annotations

from .copies import Copying
from .loading import NamedLoading
from .lookup import Lookup
from .rebinding import Rebinding
from .surgery import Surgery


class IdentifiedOptimizer(NamedLoading, Rebinding, Copying, Surgery, Lookup):
    """Mixin, first among the bases: stable IDs, names, and state that follows a parameter when it is replaced.

    The subclass calls ``_begin_identity`` before and ``_end_identity`` after torch's constructor, and ``_settle`` at
    the start of its step.
    """
