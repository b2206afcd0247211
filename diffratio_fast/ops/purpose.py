"""The one table of random streams."""

import enum


class Purpose(enum.IntEnum):
    """What a random number is for. Each purpose is its own stream of the noise contract (``ops.noise``).

    A number is a purpose's identity: never reuse or renumber one, or old runs no longer repeat.
    """

    LATENT = 0  # z of the generator during training
    SIGMA_RATIO = 1  # the noise level of a ratio step
    SIGMA_GENERATOR = 2  # the noise levels of a generator step
    NOISE_REAL = 3  # eps added to real images
    NOISE_FAKE = 4  # eps added to generated images
    NOISE_GENERATOR = 5  # eps added to generated images in the generator step
    POSTERIOR = 6  # a latent from its stored mean and standard deviation
    FLIP = 7  # horizontal flips of the data
    AUGMENTATION = 8  # augmentation of both halves of a ratio step; of the images of pre-training
    DATA_ORDER = 9  # the order of records
    DROPOUT = 10  # dropout masks, where they are keyed by sample
    INITIALISATION = 11  # parameters of new networks
    SAMPLE_LATENT = 12  # z when sampling from a trained generator
    EVALUATION_SIGMA = 13  # noise levels when measuring
    EVALUATION_REAL = 14  # eps added to real images when measuring
    EVALUATION_FAKE = 15  # eps added to generated images when measuring
    VERIFIER_NOISE = 16  # eps added to candidates that a verifier weighs
    VERIFIER_CHOICE = 17  # the uniform that draws one of the candidates
    DENOISING_SIGMA = 18  # the noise level of a pre-training step
    DENOISING_NOISE = 19  # eps added to real images in pre-training
    PENALTY_REAL = 20  # the direction in which a real image's slope is penalised
    PENALTY_FAKE = 21  # the same of a generated one
