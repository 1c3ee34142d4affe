"""What processes of the tests need, and what these import later: for a process that others are forks of."""

import pytest  # noqa: F401
import torch._dynamo  # noqa: F401  # by the first optimizer
import torch.distributed.tensor  # noqa: F401  # by the first DistributedDataParallel

import mimref.cli  # noqa: F401
import mimref.evaluation.compare  # noqa: F401
import mimref.pretraining.run  # noqa: F401
import mimref.refinement.run  # noqa: F401
import tests.ranks  # noqa: F401
import tests.tiny  # noqa: F401
