"""The networks, their losses, one step of the game, and the average."""
import copy
import math

import pytest
import torch
from torch import nn

from conftest import blobs
from gan import (KINDS, PENALTY_EVERY, Discriminator, Generator, adversarial_step, discriminator_loss, generator_loss,
                 gradient_penalty, make_optimizer, precision, update_average)


def players(seed=0):
    torch.manual_seed(seed)
    return Generator(), Discriminator()


def pictures(count):
    return blobs(count).unsqueeze(1) / 127.5 - 1


def plain_descent(network, lr=0.01):
    return torch.optim.SGD(network.parameters(), lr)


def weights(network):
    return [weight.detach().clone() for weight in network.parameters()]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_any_number_of_noise_vectors_become_images_and_logits(count):
    generator, discriminator = players()
    images = generator(torch.randn(count, 64))
    logits = discriminator(images)
    assert images.shape == (count, 1, 28, 28) and images.abs().max() <= 1
    assert logits.shape == (count,) and logits.dtype == torch.float32


def test_first_numbers_of_z_choose_a_kind_and_say_no_more():
    generator = players()[0].eval()
    z = torch.randn(2, 64)
    louder, other = z.clone(), z.clone()
    louder[:, :KINDS] = 3 * z[:, :KINDS] - 1
    other[:, z[0, :KINDS].argmin()] = 9
    with torch.no_grad():
        assert torch.equal(generator(louder), generator(z))
        assert not torch.equal(generator(other)[0], generator(z)[0])


def test_strongest_images_are_paper_and_ink_and_never_beyond():
    images = players()[0].eval()(1e5 * torch.randn(16, 64))
    assert images.min() == -1 and images.max() == 1


def test_discriminator_answers_with_logits_and_not_with_probabilities():
    discriminator = players()[1].eval()
    before = discriminator(pictures(8))
    last = [layer for layer in discriminator.modules() if isinstance(layer, nn.Linear)][-1]
    with torch.no_grad():
        last.weight *= -100
        last.bias *= -100
    torch.testing.assert_close(discriminator(pictures(8)), -100 * before)


def test_losses_equal_minus_log_sigmoid():
    real, fake = 4 * torch.randn(2, 50)
    minus_log = lambda logits: (1 + (-logits.double()).exp()).log().mean()
    torch.testing.assert_close(discriminator_loss(real, fake).double(), minus_log(real) + minus_log(-fake))
    torch.testing.assert_close(generator_loss(fake).double(), minus_log(fake))


@pytest.mark.parametrize("real, fake, d_loss, g_loss", [
    (0, 0, 2 * math.log(2), math.log(2)),
    (1000, -1000, 0, 1000),
    (-1000, 1000, 2000, 0),
])
def test_losses_are_right_for_a_coin_tosser_and_finite_for_the_surest_discriminator(real, fake, d_loss, g_loss):
    real, fake = torch.full((3,), float(real)), torch.full((3,), float(fake))
    assert discriminator_loss(real, fake).item() == pytest.approx(d_loss)
    assert generator_loss(fake).item() == pytest.approx(g_loss)


def test_generator_still_learns_where_the_discriminator_is_sure():
    sure = torch.tensor([-20.0], requires_grad=True)
    generator_loss(sure).backward()
    assert sure.grad.item() == pytest.approx(-1)


def test_game_starts_near_a_coin_toss():
    values = []
    for seed in range(8):
        generator, discriminator = players(seed)
        optimizers = plain_descent(generator, 0), plain_descent(discriminator, 0)
        values.append(torch.stack(adversarial_step(generator, discriminator, *optimizers, pictures(16))))
    d_loss, g_loss, d_real, d_fake = torch.stack(values).mean(0).tolist()
    assert d_loss == pytest.approx(2 * math.log(2), abs=0.1)
    assert g_loss == pytest.approx(math.log(2), abs=0.1)
    assert d_real == pytest.approx(0.5, abs=0.05) and d_fake == pytest.approx(0.5, abs=0.05)


def test_discriminator_update_leaves_generator_untouched():
    generator, discriminator = players()
    g_before, d_before = weights(generator), weights(discriminator)
    g_optimizer, d_optimizer = plain_descent(generator), plain_descent(discriminator)

    def after_update(*_):
        assert same(weights(generator), g_before) and all(p.grad is None for p in generator.parameters())
        assert not any(torch.equal(a, b) for a, b in zip(weights(discriminator), d_before))
        seen.append(True)

    seen = []
    d_optimizer.register_step_post_hook(after_update)
    adversarial_step(generator, discriminator, g_optimizer, d_optimizer, pictures(8))
    assert seen == [True]


def test_generator_update_leaves_discriminator_untouched():
    generator, discriminator = players()
    g_before, own = weights(generator), {}
    g_optimizer, d_optimizer = plain_descent(generator), plain_descent(discriminator)

    def after_own_update(*_):
        own.update(weights=weights(discriminator), gradients=[p.grad.clone() for p in discriminator.parameters()])

    d_optimizer.register_step_post_hook(after_own_update)
    adversarial_step(generator, discriminator, g_optimizer, d_optimizer, pictures(8))
    assert same(weights(discriminator), own["weights"])
    assert same([p.grad for p in discriminator.parameters()], own["gradients"])
    assert not any(torch.equal(a, b) for a, b in zip(weights(generator), g_before))
    assert all(p.requires_grad for p in discriminator.parameters())


@pytest.mark.parametrize("penalise", [False, True])
def test_steps_equal_the_game_played_the_long_way(penalise):
    generator, discriminator = players()
    g_naive, d_naive = copy.deepcopy(generator), copy.deepcopy(discriminator)
    optimizers = plain_descent(generator), plain_descent(discriminator)

    def descend(network, loss):
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        with torch.no_grad():
            for weight, gradient in zip(network.parameters(), gradients):
                weight -= 0.01 * gradient

    for seed in (1, 2):  # the second step shows what the first leaves behind
        torch.manual_seed(seed)
        values = adversarial_step(generator, discriminator, *optimizers, pictures(8), penalise)

        torch.manual_seed(seed)
        fake, real = g_naive(torch.randn(8, 64)), pictures(8).requires_grad_()
        on_real, on_fake = d_naive(real).double().sigmoid(), d_naive(fake.detach()).double().sigmoid()
        d_loss = -on_real.log().mean() - (1 - on_fake).log().mean()
        slopes = torch.autograd.grad((on_real / (1 - on_real)).log().sum(), real, create_graph=True)[0]
        penalty = PENALTY_EVERY * 0.01 / 2 * sum(slope.norm() ** 2 for slope in slopes) / 8
        descend(d_naive, d_loss + penalise * penalty)
        g_loss = -d_naive(fake).double().sigmoid().log().mean()
        descend(g_naive, g_loss)

        torch.testing.assert_close(torch.stack(values).double(),
                                   torch.stack([d_loss, g_loss, on_real.mean(), on_fake.mean()]), rtol=1e-3, atol=1e-4)
        for weight, expected in zip(weights(generator) + weights(discriminator), weights(g_naive) + weights(d_naive)):
            torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-4)


def test_step_in_bfloat16_plays_the_same_game(monkeypatch):
    values = []
    for fast in (False, True):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": fast})
        generator, discriminator = players()
        optimizers = plain_descent(generator), plain_descent(discriminator)
        with precision(torch.device("cpu")):
            values.append(adversarial_step(generator, discriminator, *optimizers, pictures(16), penalise=True))
        assert all(weight.dtype == torch.float32 for weight in weights(generator))
    assert values[0] != values[1]
    torch.testing.assert_close(values[1], values[0], rtol=0.05, atol=0.02)


def test_gradient_penalty_of_a_linear_discriminator_is_its_slope_squared():
    slope, images = torch.randn(28 * 28), pictures(5).requires_grad_()
    penalty = gradient_penalty(images, images.flatten(1) @ slope)
    assert penalty.item() == pytest.approx(0.01 / 2 * slope.norm().item() ** 2, rel=1e-5)


def test_optimizer_is_adam_with_a_short_memory():
    network = nn.Linear(3, 1, bias=False)
    weight, optimizer = network.weight.detach().clone(), make_optimizer(network, 0.01)
    mean = square = torch.zeros(1, 3)
    for step, gradient in enumerate(torch.randn(4, 1, 3), start=1):
        network.weight.grad = gradient.clone()
        optimizer.step()
        mean, square = 0.5 * mean + 0.5 * gradient, 0.999 * square + 0.001 * gradient ** 2
        weight = weight - 0.01 * mean / (1 - 0.5 ** step) / ((square / (1 - 0.999 ** step)).sqrt() + 1e-8)
    torch.testing.assert_close(network.weight.detach(), weight)


def test_average_is_the_weighted_mean_of_all_generators_so_far():
    average, generator = Generator(12), Generator(12)
    history = []
    for step in range(1, 41):
        with torch.no_grad():
            for weight in generator.state_dict().values():
                weight.copy_(torch.randn(weight.shape) if weight.is_floating_point() else step)
        history.append({name: weight.clone() for name, weight in generator.state_dict().items()})
        update_average(average, generator, step)
    share = [10 / (step + 9) * math.prod(1 - 10 / (later + 9) for later in range(step + 1, 41))
             for step in range(1, 41)]
    assert sum(share) == pytest.approx(1)
    for name, mean in average.state_dict().items():
        if mean.is_floating_point():
            expected = sum(part * weight[name] for part, weight in zip(share, history))
            torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-5)


def test_generator_comes_close_to_the_few_images_it_is_trained_on():
    generator, discriminator = players()
    g_optimizer, d_optimizer = make_optimizer(generator, 1e-3), make_optimizer(discriminator, 1e-3)
    few, z = pictures(4), torch.randn(32, 64)

    @torch.no_grad()
    def distance():  # mean square per pixel from an image to the nearest of the few
        return (generator(z) - few.squeeze(1)).square().mean((2, 3)).amin(1).mean()

    before = distance()
    for step in range(1, 121):
        adversarial_step(generator, discriminator, g_optimizer, d_optimizer, few.repeat(3, 1, 1, 1),
                         penalise=step % PENALTY_EVERY == 0)
    assert distance() < before / 5
