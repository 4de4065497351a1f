"""One view of every architecture: the projections of each transformer block.

A new family is one row of FAMILIES. Nothing outside this file names a submodule of a model.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from common.runs import UserError

KINDS = ("heads", "neurons")  # of groups


@dataclass(frozen=True)
class Family:
    """Where one architecture keeps its projections; paths are relative to a layer, `layers` to `model.base_model`."""

    layers: str
    attention: str  # the module whose forward splits the heads
    qkv: tuple[str, str, str]  # relative to `attention`
    o: str
    ffn_in: tuple[str, ...]  # every projection into the hidden neurons
    ffn_out: str
    head_attributes: tuple[str, ...] = ()  # attributes of `attention` that hold the number of query heads
    config_heads: tuple[str, ...] = ()  # config keys with which even head counts are expressed: query heads, KV heads
    config_neurons: str = "intermediate_size"


_BERT = Family("encoder.layer", "attention.self", ("query", "key", "value"), "attention.output.dense",
               ("intermediate.dense",), "output.dense", ("num_attention_heads",))  # fmt: skip
_DISTILBERT = Family("transformer.layer", "attention", ("q_lin", "k_lin", "v_lin"), "attention.out_lin",
                     ("ffn.lin1",), "ffn.lin2", ("n_heads",), config_neurons="hidden_dim")  # fmt: skip
_OPT = Family("decoder.layers", "self_attn", ("q_proj", "k_proj", "v_proj"), "self_attn.out_proj",
              ("fc1",), "fc2", ("num_heads",), config_neurons="ffn_dim")  # fmt: skip
_LLAMA = Family("layers", "self_attn", ("q_proj", "k_proj", "v_proj"), "self_attn.o_proj",
                ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj",
                config_heads=("num_attention_heads", "num_key_value_heads"))  # fmt: skip

FAMILIES = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "distilbert": _DISTILBERT,
    "opt": _OPT,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}


@dataclass(frozen=True)
class Attention:
    """The attention of one block. A head group is one KV head with all its query heads (one head where there is no GQA), or
    with `queries` one query head, whose keys and values stay.

    q: (n_heads * head_dim, hidden), k and v: (n_kv_heads * head_dim, hidden), o: (hidden, n_heads * head_dim).
    """

    module: nn.Module
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear
    head_dim: int
    queries: bool = False

    @property
    def n_heads(self) -> int:
        return self.q.out_features // self.head_dim

    @property
    def n_kv_heads(self) -> int:
        return self.k.out_features // self.head_dim

    @property
    def n_groups(self) -> int:
        return self.n_heads if self.queries else self.n_kv_heads

    @property
    def ins(self) -> tuple[nn.Linear, ...]:
        """The projections of which a group owns rows."""
        return (self.q,) if self.queries else (self.q, self.k, self.v)


@dataclass(frozen=True)
class FeedForward:
    """The feed-forward part of one block. A group is one hidden neuron: its row of every `ins`, its column of `out`."""

    ins: tuple[nn.Linear, ...]
    out: nn.Linear

    @property
    def n_neurons(self) -> int:
        return self.out.in_features


@dataclass(frozen=True)
class Block:
    """One transformer block of a model, as groups see it."""

    attention: Attention
    ffn: FeedForward

    @property
    def projections(self) -> tuple[nn.Linear, ...]:
        return (self.attention.q, self.attention.k, self.attention.v, self.attention.o, *self.ffn.ins, self.ffn.out)

    @property
    def inputs(self) -> tuple[tuple[nn.Linear, ...], ...]:
        """The projections by what they read: those that share their input stand together."""
        a = self.attention
        return ((a.q, a.k, a.v), (a.o,), self.ffn.ins, (self.ffn.out,))

    @property
    def shape(self) -> dict[str, int]:
        return {"heads": self.attention.n_heads, "kv_heads": self.attention.n_kv_heads, "neurons": self.ffn.n_neurons}


def family_of(config) -> Family:
    """The row of FAMILIES for a model's config. UserError for an architecture that is not in the table."""
    if config.model_type not in FAMILIES:
        raise UserError(f"model type {config.model_type!r} is not supported; known: {', '.join(FAMILIES)}. "
                        "A new family is one row of FAMILIES in common/blocks.py")  # fmt: skip
    return FAMILIES[config.model_type]


def head_dim_of(config) -> int:
    """Width of one head, from the config (an explicit `head_dim` wins over hidden / heads)."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def layers_of(model) -> nn.ModuleList:
    """The modules of the blocks of a `transformers` model, first to last, to be run one by one."""
    return model.base_model.get_submodule(family_of(model.config).layers)


def blocks_of(model, queries: bool = False) -> list[Block]:
    """The blocks of a `transformers` model, first to last, whatever head it carries. queries: single query heads are groups."""
    family, head_dim = family_of(model.config), head_dim_of(model.config)
    blocks = []
    for layer in layers_of(model):
        attention = layer.get_submodule(family.attention)
        q, k, v = (attention.get_submodule(name) for name in family.qkv)
        ins = tuple(layer.get_submodule(name) for name in family.ffn_in)
        blocks.append(Block(Attention(attention, q, k, v, layer.get_submodule(family.o), head_dim, queries),
                            FeedForward(ins, layer.get_submodule(family.ffn_out))))  # fmt: skip
    return blocks


# ---------------------------------------------------------------------------------------------------------------- groups


def group_counts(blocks: list[Block]) -> dict[str, list[int]]:
    """How many groups each layer has: head groups (KV heads; or query heads) and neurons."""
    return {"heads": [b.attention.n_groups for b in blocks], "neurons": [b.ffn.n_neurons for b in blocks]}


def group_costs(blocks: list[Block], budget: str = "parameters", length: int = 128) -> dict[str, list[float]]:
    """Cost of one group of each kind in each layer: its parameters, or its multiply-accumulates per token at `length`.

    A head group costs its rows of q, k, v (or of q alone) and its columns of o, and in MACs also 2 * length * head_dim per
    query head for the attention products.
    """
    costs: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for block in blocks:
        a, ffn = block.attention, block.ffn
        head = sum(linear.weight.numel() for linear in (*a.ins, a.o)) / a.n_groups
        neuron = sum(linear.in_features for linear in ffn.ins) + ffn.out.out_features
        if budget == "macs":
            head += 2 * length * a.head_dim * a.n_heads / a.n_groups
        else:
            head += sum(linear.out_features for linear in a.ins if linear.bias is not None) / a.n_groups
            neuron += sum(linear.bias is not None for linear in ffn.ins)
        costs["heads"].append(float(head))
        costs["neurons"].append(float(neuron))
    return costs


def total_cost(blocks: list[Block], budget: str = "parameters", length: int = 128) -> float:
    """Cost of all projections of all blocks, what no group owns included: what a sparsity is a fraction of."""
    total = sum(linear.weight.numel() for block in blocks for linear in block.projections)
    if budget == "macs":
        return float(total + sum(2 * length * b.attention.head_dim * b.attention.n_heads for b in blocks))
    biases = [linear.bias for block in blocks for linear in block.projections]
    return float(total + sum(bias.numel() for bias in biases if bias is not None))


# ---------------------------------------------------------------------------------------------- models of other shapes


def set_shapes_(model) -> None:
    """After projections were cut: make the attributes and the config of `model` say the shapes it now has.

    Shapes that the stock config can express (all layers alike; other head counts only where the family's config has the
    head width apart and takes them) go to its own keys, and the model loads plainly. The others are listed by module name in
    `config.pruned_linears` and `config.pruned_attributes`, which `modeling_pruned.py` reads.
    """
    family, blocks, config = family_of(model.config), blocks_of(model), model.config
    head_dim, names = head_dim_of(config), {id(module): name for name, module in model.named_modules()}
    attributes = {}
    for block in blocks:
        attention = block.attention
        values = {
            **dict.fromkeys(family.head_attributes, attention.n_heads),
            "all_head_size": attention.q.out_features,
            "num_key_value_groups": attention.n_heads // attention.n_kv_heads,
        }
        values = {name: value for name, value in values.items() if hasattr(attention.module, name)}
        for name, value in values.items():
            setattr(attention.module, name, value)
        attributes[names[id(attention.module)]] = values
    for key in ("pruned_linears", "pruned_attributes"):
        config.__dict__.pop(key, None)
    shapes = [block.shape for block in blocks]
    stock_heads = {"heads": config.num_attention_heads}
    stock_heads["kv_heads"] = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    same_heads = all(shape[key] == count for shape in shapes for key, count in stock_heads.items())
    # some configs refuse head counts that do not divide the width (LlamaConfig.validate_architecture), others do not
    divides = config.hidden_size % shapes[0]["heads"] == 0 or not hasattr(config, "validate_architecture")
    if all(shape == shapes[0] for shape in shapes) and (same_heads or (family.config_heads and divides)):
        setattr(config, family.config_neurons, shapes[0]["neurons"])
        if not same_heads:
            config.head_dim = head_dim
            for key, kind in zip(family.config_heads, ("heads", "kv_heads"), strict=True):
                setattr(config, key, shapes[0][kind])
    else:
        linears = [linear for block in blocks for linear in block.projections]
        config.pruned_linears = {names[id(linear)]: [linear.in_features, linear.out_features] for linear in linears}
        config.pruned_attributes = attributes
