"""A generative adversarial network (GAN) for 28x28 grey images, from scratch.

Two networks are trained against each other (Goodfellow et al. 2014, arxiv.org/abs/1406.2661):

    The generator G turns random numbers z into an image G(z). Such an image is called a fake.
    The discriminator D looks at an image x and outputs D(x), the probability that x is real.

D learns to tell real images from fakes. G learns to make fakes that D rates as real. The paper
describes both goals by one number, the value function V (equation 1). E[...] is a mean:

    V(D, G) = E[ log D(x) ]  +  E[ log(1 - D(G(z))) ]
              real images x     random z

D is trained to make V large, and G is trained to make V small. (In practice G has a slightly
different loss, for a reason that generator_loss explains.)

Nobody shows G a digit. All that G learns from is a gradient that comes back through D. For each
pixel of a fake, it shows how the pixel would have to change for D to rate the fake as more real.
For this gradient to be useful, D must stay smooth. If D separates real images and fakes too easily,
its logit (the number before the final sigmoid) hardly changes with the pixels, and no loss of G can
make up for that.

What is the goal? For a fixed G, the best possible D is p_data(x) / (p_data(x) + p_G(x)), where
p_data and p_G say how likely the image x is among real images and among fakes (Proposition 1). For
a perfect G both are equal, and the best D outputs 1/2 for every image (Theorem 1). In practice,
training comes near to this, but does not reach it.

Read this file from top to bottom: the latent vector z, the two networks, their losses, one training
step, the running average of G's weights, and how images are generated. A comment such as
# (N, 1, 28, 28) gives the shape of a result. N is the number of images in the batch.
"""
import torch
import torch.nn.functional as F
from torch import nn

N_CATEGORIES = 10     # as many as there are digits, but nobody says which is which
NOISE_DIM = 54
LATENT_DIM = N_CATEGORIES + NOISE_DIM
CATEGORY_SCALE = 4.0  # a larger value gives the category more influence than the noise


def sample_latent(count, device="cpu", random=None):
    """Draw N = `count` latent vectors z, the input of the generator: float (N, LATENT_DIM).

    The first N_CATEGORIES entries are a category: one of them is CATEGORY_SCALE, the others are 0
    ("one-hot"). The other entries are noise from a standard normal distribution. `random` is a
    random number generator (torch.Generator) on the device. None means PyTorch's own.

    Most GANs have only the noise. But a network is a continuous function: it turns similar z into
    similar images. That suits slant and stroke width, which vary continuously. It does not suit the
    ten digits. There is no digit between a 3 and a 0, but on the way from one to the other, G would
    have to draw something (Khayatkhoei et al. 2018, arxiv.org/abs/1806.00880). With a category, z
    itself jumps: no z lies between two categories. Training uses no labels, and no loss demands
    that a category be a digit. But each comes to stand for one digit, or for a few similar ones.

    InfoGAN (Chen et al. 2016, arxiv.org/abs/1606.03657) has a similar latent vector and an
    additional loss, which is not needed here.
    """
    category = torch.randint(N_CATEGORIES, (count,), device=device, generator=random)  # (N,)
    one_hot = F.one_hot(category, N_CATEGORIES)                                         # (N, 10)
    noise = torch.randn(count, NOISE_DIM, device=device, generator=random)              # (N, 54)
    return torch.cat([CATEGORY_SCALE * one_hot, noise], dim=1)                          # (N, 64)


class Generator(nn.Module):
    """Maps latent vectors z (N, LATENT_DIM) to images (N, 1, 28, 28) with values in [-1, 1].

    The network begins with 4x4 pixels and many channels. In three steps it enlarges the picture, to
    7x7, 14x14 and 28x28 pixels, and reduces the channels.

    ConvTranspose2d is an upscaling that is learned. Each input pixel adds one copy of the kernel,
    multiplied by that pixel, to the output. The copies lie `stride` pixels apart and overlap. In
    the last two upscalings the kernel size 4 is a multiple of the stride 2, so that the same number
    of copies overlaps at every pixel, but for the border. With size 3 or 5, a checkerboard pattern
    would show in the image (Odena et al. 2016, distill.pub/2016/deconv-checkerboard). The first one
    has size 3, to get from 4 pixels to 7; the layers after it can smooth the pattern out. The other
    way to upscale, repeating pixels before a convolution, needs more arithmetic.

    BatchNorm2d brings each channel to mean 0 and variance 1, over all pixels of all images of the
    batch. Then it applies a scale and a shift that are learned. Without it, the early layers may
    map all z to nearly the same values, and G draws the same image whatever z is (Radford et al.
    2015, the DCGAN paper, arxiv.org/abs/1511.06434, section 3). A layer before batch norm needs no
    bias, because subtracting the mean would cancel it. There is no batch norm at the end: it would
    force the same brightness and contrast on every batch.

    ReLU passes the full gradient on where its input is positive, and is DCGAN's choice for G. Why D
    has LeakyReLU is explained there.

    Tanh keeps the output in [-1, 1], the range to which the real images are scaled. If fakes could
    leave that range, D could recognise them by that alone. Most pixels of MNIST are black (-1) or
    white (1), and any large input of tanh gives nearly these values. One could also take a sigmoid,
    with real images in [0, 1]. As sigmoid(x) = (tanh(x / 2) + 1) / 2, it is the same curve, but
    relative to its range only half as steep. What matters is that fakes and real images have the
    same range.
    """

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(LATENT_DIM, 128 * 4 * 4, bias=False),                   # (N, 2048)
            nn.Unflatten(1, (128, 4, 4)),                                     # (N, 128, 4, 4)
            nn.BatchNorm2d(128),
            nn.ReLU(),

            nn.ConvTranspose2d(128, 64, 3, stride=2, padding=1, bias=False),  # (N, 64, 7, 7)
            nn.BatchNorm2d(64),
            nn.ReLU(),

            nn.ConvTranspose2d(64, 16, 4, stride=2, padding=1, bias=False),   # (N, 16, 14, 14)
            nn.BatchNorm2d(16),
            nn.ReLU(),

            nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1),                # (N, 1, 28, 28)
            nn.Tanh(),
        )
        self.apply(init_weights)

    def forward(self, z):
        return self.layers(z)


class Discriminator(nn.Module):
    """Maps images (N, 1, 28, 28) in [-1, 1] to one logit each: (N,). D(x) is sigmoid(logit).

    A logit may be any number. The network does not end in the probability itself, because a sigmoid
    in float32 is exactly 1 for logits of 17 and more. Then log(1 - D) would be minus infinity. The
    losses below are computed from the logits, and stay finite.

    Convolutions with stride 2 halve the size of the picture. Max pooling would do that, too, but it
    sends the gradient to only one of four pixels. G learns from that gradient, at every pixel.

    LeakyReLU(0.2) keeps a fifth of the gradient where its input is negative. ReLU would keep
    nothing, and no gradient would reach G by way of that value.

    BatchNorm2d makes the output for one image depend a little on the whole batch. If the fakes of a
    batch are all alike ("mode collapse"), D may notice it. As in DCGAN, the first convolution has
    no batch norm.

    The third convolution has stride 1. Thanks to it, a value after the fourth one depends on 26x26
    pixels of the image, enough to see a whole digit. Without it, it would depend on 18x18 pixels.
    """

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 4, stride=2, padding=1),                         # (N, 16, 14, 14)
            nn.LeakyReLU(0.2),

            nn.Conv2d(16, 32, 4, stride=2, padding=1, bias=False),            # (N, 32, 7, 7)
            nn.BatchNorm2d(32),
            nn.LeakyReLU(0.2),

            nn.Conv2d(32, 96, 3, padding=1, bias=False),                      # (N, 96, 7, 7)
            nn.BatchNorm2d(96),
            nn.LeakyReLU(0.2),

            nn.Conv2d(96, 192, 3, stride=2, padding=1, bias=False),           # (N, 192, 4, 4)
            nn.BatchNorm2d(192),
            nn.LeakyReLU(0.2),

            nn.Flatten(),                                                     # (N, 3072)
            nn.Linear(192 * 4 * 4, 1),                                        # (N, 1)
            nn.Flatten(0),                                                    # (N,)
        )
        self.apply(init_weights)

    def forward(self, images):
        return self.layers(images).float()  # for the losses, if the layers compute in bfloat16


def init_weights(module):
    """Draw the weights of convolutions from N(0, 0.02^2), as DCGAN does (section 4).

    This matters most for G's last convolution, which no batch norm follows. With small weights, the
    first fakes are a nearly even grey, that is, near 0, where tanh is steepest. Linear layers keep
    PyTorch's own small weights.
    """
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, mean=0.0, std=0.02)


def discriminator_loss(real_logits, fake_logits):
    """The loss of D: the mean of -log D(x), plus the mean of -log(1 - D(G(z))). This is -V(D, G).

    Takes logits of shape (N,), and returns a scalar. In code, both terms are binary cross-entropy
    (BCE). It is -log D for images with the label 1, and -log(1 - D) for images with the label 0.

    If D outputs 0.5 for every image, the loss is -log 0.5 - log 0.5 = 2 log 2 = 1.386. (log is the
    natural logarithm.)
    """
    real_labels = torch.ones_like(real_logits)
    fake_labels = torch.zeros_like(fake_logits)
    real_loss = F.binary_cross_entropy_with_logits(real_logits, real_labels)
    fake_loss = F.binary_cross_entropy_with_logits(fake_logits, fake_labels)
    return real_loss + fake_loss


def generator_loss(fake_logits):
    """The loss of G: the mean of -log D(G(z)).

    Takes logits of shape (N,), and returns a scalar. In code, it is BCE with the label 1, that of
    real images, although these are fakes: G wants D to rate them as real.

    To minimise V, G would have the loss log(1 - D(G(z))). Both losses fall as D(G(z)) rises. The
    difference is in the gradient with respect to the logit. That of log(1 - D) is -D. When D
    recognises a fake, D is near 0, and the gradient vanishes: this loss "saturates". Early in
    training, that is the case for nearly every fake. The gradient of -log D is -(1 - D). It is near
    -1 for the same fakes, where there is most to learn. Hence the name "non-saturating loss"
    (Goodfellow et al., end of section 3). Adam rescales gradients, and so softens the difference.
    """
    real_labels = torch.ones_like(fake_logits)
    return F.binary_cross_entropy_with_logits(fake_logits, real_labels)


R1_GAMMA = 0.03   # the weight of the penalty
R1_INTERVAL = 16  # the penalty is added once every so many steps


def r1_penalty(discriminator, real):
    """The R1 gradient penalty (Mescheder et al. 2018, arxiv.org/abs/1801.04406, section 4).

    Takes real images (N, 1, 28, 28). Returns R1_GAMMA / 2 times the mean, over these images, of the
    squared length of the gradient of D's logit with respect to the pixels.

    Training can oscillate without end when D is steep at the real images, even once G matches them
    (section 2 of that paper). Also, D may memorise the real images over time: its logit then falls
    steeply around each of them and is flat near the fakes, where G needs a gradient. The penalty
    adds to D's loss where the logit is steep, and so keeps D smooth.
    """
    real = real.detach().requires_grad_()  # another tensor, so that the caller's stays as it is
    logits = discriminator(real)
    # Each logit depends on its own image, so the gradient of the sum contains the gradients of all
    # N logits at once, apart from the little that batch norm carries between images. create_graph
    # is needed because D's update differentiates this gradient once more.
    gradient = torch.autograd.grad(logits.sum(), real, create_graph=True)[0]  # (N, 1, 28, 28)
    squared_norm = gradient.square().sum(dim=(1, 2, 3))                       # (N,)
    return R1_GAMMA / 2 * squared_norm.mean()


def make_optimizer(network, lr):
    """Adam for one network. Each network has its own, because each minimises its own loss.

    With Adam's usual beta1 = 0.9, an update averages the gradients of about ten steps. But in a GAN
    the other network changes in every step. Old gradients no longer fit, and the two networks begin
    to oscillate. DCGAN found that 0.5 helps (section 4).
    """
    return torch.optim.Adam(network.parameters(), lr=lr, betas=(0.5, 0.999))


DECAY_START = 2000  # the step after which the learning rate falls


def set_learning_rate(optimizer, lr, step):
    """Set the learning rate for a step: `lr` up to step DECAY_START, then it falls as 1/sqrt(step).

    Large updates find the shapes of digits quickly. But they also move the weights back and forth,
    and that hides the finer differences between fakes and real images from both networks. Smaller
    updates later on bring these out.

    The rate depends on the step alone, and not on the length of the training. So a run of 8 epochs
    is the beginning of a run of 50.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * min(1, (DECAY_START / step) ** 0.5)


def adversarial_step(generator, discriminator, g_optimizer, d_optimizer, real, step):
    """One training step on a batch of real images: an update of D, then an update of G.

    real: images (N, 1, 28, 28) in [-1, 1].
    step: the number of this step, from 1. Every R1_INTERVAL steps, D's loss includes the penalty.

    Returns a tensor (4,) for the log: d_loss without the penalty, g_loss, the mean of D(x) and the
    mean of D(G(z)). g_loss is measured after D's update, the other three before it.
    """
    # The discriminator's update. Real images and fakes are two separate batches: in a mixed one,
    # batch norm would compute other statistics than in G's update, where all images are fakes.
    z = sample_latent(len(real), device=real.device)                          # (N, LATENT_DIM)
    fake = generator(z)                                                       # (N, 1, 28, 28)
    real_logits = discriminator(real)                                         # (N,)
    # detach() stops the gradient at the fakes, because this loss is for D alone. Without it,
    # backward() would run on through G, and free the graph of `fake` that G's update still needs.
    fake_logits = discriminator(fake.detach())                                # (N,)
    d_loss = discriminator_loss(real_logits, fake_logits)
    loss = d_loss
    if step % R1_INTERVAL == 0:
        # The penalty takes nearly as long as the rest of the step. Adding it rarely, but with
        # R1_INTERVAL times its weight, has about the same effect in much less time (Karras et al.
        # 2020, arxiv.org/abs/1912.04958, section 3.1, "lazy regularization").
        loss = d_loss + R1_INTERVAL * r1_penalty(discriminator, real)
    d_optimizer.zero_grad()
    loss.backward()
    d_optimizer.step()

    # The generator's update. The paper (Algorithm 1) draws new fakes for it, but the same ones will
    # do, since G has not changed. D has changed, so it is applied to them again. The gradient goes
    # through D back into G. `inputs` restricts the gradients to G's weights: those of D's weights
    # would not be used.
    g_loss = generator_loss(discriminator(fake))
    g_optimizer.zero_grad()
    g_loss.backward(inputs=list(generator.parameters()))
    g_optimizer.step()

    mean_d_real = real_logits.sigmoid().mean()
    mean_d_fake = fake_logits.sigmoid().mean()
    return torch.stack([d_loss, g_loss, mean_d_real, mean_d_fake]).detach()


@torch.no_grad()
def update_average(average, generator, step):
    """Update `average`, the running average of the generator's weights. `step` counts from 1.

    GAN training does not converge to a point: G's weights keep circling around a good solution.
    Their average lies nearer to the centre of the circle (Yazıcı et al. 2018,
    arxiv.org/abs/1806.04498). Samples are made with the average. Training never uses it.

    The newest weights enter with the share 10 / (step + 9): all of the average in step 1, and less
    in every later step. Two thirds of the average comes from the last tenth of the steps so far.
    This is called polynomial-decay averaging. More common is the exponential moving average (EMA),
    where the share is constant. That constant has to be matched to the length of the training.

    The running statistics of batch norm are averaged, too, because they belong to the weights.
    """
    share = 10 / (step + 9)
    newest = generator.state_dict()
    for name, averaged in average.state_dict().items():
        if averaged.is_floating_point():  # all but the number of batches that batch norm has seen
            averaged.lerp_(newest[name], share)  # in place


@torch.no_grad()
def generate(generator, z):
    """Generate one image for each z: uint8 (N, 1, 28, 28), from 0 (background) to 255 (stroke).

    eval() makes batch norm use the running mean and variance from training. In training mode it
    would use those of this batch, and each digit would depend on the others.
    """
    was_training = generator.training
    device = next(generator.parameters()).device
    generator.eval()
    images = generator(z.to(device))                                          # (N, 1, 28, 28)
    generator.train(was_training)
    pixels = (images + 1) * 127.5                                             # [-1, 1] to [0, 255]
    return pixels.round().to("cpu", torch.uint8)


# The rest is not about GANs. It is what train.py and sample.py share.


class InputError(ValueError):
    """A mistake in what the user gave. The scripts print its text, and no traceback."""


def pick_device(name):
    """The torch.device with a name such as 'cpu', 'cuda', 'cuda:1' or 'mps'.

    'auto' is the first of CUDA, MPS and the CPU that this machine has. Raises InputError if the
    machine has no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
        else:
            name = "cpu"
    try:
        torch.zeros(1, device=name).cpu()
    except (AssertionError, ImportError, RuntimeError):  # an unknown name, or an absent device
        raise InputError(f"--device {name}: PyTorch finds no such device here; "
                         "try --device cpu") from None
    return torch.device(name)


def load_checkpoint(path):
    """The dictionary that train.py saved at `path`, with its tensors on the CPU.

    Raises OSError if the file cannot be read, and InputError if it is not such a checkpoint.
    """
    problem = InputError(f"{path} is not a checkpoint of this program, or it is damaged")
    try:
        # Without weights_only, loading a file from a stranger could run any code that is in it.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # which one torch.load raises depends on the damage
        raise problem from None
    if not isinstance(checkpoint, dict) or "average" not in checkpoint:
        raise problem
    return checkpoint
