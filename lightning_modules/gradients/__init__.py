"""Gradients of groups of samples, and their inner products, from the backward pass that training does anyway."""

from lightning_modules.gradients.collectors import Collector, GramianCollector
from lightning_modules.gradients.gramian import Gramian, gramian_by_subbatches
from lightning_modules.gradients.groups import split_tasks
from lightning_modules.gradients.recorder import GramianRecorder

__all__ = ["Collector", "Gramian", "GramianCollector", "GramianRecorder", "gramian_by_subbatches", "split_tasks"]
