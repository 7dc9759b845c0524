"""The parts of a training step that is measured whole."""
