"""Many clients on one machine: the engines, the baselines, and the whole simulated run."""
