"""Pictures of any kind, prepared as the network has seen digits."""
