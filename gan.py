"""A generative adversarial network (GAN) for 28x28 grey images, from scratch.

Two networks are trained against each other (Goodfellow et al. 2014, arxiv.org/abs/1406.2661):

    The generator G turns random numbers z into an image G(z).
    The discriminator D looks at an image x and outputs D(x), the probability that x is real.

D is trained to tell real images from generated ones, which are called fakes. G is trained to make
D take its fakes for real. Both networks work on the same number, the value function V (equation 1
of the paper). D maximises it and G minimises it:

    min over G, max over D of   V(D, G) = E[ log D(x) ] + E[ log(1 - D(G(z))) ]

The first E is the mean over real images x, the second is the mean over random z.

Nobody tells G what a digit looks like. G learns only from the gradient that D sends back: in which
direction should each pixel of this fake change, so that D finds it more real? Hence D has to be
differentiable. And D must not become certain about every image: its output would then hardly depend
on the pixels, and its gradient would carry almost no information.

How does the game end? For a fixed G the best possible D is p_data(x) / (p_data(x) + p_G(x)), where
p_data and p_G are the densities of real and of generated images (Proposition 1). If G matches the
data perfectly, the two densities are equal, and the best D outputs 1/2 for every image (Theorem 1).

Read this file from top to bottom: the latent vector z, Generator, Discriminator, the losses, one
training step, the running average of G's weights, and how images are generated. A comment at the
end of a line gives the shape of what that line makes. N is the number of images in the batch.
"""
import torch
import torch.nn.functional as F
from torch import nn

N_CATEGORIES = 10     # as many as there are digits
CATEGORY_SCALE = 4.0  # larger: the category has more influence on the image, the noise has less
NOISE_DIM = 54
LATENT_DIM = N_CATEGORIES + NOISE_DIM


def sample_latent(count, device="cpu", random=None):
    """Draw `count` latent vectors z: float, shape (count, LATENT_DIM).

    The first N_CATEGORIES entries are a one-hot category, times CATEGORY_SCALE. The others are
    noise from a standard normal distribution. `random` is a torch.Generator of that device.

    Noise alone would be enough for a GAN, and most GANs have nothing else. But a network is a
    continuous function: close z give similar images. That suits slant and stroke width. It does not
    suit the ten digits, between which there is nothing: on the way from a 3 to a 0, G would draw
    something that is neither (Khayatkhoei et al. 2018, arxiv.org/abs/1806.00880). A category lets G
    jump. No labels are used. During training, each category comes to stand for one digit or for a
    few similar ones. InfoGAN (Chen et al. 2016, arxiv.org/abs/1606.03657) has the same latent
    vector, and adds a loss of its own, which this program does without.
    """
    category = torch.randint(N_CATEGORIES, (count,), device=device, generator=random)  # (N,)
    one_hot = F.one_hot(category, N_CATEGORIES)                                         # (N, 10)
    noise = torch.randn(count, NOISE_DIM, device=device, generator=random)              # (N, 54)
    return torch.cat([CATEGORY_SCALE * one_hot, noise], dim=1)                          # (N, 64)


class Generator(nn.Module):
    """Maps latent vectors z (N, LATENT_DIM) to images (N, 1, 28, 28) with values in [-1, 1].

    It begins with a picture of 4x4 pixels that has many channels, and enlarges it three times. As
    the pixels become more, the channels become fewer: from what is drawn to where it is drawn.

    ConvTranspose2d is an upscaling that is learned. Each input pixel is multiplied by a kernel, and
    the products are added to the output, `stride` pixels apart. In the last two layers the kernel
    size 4 is a multiple of the stride, so every output pixel receives equally many products. With
    size 3 or 5 a checkerboard would show in the image (Odena et al. 2016,
    distill.pub/2016/deconv-checkerboard). The first layer needs size 3 to get from 4 pixels to 7.

    BatchNorm2d brings each channel to mean 0 and variance 1 over the batch and its pixels, and then
    applies a learned scale and shift. Without it, the early layers may turn all z into nearly the
    same activations, and G draws one image for every z (Radford et al. 2015, the DCGAN paper,
    arxiv.org/abs/1511.06434, section 3). The layer before it has no bias, because subtracting the
    mean would cancel it. The last layer has no batch norm: it would force the same brightness and
    contrast on every batch of images.

    ReLU is DCGAN's choice for G. The discriminator has LeakyReLU for a reason that is given there.

    Tanh keeps the output in [-1, 1], the range to which the real images are scaled. If fakes could
    leave that range, D could recognise them by that alone. Most pixels of MNIST are black (-1) or
    white (1). Tanh is flat near these values, so they are easy to hit. A sigmoid, with images in
    [0, 1], would do the same. But then nearly all input to D would be 0 or positive, and a network
    learns faster from input that is spread around 0.
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
    """Maps images (N, 1, 28, 28) in [-1, 1] to one logit each (N,). D(x) is sigmoid(logit).

    The network ends in a logit and not in a probability, because in float32 a sigmoid rounds to
    exactly 1 from a logit of 17 on. Then log(1 - D) would be minus infinity. The losses below are
    computed from the logit itself, and stay finite.

    Strided convolutions make the picture smaller. Max pooling would do that, too, but it passes the
    gradient on to one pixel in four. G learns from that gradient, and needs it at every pixel.

    LeakyReLU(0.2) passes on a fifth of the gradient where its input is negative. A ReLU would pass
    on nothing there, and G would learn nothing through that unit.

    BatchNorm2d makes the output for an image depend on the other images of its batch. If all fakes
    look alike, D can see that. The first layer has none, so that D sees the true pixel values
    (DCGAN, section 3).

    The convolution with stride 1 widens the view: a unit of the layer after it sees 26x26 pixels of
    the image, enough for a whole digit. Without that convolution it would see only 18x18 pixels.
    """

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 4, stride=2, padding=1),                         # (N, 16, 14, 14)
            nn.LeakyReLU(0.2),

            nn.Conv2d(16, 32, 4, stride=2, padding=1, bias=False),            # (N, 32, 7, 7)
            nn.BatchNorm2d(32),
            nn.LeakyReLU(0.2),

            nn.Conv2d(32, 64, 3, padding=1, bias=False),                      # (N, 64, 7, 7)
            nn.BatchNorm2d(64),
            nn.LeakyReLU(0.2),

            nn.Conv2d(64, 128, 3, stride=2, padding=1, bias=False),           # (N, 128, 4, 4)
            nn.BatchNorm2d(128),
            nn.LeakyReLU(0.2),

            nn.Flatten(),                                                     # (N, 2048)
            nn.Linear(128 * 4 * 4, 1),                                        # (N, 1)
            nn.Flatten(0),                                                    # (N,)
        )
        self.apply(init_weights)

    def forward(self, images):
        return self.layers(images).float()  # float32, even where the layers compute in bfloat16


def init_weights(module):
    """Initialise convolutions with normal numbers of standard deviation 0.02 (DCGAN, section 4).

    This matters for the layers without batch norm after them. The first fakes are then close to 0,
    a mid-grey, where tanh is steepest and G learns fastest.
    """
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, mean=0.0, std=0.02)


def discriminator_loss(real_logits, fake_logits):
    """The loss of D, which is -V(D, G): -log D(x) - log(1 - D(G(z))), each a mean over the batch.

    Logits (N,) and (N,) to a scalar. Both terms are binary cross-entropy (BCE): with the label 1
    for real images and the label 0 for fakes. A D that outputs 0.5 for every image has the loss
    -log 0.5 - log 0.5 = 2 ln 2 = 1.386.
    """
    real_labels = torch.ones_like(real_logits)
    fake_labels = torch.zeros_like(fake_logits)
    real_loss = F.binary_cross_entropy_with_logits(real_logits, real_labels)
    fake_loss = F.binary_cross_entropy_with_logits(fake_logits, fake_labels)
    return real_loss + fake_loss


def generator_loss(fake_logits):
    """The non-saturating loss of G: -log D(G(z)), a mean over the batch. Logits (N,) to a scalar.

    Equation 1 would have G minimise log(1 - D(G(z))). Both losses push D(G(z)) up, but not equally
    hard. The gradient of log(1 - D) with respect to the logit is -D. It vanishes, or "saturates",
    where D is certain that the image is a fake, and early in training D nearly always is. The
    gradient of -log D is -(1 - D), which is close to -1 in the same place (Goodfellow et al.,
    section 3, last paragraph).

    As code, it is binary cross-entropy with the label of real images, although these are fakes: G
    wants D to call them real.
    """
    real_labels = torch.ones_like(fake_logits)
    return F.binary_cross_entropy_with_logits(fake_logits, real_labels)


R1_GAMMA = 0.01   # how much the penalty counts
R1_INTERVAL = 16  # steps from one penalty to the next


def r1_penalty(discriminator, real):
    """The R1 gradient penalty: R1_GAMMA / 2 * E[ |gradient of D's logit at x|^2 ], x real images.

    Images (N, 1, 28, 28) to a scalar (Mescheder et al. 2018, arxiv.org/abs/1801.04406, section 4).

    Without it, D learns its 60,000 images better and better by heart. Its output becomes a cliff:
    high on one side, low on the other, and flat where the fakes are, so that G has no slope to
    follow. The penalty makes a steep D expensive near the real images, and D stays smooth.
    """
    real = real.detach().requires_grad_()
    logits = discriminator(real)
    # The gradient of the sum holds the gradient of each logit with respect to its own image (apart
    # from what batch norm carries from one image to another). create_graph makes that gradient
    # differentiable, since D's update has to differentiate the penalty once more.
    gradient, = torch.autograd.grad(logits.sum(), real, create_graph=True)    # (N, 1, 28, 28)
    squared_norm = gradient.square().sum(dim=(1, 2, 3))                       # (N,)
    return R1_GAMMA / 2 * squared_norm.mean()


def make_optimizer(network, lr):
    """Adam for one network. G and D need one each, because each minimises a loss of its own.

    beta1 is 0.5. Adam's usual 0.9 averages the gradients of about ten steps. In a GAN the other
    network has changed since then, and with outdated gradients the two begin to oscillate (DCGAN,
    section 4).
    """
    return torch.optim.Adam(network.parameters(), lr=lr, betas=(0.5, 0.999))


def adversarial_step(generator, discriminator, g_optimizer, d_optimizer, real, with_r1=False):
    """One training step on a batch of real images: an update of D, then one of G (Algorithm 1).

    real: images (N, 1, 28, 28) in [-1, 1].
    with_r1: add the R1 penalty to D's loss. Once in R1_INTERVAL steps is enough.

    Returns a tensor (4,): d_loss, g_loss, mean D(x), mean D(G(z)). d_loss is without the penalty.
    g_loss comes from after D's update, the others from before it.
    """
    # The discriminator's update. detach() cuts the fakes off from G: this loss is D's own, and its
    # gradient must stop at the pixels. Otherwise backward() would run on through G and free the
    # graph that G's update still needs ("Trying to backward through the graph a second time").
    # Real and fake images are separate batches. Batch norm would otherwise take its statistics from
    # a mixture, but in G's update, where all images are fakes, from fakes alone.
    z = sample_latent(len(real), device=real.device)                          # (N, LATENT_DIM)
    fake = generator(z)                                                       # (N, 1, 28, 28)
    real_logits = discriminator(real)                                         # (N,)
    fake_logits = discriminator(fake.detach())                                # (N,)
    d_loss = discriminator_loss(real_logits, fake_logits)
    penalty = 0.0
    if with_r1:
        # The penalty comes once in R1_INTERVAL steps, with R1_INTERVAL times its weight: the same
        # effect at a fraction of the time (Karras et al. 2020, arxiv.org/abs/1912.04958, section
        # 3.1, "lazy regularization").
        penalty = R1_INTERVAL * r1_penalty(discriminator, real)
    d_optimizer.zero_grad()
    (d_loss + penalty).backward()
    d_optimizer.step()

    # The generator's update. G has not changed, so the same fakes serve again. D has changed, so it
    # judges them anew. The gradient runs through D back into G. `inputs` keeps it away from D's
    # weights: nobody would use it there, and it would add up until D's next update.
    g_loss = generator_loss(discriminator(fake))
    g_optimizer.zero_grad()
    g_loss.backward(inputs=list(generator.parameters()))
    g_optimizer.step()

    d_real = real_logits.sigmoid().mean()
    d_fake = fake_logits.sigmoid().mean()
    return torch.stack([d_loss, g_loss, d_real, d_fake]).detach()


@torch.no_grad()
def update_average(average, generator, step):
    """Update `average`, the running average of the generator's weights, after step 1, 2, 3, ...

    The two networks do not come to rest: training moves G around a good solution, and the weights
    of any one step are one point of that orbit. Their average lies nearer to its centre (Yazici et
    al. 2018, arxiv.org/abs/1806.04498). Samples come from the average. Training never uses it.

    The newest weights count 10 / (step + 9): wholly at step 1, and less with every step. Two thirds
    of the average come from the last tenth of all steps. This is called polynomial-decay averaging.
    The exponential moving average (EMA) of other programs has a fixed span instead, which would
    have to be chosen to fit the length of the training.

    Batch norm's running statistics are averaged as well. They have to fit the weights.
    """
    weight = 10 / (step + 9)
    newest = generator.state_dict()
    for name, mean in average.state_dict().items():
        if mean.is_floating_point():  # all but batch norm's count of batches
            mean.lerp_(newest[name], weight)


@torch.no_grad()
def generate(generator, z):
    """Generate one image for each z: uint8 (N, 28, 28), from 0 (background) to 255 (stroke).

    Batch norm is in evaluation mode: it uses the running mean and variance from training. In
    training mode it would use those of this batch, and each digit would depend on the other ones.
    """
    was_training = generator.training
    device = next(generator.parameters()).device
    generator.eval()
    images = generator(z.to(device))                                          # (N, 1, 28, 28)
    generator.train(was_training)
    pixels = (images + 1) * 127.5                                             # [-1, 1] to [0, 255]
    return pixels.round().to("cpu", torch.uint8).squeeze(1)                   # (N, 28, 28)


# The rest is not about GANs. It is what train.py and sample.py share.


def pick_device(name):
    """The torch.device with a name such as 'cpu', 'cuda', 'cuda:1' or 'mps'. ValueError if absent.

    'auto' is the first of CUDA, MPS and the CPU that this machine has.
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
    except (RuntimeError, AssertionError):  # an unknown name, or a device that is absent
        raise ValueError(f"--device {name}: PyTorch finds no such device here; "
                         "try --device cpu") from None
    return torch.device(name)


def load_checkpoint(path):
    """The dictionary that train.py saved at `path`, with its tensors on the CPU.

    Raises OSError if the file cannot be read, and ValueError if it is not such a checkpoint.
    """
    try:
        # weights_only: a pickled file may hold any code, and loading it would run that code.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # torch.load raises nearly every kind of error, depending on the damage
        checkpoint = None
    if not isinstance(checkpoint, dict) or "average" not in checkpoint:
        raise ValueError(f"{path} is not a checkpoint of this program, or it is damaged")
    return checkpoint
