"""PyTorch on a lease: GPUs are requested, the lease is renewed while the block runs and released at its end.

python train.py --gpus 1 --memory 8GiB --steps 200
"""

import argparse

from corral.client import LeaseLost, Rejected, lease


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--gpus", type=int, default=1)
    arguments.add_argument("--memory", default="8GiB", help="free memory on each GPU")
    arguments.add_argument("--wait", default="10m", help="how long to wait in the queue")
    arguments.add_argument("--host", help="this machine's name in the fleet, if it differs; 'any' for all hosts")
    arguments.add_argument("--steps", type=int, default=200)
    wanted = arguments.parse_args()

    where = {"hosts": wanted.host} if wanted.host else {}
    try:
        with lease(
            gpus=wanted.gpus,
            memory=wanted.memory,
            wait=wanted.wait,
            name="example-train",
            set_environment=True,
            on_wait=lambda entry: print(f"position {entry.position} in the queue: {entry.message}"),
            **where,
        ) as held:
            print(f"lease {held.lease_id} on", ", ".join(f"{grant.host}:{grant.index}" for grant in held.grants))
            # CUDA reads CUDA_VISIBLE_DEVICES when torch first uses a GPU, so torch is imported here.
            import torch

            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 1)).to(device)
            if torch.cuda.device_count() > 1:
                model = torch.nn.DataParallel(model)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            for step in range(1, wanted.steps + 1):
                held.check()  # raises LeaseLost between steps, so that a checkpoint can be saved
                inputs = torch.randn(512, 64, device=device)
                loss = torch.nn.functional.mse_loss(model(inputs), inputs.sum(1, keepdim=True))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if step % 50 == 0 or step == wanted.steps:
                    print(f"step {step} on {device.type}: loss {loss.item():.3f}")
    except Rejected as rejected:
        raise SystemExit(f"no GPUs: {rejected}") from None
    except LeaseLost as lost:
        raise SystemExit(f"the lease was lost: {lost}") from None


if __name__ == "__main__":
    main()
