#!/usr/bin/env bash
# torch 2.13.0 (CPU), Python 3.11.
#
# After a death, `torchrun --max-restarts` ends all ranks and starts them again. Most would expect that the new ranks meet
# in an empty store: torch/distributed/rendezvous.py says "We create a new TCPStore for every retry so no need to add
# prefix for each attempt". Seen: the store is that of the first life, with everything that the dead ranks have written,
# for every kind of rendezvous. A rank that comes to init_process_group("gloo") before another one therefore reads the
# address of a process that has died, and fails with "Gloo connectFullMesh failed ... Connection refused", which costs
# another restart. TORCHELASTIC_RESTART_COUNT is no prefix to use instead: it counts the failures of one node alone.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 2>/dev/null
cat > "$folder/program.py" <<'PYTHON'
import os
import signal

from torch.distributed import TCPStore

rank, life = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
if life == "0":
    store.set(f"address of rank {rank}", "of the first life")
    store.wait(["address of rank 0", "address of rank 1"])
    if rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    store.wait(["address in the second life"])
elif rank == "0":
    key = "address of rank 1"
    print("found:", store.get(key).decode() if store.check([key]) else "nothing", flush=True)
PYTHON
for rendezvous in "--standalone" "--master-port 29533" "--rdzv-backend c10d --rdzv-endpoint localhost:29534"; do
    # shellcheck disable=SC2086 # several options
    found=$("$folder/venv/bin/torchrun" $rendezvous --nproc-per-node 2 --max-restarts 1 "$folder/program.py" 2>/dev/null)
    echo "$rendezvous: $found"
    [ "$found" = "found: of the first life" ]
done
