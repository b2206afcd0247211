"""The ratio network as a verifier: calibration, noise level, selection."""
