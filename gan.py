"""A generative adversarial network (GAN) for 28x28 grey images, from scratch.

Two networks are trained against each other (Goodfellow et al. 2014, arxiv.org/abs/1406.2661):

    The generator G turns random numbers z into an image G(z). Such an image is called a fake.
    The discriminator D looks at an image x and outputs D(x), the probability that x is real.

D learns to tell real images from fakes. G learns to make fakes that D rates as real. One value
function expresses both goals (equation 1). E[...] is a mean, and log is the natural logarithm:

    V(D, G) = E[ log D(x) ]  +  E[ log(1 - D(G(z))) ]
              real images x     random z

D is trained to maximise V. G is trained to minimise it, with a variant of the second term (see
generator_loss). G never receives a real image. It learns from the gradient of D's output with
respect to the pixels of a fake. This gradient shows how each pixel would have to change for D to
rate the fake as more real.

If the fakes have exactly the distribution of the real images, G is at its optimum, and the best
possible D outputs 1/2 for every image (their Theorem 1). In practice, training does not get there.

Read this file from top to bottom. A comment such as # (N, 1, 28, 28) gives the shape of a result,
where N is the number of images in the batch.
"""
import torch
import torch.nn.functional as F
from torch import nn


def from_pixels(pixels):
    """Scale grey levels, uint8 from 0 (black) to 255 (white), to floats from -1 to 1."""
    # This is the range of G's output. If real images left it, D could recognise them by that alone.
    # If they filled only a part of it, G would learn to draw digits on grey.
    return pixels.float() / 127.5 - 1


def to_pixels(images):
    """Scale floats from -1 to 1 back to grey levels, uint8 from 0 to 255."""
    # Image files store these. Functions such as torchvision's save_image expect floats from 0 to 1,
    # and would make everything below 0 black.
    return ((images + 1) * 127.5).round().to(torch.uint8)


N_CATEGORIES = 10     # each image has a category; there are as many as digits
NOISE_DIM = 54        # each image also has noise; DCGAN uses 100 numbers of noise only
LATENT_DIM = N_CATEGORIES + NOISE_DIM
CATEGORY_SCALE = 4.0  # the category's entry; with 100, G ignores the noise (see README)


def sample_latent(count, device="cpu", random=None):
    """Draw `count` latent vectors z, the input of the generator, as floats (count, LATENT_DIM).

    A latent vector consists of a category and noise. `random` is a torch.Generator on `device`. It
    is a source of random numbers and has nothing to do with the class Generator below. None selects
    PyTorch's default source.
    """
    # Most GANs use noise only. But a network is continuous: if z changes gradually, the image does
    # too. Slant and stroke width vary gradually, but most digits do not change into one another
    # like that: between a 3 and a 0, G would have to draw images that are neither (Khayatkhoei et
    # al. 2018, arxiv.org/abs/1806.00880). With a category, the latent space has ten separate parts.
    category = torch.randint(N_CATEGORIES, (count,), device=device, generator=random)  # (N,)
    # The number becomes a "one-hot" vector: its entry is 1, and the other nine are 0. No label and
    # no loss ties a category to a digit. Most categories nevertheless come to draw one digit, or a
    # few similar ones. InfoGAN adds a loss that makes the category recognisable in the image (Chen
    # et al. 2016, arxiv.org/abs/1606.03657).
    one_hot = F.one_hot(category, N_CATEGORIES)                                         # (N, 10)
    # The noise varies the digit within a category.
    noise = torch.randn(count, NOISE_DIM, device=device, generator=random)              # (N, 54)
    return torch.cat([CATEGORY_SCALE * one_hot, noise], dim=1)                          # (N, 64)


class Generator(nn.Module):
    """Maps latent vectors z (N, LATENT_DIM) to images (N, 1, 28, 28) with values in [-1, 1].

    It begins with many small feature maps, and upscales them step by step to one large image.
    """

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            # Each entry of z adds its own pattern to 128 feature maps of 4x4 pixels. A bias is not
            # needed: exactly one entry of the category is not 0, and its weights act as a bias.
            nn.Linear(LATENT_DIM, 128 * 4 * 4, bias=False),                   # (N, 2048)
            nn.Unflatten(1, (128, 4, 4)),                                     # (N, 128, 4, 4)
            # Batch norm normalises each channel to mean 0 and variance 1 over all pixels of the
            # batch, and then applies a learned scale and shift. The authors of DCGAN, the
            # convolutional GAN of most tutorials, found it critical to keep G from drawing the same
            # image for every z (Radford et al. 2015, arxiv.org/abs/1511.06434, section 3).
            nn.BatchNorm2d(128),
            # DCGAN uses ReLU in G (section 3). ReLU passes no gradient where its input is negative.
            # A weight still learns from the images of the batch for which the input is positive.
            nn.ReLU(),

            # A transposed convolution is a learned upsampling layer. Each input pixel adds a copy
            # of the kernel, multiplied by the pixel, to the output. The copies are `stride` pixels
            # apart, and `padding` pixels are cut off at each edge: (4 - 1) * 2 + 3 - 2 * 1 = 7. An
            # even kernel size would give an even number of pixels.
            # A bias is not needed, because batch norm subtracts the mean, and the bias with it.
            nn.ConvTranspose2d(128, 64, 3, stride=2, padding=1, bias=False),  # (N, 64, 7, 7)
            nn.BatchNorm2d(64),
            nn.ReLU(),

            # Kernel size 4 is a multiple of the stride, so the same number of copies overlaps at
            # every pixel inside. With size 3 or 5 this number alternates, and the image can show a
            # checkerboard pattern (Odena et al. 2016, distill.pub/2016/deconv-checkerboard). The
            # uneven overlap of the layer above is not visible in the digits.
            nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1, bias=False),   # (N, 32, 14, 14)
            nn.BatchNorm2d(32),
            nn.ReLU(),

            # Batch norm here would force the same brightness and contrast on every batch.
            nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),                # (N, 1, 28, 28)
            # Hardtanh cuts the output off at -1 and 1, the ends of the range of real images. The
            # gradient of tanh, which DCGAN uses here (section 3), shrinks towards the ends. A
            # background of exactly -1 is then learned slowly, and part of it stays slightly grey
            # (results/README.md). With Hardtanh, a value that was cut off has the gradient 0. It
            # can still return, because all pixels and images share the weights of G.
            nn.Hardtanh(),
        )
        self.apply(init_weights)

    def forward(self, z):
        return self.layers(z)


class Discriminator(nn.Module):
    """Maps images (N, 1, 28, 28) in [-1, 1] to logits (N,), one number for each image.

    D(x) is the sigmoid of the logit. D is a classifier with two classes, real and fake. But its
    gradient matters as much as its output, because G learns from nothing else.
    """

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            # Stride 2 halves the height and width. DCGAN uses strides in place of pooling, so that
            # D learns its own way to shrink an image (section 3). DCGAN became unstable with batch
            # norm in every layer, and left it out here and in G's last layer.
            nn.Conv2d(1, 16, 4, stride=2, padding=1),                         # (N, 16, 14, 14)
            # Where its input is negative, LeakyReLU(0.2) passes a fifth of the gradient. ReLU would
            # pass none, and that part of the gradient would not reach the pixels of a fake.
            nn.LeakyReLU(0.2),

            # Batch norm makes D's output for an image depend a little on the rest of the batch.
            # This can help D to notice that all fakes of a batch are alike, which is called "mode
            # collapse" (Salimans et al. 2016, arxiv.org/abs/1606.03498, section 3.2).
            nn.Conv2d(16, 32, 4, stride=2, padding=1, bias=False),            # (N, 32, 7, 7)
            nn.BatchNorm2d(32),
            nn.LeakyReLU(0.2),

            # Stride 1 keeps the size. This layer widens the view of the next one: there, a value
            # depends on 26x26 pixels (some of them are padding) and not only on 18x18.
            nn.Conv2d(32, 96, 3, padding=1, bias=False),                      # (N, 96, 7, 7)
            nn.BatchNorm2d(96),
            nn.LeakyReLU(0.2),

            nn.Conv2d(96, 192, 3, stride=2, padding=1, bias=False),           # (N, 192, 4, 4)
            nn.BatchNorm2d(192),
            nn.LeakyReLU(0.2),

            # A logit is an unbounded number, and not yet a probability. In float32, the sigmoid of
            # a logit of 17 or more is exactly 1, and its derivative is 0, so that no gradient would
            # pass it. The losses below take logits and do not have this flaw.
            nn.Flatten(),                                                     # (N, 3072)
            nn.Linear(192 * 4 * 4, 1),                                        # (N, 1)
            nn.Flatten(0),                                                    # (N,)
        )
        self.apply(init_weights)

    def forward(self, images):
        return self.layers(images)


def init_weights(module):
    """Draw the weights of a convolution from N(0, 0.02^2), as DCGAN does for all (section 4).

    `apply` calls this function for every layer. Other layers keep PyTorch's initialisation.
    """
    # Small weights matter in G's last convolution, which no batch norm follows. They keep the first
    # fakes between -1 and 1, so that Hardtanh passes nearly every gradient. With PyTorch's
    # initialisation, it would cut off a third of the pixels.
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, mean=0.0, std=0.02)


def discriminator_loss(real_logits, fake_logits):
    """Compute -V(D, G), a scalar: the mean of -log D(x) plus the mean of -log(1 - D(G(z))).

    Takes logits (N,). If D outputs 0.5 for every image, the loss is 2 log 2 = 1.386.
    """
    # The labels need the shape of the logits. For another shape, PyTorch reports "Target size (...)
    # must be the same as input size (...)".
    real_labels = torch.ones_like(real_logits)
    fake_labels = torch.zeros_like(fake_logits)
    # Binary cross-entropy (BCE) is -log D for the label 1 and -log(1 - D) for the label 0.
    real_loss = F.binary_cross_entropy_with_logits(real_logits, real_labels)
    fake_loss = F.binary_cross_entropy_with_logits(fake_logits, fake_labels)
    return real_loss + fake_loss


def generator_loss(fake_logits):
    """Compute the mean of -log D(G(z)), a scalar. Takes logits (N,).

    If D outputs 0.5 for every fake, the loss is log 2 = 0.693.
    """
    # G wants D to rate its fakes as real, so its labels are those of real images.
    real_labels = torch.ones_like(fake_logits)
    # To minimise V itself, G would minimise log(1 - D(G(z))). Both losses fall as D(G(z)) rises.
    # They differ in their derivative with respect to the logit: it is -D for log(1 - D), and
    # -(1 - D) for -log D. Early in training, D can recognise nearly every fake, so that D(G(z)) is
    # near 0. The first derivative is then near 0 too: that loss "saturates", and G learns very
    # little from the fakes that need it most. The second one is near -1 for the same fakes.
    # Goodfellow et al. therefore use -log D (end of section 3), which was later called the
    # "non-saturating" loss. In this program, the saturating loss was better in two of three short
    # runs, and much worse in the third (README, "Experiments").
    return F.binary_cross_entropy_with_logits(fake_logits, real_labels)


R1_GAMMA = 0.03   # called gamma in the paper
R1_INTERVAL = 16  # the number of steps from one penalty to the next


def r1_penalty(discriminator, real):
    """Compute the R1 gradient penalty (Mescheder et al. 2018, arxiv.org/abs/1801.04406), a scalar.

    Takes real images (N, 1, 28, 28). Returns R1_GAMMA / 2 times the mean, over these images, of the
    squared length of the gradient of D's logit with respect to the pixels (section 4.1).
    """
    # Even where the fakes already look like real images, D's logit can change steeply with the
    # pixels. This gradient pushes G away again, and training can oscillate without end (section 2).
    # The penalty favours a D whose logit is flat at real images.
    real = real.detach().requires_grad_()  # a new tensor, so that the caller's does not change
    logits = discriminator(real)
    # The gradient of the sum is each image's own gradient only if no image influences the logit of
    # another one. Batch norm links the images of a batch, so this penalty is only similar to R1.
    # create_graph is needed because D's update differentiates this gradient once more.
    gradient = torch.autograd.grad(logits.sum(), real, create_graph=True)[0]  # (N, 1, 28, 28)
    squared_length = gradient.square().sum(dim=(1, 2, 3))                     # (N,)
    return R1_GAMMA / 2 * squared_length.mean()


def make_optimizer(network, lr):
    """Create the Adam optimizer of one network."""
    # With Adam's usual beta1 = 0.9, an update averages the gradients of about ten steps. But the
    # other network changes in every step, so old gradients can point in a wrong direction. DCGAN
    # found that 0.9 made training oscillate, and that 0.5, about two steps, helped (section 4).
    return torch.optim.Adam(network.parameters(), lr=lr, betas=(0.5, 0.999))


def adversarial_step(generator, discriminator, g_optimizer, d_optimizer, real, step):
    """Train on a batch of real images (N, 1, 28, 28) in [-1, 1]: update D once, then G once.

    step: the number of this step. The first one is 1.

    Returns a dictionary of scalars for the log: d_loss without the penalty, g_loss, and the means
    d_real of D(x) and d_fake of D(G(z)). g_loss is measured after D's update, the others before it.
    """
    # 1. Update D.
    z = sample_latent(len(real), device=real.device)                          # (N, LATENT_DIM)
    fake = generator(z)                                                       # (N, 1, 28, 28)
    # Real images and fakes form two separate batches. In a mixed batch, batch norm would compute
    # other statistics than in G's update, where all images are fakes. G would then learn from a D
    # that behaves differently from the one that was trained.
    real_logits = discriminator(real)                                         # (N,)
    # detach() stops the gradient at the fakes, because this loss is for D alone. Without it,
    # backward() would run on through G, and free the graph of `fake`. In G's update, PyTorch would
    # then report "Trying to backward through the graph a second time".
    fake_logits = discriminator(fake.detach())                                # (N,)
    d_loss = discriminator_loss(real_logits, fake_logits)
    penalty = 0.0
    if step % R1_INTERVAL == 0:
        # The penalty takes about as long as the rest of the step. It is therefore added in only
        # one of R1_INTERVAL steps, with R1_INTERVAL times the weight. Karras et al. found that this
        # "lazy regularization" does no harm (2020, arxiv.org/abs/1912.04958, section 3.1).
        penalty = R1_INTERVAL * r1_penalty(discriminator, real)
    d_optimizer.zero_grad()
    (d_loss + penalty).backward()
    d_optimizer.step()

    # 2. Update G. Goodfellow et al. (Algorithm 1) draw new fakes here. The same fakes can be used
    # again, because G has not changed. D has changed, so it must be applied again. With
    # `fake_logits`, G would learn nothing, because detach() has cut the path from these logits to
    # G. With `inputs`, as below, no error would say so.
    g_loss = generator_loss(discriminator(fake))
    g_optimizer.zero_grad()
    # D passes the gradient on to the fakes. `inputs` leaves the gradients of D's own weights out,
    # because only G is updated.
    g_loss.backward(inputs=list(generator.parameters()))
    g_optimizer.step()

    return {
        "d_loss": d_loss.detach(),
        "g_loss": g_loss.detach(),
        "d_real": real_logits.detach().sigmoid().mean(),
        "d_fake": fake_logits.detach().sigmoid().mean(),
    }


AVERAGE_K = 40  # with a smaller value, the running average reaches further back


@torch.no_grad()
def update_average(average, generator, step):
    """Update `average`, the running average of the generator's weights. The first step is 1.

    Only the samples use the average. The training does not.
    """
    # GAN training usually does not converge to a point. Each network reacts to the other, so G's
    # weights keep moving around a good solution. Their average is closer to it (Yazıcı et al. 2018,
    # arxiv.org/abs/1806.04498).
    # The average moves towards the newest weights by a fraction that is 1 in step 1 and then falls
    # (Shamir and Zhang 2013, arxiv.org/abs/1212.1824). After a long run, the last tenth of its
    # steps has more than 98 % of the weight. The usual exponential average has a constant fraction,
    # which must be chosen to suit the length of the run.
    fraction = AVERAGE_K / (step + AVERAGE_K - 1)
    # The buffers are the running statistics of batch norm. They are averaged too, so that they fit
    # the averaged weights.
    olds = [*average.parameters(), *average.buffers()]
    news = [*generator.parameters(), *generator.buffers()]
    for old, new in zip(olds, news):
        if old.is_floating_point():  # num_batches_tracked is an integer and is not used
            old.lerp_(new, fraction)


@torch.no_grad()
def generate(generator, z):
    """Generate one image for each z: uint8 (N, 1, 28, 28), on the CPU."""
    device = next(generator.parameters()).device
    was_training = generator.training
    # In training mode, batch norm would use the mean and variance of this batch, and each digit
    # would depend on the others. eval() makes it use its running mean and variance instead.
    images = generator.eval()(z.to(device))                                   # (N, 1, 28, 28)
    generator.train(was_training)
    return to_pixels(images).cpu()


# The rest is not specific to GANs. The scripts share it.


class InputError(ValueError):
    """Raised for invalid input. The scripts print its message without a traceback."""


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
        raise InputError(f"--device {name}: PyTorch cannot use it here ({reason}); "
                         "try --device cpu") from None
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
