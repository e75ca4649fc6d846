"""A layer is complete: whatever lists the layers knows it, and a network of the tests has it."""

from __future__ import annotations

import pytest
from needs import require
from networks import CLASSES, NETWORKS, SHAPE, vectors

from distrib.export import NODES
from nn import layers

pytestmark = pytest.mark.quick

BASES = {"Pool", "GlobalPool"}
"""Of other layers only."""

each_layer = pytest.mark.parametrize("name", sorted(set(layers.__all__) - BASES))


@each_layer
def test_export_knows_it(name: str) -> None:
    assert getattr(layers, name) in NODES, "add it to NODES of distrib/export.py"


@each_layer
def test_the_network_in_pytorch_knows_it(name: str) -> None:
    require("torch")
    from launch.torch_peer.network import CONVERTERS

    assert getattr(layers, name) in CONVERTERS, "add it to CONVERTERS of launch/torch_peer/network.py"


@each_layer
def test_a_network_of_the_tests_has_it(name: str) -> None:
    made = [model(SHAPE, CLASSES) for model in (*NETWORKS.values(), vectors)]
    kinds = {type(layer) for network in made for layer in network.walk()}
    assert getattr(layers, name) in kinds, "add it to every_layer of tests/networks.py"
