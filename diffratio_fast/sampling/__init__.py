"""Images of a trained generator, and their output files."""
