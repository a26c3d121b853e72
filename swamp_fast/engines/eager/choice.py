"""Choice: the execution mode and memory format with which the eager engine runs the lanes."""

from __future__ import annotations

from dataclasses import dataclass

# The execution modes, as the setting `engine` spells them, and what the console calls them.
MODES = {"lanes": "lane by lane", "fold": "folded", "fold_grouped": "folded with grouped convolutions"}


@dataclass(frozen=True)
class Choice:
    """How the eager engine runs the lanes.

    way           the execution mode, a key of MODES
    milliseconds  what engine="fastest" measured: the time of a particle's step, by execution mode and memory format
    """

    way: str
    channels_last: bool
    why: str
    milliseconds: dict[str, float]

    def __str__(self) -> str:
        memory = "channels last" if self.channels_last else "channels first"
        return f"{MODES[self.way]}, {memory}: {self.why}"

    @property
    def name(self) -> str:
        """The value of the setting `engine` that selects this."""
        return f"eager:{self.way}" + ":channels_last" * self.channels_last
