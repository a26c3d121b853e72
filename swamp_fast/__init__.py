"""swamp_fast: SWAMP, iterative magnitude pruning with weight-averaged particles, all particles trained together.

The letters of all shapes:

    R  runs                          N  particles of a run
    L  lanes: rows of the stacked tensors, with run_of_lane [L]
    P  parameters of one model, flat Q  the prunable ones of them, which come first
    B  batch of one lane             C  classes, or channels of a picture
    H, W  height, width              K  kernel size
    D  density: kept / prunable
"""

from swamp_fast import ops
from swamp_fast.config import SwampConfig
from swamp_fast.driver import fast_swamp
from swamp_fast.naive import naive_swamp
from swamp_fast.ops.backends import backends
from swamp_fast.report import write_report
from swamp_fast.runs.result import SwampResult
from swamp_fast.studies.compare import compare
from swamp_fast.studies.comparison import Comparison
from swamp_fast.studies.result import SweepResult
from swamp_fast.studies.sweep import sweep
from swamp_fast.version import __version__

__all__ = [
    "Comparison",
    "SwampConfig",
    "SwampResult",
    "SweepResult",
    "__version__",
    "backends",
    "compare",
    "fast_swamp",
    "naive_swamp",
    "ops",
    "sweep",
    "write_report",
]
