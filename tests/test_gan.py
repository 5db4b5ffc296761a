"""The networks, the losses, the adversarial step and the running average."""
import copy
import inspect
import math
import re

import pytest
import torch
from torch import nn

import gan
from conftest import equal, real_images
from gan import (LATENT_DIM, N_CATEGORIES, R1_GAMMA, R1_INTERVAL, Discriminator, Generator,
                 InputError, adversarial_step, discriminator_loss, generate, generator_loss,
                 make_optimizer, sample_latent, update_average)


@pytest.fixture
def networks():
    torch.manual_seed(0)
    return Generator(), Discriminator()


def sgd(network, lr=0.01):
    return torch.optim.SGD(network.parameters(), lr)


def weights(network):
    return [weight.detach().clone() for weight in network.parameters()]


def test_every_grey_level_survives_the_way_to_the_range_of_the_generator_and_back():
    levels = torch.arange(256, dtype=torch.uint8)
    images = gan.from_pixels(levels)
    assert images.min() == -1 and images.max() == 1
    assert torch.equal(gan.to_pixels(images), levels)
    assert gan.to_pixels(torch.tensor([-1.1, 1.1])).tolist() == [0, 255]


def test_latent_is_a_one_hot_category_beside_normal_noise():
    category, noise = sample_latent(10_000).split([N_CATEGORIES, gan.NOISE_DIM], dim=1)
    assert ((category == gan.CATEGORY_SCALE).sum(1) == 1).all()
    assert ((category == 0).sum(1) == N_CATEGORIES - 1).all()
    assert (category > 0).float().mean(0).sub(1 / N_CATEGORIES).abs().max() < 0.02
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert abs((noise.abs() < 1).float().mean() - 0.6827) < 0.01  # as the normal distribution has


def test_chosen_category_leaves_the_noise_as_it_is():
    for category in (4, torch.arange(50) % N_CATEGORIES):
        drawn, chosen = [sample_latent(50, random=torch.Generator().manual_seed(3), category=c)
                         for c in (None, category)]
        assert torch.equal(chosen[:, N_CATEGORIES:], drawn[:, N_CATEGORIES:])
        assert (chosen[:, :N_CATEGORIES].argmax(dim=1) == category).all()


@pytest.mark.parametrize("network, inputs", [
    (Generator, torch.randn(5, LATENT_DIM)), (Discriminator, real_images(5))])
def test_each_layer_has_the_shape_that_its_comment_says(network, inputs):
    source, layers = inspect.getsource(network), network().layers
    lines = re.findall(r"^ +nn\.(\w+)\(.*\),( +# \(N.*)?$", source, re.MULTILINE)
    assert [name for name, _ in lines] == [type(layer).__name__ for layer in layers]
    for (_, comment), layer in zip(lines, layers):
        before, inputs = inputs.shape, layer(inputs)
        expected = (5, *map(int, re.findall(r"\d+", comment))) if comment else before
        assert inputs.shape == expected


@pytest.mark.parametrize("network, inputs, slope, normalised", [
    (Generator, 10 * sample_latent(64), 0, 3), (Discriminator, 100 * real_images(64), 0.2, 3)])
def test_batch_norm_gives_every_activation_but_that_of_pixels_mean_0_and_variance_1(
        network, inputs, slope, normalised):
    layers, signals, normal = network().layers, inputs, []
    for layer in layers:
        if "ReLU" in type(layer).__name__:
            assert layer(torch.tensor([-1.0, 1.0])).tolist() == pytest.approx([-slope, 1])
            mean, variance = signals.mean((0, 2, 3)), signals.var((0, 2, 3))
            normal.append(bool(mean.abs().max() < 1e-3 and (variance - 1).abs().max() < 0.1))
        signals = layer(signals)
    assert sum(normal) == normalised and len(normal) - normalised == (network is Discriminator)
    convolutions = [layer for layer in layers if "Conv" in type(layer).__name__]
    assert all(abs(layer.weight.std() / 0.02 - 1) < 0.2 for layer in convolutions)


def test_images_have_the_range_of_real_ones_and_logits_any_size(networks):
    generator, discriminator = networks
    images = generator.eval()(1e5 * sample_latent(7))
    assert images.min() == -1 and images.max() == 1
    discriminator.layers[-2].weight.data *= 1000
    assert discriminator(images).abs().max() > 10


def test_fakes_and_real_images_of_different_sizes_are_an_error_that_names_both(networks):
    with pytest.raises(InputError, match=r"\(8, 1, 28, 28\), .*\(8, 1, 32, 32\)"):
        adversarial_step(*networks, *map(sgd, networks), torch.zeros(8, 1, 32, 32), step=1)


@pytest.mark.parametrize("real, fake, d_loss, g_loss", [
    (0.0, 0.0, 2 * math.log(2), math.log(2)),  # D outputs 0.5 for every image
    (1000.0, -1000.0, 0.0, 1000.0),            # D is certain, and right
    (-1000.0, 1000.0, 2000.0, 0.0),            # D is certain, and wrong
    (math.log(3), -math.log(3), 2 * math.log(4 / 3), math.log(4)),
])
def test_losses_are_right_and_finite_however_certain_d_is(real, fake, d_loss, g_loss):
    real, fake = torch.full((3,), real), torch.full((3,), fake)
    assert discriminator_loss(real, fake).item() == pytest.approx(d_loss)
    assert generator_loss(fake).item() == pytest.approx(g_loss)


def test_best_discriminator_outputs_the_share_of_real_images_among_equal_ones():
    """An image makes up 3 of 8 real images and 1 of 8 fakes. D(x) = 3/4 is best: logit log 3."""
    logit, others = torch.tensor(math.log(3), requires_grad=True), torch.randn(7)
    discriminator_loss(torch.cat([logit.expand(3), others[:5]]),
                       torch.cat([logit.expand(1), others])).backward()
    assert logit.grad.item() == pytest.approx(0, abs=1e-7)


def test_a_step_worked_by_hand():
    """D(x) and D(G(z)) come from logits whose sigmoids are fractions: 0 is 1/2, and log 3 is 3/4.

    G's only weight is w = log 3, and every fake is w. D's only weight is v = 1, and its logit is v
    times a pixel. The learning rates are 1, so both updates can be done on paper.
    """
    class Weight(nn.Module):
        def __init__(self, value, forward):
            super().__init__()
            self.value = nn.Parameter(torch.tensor(value))
            self.forward = lambda inputs: forward(self.value, inputs)

    log3 = math.log(3)
    generator = Weight(log3, lambda w, z: w.expand(len(z), 1, 1, 1))
    discriminator = Weight(1.0, lambda v, images: v * images.flatten())
    losses = adversarial_step(generator, discriminator, sgd(generator, lr=1),
                              sgd(discriminator, lr=1), torch.zeros(4, 1, 1, 1), step=1)
    # Before D's update, the logit of a real image is 0 and that of a fake is log 3.
    assert losses["d_real"].item() == pytest.approx(1 / 2)
    assert losses["d_fake"].item() == pytest.approx(3 / 4)
    assert losses["d_loss"].item() == pytest.approx(-math.log(1 / 2) - math.log(1 / 4))
    # d_loss has the slope 3/4 with respect to a fake's logit, which is v * log 3.
    v = 1 - 3 / 4 * log3
    assert discriminator.value.item() == pytest.approx(v)
    assert discriminator.value.grad.item() == pytest.approx(3 / 4 * log3)  # none from G's loss
    # G's loss is -log sigmoid(v w). Its slope with respect to w is -(1 - sigmoid(v w)) * v.
    d_fake = 1 / (1 + math.exp(-v * log3))
    assert losses["g_loss"].item() == pytest.approx(-math.log(d_fake))
    assert generator.value.item() == pytest.approx(log3 + (1 - d_fake) * v)


@pytest.mark.parametrize("step, weight_of_the_penalty", [(1, 0), (R1_INTERVAL, R1_INTERVAL)])
def test_step_equals_a_direct_computation(networks, step, weight_of_the_penalty):
    g, d = copy.deepcopy(networks)
    optimizers = [sgd(network) for network in networks]

    def descend(network, loss):
        for weight, gradient in zip(network.parameters(),
                                    torch.autograd.grad(loss, list(network.parameters()))):
            weight.data -= 0.01 * gradient

    for seed in (1, 2):  # the second step shows what the first one left behind
        torch.manual_seed(seed)
        losses = adversarial_step(*networks, *optimizers, real_images(8), step)
        torch.manual_seed(seed)
        real, fake = real_images(8).requires_grad_(), g(sample_latent(8))
        d_real, d_fake = d(real).double().sigmoid(), d(fake.detach()).double().sigmoid()
        d_loss = -d_real.log().mean() - (1 - d_fake).log().mean()
        logits = (d_real / (1 - d_real)).log()
        slopes = torch.autograd.grad(logits.sum(), real, create_graph=True)[0]
        penalty = R1_GAMMA / 2 * sum(slope.norm() ** 2 for slope in slopes) / 8
        descend(d, d_loss + weight_of_the_penalty * penalty)
        g_loss = -d(fake).double().sigmoid().log().mean()
        descend(g, g_loss)
        expected = dict(d_loss=d_loss, g_loss=g_loss, d_real=d_real.mean(), d_fake=d_fake.mean())
        assert not any(loss.requires_grad for loss in losses.values())  # the graph would be kept
        torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-4, check_dtype=False)
        for network, direct in zip(networks, (g, d)):
            torch.testing.assert_close(weights(network), weights(direct), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("step", [1, R1_INTERVAL])
def test_step_neither_reads_a_value_nor_makes_a_tensor_on_another_device(step):
    """A tensor on the meta device has no value, so reading one or mixing devices is an error."""
    with torch.device("meta"):
        networks, average = [Generator(), Discriminator()], Generator()
        real = torch.zeros(8, 1, 28, 28)
    optimizers = [make_optimizer(network, 0.001) for network in networks]
    losses = adversarial_step(*networks, *optimizers, real, step)
    update_average(average, networks[0], 5)
    assert all(loss.is_meta and loss.shape == () for loss in losses.values())


def test_optimizer_is_adam_that_forgets_half_of_the_past_gradients_in_each_step(networks):
    for network in networks:
        optimizer = make_optimizer(network, lr=0.1)
        group, = optimizer.param_groups
        assert type(optimizer) is torch.optim.Adam and group["params"] == [*network.parameters()]
        assert group["lr"] == 0.1 and group["betas"] == (0.5, 0.999)


def test_average_is_the_weighted_mean_of_all_generators_so_far(networks):
    generator, average, k = networks[0], Generator(), gan.AVERAGE_K
    history = torch.randn(20, len(generator.state_dict()))  # a value for each step and each entry
    for step, values in enumerate(history, start=1):
        for weight, value in zip(generator.state_dict().values(), values):
            weight.fill_(value)
        update_average(average, generator, step)
    fractions = [k / (step + k - 1) for step in range(1, 21)]
    shares = [fraction * math.prod(1 - later for later in fractions[step:])
              for step, fraction in enumerate(fractions, start=1)]
    assert sum(shares) == pytest.approx(1)
    for mean, expected in zip(average.state_dict().values(), torch.tensor(shares) @ history):
        if mean.is_floating_point():
            torch.testing.assert_close(mean, expected.expand_as(mean))


@pytest.mark.parametrize("training", [True, False])
def test_generated_pixels_are_the_output_in_evaluation_mode_and_nothing_changes(networks, training):
    generator, z = networks[0], sample_latent(9)
    generator(3 * sample_latent(32))  # batch norm has seen a batch
    before = copy.deepcopy(generator.state_dict())
    with torch.no_grad():
        expected = (generator.eval()(z) + 1) / 2 * 255
    digits = generate(generator.train(training), z)
    assert digits.shape == (9, 1, 28, 28) and digits.dtype == torch.uint8
    assert (digits - expected).abs().max() < 0.51
    assert all(layer.training == training for layer in generator.modules())
    assert equal(generator.state_dict(), before)
