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

G never receives a real image. It learns from D alone: from the gradient of D's output with respect
to the pixels of a fake. This gradient says, for each pixel, whether the fake would look more real
to D if the pixel were lighter or darker.

If the fakes are distributed exactly like the real images, the best possible D outputs 1/2 for every
image (Proposition 1 of the paper). In practice, training does not get there.

Read this file from top to bottom. A comment such as # (N, 1, 28, 28) gives the shape of a result:
N images with 1 channel (grey), 28 pixels high and 28 wide.
"""
import torch
import torch.nn.functional as F
from torch import nn

# The number of colour channels: 1 for grey images, 3 for red, green and blue. The height and width
# of a fake follow from the layers of G. They must be those of the real images.
CHANNELS = 1


class InputError(ValueError):
    """Raised for invalid input. The scripts print its message without a traceback."""


def from_pixels(pixels):
    """Scale grey levels, uint8 from 0 (black) to 255 (white), to floats from -1 to 1."""
    # Real images must have the range of G's output. Otherwise D could tell them from fakes by their
    # brightness alone.
    return pixels.float() / 127.5 - 1


def to_pixels(images):
    """Scale floats from -1 to 1 back to grey levels, uint8 from 0 to 255."""
    # This undoes from_pixels: whoever changes one of the two must change the other.
    return ((images + 1) * 127.5).round().to(torch.uint8)


N_CATEGORIES = 10     # as many as there are digits; with 0, z is noise only, as in most GANs
NOISE_DIM = 54        # not tuned; with 22, digits vary a little less; with DCGAN's 100, as much
CATEGORY_SCALE = 4.0  # 1 does little, 100 too much (results/README.md, and sample_latent below)
LATENT_DIM = N_CATEGORIES + NOISE_DIM  # follows from the others; do not set it by itself


def sample_latent(count, device="cpu", random=None, category=None):
    """Draw `count` latent vectors z, the input of the generator, as floats (count, LATENT_DIM).

    A latent vector consists of a category, drawn at random, and noise. `category` chooses it, from
    0 to N_CATEGORIES - 1: a number for all vectors, or a tensor (count,). The noise stays the same.
    `random` is a source of random numbers on `device`. PyTorch calls it torch.Generator; it has
    nothing to do with the class Generator below. None selects PyTorch's default source.

    Raises InputError for a category that does not exist.
    """
    if category is not None:
        category = torch.as_tensor(category, device=device)
        if (category < 0).any() or (category >= N_CATEGORIES).any():
            raise InputError(f"category {category.tolist()}: gan.py has N_CATEGORIES = "
                             f"{N_CATEGORIES}, and the first one is 0")
    # Most GANs use noise only. But a network is continuous: if z changes gradually, the image does
    # too. Slant and stroke width vary gradually. The kind of digit does not: on the way from a 3 to
    # a 0, G would have to draw images that are neither (Khayatkhoei et al. 2018,
    # arxiv.org/abs/1806.00880). With categories, the set of all z has separate parts. Fewer digits
    # are malformed then, and they vary less (results/README.md).
    one_hot = torch.zeros(count, 0, device=device)
    if N_CATEGORIES > 0:
        number = torch.randint(N_CATEGORIES, (count,), device=device, generator=random)  # (N,)
        if category is not None:
            number[:] = category
        # A network reads a category as a "one-hot" vector: one entry is 1, and the others are 0. No
        # label and no loss ties a category to a digit. G tends to draw similar digits in one
        # category all the same. InfoGAN adds a loss for this (Chen et al. 2016,
        # arxiv.org/abs/1606.03657), and calls the category a categorical latent code.
        one_hot = F.one_hot(number, N_CATEGORIES)                             # (N, 10)
    # The noise varies the digit within its category. Its distribution must be easy to draw from.
    # Normal and uniform noise are common, and do equally well here: G can reshape either.
    noise = torch.randn(count, NOISE_DIM, device=device, generator=random)    # (N, 54)
    # The length of the noise is about 7, the root of 54. The category must count beside it, and not
    # drown it: with a scale of 100, G ignores the noise (README, "Mode collapse").
    return torch.cat([CATEGORY_SCALE * one_hot, noise], dim=1)                # (N, 64)


def split_latent(z):
    """Split latent vectors (N, LATENT_DIM) into their category and their noise."""
    return z.split([N_CATEGORIES, NOISE_DIM], dim=1)


class Generator(nn.Module):
    """Maps latent vectors z (N, LATENT_DIM) to images (N, CHANNELS, 28, 28), values in [-1, 1].

    A feature map is a small image inside a network. G begins with many feature maps of 4x4 pixels,
    and upscales them step by step to one large image.
    """

    def __init__(self):
        super().__init__()
        # How many feature maps each layer makes. Halving them as the image grows follows DCGAN, the
        # convolutional GAN of most tutorials (Radford et al. 2015, arxiv.org/abs/1511.06434). The
        # numbers are small for speed on a CPU, and not tuned.
        c1, c2, c3 = 128, 64, 32
        self.layers = nn.Sequential(
            # Each entry of z adds its own pattern to the feature maps. There is no bias: in every
            # z, one entry of the category is 4, and its pattern acts as a bias. (Noise alone works
            # without a bias, too.)
            nn.Linear(LATENT_DIM, c1 * 4 * 4, bias=False),                    # (N, 2048)
            nn.Unflatten(1, (c1, 4, 4)),                                      # (N, 128, 4, 4)
            # Batch norm takes all values of one feature map in a batch, scales them to mean 0 and
            # variance 1, and applies a learned scale and shift. DCGAN found it critical to keep G
            # from drawing the same image for every z (section 3).
            nn.BatchNorm2d(c1),
            nn.ReLU(),  # as in DCGAN (section 3)

            # A transposed convolution is a learned way to enlarge an image. Each input pixel puts a
            # copy of the 3x3 kernel, times its value, into the output. The copies lie `stride`
            # pixels apart and are added where they overlap. `padding` pixels are cut off at each
            # edge. From size 4, this makes (4 - 1) * stride + 3 - 2 * padding = 7. Kernel size 4
            # would make 8, and in the end images of 32x32 pixels.
            # There is no bias: batch norm subtracts a feature map's mean, and the bias with it.
            nn.ConvTranspose2d(c1, c2, 3, stride=2, padding=1, bias=False),   # (N, 64, 7, 7)
            nn.BatchNorm2d(c2),
            nn.ReLU(),

            # Kernel size 4 is a multiple of the stride, so every pixel inside receives equally many
            # copies. With 3 or 5, some receive more than their neighbours, and the image can show a
            # checkerboard (Odena et al. 2016, distill.pub/2016/deconv-checkerboard). The layer
            # above has size 3, but two more layers follow it, and the digits show none.
            nn.ConvTranspose2d(c2, c3, 4, stride=2, padding=1, bias=False),   # (N, 32, 14, 14)
            nn.BatchNorm2d(c3),
            nn.ReLU(),

            # Batch norm here would force the same brightness and contrast on every batch.
            nn.ConvTranspose2d(c3, CHANNELS, 4, stride=2, padding=1),         # (N, 1, 28, 28)
            # Hardtanh cuts values off at -1 and 1, the range of real images. DCGAN uses tanh, which
            # reaches the ends only for large inputs: part of the background then stays slightly
            # grey, where MNIST's is exactly black (results/README.md, "Grey levels"). The gradient
            # of a pixel that was cut off is 0. The pixel can still change, because other pixels and
            # other images move the weights that it shares with them.
            nn.Hardtanh(),
        )
        self.apply(init_weights)

    def forward(self, z):
        return self.layers(z)


class Discriminator(nn.Module):
    """Maps images (N, CHANNELS, 28, 28) in [-1, 1] to logits (N,), one number for each image.

    D(x) is the sigmoid of the logit. D is a classifier with two classes, real and fake. Its
    gradient matters as much as its output, because G learns from nothing else.
    """

    def __init__(self):
        super().__init__()
        # Feature maps. Like the kernel sizes below, they are chosen for speed and not tuned.
        c1, c2, c3, c4 = 16, 32, 96, 192
        self.layers = nn.Sequential(
            # Stride 2 halves the height and width. DCGAN uses it in place of pooling (section 3):
            # D then learns how to shrink an image. DCGAN was unstable with batch norm in all
            # layers. So this layer and G's last one have none.
            nn.Conv2d(CHANNELS, c1, 4, stride=2, padding=1),                  # (N, 16, 14, 14)
            # Where its input is negative, LeakyReLU(0.2) passes a fifth of the gradient to the
            # layers before it, and in the end to the fakes. ReLU would pass none. 0.2 is DCGAN's.
            nn.LeakyReLU(0.2),

            # With batch norm, D's output for an image depends a little on the rest of its batch. D
            # may then notice that the fakes of a batch resemble one another, as the minibatch
            # discrimination of Salimans et al. does on purpose (2016, arxiv.org/abs/1606.03498,
            # section 3.2).
            nn.Conv2d(c1, c2, 4, stride=2, padding=1, bias=False),            # (N, 32, 7, 7)
            nn.BatchNorm2d(c2),
            nn.LeakyReLU(0.2),

            # Stride 1 keeps the size. With this layer, a value of the next layer depends on up to
            # 23x23 pixels of the image, its "receptive field", so on most of a digit. (It is 26x26
            # pixels without the edges of the image.) Without this layer, it would be 18x18 pixels.
            nn.Conv2d(c2, c3, 3, padding=1, bias=False),                      # (N, 96, 7, 7)
            nn.BatchNorm2d(c3),
            nn.LeakyReLU(0.2),

            nn.Conv2d(c3, c4, 3, stride=2, padding=1, bias=False),            # (N, 192, 4, 4)
            nn.BatchNorm2d(c4),
            nn.LeakyReLU(0.2),

            # A logit is an unbounded number. Its sigmoid is a probability. D does not end in the
            # sigmoid, because PyTorch's float32 sigmoid of 17 is exactly 1, where log(1 - D) has no
            # value. D could not learn from the fakes that deceive it most. The losses below compute
            # the logarithm directly from the logit.
            nn.Flatten(),                                                     # (N, 3072)
            nn.Linear(c4 * 4 * 4, 1),                                         # (N, 1)
            nn.Flatten(0),                                                    # (N,)
        )
        self.apply(init_weights)

    def forward(self, images):
        return self.layers(images)


def init_weights(module):
    """Draw the weights of a convolution from N(0, 0.02^2), as DCGAN does for all (section 4).

    `apply` calls this function for every layer. Other layers keep PyTorch's initialisation.
    """
    # In G's last layer, which no batch norm follows, small weights keep the first fakes between -1
    # and 1. With PyTorch's initialisation, Hardtanh would cut off about a third of their pixels.
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, mean=0.0, std=0.02)


def discriminator_loss(real_logits, fake_logits):
    """Compute -V(D, G), a scalar: the mean of -log D(x) plus the mean of -log(1 - D(G(z))).

    Takes logits (N,). If D(x) and D(G(z)) are always 0.5, the loss is 2 log 2 = 1.386.
    """
    real_labels = torch.ones_like(real_logits)
    fake_labels = torch.zeros_like(fake_logits)
    # Binary cross-entropy (BCE) is -log D for the label 1 and -log(1 - D) for the label 0.
    real_loss = F.binary_cross_entropy_with_logits(real_logits, real_labels)
    fake_loss = F.binary_cross_entropy_with_logits(fake_logits, fake_labels)
    return real_loss + fake_loss


def generator_loss(fake_logits):
    """Compute the mean of -log D(G(z)), a scalar. Takes logits (N,).

    If D(G(z)) is 0.5 for every fake, the loss is log 2 = 0.693.
    """
    # G wants D to rate its fakes as real, so its labels are those of real images.
    real_labels = torch.ones_like(fake_logits)
    # V contains log(1 - D(G(z))). Its derivative with respect to the logit is -D(G(z)). It is near
    # 0 where D is sure that an image is fake: that loss "saturates", and the worst fakes count
    # least. The derivative of -log D(G(z)) is -(1 - D(G(z))), so that the worst fakes count most.
    # Goodfellow et al. therefore use it for G (end of section 3). It is called "non-saturating".
    # Here, D is seldom so sure: after 10 epochs, both losses did equally well (results/README.md).
    return F.binary_cross_entropy_with_logits(fake_logits, real_labels)


def probability(logits):
    """Turn the output of D into D(x), from 0 to 1. It is used for the log only."""
    # It belongs to the losses above: with another loss, or a sigmoid at the end of D, edit it too.
    return logits.sigmoid()


R1_GAMMA = 0.03   # "gamma" in the paper, which uses 10; 0, 0.3 and 10 did worse (results/README.md)
R1_INTERVAL = 16  # steps from one penalty to the next, as in StyleGAN2; 1 was no better (two runs)


def r1_penalty(discriminator, real):
    """Compute the R1 gradient penalty (Mescheder et al. 2018, arxiv.org/abs/1801.04406), a scalar.

    Takes real images (N, CHANNELS, 28, 28). Returns R1_GAMMA / 2 times the mean, over these images,
    of the squared length of the gradient of D's logit with respect to the pixels (section 4.1).
    """
    # Suppose that the fakes already look real. If D's logit is steep at real images, its gradient
    # still pushes G away from them. Training can then oscillate without end (section 2). The
    # penalty makes the logit flat at real images.
    real = real.detach().requires_grad_()  # a new tensor, so that the caller's does not change
    logits = discriminator(real)
    # create_graph is needed because D's update differentiates this gradient once more.
    gradient = torch.autograd.grad(logits.sum(), real, create_graph=True)[0]  # (N, 1, 28, 28)
    # The gradient of the sum is each image's own gradient only if no image influences the logit of
    # another one. Batch norm breaks this, so the penalty is an approximation here. Gulrajani et al.
    # leave batch norm out of D for that reason (2017, arxiv.org/abs/1704.00028, section 4). Here it
    # stays, because the scores are better with it (results/README.md).
    squared_length = gradient.square().sum(dim=(1, 2, 3))                     # (N,)
    return R1_GAMMA / 2 * squared_length.mean()


def make_optimizer(network, lr):
    """Create the Adam optimizer of one network."""
    # Adam follows a running average of past gradients. Its setting beta1 says how far back this
    # average reaches: about ten steps with the usual 0.9, and two with 0.5. The other network
    # changes in every step, so old gradients can point in a wrong direction. DCGAN found that 0.9
    # made training oscillate, and that 0.5 helped (section 4). 0.999 is Adam's usual beta2.
    return torch.optim.Adam(network.parameters(), lr=lr, betas=(0.5, 0.999))


def adversarial_step(generator, discriminator, g_optimizer, d_optimizer, real, step):
    """Train on a batch of real images (N, CHANNELS, 28, 28) in [-1, 1]: update D, then G.

    step: the number of this step. The first one is 1.

    Returns a dictionary of scalars for the log: d_loss without the penalty, g_loss, and the means
    d_real of D(x) and d_fake of D(G(z)). g_loss is measured after D's update, the others before it.

    Raises InputError if the fakes and the real images differ in shape.
    """
    # 1. Update D. Goodfellow et al. (Algorithm 1) also update it first.
    z = sample_latent(len(real), device=real.device)                          # (N, LATENT_DIM)
    fake = generator(z)                                                       # (N, 1, 28, 28)
    # D accepts some other sizes too. It would recognise fakes by their size, and G learn nothing.
    if fake.shape != real.shape:
        raise InputError(f"the generator makes images of shape {tuple(fake.shape[1:])}, but the "
                         f"real images have shape {tuple(real.shape[1:])}; change the layers and "
                         "CHANNELS in gan.py, or the images")
    # Real images and fakes form two separate batches, because batch norm makes D's output depend on
    # the batch. In G's update, D will see a batch of fakes. It must have been trained on such.
    real_logits = discriminator(real)                                         # (N,)
    # detach() stops the gradient at the fakes: this loss is for D alone. Without it, backward()
    # would run on through G, and free PyTorch's record of how the fakes were made (the "graph"),
    # which G's update still needs.
    fake_logits = discriminator(fake.detach())                                # (N,)
    d_loss = discriminator_loss(real_logits, fake_logits)
    penalty = 0.0
    if step % R1_INTERVAL == 0:
        # The penalty takes about as long as the rest of the step. It is therefore computed in one
        # of R1_INTERVAL steps only, with R1_INTERVAL times the weight (StyleGAN2: Karras et al.
        # 2020, arxiv.org/abs/1912.04958, section 3.1, "lazy regularization"; they make it a step of
        # its own, and adjust Adam for it).
        penalty = R1_INTERVAL * r1_penalty(discriminator, real)
    d_optimizer.zero_grad()
    (d_loss + penalty).backward()
    d_optimizer.step()

    # 2. Update G. Goodfellow et al. draw new fakes here. Using the same ones saves the time to make
    # them. D was just trained on them, so it probably rates them a little lower than new ones. D
    # has changed, so it must be applied again. `fake_logits` would not do in any case: detach() has
    # cut them off from G.
    g_loss = generator_loss(discriminator(fake))
    g_optimizer.zero_grad()
    # The gradient passes through D to the fakes, and on to G. `inputs` says that only G's weights
    # keep their gradient. D's weights do not, because only G is updated.
    g_loss.backward(inputs=list(generator.parameters()))
    g_optimizer.step()

    return {
        "d_loss": d_loss.detach(),
        "g_loss": g_loss.detach(),
        "d_real": probability(real_logits.detach()).mean(),
        "d_fake": probability(fake_logits.detach()).mean(),
    }


AVERAGE_K = 40  # a smaller value reaches further back; 20 is about as good (results/README.md)


@torch.no_grad()
def update_average(average, generator, step):
    """Update `average`, the running average of the generator's weights. The first step is 1.

    Only the samples use the average. The training does not.
    """
    # G and D react to each other, so G's weights keep moving around a good solution instead of
    # settling there. Their average is closer to it (Yazıcı et al. 2018, arxiv.org/abs/1806.04498).
    # Each step moves the average towards the newest weights by a fraction of the way.
    fraction = AVERAGE_K / (step + AVERAGE_K - 1)
    # The fraction is 1 in step 1, then falls (Shamir and Zhang 2013, arxiv.org/abs/1212.1824). The
    # average always covers the last part of the run: from 300 steps on, the last tenth of them has
    # about 98 % of the weight. An exponential average has a constant fraction, which must be chosen
    # to suit the length of the run.
    # The buffers are batch norm's running means and variances. They belong to the weights: averaged
    # like these, they fit approximately.
    olds = [*average.parameters(), *average.buffers()]
    news = [*generator.parameters(), *generator.buffers()]
    for old, new in zip(olds, news):
        if old.is_floating_point():  # num_batches_tracked is an integer and is not used
            old.lerp_(new, fraction)


@torch.no_grad()
def generate(generator, z):
    """Generate one image for each z: uint8 (N, CHANNELS, 28, 28), on the CPU."""
    device = next(generator.parameters()).device
    # In training mode, batch norm would use the mean and variance of this batch, and each digit
    # would depend on the others. eval() makes it use its running mean and variance instead. A
    # generator that is being trained must go on in training mode afterwards.
    was_training = generator.training
    images = generator.eval()(z.to(device))                                   # (N, 1, 28, 28)
    generator.train(was_training)
    return to_pixels(images).cpu()


# The rest is not specific to GANs. The scripts share it.


def pick_device(name):
    """Return the torch.device 'cpu', 'cuda', 'cuda:1', 'mps', ..., or the best one for 'auto'.

    Raises InputError if PyTorch cannot use this device here.
    """
    if name == "auto":
        name = "cpu"
        if torch.backends.mps.is_available():
            name = "mps"
        if torch.cuda.is_available():
            name = "cuda"
    try:
        torch.zeros(1, device=name).cpu()
    except (AssertionError, ImportError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"device {name}: PyTorch cannot use it here ({reason}); try cpu") from None
    return torch.device(name)


def load_checkpoint(path, *names):
    """Load the dictionary that train.py saved at `path`, with its tensors on the CPU.

    Raises OSError if the file cannot be read, and InputError if it is not such a checkpoint or does
    not have an entry for each of the names.
    """
    with open(path, "rb") as file:
        try:
            # With weights_only=False, a file from a stranger could run any code that is in it.
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        except Exception:  # torch.load raises different exceptions for different kinds of damage
            checkpoint = None
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= set(names):
        raise InputError(f"{path} is damaged, or it is not a checkpoint of this program, or it "
                         f"lacks one of these entries: {', '.join(names)}")
    return checkpoint


def load_state(part, checkpoint, name, path):
    """Load an entry of the checkpoint from `path` into a network or an optimizer.

    Raises InputError if it does not fit.
    """
    try:
        part.load_state_dict(checkpoint[name])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        raise InputError(f"{path} does not fit the {type(part).__name__} in gan.py, which may have "
                         "been edited since the file was saved") from None
