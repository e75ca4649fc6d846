"""`distrib accept`: whether a cluster is fit to train on."""
