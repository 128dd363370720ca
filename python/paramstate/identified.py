"""An optimizer whose state belongs to parameters: the identity layer, around any ``torch.optim.Optimizer``."""

from __future__ import annotations

from .editing.optimizer import OptimizerEditing
from .identity.copies import Copying
from .identity.lookup import Lookup
from .loading.loading import NamedLoading
from .surgery.constraining import Constraining
from .surgery.freezing import Freezing
from .surgery.relayouting import Relayouting
from .surgery.replacing import Surgery
from .surgery.retyping import Retyping
from .surgery.row_surgery import RowSurgery


class IdentifiedOptimizer(
    NamedLoading, Relayouting, Copying, OptimizerEditing, RowSurgery, Surgery, Retyping, Constraining, Freezing, Lookup
):
    """Mixin, first among the bases: stable IDs, names, and state that follows a parameter when it is replaced.

    The subclass calls ``_begin_identity`` before and ``_end_identity`` after torch's constructor, and ``_settle`` at
    the start of its step.
    """
