"""LoRA on sparse models: adapters whose merge keeps the zeros, because they are trained so."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.nn import functional

from common.blocks import blocks_of
from common.runs import UserError


class SparseLinear(Linear):
    """A LoRA layer that adds nothing where its weight is zero: y = x (W + (W != 0) * s B A)^T.

    What is trained is what is merged, so no mask has to take anything away in the end. The sum of adapter and weight is made
    in every forward, one layer at a time: as much arithmetic as full fine-tuning, and still neither gradients nor optimizer
    states of the weights. Plain LoRA is arXiv 2106.09685.
    """

    def get_delta_weight(self, adapter) -> torch.Tensor:
        return super().get_delta_weight(adapter) * (self.base_layer.weight != 0)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        (adapter,) = self.active_adapters
        delta, dropout = self.get_delta_weight(adapter), self.lora_dropout[adapter]
        if isinstance(dropout, nn.Identity):
            weight = self.base_layer.weight
            return functional.linear(x, weight + delta.to(weight.dtype), self.base_layer.bias)
        return self.base_layer(x) + functional.linear(dropout(x), delta.to(x.dtype))


def add_lora(model, r: int, alpha: float, dropout: float, sparse: bool, only: tuple[str, ...] | None = None):
    """The model with an adapter on every projection of its blocks, as peft has it; all else is frozen.

    only: on those of these names. sparse: adapters of SparseLinear. The adapters are fp32, their B is zero: the model still
    says what it said.
    """
    names = {module: name for name, module in model.named_modules()}
    inside = {names[linear] for block in blocks_of(model) for linear in block.projections}
    targets = sorted(last for last in {name.rpartition(".")[2] for name in inside} if only is None or last in only)
    if others := [name for name in names.values() if name.rpartition(".")[2] in targets and name not in inside]:
        raise UserError(f"LoRA: {others[0]} has the name of a projection, and is none of a block")
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")
    if sparse:
        config._register_custom_module({nn.Linear: SparseLinear})
    return get_peft_model(model, config)


def merge_(model):
    """The plain model with its adapters added to its weights; a peft model's weights are changed in place."""
    return model.merge_and_unload()
