"""Neural networks in plain NumPy or CuPy: no rank, no file, no command line is known here."""
