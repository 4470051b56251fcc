"""IVE-GAN: invariant encodings learned by a generative adversarial network.

    min     max    E_x [ log D(T(x), x) + log(1 - D(G(z', E(x)), x)) ]        pairs
    G, E   D, D'   + E_x [ log D'(x) ] + E_z [ log(1 - D'(G(z', z))) ]        single samples

The discriminator D sees an image x beside a candidate and says whether the candidate is a
transformation T(x) or the generator's variation G(z', E(x)). To fool it, the encoder E must keep
what T leaves alone, and z' must supply what T changes. D' keeps samples from the prior real.

Reading order: step.py, losses.py, networks.py with layers/tables.py, config.py, order.py,
transforms.py, optimizer.py, checkpoint/. data/ reads shards, storage/ knows folders and S3,
evaluation/ measures the result, speed/ captures a step as a CUDA graph.
"""
