"""A generative adversarial network (GAN) for small images such as MNIST's digits, from scratch.

Two networks are trained against each other (Goodfellow et al. 2014, arxiv.org/abs/1406.2661):

    The generator G turns random numbers z into an image G(z). Such an image is called a fake.
    The discriminator D looks at an image x and outputs D(x), the probability that x is real.

D learns to tell real images from fakes. G learns to make fakes that D rates as real. One number
measures how well D does (the value function, equation 1 of the paper):

    V(D, G) = E[ log D(x) ]  +  E[ log(1 - D(G(z))) ]
              real images x     random z

Here E[...] is a mean, and log is the natural logarithm. D is trained to make V large. G is trained
to make V small. (For G, the second term is replaced by a variant: see generator_loss.)

What is the best D? Take one image x, which occurs with frequency p among the real images and with
frequency q among the fakes. If D rates each image by itself, x contributes

    p log D(x)  +  q log(1 - D(x))

to V. The slope of this sum with respect to D(x) is p / D(x) - q / (1 - D(x)). It is 0, and the sum
is largest, at

    D(x) = p / (p + q)

(Proposition 1 of the paper). If D sees equally many real images and fakes, this is the share of
real ones among all occurrences of x. Where both are equally frequent, the best D outputs 1/2. With
the best D, V is smallest, and G at its goal, if this is so everywhere: the fakes are distributed
exactly like the real images (Theorem 1).

G never receives a real image. It learns from D alone: from the gradient of D(x) with respect to the
pixels of a fake. This gradient says, for each pixel, whether the fake would look more real to D if
the pixel were lighter or darker. The best D(x) rises with p / q, so its gradient points to where
p / q grows fastest.

Read this file from top to bottom: the input z, the two networks, their losses, the step in which
they meet, two additions, and the way from pixels to numbers and back. A comment such as
# (N, 1, 28, 28) gives the shape of a result: N images with 1 channel (grey), 28 pixels high and 28
wide.
"""
import torch
import torch.nn.functional as F
from torch import nn

# ------------------------------------------------------------------------------------------------
# The input of the generator: random numbers z

NOISE_DIM = 100       # as in DCGAN (see Generator)
N_CATEGORIES = 10     # as many as there are digits
CATEGORY_SCALE = 6.0  # with 0, z is noise only; with 100, G does not notice the noise
LATENT_DIM = N_CATEGORIES + NOISE_DIM


def sample_latent(count, device="cpu", random=None, category=None):
    """Draw `count` latent vectors z, each a random category beside noise: (count, LATENT_DIM).

    `category` chooses the category, from 0 to N_CATEGORIES - 1: a number, or a tensor (count,). The
    noise stays as it is. `random` is a source of random numbers on `device`: a torch.Generator,
    which has nothing to do with the Generator below.
    """
    # Most GANs have only the noise. But a network is continuous: if z changes gradually, the image
    # does too. Slant and stroke width vary gradually. The kind of digit does not: on the way from a
    # 3 to a 0, G would have to draw images that are neither (Khayatkhoei et al. 2018,
    # arxiv.org/abs/1806.00880). Each category is a separate part of the set of all z, so there is
    # no such way. No label and no loss ties a category to a digit, but G tends to draw similar
    # digits in one category.
    # A network reads a category as a "one-hot" vector: one entry is 1, and the others are 0. The
    # norm of the noise is about 10, the root of NOISE_DIM, so a 1 alone would hardly count.
    number = torch.randint(N_CATEGORIES, (count,), device=device, generator=random)  # (N,)
    if category is not None:
        number[:] = category
    one_hot = F.one_hot(number, N_CATEGORIES)                                 # (N, 10)
    noise = torch.randn(count, NOISE_DIM, device=device, generator=random)    # (N, 100)
    return torch.cat([CATEGORY_SCALE * one_hot, noise], dim=1)                # (N, 110)


# ------------------------------------------------------------------------------------------------
# The two networks

CHANNELS = 1  # of an image: 1 for grey, 3 for red, green and blue


class Generator(nn.Module):
    """Maps latent vectors z (N, LATENT_DIM) to images (N, CHANNELS, 28, 28), values in [-1, 1]."""

    def __init__(self):
        super().__init__()
        # Both networks follow DCGAN, the convolutional GAN of most tutorials (Radford et al. 2015,
        # arxiv.org/abs/1511.06434). A feature map is a small image inside a network. G begins with
        # c1 of them, of 4x4 pixels, enlarges them step by step, to 7, 14 and 28, and halves their
        # number as they grow.
        # Linear: each entry of z adds its own pattern to the first feature maps.
        # BatchNorm2d scales each feature map to mean 0 and variance 1 over the batch, then applies
        #     a learned scale and shift. DCGAN found it critical to keep G from drawing the same
        #     image for every z (section 3). The last layer has none: it would give every batch the
        #     same brightness and contrast.
        # ConvTranspose2d is a learned way to enlarge an image. Each input pixel puts a copy of the
        #     kernel, times its value, into the output. The copies lie `stride` pixels apart and are
        #     added where they overlap. `padding` pixels are cut off at each edge. From size 4,
        #     kernel 3 makes (4 - 1) * stride + 3 - 2 * padding = 7. Kernel 4 doubles the size. It
        #     is a multiple of the stride, so every pixel inside gets equally many copies. With
        #     kernel 3 in the last layers, some pixels would receive more, and the image could show
        #     a checkerboard (Odena et al. 2016, distill.pub/2016/deconv-checkerboard).
        # Tanh: its outputs lie between -1 and 1, the range of the real images.
        c1, c2, c3 = 64, 32, 16
        self.layers = nn.Sequential(
            nn.Linear(LATENT_DIM, c1 * 4 * 4),                         # (N, 1024)
            nn.Unflatten(1, (c1, 4, 4)),                               # (N, 64, 4, 4)
            nn.BatchNorm2d(c1),
            nn.ReLU(),
            nn.ConvTranspose2d(c1, c2, 3, stride=2, padding=1),        # (N, 32, 7, 7)
            nn.BatchNorm2d(c2),
            nn.ReLU(),
            nn.ConvTranspose2d(c2, c3, 4, stride=2, padding=1),        # (N, 16, 14, 14)
            nn.BatchNorm2d(c3),
            nn.ReLU(),
            nn.ConvTranspose2d(c3, CHANNELS, 4, stride=2, padding=1),  # (N, 1, 28, 28)
            nn.Tanh(),
        )
        self.apply(init_weights)

    def forward(self, z):
        return self.layers(z)


class Discriminator(nn.Module):
    """Maps images (N, CHANNELS, 28, 28) in [-1, 1] to logits (N,). D(x) is a logit's sigmoid."""

    def __init__(self):
        super().__init__()
        # D is a classifier with two classes, real and fake. G learns from nothing but its gradient.
        # Conv2d with stride 2 halves the size (7 becomes 4). DCGAN uses it in place of pooling
        #     (section 3). The one with stride 1 keeps the size and lets the next layer see up to
        #     23x23 pixels of the image (its "receptive field"), most of a digit. Without it, it
        #     would be 18x18.
        # BatchNorm2d makes D's output for an image depend a little on the rest of its batch. D may
        #     then notice that the fakes of a batch resemble one another, as the minibatch
        #     discrimination of Salimans et al. does on purpose (2016, arxiv.org/abs/1606.03498,
        #     section 3.2). The first layer has none, like G's last one: DCGAN was unstable with
        #     batch norm in all layers.
        # LeakyReLU(0.2) passes a fifth of the gradient where its input is negative, so that some
        #     gradient reaches the fakes everywhere. ReLU would pass none.
        # D ends in a logit, an unbounded number. The losses below take log(1 - D), and in float32
        #     the sigmoid of 17 is exactly 1, where log(1 - D) has no value.
        c1, c2, c3, c4 = 8, 16, 48, 96
        self.layers = nn.Sequential(
            nn.Conv2d(CHANNELS, c1, 4, stride=2, padding=1),          # (N, 8, 14, 14)
            nn.LeakyReLU(0.2),
            nn.Conv2d(c1, c2, 4, stride=2, padding=1),                # (N, 16, 7, 7)
            nn.BatchNorm2d(c2),
            nn.LeakyReLU(0.2),
            nn.Conv2d(c2, c3, 3, stride=1, padding=1),                # (N, 48, 7, 7)
            nn.BatchNorm2d(c3),
            nn.LeakyReLU(0.2),
            nn.Conv2d(c3, c4, 3, stride=2, padding=1),                # (N, 96, 4, 4)
            nn.BatchNorm2d(c4),
            nn.LeakyReLU(0.2),
            nn.Flatten(),                                             # (N, 1536)
            nn.Linear(c4 * 4 * 4, 1),                                 # (N, 1)
            nn.Flatten(0),                                            # (N,)
        )
        self.apply(init_weights)

    def forward(self, images):
        return self.layers(images)


def init_weights(module):
    """Draw the weights of a convolution from N(0, 0.02^2), as DCGAN does. `apply` calls this."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, mean=0.0, std=0.02)


# ------------------------------------------------------------------------------------------------
# The two losses: binary cross-entropy (BCE), -log D for the label 1 and -log(1 - D) for the label 0


def discriminator_loss(real_logits, fake_logits):
    """Compute -V(D, G), a scalar, from logits (N,).

    If D outputs 1/2 for every image, it is 2 log 2 = 1.386.
    """
    real_labels = torch.ones_like(real_logits)
    fake_labels = torch.zeros_like(fake_logits)
    real_loss = F.binary_cross_entropy_with_logits(real_logits, real_labels)
    fake_loss = F.binary_cross_entropy_with_logits(fake_logits, fake_labels)
    return real_loss + fake_loss


def generator_loss(fake_logits):
    """Compute the mean of -log D(G(z)), a scalar, from logits (N,).

    If D outputs 1/2 for every fake, it is log 2 = 0.693.
    """
    # G wants D to rate its fakes as real, so its labels are those of real images.
    # V has log(1 - D) in this place. Its slope with respect to the logit is -D, near 0 where D is
    # sure that an image is fake: it "saturates", and the worst fakes count least. The slope of
    # -log D is -(1 - D), so that the worst fakes count most (Goodfellow et al., end of section 3).
    real_labels = torch.ones_like(fake_logits)
    return F.binary_cross_entropy_with_logits(fake_logits, real_labels)


# ------------------------------------------------------------------------------------------------
# The step in which they meet


def adversarial_step(generator, discriminator, g_optimizer, d_optimizer, real, step):
    """Train on a batch of real images (N, CHANNELS, 28, 28) in [-1, 1]: update D, then G.

    `step` is the number of this step. The first one is 1. Returns a dictionary of scalars for the
    log: d_loss without the penalty, g_loss, and the means d_real of D(x) and d_fake of D(G(z)). All
    but g_loss are from before D's update.
    Raises InputError if the fakes and the real images differ in shape.
    """
    # The fakes must have the height and width of the real images. D would recognise them by another
    # size, whatever they show.
    z = sample_latent(len(real), device=real.device)                          # (N, 110)
    fake = generator(z)                                                       # (N, 1, 28, 28)
    if fake.shape != real.shape:
        raise InputError(f"fakes have shape {tuple(fake.shape)}, and real images "
                         f"{tuple(real.shape)}; change G's layers or CHANNELS, or the images")

    # 1. Update D, as Goodfellow et al. do first (Algorithm 1).
    # In G's update, D sees a batch of fakes only, and batch norm makes its output depend on the
    # batch. So here, too, real images and fakes are two batches.
    # detach() gives the fakes without PyTorch's record of how G made them (the "graph"): this loss
    # is for D alone. Without it, backward() would run on through G and free the record, which G's
    # update still needs.
    # The penalty is explained below. To save time, it is computed in one of R1_INTERVAL steps, with
    # R1_INTERVAL times the weight (StyleGAN2: Karras et al. 2020, arxiv.org/abs/1912.04958, section
    # 3.1, "lazy regularization").
    real_logits = discriminator(real)                                         # (N,)
    fake_logits = discriminator(fake.detach())                                # (N,)
    d_loss = discriminator_loss(real_logits, fake_logits)
    penalty = r1_penalty(discriminator, real) if step % R1_INTERVAL == 0 else 0
    d_optimizer.zero_grad()
    (d_loss + R1_INTERVAL * penalty).backward()
    d_optimizer.step()

    # 2. Update G with the same fakes, which saves the time to make new ones.
    # D has changed, so it rates them once more. The old fake_logits would not do in any case:
    # detach() has cut them off from G.
    # The gradient passes through D to the pixels of the fakes, and on to G. `inputs` saves the time
    # to compute that of D's weights, which are not updated here.
    g_loss = generator_loss(discriminator(fake))
    g_optimizer.zero_grad()
    g_loss.backward(inputs=list(generator.parameters()))
    g_optimizer.step()

    return {
        "d_loss": d_loss.detach(),
        "g_loss": g_loss.detach(),
        "d_real": real_logits.detach().sigmoid().mean(),
        "d_fake": fake_logits.detach().sigmoid().mean(),
    }


def make_optimizer(network, lr):
    """Create the Adam optimizer of one network, with the learning rate lr."""
    # Adam follows a running average of past gradients. beta1 says how far back it reaches: about
    # ten steps with the usual 0.9, and two with 0.5. The other network changes in every step, so
    # old gradients can point in a wrong direction. DCGAN found that 0.9 made training oscillate
    # (section 4).
    return torch.optim.Adam(network.parameters(), lr=lr, betas=(0.5, 0.999))


# ------------------------------------------------------------------------------------------------
# Two additions. Like the category in z, they are neither in Goodfellow et al. nor in DCGAN.
# Training works without them, and draws worse digits (README.md, "From a blank file").

R1_GAMMA = 0.03   # Mescheder et al. use 10, for larger images
R1_INTERVAL = 16  # steps from one penalty to the next, as in StyleGAN2


def r1_penalty(discriminator, real):
    """Compute the R1 gradient penalty (Mescheder et al. 2018, arxiv.org/abs/1801.04406), a scalar.

    Takes real images (N, CHANNELS, 28, 28). It is R1_GAMMA / 2 times the mean, over the images, of
    the squared length of the gradient of D's logit with respect to the pixels (section 4.1).
    """
    # If the fakes are distributed like the real images, the best D is 1/2 everywhere: its gradient
    # is 0. If D still has a gradient there, it moves G away, D follows, and both can circle around
    # this solution and never reach it (section 2). The penalty makes D's gradient at real images
    # smaller, so that it moves G less as G comes close.
    # Batch norm lets the images of a batch influence each other's logits. The gradient of the sum
    # is then not exactly each image's own.
    # requires_grad_() marks a new tensor: the caller's stays as it is. create_graph is needed
    # because D's update differentiates this gradient once more.
    real = real.detach().requires_grad_()
    logits = discriminator(real)                                              # (N,)
    gradient = torch.autograd.grad(logits.sum(), real, create_graph=True)[0]  # (N, 1, 28, 28)
    squared_length = gradient.square().sum(dim=(1, 2, 3))                     # (N,)
    return R1_GAMMA / 2 * squared_length.mean()


AVERAGE_K = 40  # not tuned; a smaller value reaches further back


def update_average(average, generator, step):
    """Update `average`, the running average of G's weights, after a step. The first step is 1."""
    # G and D react to each other, so G's weights keep moving around a good solution instead of
    # settling there. Their average is closer to it (Yazıcı et al. 2018, arxiv.org/abs/1806.04498).
    # Only the samples use the average. Each step moves it towards the newest weights by a fraction
    # of the way: all of it in step 1, then less and less (Shamir and Zhang 2013,
    # arxiv.org/abs/1212.1824), so that it covers about the last fortieth of all steps.
    # A state holds the weights and batch norm's running means and variances, which belong to them.
    # It also holds integers, which batch norm does not use.
    fraction = AVERAGE_K / (step + AVERAGE_K - 1)
    for old, new in zip(average.state_dict().values(), generator.state_dict().values()):
        if old.is_floating_point():
            old.lerp_(new, fraction)


# ------------------------------------------------------------------------------------------------
# From grey levels to the range of G's output, and back


def from_pixels(pixels):
    """Scale grey levels, uint8 from 0 (black) to 255 (white), to floats from -1 to 1."""
    # With another range than that of the fakes, D could tell them apart by brightness alone.
    return pixels.float() / 127.5 - 1


def to_pixels(images):
    """Scale floats from -1 to 1 back to grey levels, uint8 from 0 to 255."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def generate(generator, z):
    """Generate one image for each z (N, LATENT_DIM): uint8 (N, CHANNELS, 28, 28), on the CPU."""
    # In training mode, batch norm would use the mean and variance of this batch, and each digit
    # would depend on the others. eval() makes it use its running mean and variance instead. A
    # generator in training goes on in training mode afterwards.
    was_training = generator.training
    images = generator.eval()(z.to(next(generator.parameters()).device))      # (N, 1, 28, 28)
    generator.train(was_training)
    return to_pixels(images).cpu()


class InputError(ValueError):
    """Raised for input that a user can mend. The scripts print its message without a traceback."""
