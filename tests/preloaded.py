"""What the tests' processes need, now or later: imported by the process from which the others are forked."""

import pytest  # noqa: F401
import torch._dynamo  # by the first optimizer
import torch.distributed.fsdp  # by the first sharded module
import torch.distributed.tensor  # noqa: F401  # by the first DistributedDataParallel

import mimref.cli
import mimref.evaluation.compare
import mimref.pretraining.run
import mimref.refinement.run
import mimref.training.saver
import mimref.transfer.finetune.run  # noqa: F401
import tests.ranks
import tests.tiny  # noqa: F401
