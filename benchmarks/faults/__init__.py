"""What the proofs of robustness share: callers who count their answers, the ledger, a probe of /live, and attackers."""
