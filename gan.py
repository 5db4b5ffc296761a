"""A generative adversarial network (GAN) for 28x28 grey images, from scratch.

Two networks are trained against each other (Goodfellow et al. 2014, arxiv.org/abs/1406.2661):

    The generator G turns random numbers z into an image G(z). Such an image is called a fake.
    The discriminator D looks at an image x and outputs D(x), the probability that x is real.

D learns to tell real images from fakes. G learns to make fakes that D rates as real. The paper
expresses both goals in one value function V (equation 1). E[...] denotes a mean, and log is the
natural logarithm:

    V(D, G) = E[ log D(x) ]  +  E[ log(1 - D(G(z))) ]
              real images x     random z

D is trained to maximise V, and G is trained to minimise it. (In practice G has a slightly different
loss, for a reason that generator_loss explains.)

G never receives a real image. It learns from the gradient of D's output with respect to the pixels
of a fake. This gradient shows how each pixel would have to change for D to rate the fake as more
real. Backpropagation carries it on to the weights of G.

This gradient is useful only if D's output changes gradually between fakes and real images. The
penalty in r1_penalty favours such a D.

What is the optimum? Let p_data and p_G be the probability densities of real images and of fakes.
For a fixed G, the best possible D is p_data(x) / (p_data(x) + p_G(x)) (Proposition 1). Where real
images are three times as likely as fakes, the best D outputs 3/4. If p_G equals p_data, G is
perfect, and the best D outputs 1/2 for every image (Theorem 1). In practice, training does not
reach this optimum.

Read this file from top to bottom: the latent vector z, the two networks, their losses, the
optimizers, one training step, the running average of G's weights, and how images are generated.
A comment such as # (N, 1, 28, 28) gives the shape of a result. N is the number of images in the
batch.
"""
import torch
import torch.nn.functional as F
from torch import nn

N_CATEGORIES = 10     # as many as there are digits
NOISE_DIM = 54
LATENT_DIM = N_CATEGORIES + NOISE_DIM
CATEGORY_SCALE = 4.0  # with a much larger value, G ignores the noise (README: "Mode collapse")


def sample_latent(count, device="cpu", random=None):
    """Draw `count` latent vectors z, the input of the generator, as floats (count, LATENT_DIM).

    The first N_CATEGORIES entries encode a category as a "one-hot" vector: one of them is
    CATEGORY_SCALE, and the others are 0. The other entries are noise from a standard normal
    distribution. `random` is a torch.Generator, which is a source of random numbers and has nothing
    to do with the class Generator below. It must be on `device`. None selects PyTorch's default
    source.

    Most GANs use noise only. But a network is a continuous function: it turns similar z into
    similar images. That suits slant and stroke width, which vary continuously. It does not suit the
    ten digits. There is no digit between a 3 and a 0, but on the way from one to the other, G would
    have to draw something (Khayatkhoei et al. 2018, arxiv.org/abs/1806.00880). With a category, the
    latent space consists of separate parts. No z lies between two of them, so G does not have to
    draw anything there.

    Training does not use MNIST's labels, and no loss ties a category to a digit. In the trained
    generator, most categories nevertheless produce one digit, or a few similar ones. A likely reason
    is that a change between dissimilar digits has to be abrupt, and G can change abruptly only
    between two parts of the latent space. InfoGAN (Chen et al. 2016, arxiv.org/abs/1606.03657) has
    a similar latent vector. It adds a loss that is small if a network can recover the category from
    the image. This program does not have that loss.
    """
    category = torch.randint(N_CATEGORIES, (count,), device=device, generator=random)  # (N,)
    one_hot = F.one_hot(category, N_CATEGORIES)                                         # (N, 10)
    noise = torch.randn(count, NOISE_DIM, device=device, generator=random)              # (N, 54)
    return torch.cat([CATEGORY_SCALE * one_hot, noise], dim=1)                          # (N, 64)


class Generator(nn.Module):
    """Maps latent vectors z (N, LATENT_DIM) to images (N, 1, 28, 28) with values in [-1, 1].

    The first layer produces feature maps of 4x4 pixels with many channels. Three steps enlarge them
    to 7x7, 14x14 and 28x28 pixels, and reduce the number of channels.

    ConvTranspose2d is a learned upsampling layer. Each input pixel adds a copy of the kernel to the
    output, multiplied by the value of the pixel. The copies are `stride` pixels apart and overlap.
    An alternative is to repeat each pixel and to apply a 3x3 convolution to the result. This
    alternative needs 2.25 times as many multiplications as a 4x4 transposed convolution.

    In the last two upsampling layers, the kernel size 4 is a multiple of the stride 2. The same
    number of copies therefore overlaps at every pixel, except at the border. With size 3 or 5, this
    number differs between neighbouring pixels, and the image can show a checkerboard pattern (Odena
    et al. 2016, distill.pub/2016/deconv-checkerboard). The first upsampling layer has size 3,
    because enlarging 4 pixels to 7 needs an odd size. Later layers can remove the pattern that it
    causes.

    BatchNorm2d normalises each channel to mean 0 and variance 1 over all pixels of all images in
    the batch. It then applies a learned scale and shift. It also keeps a running mean and variance
    of each channel, which `generate` uses in place of those of a batch. Without batch norm, G may
    draw the same image for every z, as was found for DCGAN, the deep convolutional GAN (Radford et
    al. 2015, arxiv.org/abs/1511.06434, section 3). A convolution before batch norm needs no bias,
    because subtracting the mean would cancel it. The linear layer needs none either: one entry of
    the category is always CATEGORY_SCALE, so its weights act as a bias. The last layer has no batch
    norm, because batch norm would force the same brightness and contrast on every batch.

    As in DCGAN, the activation in G is ReLU. ReLU passes no gradient where its input is negative.
    This does little harm in G. A channel needs a gradient from only some of the images of the batch
    to learn, and after batch norm, about half of the values in a channel are positive. D is
    different: its gradient has to reach the pixels of every single fake.

    Tanh keeps the output in [-1, 1], the range to which the real images are scaled. If fakes could
    leave that range, D could recognise them by that alone. Most pixels of MNIST are black (-1) or
    nearly white. Tanh is close to -1 and 1 for every input far from 0, so G does not have to find
    one exact input. A sigmoid is the same curve, rescaled and shifted, because sigmoid(x) is
    (1 + tanh(x / 2)) / 2. It could be used with real images in [0, 1]. What matters is that fakes
    and real images have the same range.
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

            nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1, bias=False),   # (N, 32, 14, 14)
            nn.BatchNorm2d(32),
            nn.ReLU(),

            nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),                # (N, 1, 28, 28)
            nn.Tanh(),
        )
        self.apply(init_weights)

    def forward(self, z):
        return self.layers(z)


class Discriminator(nn.Module):
    """Maps images (N, 1, 28, 28) in [-1, 1] to logits (N,). D(x) is sigmoid(logit).

    A logit is an unbounded number. The network does not output the probability, because in float32
    the sigmoid of a logit of 17 or more is exactly 1, and log(1 - D) would be minus infinity. The
    losses below take logits, and they stay finite.

    Convolutions with stride 2 halve the height and width (7 becomes 4). Max pooling could do that
    instead, but it passes the gradient to only one of four pixels. G needs the gradient at every
    pixel.

    LeakyReLU(0.2) passes a fifth of the gradient where its input is negative. ReLU would pass none,
    and that part of the gradient would not reach the pixels of the fake, from which G learns.

    BatchNorm2d makes D's output for an image depend a little on the rest of the batch. D can
    therefore detect that all fakes of a batch are alike ("mode collapse"). The first convolution
    has no batch norm, because DCGAN became unstable with batch norm in every layer (section 3).

    The third convolution has stride 1 and padding 1, so it keeps the height and width. It enlarges
    the receptive field: each value after the fourth convolution depends on 26x26 pixels of the
    image, enough for a whole digit. Without the third convolution, it would depend on 18x18 pixels.
    The linear layer sees the whole image, but it only adds up these values, each with a weight of
    its own.
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
        return self.layers(images)


def init_weights(module):
    """Draw the weights of convolutions from N(0, 0.02^2), as DCGAN does (section 4).

    `apply` calls this function for every layer of a network.

    Small weights matter most in G's last convolution, which no batch norm follows. They make the
    first fakes nearly uniform grey: the input of tanh is near 0, where tanh is steepest and passes
    the most gradient. Linear layers keep PyTorch's default initialisation.
    """
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, mean=0.0, std=0.02)


def discriminator_loss(real_logits, fake_logits):
    """Compute D's loss: the mean of -log D(x) plus the mean of -log(1 - D(G(z))). It is -V(D, G).

    Takes logits (N,) and returns a scalar. Both terms are a binary cross-entropy (BCE), which is
    -log D for images with the label 1 and -log(1 - D) for images with the label 0.

    If D outputs 0.5 for every image, the loss is -log 0.5 - log 0.5 = 2 log 2 = 1.386.
    """
    real_labels = torch.ones_like(real_logits)
    fake_labels = torch.zeros_like(fake_logits)
    real_loss = F.binary_cross_entropy_with_logits(real_logits, real_labels)
    fake_loss = F.binary_cross_entropy_with_logits(fake_logits, fake_labels)
    return real_loss + fake_loss


def generator_loss(fake_logits):
    """Compute G's loss: the mean of -log D(G(z)).

    Takes logits (N,) and returns a scalar. The loss is BCE with the label 1. This is the label of
    real images, because G is trained to make D output 1 for fakes.

    A G that minimised V itself would have the loss log(1 - D(G(z))). Both losses fall as D(G(z))
    rises. They differ in the gradient with respect to the logit s, where D = sigmoid(s):

        the derivative of log(1 - D) is -D
        the derivative of -log D     is -(1 - D)

    Early in training, D recognises nearly every fake, so D(G(z)) is near 0. The derivative of
    log(1 - D) is then near 0 as well. That loss "saturates": G learns very little from these fakes,
    although it has the most to learn from them. The derivative of -log D is near -1 for the same
    fakes, so Goodfellow et al. use this loss (end of section 3). It is called non-saturating. Adam
    divides each gradient by its recent size, which can make up for a part of the difference. G
    still learns more slowly with the saturating loss (README, "Experiments").
    """
    real_labels = torch.ones_like(fake_logits)
    return F.binary_cross_entropy_with_logits(fake_logits, real_labels)


R1_GAMMA = 0.03   # the weight of the penalty
R1_INTERVAL = 16  # the number of steps from one penalty to the next


def r1_penalty(discriminator, real):
    """Compute the R1 gradient penalty (Mescheder et al. 2018, arxiv.org/abs/1801.04406, section 4).

    Takes real images (N, 1, 28, 28). Returns R1_GAMMA / 2 times the mean, over these images, of the
    squared length of the gradient of D's logit with respect to the pixels.

    Without the penalty, D's logit can become very steep near the real images and flat near the
    fakes, where G needs a gradient. The non-saturating loss does not help there: it has a gradient
    with respect to the logit, but the logit hardly depends on the pixels. A steep D can also make
    the training oscillate without end (section 2 of that paper). The penalty increases D's loss
    where the logit is steep at a real image. It therefore favours a D whose logit changes
    gradually.
    """
    real = real.detach().requires_grad_()  # a new tensor, so that the caller's does not change
    logits = discriminator(real)
    # Apart from a small effect through batch norm, each image influences only its own logit. The
    # gradient of the sum with respect to an image is therefore nearly that of its own logit.
    # create_graph is needed because D's update differentiates this gradient once more.
    gradient = torch.autograd.grad(logits.sum(), real, create_graph=True)[0]  # (N, 1, 28, 28)
    squared_norm = gradient.square().sum(dim=(1, 2, 3))                       # (N,)
    return R1_GAMMA / 2 * squared_norm.mean()


def make_optimizer(network, lr):
    """Create the Adam optimizer of one network. Each network minimises its own loss.

    With Adam's usual beta1 = 0.9, an update averages the gradients of about ten steps. But in a GAN
    the other network changes in every step, so old gradients can point in a wrong direction. In
    DCGAN, training with 0.9 oscillated and was unstable, and 0.5 helped (section 4). With 0.5, an
    update averages the gradients of about two steps.
    """
    return torch.optim.Adam(network.parameters(), lr=lr, betas=(0.5, 0.999))


def adversarial_step(generator, discriminator, g_optimizer, d_optimizer, real, step):
    """Train on a batch of real images: update D once, then update G once.

    real: images (N, 1, 28, 28) in [-1, 1].
    step: the number of this step; the first one is 1. Every R1_INTERVAL steps, D's loss includes
    the penalty.

    Returns a tensor (4,) for the log: d_loss without the penalty, g_loss, the mean of D(x) and the
    mean of D(G(z)). g_loss is measured after D's update. The other three are measured before it.
    """
    # Update D. Real images and fakes form two separate batches. In a mixed batch, the statistics of
    # batch norm would differ from those in G's update, where all images are fakes. G would then
    # learn from a D that behaves differently from the one that was trained.
    z = sample_latent(len(real), device=real.device)                          # (N, LATENT_DIM)
    fake = generator(z)                                                       # (N, 1, 28, 28)
    real_logits = discriminator(real)                                         # (N,)
    # detach() stops the gradient at the fakes, because this loss is for D alone. Without it,
    # backward() would run on through G, and free the graph of `fake` that G's update still needs.
    fake_logits = discriminator(fake.detach())                                # (N,)
    d_loss = discriminator_loss(real_logits, fake_logits)
    loss = d_loss
    if step % R1_INTERVAL == 0:
        # Computing the penalty takes nearly as long as the rest of the step. Adding it in only one
        # of every R1_INTERVAL steps, with R1_INTERVAL times the weight, has about the same effect
        # and takes much less time. Karras et al. (2020, arxiv.org/abs/1912.04958, section 3.1) call
        # this "lazy regularization".
        loss = d_loss + R1_INTERVAL * r1_penalty(discriminator, real)
    d_optimizer.zero_grad()
    loss.backward()
    d_optimizer.step()

    # Update G. Goodfellow et al. (Algorithm 1) draw new fakes here. The same fakes can be used
    # again, because G has not changed. D has changed, so it is applied again. `inputs` restricts
    # backward() to the weights of G, because the gradients of D's weights are not needed.
    g_loss = generator_loss(discriminator(fake))
    g_optimizer.zero_grad()
    g_loss.backward(inputs=list(generator.parameters()))
    g_optimizer.step()

    mean_d_real = real_logits.sigmoid().mean()
    mean_d_fake = fake_logits.sigmoid().mean()
    return torch.stack([d_loss, g_loss, mean_d_real, mean_d_fake]).detach()


@torch.no_grad()
def update_average(average, generator, step):
    """Update `average`, the running average of the generator's weights. The first step is 1.

    GAN training usually does not converge to a point. Each network reacts to the other, so G's
    weights keep moving around a good solution. Their average is closer to it (Yazıcı et al. 2018,
    arxiv.org/abs/1806.04498). Only the samples use the average. The training does not.

    Each step moves the average towards the newest weights by the fraction 40 / (step + 39). In
    step 1, this fraction is 1. It falls so that the last tenth of the steps so far always
    determines about 98 % of the average (1 - 0.9**40). This is called polynomial-decay averaging
    (Shamir and Zhang 2013, arxiv.org/abs/1212.1824). The exponential moving average (EMA) is more
    common. Its fraction is constant and must be chosen to suit the length of the run. Polynomial
    decay suits any length.

    The running statistics of batch norm are also averaged, so that they roughly fit the averaged
    weights.
    """
    fraction = 40 / (step + 39)
    newest = generator.state_dict()
    for name, averaged in average.state_dict().items():
        if averaged.is_floating_point():  # skips num_batches_tracked, an integer
            averaged.lerp_(newest[name], fraction)


@torch.no_grad()
def generate(generator, z):
    """Generate one image for each z: uint8 (N, 1, 28, 28), where 0 is black and 255 is white.

    eval() makes batch norm use the running mean and variance. In training mode, it would use the
    statistics of the batch of z, and each digit would depend on the others.
    """
    was_training = generator.training
    device = next(generator.parameters()).device
    generator.eval()
    images = generator(z.to(device))                                          # (N, 1, 28, 28)
    generator.train(was_training)
    pixels = (images + 1) * 127.5                                             # [-1, 1] to [0, 255]
    return pixels.round().to("cpu", torch.uint8)


# The code below is not specific to GANs. train.py and sample.py share it.


class InputError(ValueError):
    """Raised for invalid input. The scripts print its message without a traceback."""


def pick_device(name):
    """Return the torch.device with a name such as 'cpu', 'cuda', 'cuda:1' or 'mps'.

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
    """Load the dictionary that train.py saved at `path`, with its tensors on the CPU.

    Raises OSError if the file cannot be read, and InputError if it is not such a checkpoint.
    """
    try:
        # With weights_only=False, a file from a stranger could run any code that is in it.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if "average" not in checkpoint:
            raise KeyError("average")
    except OSError:
        raise
    except Exception:  # torch.load raises different exceptions for different kinds of damage
        raise InputError(f"{path} is not a checkpoint of this program, or it is damaged") from None
    return checkpoint
