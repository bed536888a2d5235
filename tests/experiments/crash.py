"""A callback that ends a training as a bug would, for tests of what is left behind."""

import pytorch_lightning as pl


class CrashAt(pl.Callback):
    """Raises after the given step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            raise RuntimeError("crash as planned")
