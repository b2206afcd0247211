"""The table of random streams: what each random number of a run is for."""

import enum


class Purpose(enum.IntEnum):
    """What a random number is for. Each purpose is a stream of the noise contract (``ops.noise``).

    The number is the purpose's identity. Never reuse or renumber one: old runs would no longer repeat.
    """

    LATENT = 0  # z of the generator during training
    SIGMA_RATIO = 1  # the noise level of a ratio step
    SIGMA_GENERATOR = 2  # the noise levels of a generator step
    NOISE_REAL = 3  # eps added to real images; with shared noise also to their generated partners
    NOISE_FAKE = 4  # eps added to generated images, where it is separate
    NOISE_GENERATOR = 5  # eps added to generated images in the generator step
    POSTERIOR = 6  # a latent from its stored mean and standard deviation
    FLIP = 7  # horizontal flips of the data
    AUGMENTATION = 8  # augmentation of both halves of a ratio step; of the images of pre-training
    DATA_ORDER = 9  # the order of records
    DROPOUT = 10  # dropout masks that are keyed by sample
    INITIALIZATION = 11  # parameters of new networks
    SAMPLE_LATENT = 12  # z when sampling from a trained generator
    EVALUATION_SIGMA = 13  # noise levels of measurements
    EVALUATION_REAL = 14  # eps added to real images in measurements; likewise with shared noise
    EVALUATION_FAKE = 15  # eps added to generated images in measurements, where it is separate
    VERIFIER_NOISE = 16  # eps added to candidates that the verifier weighs
    VERIFIER_CHOICE = 17  # the uniform that selects one candidate
    DENOISING_SIGMA = 18  # the noise level of a pre-training step
    DENOISING_NOISE = 19  # eps added to real images in pre-training
    PENALTY_REAL = 20  # the direction in which the slope at a real image is penalized
    PENALTY_FAKE = 21  # the same for a generated image


SHARED_NOISE = (Purpose.NOISE_REAL, Purpose.NOISE_REAL)
"""Purposes of a ratio step's (real, fake) pair that share one eps: it is generated once for both halves."""

SEPARATE_NOISE = (Purpose.NOISE_REAL, Purpose.NOISE_FAKE)
"""Purposes of a ratio step's (real, fake) pair with independent eps."""
