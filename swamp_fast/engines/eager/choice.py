"""Choice: the eager engine's execution mode and memory format."""

from __future__ import annotations

from dataclasses import dataclass

# The execution modes: their spelling in the setting `engine`, and their names on the console.
MODES = {"lanes": "lane by lane", "fold": "folded", "fold_grouped": "folded with grouped convolutions"}


@dataclass(frozen=True)
class Choice:
    """How the eager engine runs the lanes.

    mode           the execution mode, a key of MODES
    channels_last  whether images are in channels-last memory format
    why            the reason for this choice
    milliseconds   for engine="fastest", the measured time of a particle's step in each execution mode and memory format
    """

    mode: str
    channels_last: bool
    why: str
    milliseconds: dict[str, float]

    def __str__(self) -> str:
        memory = "channels last" if self.channels_last else "channels first"
        return f"{MODES[self.mode]}, {memory}: {self.why}"

    @property
    def name(self) -> str:
        """The value of the setting `engine` that selects this."""
        return f"eager:{self.mode}" + ":channels_last" * self.channels_last
