"""Trains under DistributedDataParallel and alone, and prints as JSON what differs.

python tests/devices_torch.py RANK PORT     in two processes"""

import json
import os
import sys

os.environ["KERAS_BACKEND"] = "torch"

import torch
from devices_network import BATCH, data, difference, frn, frn_tlu, moved, network
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

rank, port = sys.argv[1:]
x, y = (torch.tensor(part) for part in data())


def train(model, net, part):
    """`model` is what is called, `net` the network in it."""
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    for start in range(0, len(x), BATCH):
        batch = slice(start + part.start, start + part.stop)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    return net


torch.set_num_threads(1)
torch.distributed.init_process_group(
    "gloo", f"tcp://localhost:{port}", rank=int(rank), world_size=2
)
start, net = network(frn, frn_tlu), network(frn, frn_tlu)
parallel = torch.nn.parallel.DistributedDataParallel(net)
buckets = []


def counting_hook(state, bucket):
    buckets.append(bucket.buffer().numel())
    return allreduce_hook(state, bucket)


parallel.register_comm_hook(None, counting_hook)
half = BATCH // 2
train(parallel, net, slice(int(rank) * half, (int(rank) + 1) * half))
one = train(*[network(frn, frn_tlu)] * 2, slice(0, BATCH))
result = {
    "moved": moved(one, start),
    "ddp": difference(one, net),
    "sent": buckets,
    "weights": one.count_params(),
    "buffers": len(list(net.buffers())),
}
print(json.dumps(result))
torch.distributed.destroy_process_group()
