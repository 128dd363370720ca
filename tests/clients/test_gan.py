"""GANs: two networks with the same names, and critics that are clipped."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

import paramstate
from side_by_side import as_with_torch, same_bits
from small_models import state_by_name

OptimizerClass = type[torch.optim.Optimizer]


class Network(nn.Module):
    """Generator and discriminator alike: every name that one of them has, the other has as well."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(inputs, 8), nn.Linear(8, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(self.inner(x).relu())


def networks() -> tuple[Network, Network]:
    return Network(2, 4), Network(4, 1)


def batches(count: int = 10) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(4)
    for _ in range(count):
        yield torch.randn(8, 4, generator=draw), torch.randn(8, 2, generator=draw)


def softplus(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.softplus(x).mean()


def adversarial(
    generator: Network, discriminator: Network, of_generator: Any, of_discriminator: Any
) -> tuple[list[float], Any, Any]:
    """The usual loop: the discriminator on real and fake, then the generator through the discriminator."""
    losses = []
    for real, noise in batches():
        of_discriminator.zero_grad()
        loss_d = softplus(-discriminator(real)) + softplus(discriminator(generator(noise).detach()))
        loss_d.backward()
        of_discriminator.step()
        of_generator.zero_grad()
        loss_g = softplus(-discriminator(generator(noise)))
        loss_g.backward()
        of_generator.step()
        losses += [loss_d.item(), loss_g.item()]
    return losses, state_by_name(generator, of_generator), state_by_name(discriminator, of_discriminator)


@pytest.mark.parametrize("named", [False, True])
def test_two_optimizers_train_as_with_torch(named: bool) -> None:
    """A generator and a discriminator with an optimizer each train as with torch, given bare or named."""

    def script(optimizer_class: OptimizerClass) -> Any:
        pair = networks()
        given = [net.named_parameters() if named else net.parameters() for net in pair]
        return adversarial(*pair, *(optimizer_class(params, lr=1e-2, betas=(0.5, 0.999)) for params in given))

    as_with_torch(script, name="Adam", rtol=1e-4, atol=1e-6)


def losses_together(generator: Network, discriminator: Network, optimizer: Any, count: int = 6) -> list[float]:
    """One optimizer over both networks: both losses, one step."""
    losses = []
    for real, noise in batches(count):
        optimizer.zero_grad()
        loss_d = softplus(-discriminator(real)) + softplus(discriminator(generator(noise).detach()))
        loss_g = softplus(-discriminator(generator(noise)))
        grads_d = torch.autograd.grad(loss_d, list(discriminator.parameters()))
        grads_g = torch.autograd.grad(loss_g, list(generator.parameters()))
        for param, grad in zip(
            [*discriminator.parameters(), *generator.parameters()], [*grads_d, *grads_g], strict=True
        ):
            param.grad = grad
        optimizer.step()
        losses += [loss_d.item(), loss_g.item()]
    return losses


@pytest.mark.parametrize("named", [False, True])
def test_one_optimizer_with_two_groups_trains_as_with_torch(named: bool) -> None:
    """One optimizer with a group for each network trains as with torch, the same names in both groups."""

    def script(optimizer_class: OptimizerClass) -> Any:
        pair = networks()
        given = [list(net.named_parameters() if named else net.parameters()) for net in pair]
        optimizer = optimizer_class([{"params": given[0], "lr": 1e-2}, {"params": given[1], "lr": 4e-2}])
        return losses_together(*pair, optimizer), *(state_by_name(net, optimizer) for net in pair)

    as_with_torch(script, name="Adam", rtol=1e-4, atol=1e-6)


def one_optimizer(order: tuple[int, int]) -> tuple[tuple[Network, Network], paramstate.Adam]:
    """Both networks under one optimizer, the groups in this order."""
    torch.manual_seed(0)
    pair = networks()
    groups = [{"params": pair[number], "name": ("generator", "discriminator")[number]} for number in order]
    return pair, paramstate.Adam(groups, lr=1e-2)


def test_the_two_networks_of_one_optimizer_are_never_mixed_up() -> None:
    """A bare name that both networks have is refused, and a load finds the right one, also with the groups swapped."""
    pair, optimizer = one_optimizer((0, 1))
    losses_together(*pair, optimizer)
    with pytest.raises(paramstate.AmbiguousNameError, match=r"generator:inner.weight.*discriminator:inner.weight"):
        optimizer.state_of("inner.weight")
    torch.save([*(net.state_dict() for net in pair), optimizer.state_dict()], "gan.pt")
    whole = losses_together(*pair, optimizer)

    again, resumed = one_optimizer((1, 0))
    *weights, state = torch.load("gan.pt", weights_only=True)
    for net, saved in zip(again, weights, strict=True):
        net.load_state_dict(saved)
    assert resumed.load_state_dict(state).matched_by == "name"
    assert losses_together(*again, resumed) == whole
    for one, other in zip(pair, again, strict=True):
        same_bits(state_by_name(other, resumed), state_by_name(one, optimizer))


class Critic:
    """A Wasserstein GAN's critic and how its weights are kept within bounds after each step."""

    def __init__(self, clip: Callable[[nn.Module, float], None], bound: float = 0.0625) -> None:
        self.clip, self.bound = clip, bound

    def train(self, optimizer_class: OptimizerClass, given: Callable[[nn.Module], Any], **options: Any) -> Any:
        generator, critic = networks()
        clip_data(critic, self.bound)
        of_critic = optimizer_class(given(critic), lr=1e-2, betas=(0.5, 0.9), **options)
        of_generator = optimizer_class(generator.parameters(), lr=1e-2, betas=(0.5, 0.9))
        losses = []
        for number, (real, noise) in enumerate(batches(20)):
            of_critic.zero_grad()
            loss = critic(generator(noise).detach()).mean() - critic(real.cos()).mean()
            loss.backward()
            of_critic.step()
            self.clip(critic, self.bound)
            losses.append(loss.item())
            if number % 5 == 4:
                of_generator.zero_grad()
                (-critic(generator(noise)).mean()).backward()
                of_generator.step()
        assert max(param.abs().max().item() for param in critic.parameters()) <= self.bound
        return losses, state_by_name(critic, of_critic), state_by_name(generator, of_generator)


def clip_data(critic: nn.Module, bound: float) -> None:
    for p in critic.parameters():
        p.data.clamp_(-bound, bound)


def clip_without_gradient(critic: nn.Module, bound: float) -> None:
    with torch.no_grad():
        for p in critic.parameters():
            p.clamp_(-bound, bound)


def clip_data_anew(critic: nn.Module, bound: float) -> None:
    for p in critic.parameters():
        p.data = p.data.clamp(-bound, bound)


def clip_by_loading(critic: nn.Module, bound: float) -> None:
    critic.load_state_dict({name: value.clamp(-bound, bound) for name, value in critic.state_dict().items()})


def clip_by_replacing(critic: nn.Module, bound: float) -> None:
    for module in critic.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(param.detach().clamp(-bound, bound)))


def clip_by_assigning(critic: nn.Module, bound: float) -> None:
    clipped = {name: value.clamp(-bound, bound) for name, value in critic.state_dict().items()}
    critic.load_state_dict(clipped, assign=True)


def bare(module: nn.Module) -> Any:
    return module.parameters()


@pytest.mark.parametrize("clip", [clip_data, clip_without_gradient, clip_data_anew, clip_by_loading])
def test_weights_that_are_clipped_in_place_train_as_with_torch(clip: Callable[[nn.Module, float], None]) -> None:
    """A Wasserstein critic clipped in place (`p.data.clamp_`, `clamp_`, new `.data`, a load) trains as with torch."""
    as_with_torch(lambda optimizer_class: Critic(clip).train(optimizer_class, bare), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "given", [bare, nn.Module.named_parameters, lambda module: module], ids=["bare", "named", "model"]
)
@pytest.mark.parametrize("clip", [clip_by_replacing, clip_by_assigning])
def test_weights_that_are_clipped_by_replacing_them_train_as_if_clipped_in_place(
    clip: Callable[[nn.Module, float], None], given: Callable[[nn.Module], Any]
) -> None:
    """Clipping by new `nn.Parameter`s or `assign=True` is bit-equal to an in-place clamp; torch trains dead tensors."""
    torch.manual_seed(0)
    in_place = Critic(clip_data).train(paramstate.AdamW, bare)
    torch.manual_seed(0)
    same_bits(Critic(clip).train(paramstate.AdamW, given), in_place)
    torch.manual_seed(0)
    torchs_losses, torchs_critic, _ = Critic(clip).train(torch.optim.AdamW, bare)
    assert torchs_critic["inner.weight"].keys() == {"value"}, "torch keeps state for a critic that is replaced"
    assert torchs_losses != pytest.approx(in_place[0], rel=1e-3)


def test_a_declared_box_is_the_critics_clip() -> None:
    """A box declared once, `constraints=Box(-c, c)`, is bit-equal to clamping in place after each step."""
    torch.manual_seed(0)
    in_place = Critic(clip_data).train(paramstate.AdamW, bare)
    torch.manual_seed(0)
    box = paramstate.Box(-0.0625, 0.0625)
    same_bits(Critic(clip_nothing).train(paramstate.AdamW, bare, constraints=box), in_place)


def clip_nothing(critic: nn.Module, bound: float) -> None:
    """The optimizer does it."""
