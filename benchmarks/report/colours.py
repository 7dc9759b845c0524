"""Colours that the report and README's figures share."""

from ..step.parts import BACKWARD, FORWARD, LOOPS, LOSS, OPTIMIZER, TARGETS

INK, FAINT, GRID = "#1f2933", "#5f6b76", "#e4e8ec"
PARTS = {  # of a training step
    TARGETS: "#7fbc41",
    LOOPS: "#dfc27d",
    FORWARD: "#c8cdd2",
    LOSS: "#c51b7d",
    BACKWARD: "#9aa3ab",
    OPTIMIZER: "#66717b",
}
