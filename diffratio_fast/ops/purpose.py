"""The table of random streams: the purpose of each random number of a run."""

import enum


class Purpose(enum.IntEnum):
    """Purpose of a random number; each purpose is a stream of the noise contract (``ops.noise``).

    Never reuse or change a number: old runs would not be reproducible.
    """

    LATENT = 0  # z of the generator during training
    SIGMA_RATIO = 1  # the noise level of a ratio step
    SIGMA_GENERATOR = 2  # the noise levels of a generator step
    NOISE_REAL = 3  # eps added to real images; shared noise: also to the generated images
    NOISE_FAKE = 4  # eps added to generated images; not with shared noise
    NOISE_GENERATOR = 5  # eps added to generated images in the generator step
    POSTERIOR = 6  # a latent from its stored mean and standard deviation
    FLIP = 7  # horizontal flips of the data
    AUGMENTATION = 8  # augmentation of both halves of a ratio step, and in pre-training
    DATA_ORDER = 9  # the order of records
    DROPOUT = 10  # dropout masks that are keyed by sample
    INITIALIZATION = 11  # parameters of new networks
    SAMPLE_LATENT = 12  # z when sampling from a trained generator
    EVALUATION_SIGMA = 13  # noise levels of measurements
    EVALUATION_REAL = 14  # the same as NOISE_REAL, in measurements
    EVALUATION_FAKE = 15  # the same as NOISE_FAKE, in measurements
    VERIFIER_NOISE = 16  # eps added to the candidates of a verifier
    VERIFIER_CHOICE = 17  # the uniform that selects one candidate
    DENOISING_SIGMA = 18  # the noise level of a pre-training step
    DENOISING_NOISE = 19  # eps added to real images in pre-training
    PENALTY_REAL = 20  # direction of the gradient penalty at a real image
    PENALTY_FAKE = 21  # direction of the gradient penalty at a generated image


SHARED_NOISE = (Purpose.NOISE_REAL, Purpose.NOISE_REAL)
"""Purposes of the (real, fake) pair of a ratio step with one eps, generated once for both halves."""

SEPARATE_NOISE = (Purpose.NOISE_REAL, Purpose.NOISE_FAKE)
"""Purposes of the (real, fake) pair of a ratio step with independent eps."""
