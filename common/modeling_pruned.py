"""A transformers model whose projections have the shapes that its config lists under `pruned_linears`.

This file lies beside the weights of a model whose layers differ in shape, or whose embeddings are packed integers, and
`trust_remote_code=True` runs it. It needs torch and transformers and nothing else. `PrunedBertForSequenceClassification` is
`BertForSequenceClassification` with other shapes, and so for every class of transformers.
"""

import transformers
from torch import nn


def resize_(model, config) -> None:
    """Give the listed Linear layers their shapes [in, out] and the listed modules their attributes."""
    for name, (n_in, n_out) in getattr(config, "pruned_linears", {}).items():
        parent, _, child = name.rpartition(".")
        bias = model.get_submodule(name).bias is not None
        setattr(model.get_submodule(parent), child, nn.Linear(n_in, n_out, bias=bias))
    for name, attributes in getattr(config, "pruned_attributes", {}).items():
        for attribute, value in attributes.items():
            setattr(model.get_submodule(name), attribute, value)


def pruned_class(base):
    """The class of transformers `base`, built with the shapes of its config. It keeps the name of `base`."""

    def __init__(self, config, *args, **kwargs):
        base.__init__(self, config, *args, **kwargs)
        resize_(self, config)

    def _init_weights(self, module):  # transformers 5 expects every Embedding to have a `weight`
        if not (isinstance(module, nn.Embedding) and hasattr(module, "weight_packed")):
            base._init_weights(self, module)

    return type(base.__name__, (base,), {"__init__": __init__, "_init_weights": _init_weights, "__module__": __name__})


def class_of_transformers(name, module):
    base = getattr(transformers, name, None)
    if not (isinstance(base, type) and issubclass(base, transformers.PreTrainedModel)):
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    return base


def __getattr__(name):
    return pruned_class(class_of_transformers(name.removeprefix("Pruned"), __name__))
