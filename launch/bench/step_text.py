"""What `distrib bench step` says of its measurements."""

from __future__ import annotations

import statistics
from typing import Any

from launch.bench.measure import spread


def with_ratios(result: dict[str, Any]) -> dict[str, Any]:
    """Add the ratios to the best of the others, pair by pair, and our GFLOP/s."""
    rates = result["images_per_second"]
    mine = rates["distrib"]
    others = [name for name in rates if name != "distrib"]
    if others:
        best = max(others, key=lambda name: statistics.median(rates[name]))
        ratios = {name: [a / b for a, b in zip(mine, rates[name], strict=True)] for name in others}
        result |= {"against": best, "ratio": ratios[best], "ratios": ratios}
    result["gflops"] = [rate * result["flops_per_image"] / 1e9 for rate in mine]
    return result


def print_report(r: dict[str, Any]) -> None:
    """Print what `Bench.figures` found, for people."""
    device = ", ".join(f"{name} {value}" for name, value in r["device"].items())
    what = "evaluation" if r["evaluate"] else "training"
    how = "whole steps as CUDA graphs" if r["graph"] else f"{r['threads']} thread(s) in total"
    print(r["machine"] + (f"; {device}" if device else ""))
    print(
        f"{what}, {r['ranks']} rank(s), {how}, batch {r['batch_size']},"
        f" width {r['width']}, {r['variant']}, {r['precision']}, {r['steps']} steps a measurement"
    )
    print(f"  {fitness_text(r)}")
    unfit = f"unfit: {r['unfit']}"
    for name, rates in r["images_per_second"].items():
        rate = f"{spread(rates)} images/s" if r["fit"] else f"{unfit} ({spread(rates)} images/s)"
        print(f"  {name:26} {rate}{memory_text(r['peak_bytes'].get(name))}")
    for name, ratio in r.get("ratios", {}).items():
        best = "  (the best of them)" if name == r["against"] else ""
        print(f"  ratio to {name}: {spread(ratio) if r['fit'] else unfit}{best}")
    text = f"  direct convolution's work done at {spread(r['gflops'])} GFLOP/s"
    if peaks := r["matrix_peak_gflops"]:
        share = [100 * a / b for a, b in zip(r["gflops"], peaks, strict=True)]
        text += f"; matrix product {spread(peaks)} GFLOP/s: {spread(share, 3)} %"
    print(text)
    print(f"  workspace after warm-up grew by {r['workspace_grown_bytes']} bytes")
    if phases := r["phases_ms"]:
        print("  ms a step: " + ", ".join(f"{name} {ms:.3g}" for name, ms in phases.items()))
    if phases and r["all_reduce_alone_ms"] is not None:
        waited, alone = phases["gradients"], r["all_reduce_alone_ms"]
        hidden = max(0.0, 100 * (1 - waited / alone))
        print(
            f"  gradients: {r['gradient_buckets']} bucket(s) take {alone:.3g} ms alone; {waited:.3g} ms of"
            f" waiting (for the slower rank too) remain after the backward: {hidden:.0f} % hidden"
        )


def fitness_text(r: dict[str, Any]) -> str:
    """How much of the cores others took beside each side, and how far the measurements scatter."""
    shares = {name: "?" if share is None else f"{100 * share:.0f} %" for name, share in r["others"].items()}
    taken = ", ".join(f"{share} beside {name}" for name, share in shares.items())
    text = f"of the cores other processes took {taken}; spread {100 * r['sets'][0]['spread']:.0f} %"
    return f"{text}; the best of {len(r['sets'])} sets" if len(r["sets"]) > 1 else text


def memory_text(peaks: list[int] | None) -> str:
    """Peak memory of the rank with most."""
    if not peaks:
        return ""
    return f"   peak memory {max(peaks) / 2**20:.0f} MiB" + (" a rank" if len(peaks) > 1 else "")
