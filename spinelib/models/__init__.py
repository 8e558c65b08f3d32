"""Networks and trivial baselines."""
