"""Data-parallel training, started by `torchrun`: one process per GPU, or on the CPU if CUDA is not available.

torchrun --nproc-per-node 2 train_ddp.py
"""

import os

import torch
import torch.distributed as dist


def main() -> None:
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    torch.manual_seed(dist.get_rank())
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 1).to(device))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(100):
        inputs = torch.randn(256, 64, device=device)
        loss = torch.nn.functional.mse_loss(model(inputs), inputs.sum(1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # Gradients were averaged, so all processes have the same weights, though each had different data.
    weights = model.module.weight.detach().clone()
    dist.broadcast(weights, src=0)
    same = torch.equal(weights, model.module.weight)
    lease = os.environ.get("CORRAL_LEASE", "no lease")
    print(f"rank {dist.get_rank()} of {dist.get_world_size()}, {lease}: loss {loss.item():.3f}, in step: {same}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
