"""The fastest setting within a limit of quality: candidates, what they cost, and a race of them on held-out text."""
