"""The table at the end: every figure beside the memory's, and beside what was aimed at. `summary.py DIR`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# tok/s on one H200: (shape, type, test) -> at least.
TARGETS = {
    ("llama-2-7b", "q4_0", "tg128"): 800,
    ("llama-3.1-8b", "q4_k_m", "tg128"): 660,
    ("llama-3.2-1b", "q4_k_m", "tg128"): 2600,
    ("llama-2-70b", "q4_0", "tg128"): 90,
    ("llama-3.1-8b", "q4_k_m", "pp512"): 15000,
    ("llama-3.1-8b", "q4_k_m", "pp2048"): 15000,
}


def main() -> int:
    out = Path(sys.argv[1])

    def read(name: str, otherwise: Any) -> Any:
        path = out / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else otherwise

    build, bandwidth = read("build", {}), read("bandwidth", {})
    best = bandwidth.get("read_gb_s", 0)
    title = build.get("gpu") or ", ".join(build.get("info", {}).get("cuda_devices", [])) or "no GPU"
    print(f"# {'Emulated on the CPU, the figures mean nothing: ' if build.get('emulated') else ''}{title}\n")
    print(
        f"commit {build.get('commit', '?')[:12]}{' with changes' if build.get('changed') else ''}, ", end=""
    )
    print(f"nvcc {build.get('nvcc') or 'none'}; memory read at {best:.0f} GB/s", end="")
    print(f" (data sheet {bandwidth.get('data_sheet_gb_s', 0):.0f})\n")
    table = [["model", "test", "tok/s", "GB/s", "% of read", "at least", ""]]
    for row in read("models", []):
        model = f"{row['shape']} {row['type']}"
        if "error" in row:
            table.append([model, row["test"], row["error"][:60], "", "", "", ""])
            continue
        target = TARGETS.get((row["shape"], row["type"], row["test"]))
        met = "" if target is None else "yes" if row["median_ts"] >= target else "no"
        gb_s = row.get("gb_s", 0) if row["n_gen"] else 0
        share = f"{100 * gb_s / best:.0f}" if best and gb_s else ""
        aim = "" if target is None else str(target)
        figures = [f"{row['median_ts']:.1f}", f"{gb_s:.0f}" if gb_s else "", share]
        table.append([model, row["test"], *figures, aim, met])
    for row in read("peer", {}).get("rows", []):
        gb_s = row.get("gb_s", 0)
        share = f"{100 * gb_s / best:.0f}" if best and gb_s else ""
        rate = f"{row['tok_s']:.1f}" if "tok_s" in row else row.get("error", "")[:60]
        table.append(
            [row["model"], "peer: " + row["test"], rate, f"{gb_s:.0f}" if gb_s else "", share, "", ""]
        )
    width = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    table.insert(1, ["-" * w for w in width])
    for row in table:
        print("| " + " | ".join(cell.ljust(w) for cell, w in zip(row, width, strict=True)) + " |")
    print()
    for stage in read("stages", []):
        print(f"{stage['stage']}: {stage['status']}, {stage['seconds']} s")
    tests, nothing = read("tests", {}), {"status": "nothing written"}
    for name, said in (
        ("tests", tests if "status" in tests else nothing),
        ("sanitizer", tests.get("sanitizer", nothing)),
        ("peer", read("peer", nothing)),
    ):
        print(f"{name}: " + ", ".join(f"{k} {v}" for k, v in said.items() if isinstance(v, (str, int))))
        print("".join(f"  {line}\n" for line in said.get("said", [])), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
