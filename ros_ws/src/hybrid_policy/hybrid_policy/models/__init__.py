"""pi0.5 as plain PyTorch; checkpoints; processors. Importing this package imports no torch."""
