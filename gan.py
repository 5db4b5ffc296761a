"""A generative adversarial network for 28x28 grey images, from scratch.

The game (Goodfellow et al. 2014, arxiv.org/abs/1406.2661). Two networks play against each other:

    the generator G turns noise z into an image G(z), and wants it to be taken for a real one;
    the discriminator D looks at an image x and says how probable it is that x is real: D(x) in (0, 1).

They fight over one number, the value of the game (equation 1):

    min over G, max over D of   V(D, G) = E[ log D(x) ] + E[ log(1 − D(G(z))) ]
                                          x: real images    z: noise

Nobody tells G what a digit is. All that it learns comes through D, as the answer to one question: how should each
pixel of this image change for you to find it more real? That answer is a gradient, which is why D must be a
differentiable network, and why it must not run away: a D that is never in doubt has nothing to teach.

The best D for a given G says p_data(x) / (p_data(x) + p_G(x)) (Proposition 1). Once G matches the data that is 1/2
everywhere, and D can do no better than toss a coin (Theorem 1).

The file goes in the order of the game: G, D, what each minimises, one step of play, and the average of G over many
steps, which is what gets sampled. Shapes stand at the ends of lines; N is the number of images in a batch.
"""
import torch
import torch.nn.functional as F
from torch import nn

KINDS = 10   # that G may choose from
CHUNK = 100  # images that draw() has G make at a time


class Generator(nn.Module):
    """Noise z (N, latent_dim), drawn from a standard normal, to images (N, 1, 28, 28) in [-1, 1].

    Nothing says what the numbers of z mean; training finds a use for them. As the layers are continuous, nearby z give
    images that look alike: good for slants and strokes, bad for digits, which come in kinds with nothing in between. On
    the way from a 3 to a 0 G draws what is neither (Khayatkhoei et al. 2018, arxiv.org/abs/1806.00880). So the first
    KINDS numbers of z only make a choice: which of them is the largest? What the kinds are is for G to find out, and
    without a single label it gives each to a digit or two. In a pair of runs of 8 epochs the share of images that a
    classifier is not sure of fell by half.
    """

    def __init__(self, latent_dim=64):
        super().__init__()
        self.latent_dim = latent_dim
        self.layers = nn.Sequential(
            # A tiny picture with many channels: which strokes there are, and roughly where.
            nn.Linear(latent_dim, 128 * 4 * 4, bias=False),                       # (N, 2048)
            nn.Unflatten(1, (128, 4, 4)),                                         # (N, 128, 4, 4)
            # Batch norm brings each channel to mean 0, variance 1 over batch and pixels, then applies a learned scale
            # and shift. Without it an early layer can shrink all noise to nearly the same activations, and G draws one
            # digit for every z (Radford et al. 2015, the DCGAN paper, arxiv.org/abs/1511.06434, section 3). A bias just
            # before would be taken away with the mean; hence bias=False.
            nn.BatchNorm2d(128),
            nn.ReLU(),  # DCGAN's choice. D's are leaky, for a reason given there.
            # A transposed convolution paints one small patch per input pixel, `stride` pixels apart, and adds them up:
            # upscaling that is learned. Channels fall as pixels grow: less of what is drawn, more of where.
            nn.ConvTranspose2d(128, 64, 3, stride=2, padding=1, bias=False),      # (N, 64, 7, 7)
            nn.BatchNorm2d(64),
            nn.ReLU(),
            # Kernel 4 is a multiple of stride 2, so every pixel gets equally many patches. Kernel 3 or 5 this near
            # to the image shows as a checkerboard (Odena et al. 2016, distill.pub/2016/deconv-checkerboard).
            nn.ConvTranspose2d(64, 16, 4, stride=2, padding=1, bias=False),       # (N, 16, 14, 14)
            nn.BatchNorm2d(16),
            nn.ReLU(),
            # No batch norm here: it would force every batch of images to the same mean and contrast. And the last
            # upscaling goes another way, four channels laid out as 2x2 pixels (Shi et al. 2016,
            # arxiv.org/abs/1609.05158): transposed convolution to one channel made a step 3 % slower.
            nn.Conv2d(16, 4, 3, padding=1),                                       # (N, 4, 14, 14)
            nn.PixelShuffle(2),                                                   # (N, 1, 28, 28)
            # tanh keeps to the range that real pixels are scaled to. Were fakes free to leave it, D could tell them by
            # that alone. Its flat ends suit MNIST: most pixels are paper (−1) or ink (1), hard to overshoot that way.
            nn.Tanh(),
        )
        self.apply(initialise)

    def forward(self, z):
        choice = F.one_hot(z[:, :KINDS].argmax(1), KINDS)                         # (N, KINDS), a single 1 in each row
        return self.layers(torch.cat([4 * choice, z[:, KINDS:]], dim=1))          # at 2 G ignores it; 5: less variety


class Discriminator(nn.Module):
    """Images (N, 1, 28, 28) in [-1, 1] to one logit each (N,); sigmoid(logit) is D(x).

    Logits, not probabilities: in float32 a sigmoid rounds to exactly 1 from a logit of 17 on, and log(1 − D) is
    infinite there. The losses below work on the logit itself and never meet that 1.
    """

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            # The generator backwards. Strides shrink the picture, not pooling: max pooling would pass G's gradient to
            # one pixel in four. No batch norm on the input, so that D sees the true range of values (DCGAN, section 3).
            nn.Conv2d(1, 16, 4, stride=2, padding=1),                             # (N, 16, 14, 14)
            # G learns only through D. A ReLU that is off passes no gradient back; a leaky one passes 0.2 of it.
            nn.LeakyReLU(0.2),
            nn.Conv2d(16, 32, 4, stride=2, padding=1, bias=False),                # (N, 32, 7, 7)
            # Batch norm lets D compare an image with its batch: if all fakes look alike, that shows.
            nn.BatchNorm2d(32),
            nn.LeakyReLU(0.2),
            # To judge digits and not just strokes, a unit must see a whole digit, some 20 pixels wide; the linear layer
            # sees it all, but only adds up. This layer shrinks nothing, but widens the view of the next one's units
            # from 18 of the 28 pixels to 26. At 7x7 it is cheap, and in a pair of runs of 8 epochs it halved the
            # Fréchet distance (of generated from real images: less is better; tests/benchmark.py measures it).
            nn.Conv2d(32, 64, 3, padding=1, bias=False),                          # (N, 64, 7, 7)
            nn.BatchNorm2d(64),
            nn.LeakyReLU(0.2),
            nn.Conv2d(64, 128, 3, stride=2, padding=1, bias=False),               # (N, 128, 4, 4)
            nn.BatchNorm2d(128),
            nn.LeakyReLU(0.2),
            nn.Flatten(),                                                         # (N, 2048)
            nn.Linear(128 * 4 * 4, 1),                                            # (N, 1)
            nn.Flatten(0),                                                        # (N,)
        )
        self.apply(initialise)
        nn.init.normal_(self.layers[-2].weight, 0, 0.002)  # no opinion yet: the game starts at D(x) near 1/2

    def forward(self, images):
        return self.layers(images).float()  # where the layers compute in bfloat16, the losses still do not


def initialise(module):
    """Small weights, from N(0, 0.02²), for the convolutions (DCGAN, section 4): the first images are grey, where tanh
    is steepest. PyTorch's own initialisation did a little worse. Batch norm starts at scale 1; 0.02 would mute it."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0, 0.02)


def discriminator_loss(real_logits, fake_logits):
    """−V(D, G), which D minimises: −log D(x) − log(1 − D(G(z))), each a mean over its batch. Logits (N,) to scalar.

    This is binary cross-entropy with label 1 for real and 0 for fake. A coin-tossing D scores 2 ln 2 = 1.386.
    """
    return (F.binary_cross_entropy_with_logits(real_logits, torch.ones_like(real_logits))
            + F.binary_cross_entropy_with_logits(fake_logits, torch.zeros_like(fake_logits)))


def generator_loss(fake_logits):
    """−log D(G(z)), averaged, which G minimises in place of equation 1's log(1 − D(G(z))). Logits (N,) to a scalar.

    Both push D(G(z)) up. But the gradient of log(1 − D) with respect to the logit is −D: it vanishes where D sees
    through the fake, as it soon does while G is still bad. That of −log D is −(1 − D), near −1 there (Goodfellow et
    al., section 3, last paragraph; "non-saturating" is its later name). As code: cross-entropy with the label of real.
    """
    return F.binary_cross_entropy_with_logits(fake_logits, torch.ones_like(fake_logits))


def gradient_penalty(real, real_logits):
    """R1 (Mescheder et al. 2018, arxiv.org/abs/1801.04406, section 4.1): 0.01 / 2 · E[ |∇ logit(x)|² ], x real.

    Left alone, D learns its 60,000 images ever better, and d_loss sinks: D is then certain on both sides of a cliff,
    and flat where the fakes are. The penalty makes steepness near the data cost something, so that D slopes gently
    from fakes to real ones, and a slope is what G climbs. In a pair of runs of 8 epochs, of an earlier version
    with 0.1 for 0.01, it divided the Fréchet distance by three, and d_loss stayed near 1.3 in place of 0.5.
    """
    # One backward pass for all: image i's part of the gradient of the sum is that of its own logit, but for what batch
    # norm carries from one image to another. create_graph, since the gradient is to be differentiated once more.
    gradient, = torch.autograd.grad(real_logits.sum(), real, create_graph=True)   # (N, 1, 28, 28)
    return 0.01 / 2 * gradient.square().sum(dim=(1, 2, 3)).mean()


def make_optimizer(network, lr):
    """Adam for one of the two networks; each has its own, as each minimises its own loss.

    lr: DCGAN found 0.001 too high and took 0.0002; networks as small as these stand 0.0015, and learn faster.
    beta1 = 0.5: Adam's usual 0.9 averages the gradients of some ten steps, but here the other player has moved since,
    and old gradients make the two chase each other in circles (DCGAN, section 4: oscillation). beta2 is Adam's own.
    """
    return torch.optim.Adam(network.parameters(), lr, betas=(0.5, 0.999), fused=True)


def precision(device):
    """A context in which the networks compute in bfloat16 where the device is fast at it, in float32 elsewhere.

    Weights, gradients and losses stay float32. No cache: it could carry D's old weights over into G's turn.
    """
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else (
        device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False))
    return torch.autocast(device.type, torch.bfloat16, enabled=fast, cache_enabled=False)


# In every 16th step, with 16 times the weight, the penalty pulls as hard for a 16th of the time (Karras et al. 2020,
# arxiv.org/abs/1912.04958, section 3.1, "lazy regularization").
PENALTY_EVERY = 16


def adversarial_step(generator, discriminator, g_optimizer, d_optimizer, real, penalise=False):
    """One step of the game on real images (N, 1, 28, 28): D's update, then G's (Algorithm 1, with k = 1).

    `penalise` adds the gradient penalty to D's update, to be done in one step out of PENALTY_EVERY.

    Returns four scalar tensors for the log: d_loss (without the penalty), g_loss, mean D(x), mean D(G(z)). All are from
    before D's update, save g_loss, which comes after it.
    """
    z = torch.randn(len(real), generator.latent_dim, device=real.device)
    fake = generator(z)                                                           # (N, 1, 28, 28)

    # D's turn. detach() cuts the fakes off from G: to D they are mere images. Without it backward() would run on
    # through G, for gradients that nobody uses, and free the graph of `fake`, which G's turn still needs: PyTorch then
    # complains of a second backward through the same graph. Real and fake go through apart, not as one shuffled batch:
    # batch norm would take its statistics from both, and G's turn, all fakes, would show D batches of another kind.
    real = real.detach().requires_grad_(penalise)  # for the penalty's gradient by the pixels
    real_logits, fake_logits = discriminator(real), discriminator(fake.detach())  # (N,), (N,)
    d_loss = discriminator_loss(real_logits, fake_logits)
    penalty = PENALTY_EVERY * gradient_penalty(real, real_logits) if penalise else 0
    d_optimizer.zero_grad()
    (d_loss + penalty).backward()
    d_optimizer.step()

    # G's turn, with the same fakes (Algorithm 1 draws new ones): G has not changed. D has, and is asked anew. The
    # gradient goes through D into G. D's weights stand still anyway; freezing them saves computing their gradients.
    discriminator.requires_grad_(False)
    g_loss = generator_loss(discriminator(fake))
    g_optimizer.zero_grad()
    g_loss.backward()
    g_optimizer.step()
    discriminator.requires_grad_(True)

    with torch.no_grad():
        return d_loss.detach(), g_loss.detach(), real_logits.sigmoid().mean(), fake_logits.sigmoid().mean()


@torch.no_grad()
def update_average(average, generator, step):
    """Move `average`, a copy of the generator, towards it after the step numbered `step` (from 1).

    The two players hardly come to rest: G circles around what it seeks, and its latest weights are one point of the
    circle. Their mean lies nearer the middle (Yazici et al. 2018, arxiv.org/abs/1806.04498). The newest G counts
    10 / (step + 9), all of it at step 1, less and less later: two thirds of the mean soon come from the last tenth of
    the steps so far. Batch norm's statistics are averaged, too. After 50 epochs it halved the Fréchet distance.
    """
    weight = 10 / (step + 9)
    for mean, latest in zip(average.state_dict().values(), generator.state_dict().values()):
        if mean.is_floating_point():  # batch norm also counts its batches
            mean.lerp_(latest, weight)


@torch.no_grad()
def draw(generator, z):
    """G(z) as uint8 (len(z), 28, 28), paper 0 to ink 255.

    In eval mode: batch norm then uses the means of its training. In train mode it would use those of this batch, and
    each digit would change with its neighbours. All batches have one size, as on another one rounding may differ.
    """
    was_training, device = generator.training, next(generator.parameters()).device
    generator.eval()
    chunks = F.pad(z, (0, 0, 0, -len(z) % CHUNK)).to(device).split(CHUNK)
    images = [(generator(chunk).float() * 127.5 + 127.5).round().to("cpu", torch.uint8) for chunk in chunks]
    generator.train(was_training)
    return torch.cat(images)[:len(z), 0]
