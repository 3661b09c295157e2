"""The release gate: a frozen battery of attacks on a checkpoint and its controls, and criteria with verdicts."""
