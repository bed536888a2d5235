"""DiT, the diffusion transformer, with room for task routing.

Peebles & Xie, "Scalable Diffusion Models with Transformers", ICCV 2023 (arXiv 2212.09748), the adaLN-Zero variant.
State-dict keys are those of the published checkpoints.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_modules.backbones.backbone import Backbone, BranchObserver, StreamObserver
from lightning_modules.backbones.dit_layers import (
    DiTBlock,
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    position_embedding,
)
from lightning_modules.backbones.presets import DIT_PRESETS, DiTConfig, dit_config
from lightning_modules.routing import masked_block

__all__ = ["DIT_PRESETS", "DiT", "DiTConfig", "dit_config"]


class DiT(Backbone):
    """Diffusion transformer.

    Attributes:
        config: Its shape.
        hidden_size: Channels of the residual stream.
        blocks: The residual blocks, each called as ``block(tokens (B, N, C), conditioning (B, C))``.
        routing: Task routing of the blocks, or None for the plain model; see `lightning_modules.routing.route`.
    """

    config: DiTConfig

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = config.hidden_size
        self.routing = None
        self.x_embedder = PatchEmbed(config.patch_size, config.in_channels, config.hidden_size)
        self.t_embedder = TimestepEmbedder(config.hidden_size)
        if config.num_classes:
            self.y_embedder = LabelEmbedder(config.num_classes + config.has_null_class, config.hidden_size)
        # A parameter although it is never trained: published checkpoints contain it.
        tokens_per_side = config.input_size // config.patch_size
        self.pos_embed = nn.Parameter(position_embedding(config.hidden_size, tokens_per_side), requires_grad=False)
        self.blocks = nn.ModuleList(
            DiTBlock(config.hidden_size, config.num_heads, config.mlp_ratio) for _ in range(config.depth)
        )
        self.final_layer = FinalLayer(config.hidden_size, config.patch_size, config.out_channels)
        self._initialize()

    def _initialize(self) -> None:
        """DiT's initialisation: every block starts as the identity, and the model's output as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # The patch embedding is a linear layer in the shape of a convolution.
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.get_parameter("x_embedder.proj.bias"))
        embeddings = ["t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight"]
        if self.config.num_classes:
            embeddings.append("y_embedder.embedding_table.weight")
        for name in embeddings:
            nn.init.normal_(self.get_parameter(name), std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith("adaLN_modulation.1.weight") or name == "final_layer.linear.weight":
                nn.init.zeros_(parameter)

    @property
    def block_channels(self) -> dict[str, int]:
        """Module path of each residual block -> channels that its branches read, in network order."""
        return {f"blocks.{index}": self.hidden_size for index in range(len(self.blocks))}

    def observe_branches(self, observer: BranchObserver) -> list[RemovableHandle]:
        """Shows what each block reads (masked, where it is routed) and what its branches add to that."""

        def listener(name: str) -> Any:
            def listen(block: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001
                read = args[0].detach().float()
                observer(name, "input", read)
                observer(name, "update", output.detach().float() - read)

            return listen

        return [
            block.register_forward_hook(listener(name))
            for name, block in zip(self.block_channels, self.blocks, strict=True)
        ]

    def observe_streams(self, observer: StreamObserver) -> list[RemovableHandle]:
        """Shows the stream behind each block: the embedded patches and what all blocks so far have added.

        A routed block itself sees the masked stream only.
        """
        stream: list[Tensor] = []

        def begin(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001
            stream[:] = [(output + self.pos_embed).detach().float()]

        def add(block: str, site: str, values: Tensor) -> None:
            if site == "update":
                stream[0] = stream[0] + values
                observer(block, stream[0])

        return [self.x_embedder.register_forward_hook(begin), *self.observe_branches(add)]

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predicts the diffusion's target, and the variance values if ``learn_sigma``.

        Args:
            x: Noised images or latents ``(B, C, H, W)``.
            t: Timesteps ``(B,)``, integer or continuous.
            y: Class labels ``(B,)``, int64, the null class included; None for an unconditional model.

        Returns:
            ``(B, C, H, W)``, or ``(B, 2C, H, W)`` if ``learn_sigma``.

        Raises:
            ValueError: If the input's shape is not the configured one, or labels are missing or superfluous.
        """
        self._check_inputs(x, y)
        tokens = self.x_embedder(x) + self.pos_embed
        conditioning = self._condition(t, y)
        masks = None if self.routing is None else self.routing(t)
        for index, block in enumerate(self.blocks):
            if masks is None:
                tokens = block(tokens, conditioning)
            else:
                tokens = masked_block(block, masks[index], tokens, conditioning)
        return self._unpatchify(self.final_layer(tokens, conditioning))

    def _condition(self, t: Tensor, y: Tensor | None) -> Tensor:
        """Conditioning vectors (B, C) of timesteps and labels."""
        conditioning = self.t_embedder(t)
        return conditioning if y is None else conditioning + self.y_embedder(y)

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """Patches (B, N, patch_size^2 * C) -> images (B, C, H, W)."""
        p, side = self.config.patch_size, self.config.input_size // self.config.patch_size
        grid = patches.view(-1, side, side, p, p, self.config.out_channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.config.out_channels, side * p, side * p)
