"""What a checkpoint gives `dtr-lab probe` and `dtr-lab affinity` to measure."""

import torch

from experiments.probing.subject import backbone_state
from lightning_modules.balancing.config import BalancingConfig
from lightning_modules.denoiser import NoisedBatch
from lightning_modules.loss_weights import LossWeightConfig, timestep_weights
from tests.experiments.probing.helpers import prepare, save_checkpoint


def test_another_loss_weight_than_the_trained_one_can_be_asked_for(make_denoiser, tmp_path):
    checkpoint = save_checkpoint(make_denoiser(loss_weight=LossWeightConfig("edm2")), tmp_path / "last.ckpt")
    for name in ("uniform", "min_snr", "speed"):
        _, subject, _ = prepare(checkpoint, f"--loss-weight={name}")
        t = torch.arange(0, 8) * 120
        drawn = NoisedBatch(torch.zeros(8, 1, 8, 8), torch.arange(8), t, torch.ones(8, 1, 8, 8))
        losses = subject.module.sample_losses(drawn, subject.backbone)
        expected = timestep_weights(LossWeightConfig(name), subject.module.diffusion)[t] * losses.mse
        torch.testing.assert_close(losses.loss, expected)


def test_the_optimizers_state_of_the_backbone_is_kept_apart_from_that_of_learned_weights(make_denoiser):
    module = make_denoiser(balancing=BalancingConfig(method="uw"))
    optimizer = module.configure_optimizers()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    alone = torch.optim.AdamW([p for p in module.backbone.parameters() if p.requires_grad])
    alone.load_state_dict(backbone_state(optimizer.state_dict()))
    for parameter in alone.param_groups[0]["params"]:
        assert torch.equal(alone.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])
    assert alone.param_groups[0]["lr"] == module.optimization.learning_rate
