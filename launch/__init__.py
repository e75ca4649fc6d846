"""What a person types: the `distrib` command, benchmarks and checks of the machine."""
