#!/usr/bin/env bash
# ray 2.60.0: a cluster of one machine listens on all addresses, also when it is told 127.0.0.1.
#
# One would guess: ray.init(address="local", _node_ip_address="127.0.0.1") keeps its ports on the loopback interface.
# True: 127.0.0.1 is replaced by the machine's outward address, and gcs_server and raylet bind to all; what guards them is the
# token, which that version asks for by default.
# Seen: gcs_server binds to all: True / its address is 127.0.0.1: False / raylet binds to all: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q ray==2.60.0
cat > "$folder/seen.py" <<'P'
import os
from pathlib import Path

import ray

ray.init(
    address="local", _node_ip_address="127.0.0.1", include_dashboard=False, num_cpus=1,
    object_store_memory=100 << 20, log_to_driver=False, logging_level="ERROR",
)  # fmt: skip
print("its address is 127.0.0.1:", ray.util.get_node_ip_address() == "127.0.0.1")
bound = {}  # of each socket that listens: whether to all addresses
for table in ("/proc/net/tcp", "/proc/net/tcp6"):
    for line in Path(table).read_text().splitlines()[1:]:
        words = line.split()
        if words[3] == "0A":
            bound[words[9]] = set(words[1].split(":")[0]) == {"0"}
for process in Path("/proc").iterdir():
    if not process.name.isdigit():
        continue
    try:
        name, parent = (process / "comm").read_text().strip(), (process / "stat").read_text().rsplit(")", 1)[1].split()[1]
        if name not in ("gcs_server", "raylet") or int(parent) != os.getpid():
            continue
        links = [os.readlink(link) for link in (process / "fd").iterdir()]
    except (FileNotFoundError, ProcessLookupError):
        continue
    print(name, "binds to all:", any(bound.get(link[8:-1]) for link in links if link.startswith("socket:")))
ray.shutdown()
P
HOME="$folder" RAY_USAGE_STATS_ENABLED=0 "$folder/venv/bin/python" -W ignore "$folder/seen.py" 2>/dev/null | sort
