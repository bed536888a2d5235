"""`GramianRecorder` on whole models, ours and others', against one backward pass per group in float64.

The batch of eight samples also divides most widths and lengths, so that a dimension mistaken for the batch would fit.
"""

import diffusers
import pytest
import torch
import transformers
from torch import nn

from lightning_modules.backbones.dit import DiT, DiTConfig
from lightning_modules.backbones.unet import UNet, UNetConfig
from lightning_modules.routing import MaskConfig, route
from tests.lightning_modules.gradients.support import GROUP, Model, normal, parameter, shaken, squares
from tests.oracles.group_gradients import assert_exact

TIMES = torch.tensor([10, 900, 400, 300, 20, 750, 600, 5])
LABELS = torch.arange(8) % 3


def exact(model, *inputs, output=lambda result: result, tolerance=1e-10):
    return assert_exact(model, lambda: squares(output(model(*inputs))), GROUP, 5, tolerance)


def routed(model, kind):
    if kind:
        route(model, MaskConfig(kind=kind, alpha=2, beta=0.5))
    return model


@pytest.mark.parametrize("kind", [None, "dtr", "random"])
def test_our_dit(kind):
    config = DiTConfig(
        input_size=8, patch_size=2, in_channels=2, hidden_size=16, depth=2, num_heads=2, num_classes=3, learn_sigma=True
    )
    exact(routed(shaken(DiT(config)), kind), normal(8, 2, 8, 8), TIMES, LABELS)


@pytest.mark.parametrize("kind", [None, "dtr"])
def test_our_unet(kind):
    config = UNetConfig(
        input_size=8,
        in_channels=1,
        channels=8,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(4,),
        head_channels=4,
        norm_groups=4,
        num_classes=3,
    )
    exact(routed(shaken(UNet(config)), kind), normal(8, 1, 8, 8), TIMES, LABELS)


def test_diffusers_dit():
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=2,
        num_layers=2,
        norm_num_groups=2,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    model = shaken(model).train()
    exact(model, normal(8, 2, 8, 8), TIMES, LABELS, output=lambda result: result.sample)


def test_diffusers_unet():
    model = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
    )
    exact(shaken(model), normal(8, 1, 8, 8), TIMES, output=lambda result: result.sample)


def test_diffusers_unet_with_cross_attention():
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=8,
    )
    exact(shaken(model), normal(8, 1, 8, 8), TIMES, normal(8, 8, 8, seed=3), output=lambda result: result.sample)


TOKENS = torch.randint(1, 20, (8, 8), generator=torch.Generator().manual_seed(4))


def test_bert():
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
    )
    model = shaken(transformers.BertForMaskedLM(config)).train()  # with dropout, and a head tied to the embeddings
    exact(model, TOKENS, output=lambda result: result.logits)


def test_gpt2():
    config = transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    model = shaken(transformers.GPT2LMHeadModel(config)).train()
    exact(model, TOKENS, output=lambda result: result.logits)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_torch_encoder_layer(training, norm_first):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True, norm_first=norm_first)
    exact(shaken(layer).train(training), normal(8, 8, 8))


def test_torch_decoder_layer():
    layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
    exact(shaken(layer), normal(8, 4, 8), normal(8, 8, 8, seed=3))


def test_vision_transformer_with_parameters_of_its_own():
    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.positions
        x = x + self.gamma * self.mlp(self.norm(x))
        return self.head(x[:, 0])

    model = Model(
        forward,
        patch=nn.Conv2d(3, 8, 4, stride=4),
        cls_token=parameter(1, 1, 8),
        positions=parameter(1, 5, 8),
        gamma=parameter(8),
        norm=nn.LayerNorm(8),
        mlp=nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)),
        head=nn.Linear(8, 3),
    )
    exact(model, normal(8, 3, 8, 8))


def test_positions_looked_up_in_an_embedding():
    model = Model(
        lambda self, x: self.linear(x + self.positions(torch.arange(x.shape[1]))),
        positions=nn.Embedding(8, 8),
        linear=nn.Linear(8, 8),
    )
    exact(model, normal(8, 8, 8))


@pytest.mark.parametrize("normalize", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_parametrized_weights(normalize):
    model = nn.Sequential(normalize(nn.Linear(8, 8)), nn.SiLU(), normalize(nn.Linear(8, 4))).eval()
    exact(shaken(model), normal(8, 8))


def test_a_weight_used_twice():
    model = Model(
        lambda self, x: self.out(self.inner(self.inner(x).tanh()).tanh()), inner=nn.Linear(8, 8), out=nn.Linear(8, 8)
    )
    exact(model, normal(8, 3, 8))


def test_a_weight_used_transposed():
    model = Model(lambda self, x: self.linear(x).tanh() @ self.linear.weight, linear=nn.Linear(8, 5))
    exact(model, normal(8, 3, 8))


def test_an_output_head_tied_to_the_embedding():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens):
            return self.head(self.embedding(tokens).tanh())

    gramian = exact(shaken(Tied()), TOKENS)
    assert gramian.layers == ("embedding",)


def test_attention_that_is_scaled_and_biased_by_parameters():
    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        scores = nn.functional.normalize(q, dim=-1) @ nn.functional.normalize(k, dim=-1).transpose(2, 3)
        weights = (scores * self.temperature.exp() + self.bias).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))

    model = Model(
        forward,
        qkv=nn.Linear(8, 24),
        out=nn.Linear(8, 8),
        temperature=parameter(2, 1, 1),
        bias=parameter(2, 8, 8),
    )
    exact(model, normal(8, 8, 8))


def test_low_rank_updates_of_a_frozen_weight():
    model = Model(
        lambda self, x: self.frozen(x) + nn.functional.linear(nn.functional.linear(x, self.down), self.up),
        frozen=nn.Linear(8, 8).requires_grad_(False),
        down=parameter(2, 8),
        up=parameter(8, 2),
    )
    assert exact(model, normal(8, 3, 8)).layers == ("down", "up")


def test_low_rank_updates_merged_into_a_frozen_weight():
    model = Model(
        lambda self, x: nn.functional.linear(x, self.frozen + self.up @ self.down),
        frozen=parameter(8, 8).requires_grad_(False),
        down=parameter(2, 8),
        up=parameter(8, 2),
    )
    exact(model, normal(8, 3, 8))
