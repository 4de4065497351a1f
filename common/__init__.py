"""What the scripts must agree on, so that their numbers can be compared. Nothing here parses a flag or prints a result."""

import logging

for _name in ("torchao", "torch.utils._pytree"):  # where torchao is installed, each import of transformers' Trainer warns of it
    logging.getLogger(_name).setLevel(logging.ERROR)
