"""Trains with ``lentando.torch.elastic.run`` in an elastic job, one rank of which dies in the middle of an epoch.

    mpirun --with-ft ulfm -np 3 python elastic_state_torch.py METHOD

Rank 1 kills itself before step 13. Each rank that lives prints a line of JSON.
"""

import json
import sys
from typing import Any

import torch
from elastic_state_data import COMMIT, DEATH, MOMENTUM, PERIOD, RATE, SLOW, STEPS, batch
from kill_points import die

import lentando.torch as lt

METHODS: dict[str, dict[str, Any]] = {
    "allreduce": {},
    "slowmo": {"base": lt.LocalSGD(), "period": PERIOD, "outer": lt.SlowMomentum(1.0, SLOW)},
    "sgp": {"base": lt.SGP()},
    "osgp": {"base": lt.OSGP(), "period": PERIOD},
}


def main() -> None:
    lt.init(elastic=True)
    number = lt.rank()
    torch.manual_seed(number)
    model = torch.nn.Linear(3, 1, dtype=torch.float64)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    sgd = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    optimizer = lt.DistributedOptimizer(sgd, model=model, base_buffers="maintain", **METHODS[sys.argv[1]])
    state = lt.elastic.TorchState(model=model, optimizer=optimizer, step=0, seen=[])
    found: dict[str, Any] = {"number": number, "entered": [], "resets": []}
    state.register_reset_callbacks([lambda: found["resets"].append([lt.rank(), lt.size()])])

    @lt.elastic.run
    def train(state: lt.elastic.TorchState) -> str:
        found["entered"].append([state.step, state.seen.copy(), optimizer.report()["inner_steps"]])
        while state.step < STEPS:
            if number == 1 and state.step == DEATH:
                die()
            x = torch.from_numpy(batch(state.step, lt.rank()))
            optimizer.zero_grad()
            (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
            optimizer.step()
            state.seen.append(state.step)
            state.step += 1
            if state.step % COMMIT == 0:
                state.commit()
        return "trained"

    found["result"] = train(state)
    with optimizer.averaged():
        found["weights"] = torch.cat([model.weight.detach()[0], model.bias.detach()]).tolist()
    found |= {"rank": lt.rank(), "size": lt.size(), "steps": optimizer.report()["inner_steps"], "seen": state.seen}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
