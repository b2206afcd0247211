"""Images of a trained generator, and the files that hold them."""
