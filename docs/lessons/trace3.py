"""Lesson 3, second part: trace two steps of a ResNet-9 on all ranks, and judge them with your exercise."""

import json
from pathlib import Path

from exercise3 import hidden

import distrib

TRACE = Path("runs/lesson3.json")
FIRST, LAST = 6, 7  # the first steps are slower: memory is touched for the first time


def spans(events, rank, kind):
    """Name, begin and end in microseconds of a rank's events of a kind."""
    found = [event for event in events if event.get("cat") == kind and event["pid"] == rank]
    return [(event["name"], event["ts"], event["ts"] + event["dur"]) for event in found]


TRACE.parent.mkdir(exist_ok=True)
options = {"width": 0.5, "batch_size": 32, "epochs": 1, "limit_train": 256, "limit_test": 10}
trace = {"trace": str(TRACE), "trace_steps": f"{FIRST}:{LAST}"}
distrib.fit("resnet9", backend="numpy", progress=False, **options, **trace)

if distrib.launched_rank() == 0:
    events = json.loads(TRACE.read_text())["traceEvents"]
    print(f"steps {FIRST} to {LAST} are in {TRACE}: open it at ui.perfetto.dev")
    for rank in range(distrib.launched_ranks()):
        for step, begin, end in spans(events, rank, "step"):
            within = [s for s in spans(events, rank, "phase") if begin <= s[1] < end and s[0] == "backward"]
            sent = [s for s in spans(events, rank, "wire") if begin <= s[1] < end and "bucket" in s[0]]
            share = hidden(within[0][1:], [s[1:] for s in sent])
            print(f"rank {rank}, {step}: {len(sent)} buckets, {100 * share:.0f} % of their time hidden")
