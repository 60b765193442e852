"""`python -m papers.mta.train` in several CPU processes with the model sharded by FSDP2, for test_train.py.

accelerate shards on GPUs only, so this shards where it would, in `prepare`.
"""

import sys

from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from papers.mta import train
from papers.mta.config import Config
from shared.experiments import stage_main


def prepare(self, model, optimizer):
    mesh = init_device_mesh("cpu", (self.num_processes,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    return model, self.prepare_optimizer(optimizer)


Accelerator.prepare = prepare
stage_main("train", Config, train.train, sys.argv[1:])
