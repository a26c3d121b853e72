"""swamp_fast: SWAMP, iterative magnitude pruning with weight-averaged particles, all particles trained together.

Letters that tensor shapes use throughout the package:

    R     number of runs
    N     number of particles in a run
    L     number of lanes; a lane is one particle's row in the stacked tensors, and run_of_lane [L] names its run
    P     number of parameters of one model, laid out as a flat vector
    Q     number of prunable parameters; they come first in that vector
    S     number of segments of that vector; the parameters of a segment share a learning rate and a weight decay
    B     batch size of one lane
    C     number of classes, or of a picture's channels
    H, W  height and width
    K     kernel size
    D     density: kept weights / prunable weights
"""

from swamp_fast import ops
from swamp_fast.config import SwampConfig
from swamp_fast.driver import fast_swamp
from swamp_fast.naive import naive_swamp
from swamp_fast.ops.backends import backends
from swamp_fast.problem.arguments import StopRun
from swamp_fast.problem.recipe import Recipe
from swamp_fast.report import write_report
from swamp_fast.runs.result import SwampResult
from swamp_fast.studies.compare import compare
from swamp_fast.studies.comparison import Comparison
from swamp_fast.studies.result import SweepResult
from swamp_fast.studies.sweep import sweep
from swamp_fast.version import __version__

__all__ = [
    "Comparison",
    "Recipe",
    "StopRun",
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
