"""What IVE-GAN is compared with, in the same networks, on the same data in the same order.

    adversarial.py    GAN, PacGAN2, and BiGAN / ALI
    autoencoder.py    autoencoder, denoising autoencoder, variational autoencoder
    siamese.py        SimCLR and VICReg
    untrained.py      PCA, and an encoder with its first weights

Each returns an encoder (images -> codes of ``z_dim`` entries), a generator ((z', z) -> samples), or
both, in the form that ``evaluation/`` measures. ``training.py`` has the loop that they share.
"""
