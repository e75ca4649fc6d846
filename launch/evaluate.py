"""`distrib evaluate`: accuracy and loss of a checkpoint."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from distrib.comm.base import SingleCommunicator
from distrib.evaluate import evaluate as run
from distrib.predict import load
from launch.entry import AsJson, Model, OwnModel, number, one_process
from launch.report.records import shown
from launch.report.runs import load_data


@one_process
def evaluate(
    checkpoint: Model,
    data: Annotated[
        str | None, typer.Option(help="The data set, as for train.", show_default="the run's own")
    ] = None,
    limit_test: Annotated[int | None, number("--limit-test", "Use only the first N test images.")] = None,
    model: OwnModel = None,
    as_json: AsJson = False,
) -> None:
    """Accuracy and loss of a checkpoint on the test set.

    Example: distrib evaluate runs/first --json
    """
    found = load(checkpoint, model)
    test = load_data(found, data, limit_test)
    found.require_fit(test)
    loss, accuracy = run([found.model], test.test_images, test.test_labels, found.loss, SingleCommunicator())
    result = {
        "checkpoint": str(found.path),
        "data": test.name,
        "images": len(test.test_images),
        "test_loss": loss,
        "test_accuracy": accuracy,
    }
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        print(
            f"{shown(str(found.path))}: test accuracy {accuracy:.2f} %, loss {loss:.4f}"
            f" on {result['images']} images of {shown(test.name)}"
        )
