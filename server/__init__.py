"""The server: asks clients, folds their answers into the shared adapter, keeps checkpoints."""
