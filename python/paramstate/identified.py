"""An optimizer whose state belongs to parameters: the identity layer, around any ``torch.optim.Optimizer``."""

from __future__ import annotations

from .constraining import Constraining
from .copies import Copying
from .freezing import Freezing
from .loading import NamedLoading
from .lookup import Lookup
from .optimizer_editing import OptimizerEditing
from .rebinding import Rebinding
from .row_surgery import RowSurgery
from .surgery import Surgery


class IdentifiedOptimizer(
    NamedLoading, Rebinding, Copying, OptimizerEditing, RowSurgery, Surgery, Constraining, Freezing, Lookup
):
    """Mixin, first among the bases: stable IDs, names, and state that follows a parameter when it is replaced.

    The subclass calls ``_begin_identity`` before and ``_end_identity`` after torch's constructor, and ``_settle`` at
    the start of its step.
    """
