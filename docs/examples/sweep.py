"""A sweep over learning rates: an array with a task for each, two at a time, whose ends are reported as they come.

python sweep.py
"""

import corral.client

RATES = [0.3, 0.1, 0.03, 0.01, 0.003, 0.001]


def train(rate: float, epochs: int = 3) -> None:
    """Train with one rate. It runs on the host of its GPU, where files are the results; here it only counts."""
    import json
    import os
    import time

    loss = 1.0
    for epoch in range(epochs):
        loss *= 1 - rate
        print(f"rate {rate}: loss {loss:.3f}", flush=True)
        print(f"::progress {(epoch + 1) / epochs}", flush=True)
        time.sleep(0.1)
    with open(f"sweep-{os.environ['CORRAL_ARRAY_INDEX']}.json", "w") as file:
        json.dump({"rate": rate, "loss": loss}, file)


def main() -> None:
    sweep = corral.client.map(train, RATES, gpus=1, array="%2", retries=1, name="sweep")
    print("job", sweep.job_id)
    for task in sweep.as_completed():
        print(f"rate {RATES[task.index]}: {task.state.value}, exit code {task.exit_code}")
    raise SystemExit(sweep.wait())


if __name__ == "__main__":
    main()
