"""The built-in demo: what it ships, and that its score tells a good model from a bad one."""

import pytest
import torch
from torch import Tensor, nn

from structprune import demo


class Relabelled(nn.Module):
    """A network whose answer for one class is given as the next one's."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).roll(1, dims=1)


class Failing(nn.Module):
    """A network that answers nothing."""

    def forward(self, images: Tensor) -> Tensor:
        raise RuntimeError("no answer")


def test_model_is_small_float32_and_in_evaluation_mode():
    network = demo.model()
    assert not any(module.training for module in network.modules())
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert 60_000 < sum(parameter.numel() for parameter in network.parameters()) < 200_000


def test_shipped_files_are_small():
    assert demo.WEIGHTS.stat().st_size < 1_000_000
    assert demo.SAMPLES.stat().st_size < 1_000_000


def test_samples_are_ready_for_the_network():
    images, labels = demo.samples()
    assert (images.shape, images.dtype) == ((500, 1, 28, 28), torch.float32)
    assert (images.min(), images.max()) == (0, 1)
    assert labels.dtype == torch.int64
    assert labels.bincount().tolist() == [50] * 10
    assert demo.model()(images[:3]).shape == (3, 10)


def test_calibration_images_are_none_of_the_samples():
    images, others = demo.samples()[0].flatten(1), demo.calibration().flatten(1)
    assert (others.shape, others.dtype) == ((256, 784), torch.float32)
    assert torch.cdist(images, others).min() > 0.1


def test_each_call_gives_tensors_of_its_own():
    demo.samples()[0].zero_()
    nn.init.zeros_(demo.model().get_parameter("head.weight"))
    assert demo.accuracy(demo.model()) > 0.5


def test_making_the_model_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    demo.model()
    assert torch.equal(torch.get_rng_state(), before)


def test_accuracy_is_high():
    assert demo.accuracy(demo.model()) >= 0.92


def test_accuracy_of_permuted_logits_is_low():
    assert demo.accuracy(Relabelled(demo.model())) < 0.1


def test_accuracy_is_the_share_of_right_answers():
    constant = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    nn.init.zeros_(constant[1].weight)
    constant[1].bias.data = torch.arange(10.0)
    assert demo.accuracy(constant) == 0.1


@pytest.mark.parametrize("training", [True, False])
def test_accuracy_puts_every_training_flag_back(training: bool):
    network = demo.model().train(training)
    network.stem.train(not training)
    before = [module.training for module in network.modules()]
    statistics = network.stem[1].running_mean.clone()
    demo.accuracy(network)
    assert [module.training for module in network.modules()] == before
    assert torch.equal(network.stem[1].running_mean, statistics)


def test_accuracy_puts_the_training_flag_back_when_the_model_fails():
    network = Failing().train()
    with pytest.raises(RuntimeError, match="no answer"):
        demo.accuracy(network)
    assert network.training
