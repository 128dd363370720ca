"""What two models, optimizers, sessions or state dicts have in common, parameter by parameter.

One question for each file: ``sides`` reads what is compared, ``layout`` says how one shape can be another, ``relation``
tells how one tensor was made from another, ``content`` and ``structure`` find partners where names do not meet,
``matching`` puts these together, ``folding`` finds what went into what, ``outputs`` runs the models, ``report`` holds
and prints the answer.
"""

from .compare import diff as diff
from .report import DiffReport as DiffReport, OutputRow as OutputRow, Row as Row
from .sides import HasTensors as HasTensors
