"""The models that were being loaded, or had just been, when the machine went down: one that did so twice is not loaded by itself again.

A kernel panic in a GPU driver comes back with the model that caused it, at every boot, for ever, unless somebody remembers.
"""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

from mlxd import paths
from mlxd.papers import Papers

log = logging.getLogger("mlxd")

#: A model is left alone after this many boots that ended with it freshly loaded.
MOST_DIRTY = 2
MAX_FILE_BYTES = 1024 * 1024


class Marker(msgspec.Struct):
    """`boot`: the boot in which the model is on trial; "" when it is not. `dirty`: how many boots ended so."""

    boot: str
    dirty: int = 0


markers = msgspec.json.Decoder(dict[str, Marker])


class Boots:
    """One marker per model, on disk before its load begins."""

    def __init__(self, file: Path, boot: str, papers: Papers):
        self.file = file
        self.papers = papers
        self.boot = boot
        self.markers = read(file)
        fresh = {model: marker for model, marker in self.markers.items() if marker.boot not in ("", boot)}
        for model, marker in fresh.items():
            marker.boot = ""
            marker.dirty += 1
            log.warning("the machine went down while %s was fresh, %d times in a row", model, marker.dirty)
        if fresh:
            self.write()

    def begin(self, model: str) -> None:
        """It is about to be loaded."""
        marker = self.markers.setdefault(model, Marker(""))
        if marker.boot != self.boot:
            marker.boot = self.boot
            self.write()

    def pass_trial(self, model: str) -> None:
        """It has run long enough, or ended well: nothing is held against it."""
        if self.markers.pop(model, None) is not None:
            self.write()

    def pass_trials(self) -> None:
        """All that are loaded now end well."""
        for model in [model for model, marker in self.markers.items() if marker.boot]:
            self.pass_trial(model)

    def end_trial(self, model: str) -> None:
        """It is not loaded any more, and the machine is still up."""
        marker = self.markers.get(model)
        if marker is not None and marker.boot:
            marker.boot = ""
            if not marker.dirty:
                del self.markers[model]
            self.write()

    def objection(self, model: str) -> str:
        """Why the model should not be loaded unasked, in words; "" when nothing speaks against it."""
        marker = self.markers.get(model)
        if marker is None or marker.dirty < MOST_DIRTY:
            return ""
        return f"the machine went down {marker.dirty} times while it was loaded or fresh; a request for it loads it all the same"

    def write(self) -> None:
        if self.markers:
            self.papers.write(self.file, msgspec.json.encode(self.markers))
        else:
            self.papers.remove(self.file)


def read(file: Path) -> dict[str, Marker]:
    """What earlier boots left; {} when it cannot be read."""
    try:
        return markers.decode(paths.read_small(file, MAX_FILE_BYTES) or b"{}")
    except (msgspec.DecodeError, UnicodeDecodeError):
        return {}
